"""Write docs/reliability.md: a row for every test that is marked with the fault that it tries.

    python scripts/write_reliability.py

A test is marked `@pytest.mark.fault("what goes wrong", "what happens then")`. How often it is tried in each run of
`make test` is the number of its cases; what longer runs tried is in tests/tried.json, written by hand after such a
run. tests/test_reliability.py compares the page with the marks.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TRIED = ROOT / "tests" / "tried.json"
HEAD = """# Reliability

What can go wrong, what cratelm does then, and the test that tries it. The table is written by
`scripts/write_reliability.py` from the tests: *cases* is how often `make test` tries a fault, *tried* how often the
longest recorded run did. The inputs of tests under `tests/fuzz/` are generated; `CRATELM_FUZZ=10000 pytest tests/fuzz`
generates that many for each.

The rules behind the table:

- Bad input gets one line: what was found, what was expected, what to type next. The exit status is not 0, and nothing
  half-written is left.
- A process can be killed at any moment: the same command, typed again, ends with the files of a run that was not
  killed.
- A file that a verb opens is compared with the hash that its stage recorded; [`cratelm check`](verbs/check.md) compares
  all.
"""


class Fault(NamedTuple):
    """What a marked test tries."""

    what: str
    happens: str
    test: str
    """file and name, without the case"""


def collected(arguments: Sequence[str] = ("tests",)) -> dict[Fault, int]:
    """Return the marked tests with their numbers of cases, in the order of the files."""
    marked = _Marked()
    pytest.main(
        ["--collect-only", "-q", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *arguments],
        plugins=[marked],
    )
    return marked.cases


class _Marked:
    def __init__(self) -> None:
        self.cases: dict[Fault, int] = defaultdict(int)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark = item.get_closest_marker("fault")
            if mark is not None:
                what, happens = mark.args
                path = Path(item.path).relative_to(ROOT).as_posix()
                name = getattr(item, "originalname", item.name)
                self.cases[Fault(what, happens, f"{path}::{name}")] += _inputs(item)


def _inputs(item: pytest.Item) -> int:
    """Return how many inputs a test generates; 1 for a test that generates none."""
    test = getattr(item, "obj", None)
    settings = getattr(test, "_hypothesis_internal_use_settings", None)
    return settings.max_examples if getattr(test, "is_hypothesis_test", False) and settings else 1


def page(cases: Mapping[Fault, int], tried: Mapping[str, str]) -> str:
    """Return the page for these tests; `tried` has the counts of longer runs by test, in words."""
    rows = [
        f"| {f.what} | {f.happens} | `{f.test.removeprefix('tests/')}` | {n:,} | {tried.get(f.test, '')} |"
        for f, n in cases.items()
    ]
    head = "| fault | what happens | test | cases | tried |\n|---|---|---|---|---|"
    return "\n".join([HEAD, head, *rows]) + "\n"


def main() -> None:
    """Write the page."""
    tried = json.loads(TRIED.read_text(encoding="utf-8")) if TRIED.is_file() else {}
    PAGE.write_text(page(collected(), tried), encoding="utf-8")


if __name__ == "__main__":
    main()
