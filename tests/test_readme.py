"""The README's commands parse and its first example runs."""

import re
import shlex
from pathlib import Path

import pytest

from cratelm.cli import VERBS, _parse

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^cratelm +(?!VERB)(.+)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    verb, *arguments = shlex.split(command)
    assert _parse(verb, arguments)


def test_every_verb_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) >= set(VERBS)


def test_first_example_runs():
    scope: dict = {}
    exec(PYTHON[0], scope)
    assert [tuple(a.shape) for a in scope["neurons"]] == [(1, 32, 512)] * 2
    assert scope["text"].shape == (1, 40)


def test_other_examples_compile():
    for example in PYTHON[1:]:
        compile(example, "README", "exec")
