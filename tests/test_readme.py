"""The README's commands parse and its first example runs."""

import re
import shlex
from pathlib import Path

import pytest

from cratelm.cli import VERBS, _parse, split_words

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = [c for page in PAGES for c in re.findall(r"^cratelm +(?!VERB)(.+)$", page, re.MULTILINE)]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    verb, arguments = split_words(shlex.split(command))
    assert _parse(verb, arguments)


def test_every_verb_is_in_the_table():
    assert set(re.findall(r"^\| `([\w ]+)` \|", README, re.MULTILINE)) >= set(VERBS)


def test_first_example_runs():
    scope: dict = {}
    exec(PYTHON[0], scope)
    assert [tuple(a.shape) for a in scope["neurons"]] == [(1, 32, 512)] * 2
    assert scope["text"].shape == (1, 40)


def test_other_examples_compile():
    for example in PYTHON[1:]:
        compile(example, "README", "exec")
