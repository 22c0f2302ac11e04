"""Mark stale results wherever a report shows them.

Results are stale if their model or tokens have changed since. A report still shows them, but calls the model
`MODEL (stale)` in every table, figure and gallery that uses a stale stage. The page and the printed report
also state the reason and the command to type.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cratelm.report.drawing import Figure
from cratelm.report.gallery import Gallery
from cratelm.results.run_results import RunResults
from cratelm.runs import StageName
from cratelm.runs.stage import stale_lines
from cratelm.text.table import Cell, Table

_MARK = " (stale)"
_SCORED: tuple[StageName, ...] = ("model", "activations", "explanations", "scores")
_STAGES_OF: tuple[tuple[str, tuple[StageName, ...]], ...] = (
    ("models", ("model",)),
    ("replacement", ("replacement",)),
    ("sae", ("sae", *_SCORED)),
    ("white_box", ("analysis",)),
    ("effects", ("steer",)),
    ("interventions", ("steer",)),
    ("seed_", ("seeds",)),
)
"""stages that a table or figure depends on, by the beginning of its name; all others depend on `_SCORED`"""
_NOT_OF_THE_RUN = ("published",)


class Stale:
    """The stale stages of the models of a report. Copies tables, figures and galleries with stale models marked."""

    def __init__(self, results: RunResults):
        self._by_model = {model.name: model.stale for model in results.models}

    @property
    def lines(self) -> list[str]:
        """Return a line for each stale stage, with the reason and the command to type."""
        return [line for stale in self._by_model.values() for line in stale_lines(stale)]

    def tables(self, tables: Mapping[str, Table]) -> dict[str, Table]:
        """Return the tables with the names of stale models marked."""
        return {name: self._table(table) for name, table in tables.items()}

    def figures(self, figures: Mapping[str, Figure]) -> dict[str, Figure]:
        """Return the figures with the names of stale models marked, in the legend and in the caption."""
        return {name: self._figure(figure) for name, figure in figures.items()}

    def galleries(self, galleries: Sequence[Gallery]) -> list[Gallery]:
        """Return the galleries with the names of stale models marked."""
        return [replace(g, model=_marked(g.model, self._names("neurons"))) for g in galleries]

    def _names(self, item: str) -> list[str]:
        """Return the models with a stale stage among those that the table or figure `item` depends on."""
        if item in _NOT_OF_THE_RUN:
            return []
        stages = next((s for begin, s in _STAGES_OF if item.startswith(begin)), _SCORED)
        return [
            model
            for model, stale in self._by_model.items()
            if any(label.partition("/")[0] in stages for label in stale)
        ]

    def _table(self, table: Table) -> Table:
        names = self._names(table.name)
        rows = tuple(tuple(_marked(cell, names) for cell in row) for row in table.rows)
        columns = tuple(replace(c, label=_marked(c.label, names)) for c in table.columns)
        return replace(table, title=_marked(table.title, names), rows=rows, columns=columns)

    def _figure(self, figure: Figure) -> Figure:
        names = self._names(figure.name)
        if not names:
            return figure
        series = tuple(replace(s, label=_marked(s.label, names)) for s in figure.series)
        note = f" Stale: {', '.join(names)}."
        return replace(figure, series=series, caption=figure.caption + note)


def _marked(cell: Cell, names: Sequence[str]) -> Cell:
    """Return a cell with the mark appended to each of the names, also in the form MODEL@SET."""
    if not isinstance(cell, str):
        return cell
    for name in names:
        whole = rf"(?<![\w.+@-]){re.escape(name)}(@[\w.-]+)?(?![\w+@-])"
        cell = re.sub(whole, lambda match: match[0] + _MARK, cell)
    return cell
