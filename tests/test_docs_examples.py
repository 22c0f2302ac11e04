"""Every Python example of the docs runs, beside a small finished run `runs/demo`.

How a page says what is to be done with its fences of `python`:

- They run in order and in one namespace, in a fresh folder with a copy of `runs/demo`.
- `<!-- each section runs alone -->` on a page: each of its `##` sections has a namespace and folder
  of its own.
- `<!-- needs: nnsight, datasets -->`: modules without which the page, or the section, is skipped.
- `<!-- not run: why -->` on the line before a fence: it is compiled, not run.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cratelm

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
ALONE = "<!-- each section runs alone -->"


class Example(NamedTuple):
    """Fences that share a namespace: a page, or one of its sections."""

    name: str
    text: str

    @property
    def needs(self) -> list[str]:
        found = re.findall(r"^<!-- needs: (.+) -->$", self.text, re.MULTILINE)
        return [module for names in found for module in re.split(r", *", names)]

    @property
    def fences(self) -> list[tuple[str, str]]:
        """Why it is not run (empty where it is) and the code, of each."""
        return [(m["why"] or "", m["code"]) for m in FENCE.finditer(self.text)]


def examples(page: Path) -> Iterator[Example]:
    text, name = page.read_text(), page.relative_to(DOCS).as_posix()
    if ALONE not in text:
        yield Example(name, text)
        return
    first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    yield Example(name, first)
    for section in sections:
        yield Example(f"{name}: {section.splitlines()[0]}", section)


EXAMPLES = [example for page in PAGES for example in examples(page) if example.fences]


def texts(folder: Path) -> Path:
    """60 openings of the standard library's modules: 85,000 tokens."""
    folder.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        (folder / path.name).write_text(path.read_text(errors="replace")[:3000])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run as `cratelm demo` leaves it, without report and controls: barely trained, 8 neurons explained."""
    folder = tmp_path_factory.mktemp("finished")
    run = folder / "runs" / "demo"
    corpus = str(texts(folder / "texts"))
    cratelm.api.tokenize(run=run, corpus=corpus, vocab_size=512, fit=0.15, held_out=0.15)
    for model in ("crate-2l", "gpt2-2l"):
        cratelm.api.train(run=run, model=model, steps=2, batch_size=4, sequence_length=128)
        cratelm.api.harvest(
            run=run, model=model, tokens=3000, sequence_length=64, top=12, random=10, per_bin=2
        )
        cratelm.api.explain(run=run, model=model, neurons=4)
        cratelm.api.score(run=run, model=model)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=[e.name for e in EXAMPLES])
def test_runs(example, finished, tmp_path, monkeypatch):
    for module in example.needs:
        pytest.importorskip(module, reason=f"{module} is not installed")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "datasets" in example.needs:  # it leaves lock files in the user's cache
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    scope: dict = {"__name__": "example"}
    for number, (why, code) in enumerate(example.fences):
        file = tmp_path / f"example_{number}.py"  # a file: nnsight reads the source of its blocks
        file.write_text(code)
        compiled = compile(code, str(file), "exec")
        if not why:
            exec(compiled, scope)


def test_files_page_names_every_file(finished):
    """And every key of the JSON lines and of the summary."""
    page = (DOCS / "files.md").read_text()
    run = finished / "runs" / "demo"
    for path in run.rglob("*"):
        if path.is_file() and "tensorboard" not in path.parts:
            name = re.sub(r"(train|fit|held_out)(?=[-.])", "SPLIT", path.name)
            assert f"`{name}`" in page or f" {name} " in page, path
    model, scores = run / "model" / "crate-2l", run / "scores" / "crate-2l"
    lines = [*_lines(model / "metrics.jsonl"), *_lines(model / "timing.jsonl")]
    lines.append(json.loads((scores / "summary.json").read_text()))
    lines.append(json.loads((run / "tokens" / "meta.json").read_text()))
    assert {key for line in lines for key in line} <= set(re.findall(r"`(\w+)`", page))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(DOCS).as_posix() for p in PAGES])
def test_no_example_is_passed_over(page):
    """Every fence that looks like Python is one that `FENCE` finds, and each marker stands before one."""
    text = page.read_text()
    found = [fence for example in examples(page) for fence in example.fences]
    assert len(re.findall(r"```[ \t]*\{?\.?(?:py|Py|ipython)", text)) == len(found)
    assert len(re.findall(r"not run:", text)) == sum(bool(why) for why, _ in found)
    assert len(re.findall(r"needs:", text)) == len(re.findall(r"^<!-- needs: .+ -->$", text, re.M))


def test_the_reader_of_fences():
    page = Example(
        "p",
        "<!-- needs: a, b -->\n```python\nx = 1\n```\ntext\n<!-- not run: why -->\n```python\ny\n```\n",
    )
    assert page.needs == ["a", "b"]
    assert page.fences == [("", "x = 1\n"), ("why", "y\n")]
