"""Text made visible, over all of Unicode, and columns of plain text."""

import sys
import unicodedata

import pytest

from cratelm.records import Estimate, Interval
from cratelm.text.display import laid_out, printable, visible, visible_folded
from cratelm.text.table import Column, Table, align

EVERY_CHARACTER = list(map(chr, range(sys.maxunicode + 1)))


def test_every_character_is_shown_as_it_is_or_by_its_code():
    """All of Unicode: the code is what Python reads back, and nothing of a shown text acts."""
    for c in EVERY_CHARACTER:
        shown = printable(c)
        assert shown.isprintable()
        if not c.isprintable():
            assert shown.startswith("\\")
            assert shown.encode("ascii").decode("unicode_escape") == c
        else:
            assert shown == c


def test_the_ways_of_showing_differ_in_marks_alone():
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    for c in EVERY_CHARACTER:
        assert visible_folded(c) == marks.get(c, printable(c))
        circle = "◌" if unicodedata.category(c).startswith("M") else ""
        assert visible(c) == circle + visible_folded(c)
        assert laid_out(c) == {"\n": "⏎\n"}.get(c, c if c in " \t" else visible(c))


def test_long_runs_are_folded():
    assert visible_folded("   x    \n\n\n\n\n") == "␣␣␣x␣×4⏎×5"
    assert visible_folded("\u0301x") == "\u0301x"


def test_columns_are_aligned():
    lines = [["", "loss", "top-1"], ["crate-2l", "3.1", "40%"], ["x", "12.25", "–"]]
    assert align(lines) == [
        "           loss  top-1",
        "crate-2l    3.1    40%",
        "x         12.25      –",
    ]
    assert align(lines, [True, False, False])[1:] == ["crate-2l  3.1    40%", "       x  12.25  –"]


@pytest.mark.parametrize(
    ("cell", "shown", "plain"),
    [
        (Interval(1.0, None, None, 1), "1.0", 1.0),
        (Interval(1.0, 0.5, 1.5, 9), "1.0 [0.5, 1.5]", {"value": 1.0, "low": 0.5, "high": 1.5}),
        (Estimate(1.0, None), "1.0", 1.0),
        (Estimate(1.0, 0.25), "1.0 ± 0.2", {"value": 1.0, "error": 0.25}),
    ],
)
def test_a_cell_without_bounds_is_a_number(cell, shown, plain):
    table = Table("t", "T", (Column("x", "x", ".1f"),), ((cell,),))
    assert table.grid()[1] == [shown]
    assert table.records() == [{"x": plain}]
