"""The README's and the documentation's commands parse, every verb has its page, the first example runs."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from cratelm.cli import VERBS, config_class, parse_options, split_words

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))]
COMMANDS = [c for page in PAGES for c in re.findall(r"^cratelm +(?!VERB)(.+)$", page, re.MULTILINE)]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    verb, arguments = split_words(shlex.split(command))
    assert parse_options(verb, arguments)


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


@pytest.fixture(scope="module")
def hooks():
    """What the documentation's site takes from the code."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page(verb, hooks):
    """With its options, each explained, and a place in the navigation."""
    name = f"verbs/{hooks.file_name(verb)}.md"
    page = (ROOT / "docs" / name).read_text()
    assert page.startswith(f"# {verb}\n")
    assert f"cratelm {verb}" in page
    assert "<!-- options -->" in page
    assert f": {name}\n" in (ROOT / "mkdocs.yml").read_text()
    fields = {f.name for f in dataclasses.fields(config_class(verb))}
    assert set(hooks.documented(config_class(verb))) == fields
    table = hooks.options(hooks.file_name(verb))
    assert table.count("\n") == 1 + len(fields)
