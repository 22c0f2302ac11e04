"""docs/reliability.md has a row for every test that is marked with a fault, and no other."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
ROW = re.compile(r"^\| (.+?) \| (.+?) \| `(.+?)` \| ([\d,]+) \| (.*?) \|$", re.MULTILINE)


def marked() -> Iterator[tuple[str, str, str]]:
    """Fault, what happens and name of every marked test, from the files as they are."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    what, happens = map(ast.literal_eval, mark.args)
                    yield what, happens, f"{path.relative_to(TESTS).as_posix()}::{node.name}"


def test_the_page_has_a_row_for_every_marked_test():
    """If not: `python scripts/write_reliability.py`."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert sorted(row[:3] for row in rows) == sorted(marked())
    assert all(int(row[3].replace(",", "")) >= 1 for row in rows)


def test_what_longer_runs_tried_is_about_tests_that_exist():
    tried = json.loads((TESTS / "tried.json").read_text(encoding="utf-8"))
    assert set(tried) <= {f"tests/{test}" for _, _, test in marked()}
