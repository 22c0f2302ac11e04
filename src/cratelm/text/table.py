"""A table is made once and written five ways: HTML, CSV, JSON, LaTeX and plain text.

The page, the files and the terminal show the same cells, so their numbers cannot differ.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cratelm.text.printable import printable

MISSING = "–"


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PlusMinus:
    """A figure with its standard error."""

    value: float
    error: float


Cell = str | int | float | Interval | PlusMinus | None
"""None where there is no figure, shown as a dash"""


@dataclass(frozen=True)
class Column:
    key: str
    """name in CSV and JSON"""
    label: str
    """heading, with the unit"""
    form: str = ""
    """format of its numbers, such as `,d`, `.2f` or `.3g`; empty for words"""
    level: Literal["", "head", "minor"] = ""
    """in a flipped table: a line that opens a group, or one that belongs to the group above"""

    def show(self, cell: Cell) -> str:
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return MISSING
        if isinstance(cell, str):
            return printable(cell)
        if isinstance(cell, Interval):
            low, high = (self._number(bound) for bound in (cell.low, cell.high))
            return f"{self._number(cell.value)} [{low}, {high}]"
        if isinstance(cell, PlusMinus):
            return f"{self._number(cell.value)} ± {self._number(cell.error)}"
        return self._number(cell)

    def _number(self, value: float) -> str:
        shown = format(value, self.form or ",")
        # Negative numbers that round to nothing lose their sign, as in `-0.0`.
        return shown.removeprefix("-") if not shown.strip("-0.,%") else shown


@dataclass(frozen=True)
class Table:
    name: str
    """file name, and anchor on the page"""
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """how to read it: what the intervals are over, what is counted"""
    flipped: bool = False
    """shown with a line a column, where there are few rows with many figures each"""

    def grid(self) -> list[list[str]]:
        """Header and rows as they are shown."""
        header = [c.label for c in self.columns]
        shown = [[c.show(cell) for c, cell in zip(self.columns, r, strict=True)] for r in self.rows]
        lines = [header, *shown]
        return [list(line) for line in zip(*lines, strict=True)] if self.flipped else lines

    def numeric(self) -> list[bool]:
        """Which columns of `grid` are set flush right."""
        if self.flipped:
            return [False] + [True] * len(self.rows)
        return [bool(c.form) for c in self.columns]

    def records(self) -> list[dict[str, Any]]:
        """Rows as JSON values at full precision, figures with bounds as objects."""
        return [
            {c.key: _plain(cell) for c, cell in zip(self.columns, row, strict=True)}
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        columns = [{"key": c.key, "label": c.label} for c in self.columns]
        return {
            "title": self.title,
            "note": self.note,
            "columns": columns,
            "rows": self.records(),
        }

    def to_csv(self) -> str:
        """Full precision; a figure with bounds takes a column each, such as `mean`, `mean_low`, `mean_high`."""
        rows = [_flat(record) for record in self.records()]
        keys = [k for c in self.columns for k in (c.key, *_bounds(rows, c.key))]
        out = io.StringIO()
        writer = csv.DictWriter(out, keys, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def to_latex(self) -> str:
        """A `tabular` for the package booktabs, ASCII alone, so that every LaTeX engine reads it."""
        header, *rows = self._indented(r"\quad ", [[latex(c) for c in li] for li in self.grid()])
        align = "".join("r" if right else "l" for right in self.numeric())
        body = [" & ".join(row) + r" \\" for row in rows]
        lines = [
            f"% {_ascii(self.title)}. {_ascii(self.note)}".rstrip(),
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def to_text(self) -> str:
        """For a terminal: columns aligned, no colour."""
        grid = self._indented("  ", self.grid())
        widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
        lines = []
        for line in grid:
            cells = [
                cell.rjust(w) if right else cell.ljust(w)
                for cell, w, right in zip(line, widths, self.numeric(), strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join(lines)

    def _indented(self, by: str, lines: list[list[str]]) -> list[list[str]]:
        """In a flipped table, minor lines moved in."""
        if not self.flipped:
            return lines
        moved = [by if c.level == "minor" else "" for c in self.columns]
        return [[m + line[0], *line[1:]] for m, line in zip(moved, lines, strict=True)]


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Interval | PlusMinus):
        return {key: _plain(value) for key, value in asdict(cell).items()}
    if isinstance(cell, str):
        return printable(cell)
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    return cell


def _bounds(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Columns beside `key` that hold its bounds or its error in any row."""
    parts = [f"{key}_{part}" for part in ("low", "high", "error")]
    return [part for part in parts if any(part in row for row in rows)]


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {key if part == "value" else f"{key}_{part}": v for part, v in value.items()}
        else:
            flat[key] = value
    return flat


_LATEX = {
    "\\": r"\textbackslash{}",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": r"$<$",
    ">": r"$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def latex(text: str) -> str:
    """Escaped; a character beyond ASCII is named by its code point, for pdfLaTeX knows few of them."""
    return "".join(
        _LATEX.get(c) or (c if c.isascii() else rf"\texttt{{U+{ord(c):04X}}}") for c in text
    )


def _ascii(text: str) -> str:
    return printable(text).encode("ascii", "replace").decode()
