"""Tables that are built once and written in six formats, and aligned columns of plain text.

A `Table` becomes HTML (in the page's template), CSV, JSON, LaTeX, Markdown and plain text. The page, the files and
the terminal show the same cells, so their numbers cannot differ.

Plain text is aligned here and not by `rich.table`, which fits columns to the width of the terminal:
output that is redirected to a file, or read by a test, would depend on that width.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cratelm.records import Estimate, Interval
from cratelm.text.display import printable

MISSING = "–"


Cell = str | int | float | Interval | Estimate | None
"""None if there is no figure, which is displayed as a dash"""


def align(lines: Sequence[Sequence[str]], right: Sequence[bool] | None = None) -> list[str]:
    """Return `lines` of cells as text with aligned columns, two spaces between them.

    `right` says which columns are flush right; None: all but the first.
    """
    right = right or [False] + [True] * (len(lines[0]) - 1)
    widths = _widths(lines)
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


@dataclass(frozen=True)
class Column:
    """Name of a column and format of its numbers."""

    key: str
    """name in CSV and JSON"""
    label: str
    """heading, with the unit"""
    form: str = ""
    """format of its numbers, such as `,d`, `.2f` or `.3g`; empty for words"""
    level: Literal["", "head", "minor"] = ""
    """in a flipped table: `head` begins a group of lines, `minor` belongs to the group above"""

    def show(self, cell: Cell) -> str:
        """Return a cell as text, with its numbers in the format of the column."""
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return MISSING
        if isinstance(cell, str):
            return printable(cell)
        if isinstance(cell, Interval):
            value = self._number(cell.value)
            if cell.low is None or cell.high is None:
                return value
            return f"{value} [{self._number(cell.low)}, {self._number(cell.high)}]"
        if isinstance(cell, Estimate):
            value = self._number(cell.value)
            return value if cell.error is None else f"{value} ± {self._number(cell.error)}"
        return self._number(cell)

    def _number(self, value: float) -> str:
        text = format(value, self.form or ",")
        # Negative numbers that round to zero lose their sign, as in `-0.0`.
        return text.removeprefix("-") if not text.strip("-0.,%") else text


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells, with a title and a note."""

    name: str
    """file name, and anchor on the page"""
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """how to read it: what the intervals are over, what is counted"""
    flipped: bool = False
    """displayed with one line per column: for few rows with many figures each"""

    def grid(self) -> list[list[str]]:
        """Return header and rows as text, transposed if the table is flipped."""
        header = [c.label for c in self.columns]
        rows = [[c.show(cell) for c, cell in zip(self.columns, r, strict=True)] for r in self.rows]
        lines = [header, *rows]
        return [list(line) for line in zip(*lines, strict=True)] if self.flipped else lines

    def numeric(self) -> list[bool]:
        """Return which columns of `grid` are flush right."""
        if self.flipped:
            return [False] + [True] * len(self.rows)
        return [bool(c.form) for c in self.columns]

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as JSON values at full precision; figures with bounds become objects."""
        return [
            {c.key: _plain(cell) for c, cell in zip(self.columns, row, strict=True)}
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the table as a JSON object: title, note, columns and `records`."""
        columns = [{"key": c.key, "label": c.label} for c in self.columns]
        return {
            "title": self.title,
            "note": self.note,
            "columns": columns,
            "rows": self.records(),
        }

    def to_csv(self) -> str:
        """Return CSV at full precision; bounds have separate columns, such as `mean_low` and `mean_high`.

        Text that a spreadsheet would take for a formula has a `'` before it: see `csv_text`.
        """
        rows = [
            {key: csv_text(v) if isinstance(v, str) else v for key, v in _flat(record).items()}
            for record in self.records()
        ]
        keys = [k for c in self.columns for k in (c.key, *_bounds(rows, c.key))]
        out = io.StringIO()
        writer = csv.DictWriter(out, keys, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def to_latex(self) -> str:
        """Return a `tabular` for the package booktabs, in ASCII, which every LaTeX engine reads."""
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
        """Return text for a terminal: aligned columns, no colour."""
        grid = self._indented("  ", self.grid())
        header, *rows = align(grid, self.numeric())
        widths = _widths(grid)
        return "\n".join([header, "-" * (sum(widths) + 2 * (len(widths) - 1)), *rows])

    def to_markdown(self) -> str:
        """Return a table of Markdown, numbers flush right."""
        header, *rows = [[cell.replace("|", "\\|") for cell in line] for line in self.grid()]
        rule = ["---:" if right else "---" for right in self.numeric()]
        return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))

    def _indented(self, by: str, lines: list[list[str]]) -> list[list[str]]:
        """Return the lines, with minor lines of a flipped table indented."""
        if not self.flipped:
            return lines
        indents = [by if c.level == "minor" else "" for c in self.columns]
        return [[i + line[0], *line[1:]] for i, line in zip(indents, lines, strict=True)]


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""beginnings that spreadsheets take for a formula, also in full width"""


def csv_text(text: str) -> str:
    """Return text as a cell of CSV: with a `'` before it if a spreadsheet would take it for a formula.

    The cell of a model's name or of an explanation may come from anyone, and a formula can send what is on the
    sheet elsewhere (OWASP, "CSV injection"). Numbers stay numbers.
    """
    if not text.lstrip(" ").startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Interval) and cell.low is not None:
        return {"value": _plain(cell.value), "low": _plain(cell.low), "high": _plain(cell.high)}
    if isinstance(cell, Estimate) and cell.error is not None:
        return {"value": _plain(cell.value), "error": _plain(cell.error)}
    if isinstance(cell, Interval | Estimate):
        return _plain(cell.value)
    if isinstance(cell, str):
        return printable(cell)
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    return cell


def _bounds(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Return the columns next to `key` that hold its bounds or its error in any row."""
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
    """Return `text` escaped for LaTeX; other characters than ASCII become their code points.

    pdfLaTeX supports few of them.
    """
    return "".join(
        _LATEX.get(c) or (c if c.isascii() else rf"\texttt{{U+{ord(c):04X}}}") for c in text
    )


def _ascii(text: str) -> str:
    return printable(text).encode("ascii", "replace").decode()
