"""What a table of neurons needs of one model, as columns: one row a neuron, by layer and index.

Memory: some 60 bytes a neuron, 9 bytes for each explainer and metric, and the explanations' texts; no
excerpt, payload or list of documents is read. 36,864 neurons with two explainers take some 20 MB.

Shape legend: n neurons of a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.activations.store import summaries_path
from cratelm.errors import InputError
from cratelm.records import SCORERS
from cratelm.runs import Run, StageName
from cratelm.runs.names import set_name, sets_of

Told = tuple[str, str]
"""name of the set (empty without a language model), explainer"""
READ_ERRORS = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, IndexError)
"""what reading a damaged file may raise"""
_SET_STAGES: tuple[StageName, ...] = ("explanations", "scores")


@dataclass(frozen=True, eq=False)
class ScoreColumn:
    """Scores of one explainer under one metric."""

    values: NDArray[np.float64]
    """[n] x 100; NaN where there is none"""
    status: NDArray[np.object_]
    """[n] `defined`, `undefined`, `dead`, `failed`, or empty where it was not to be scored"""
    reasons: NDArray[np.object_]
    """[n]"""


@dataclass(frozen=True, eq=False)
class Columns:
    """The neurons of one model."""

    site: str
    layer: NDArray[np.int32]
    """[n]"""
    index: NDArray[np.int32]
    """[n]"""
    firing_rate: NDArray[np.float64]
    """[n] 0 to 1, held-out"""
    maximum: NDArray[np.float32]
    """[n] held-out"""
    texts: Mapping[Told, NDArray[np.object_]]
    """[n] each explainer's explanations, empty where there is none"""
    scores: Mapping[tuple[str, str, str], ScoreColumn]
    """by set, explainer and metric"""
    problems: tuple[str, ...]

    @cached_property
    def folded(self) -> list[str]:
        """[n] explanations of the principal explainer, for a search that knows no case."""
        return [str(text).casefold() for text in self.text()]

    def holding(self, text: str, among: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Rows, of those given or of all, that have an explanation, and with all words of `text`."""
        folded = self.folded
        rows = [r for r in (range(len(folded)) if among is None else among) if folded[r]]
        for word in text.casefold().split():
            rows = [r for r in rows if word in folded[r]]
        return np.array(rows, np.int64)

    @cached_property
    def principal(self) -> Told | None:
        """Whose explanations and scores tables show: the trie, or the first without a language model."""
        known = sorted({*self.texts, *((s, e) for s, e, _ in self.scores)})
        return min(known, key=lambda t: (t[0] != "", t[1] != "trie", t), default=None)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Of the principal explainer, in their usual order."""
        told = self.principal
        found = {m for s, e, m in self.scores if (s, e) == told}
        return tuple(m for m in SCORERS if m in found)

    def text(self) -> NDArray[np.object_]:
        """[n] explanations of the principal explainer."""
        found = self.texts.get(self.principal) if self.principal else None
        return self._empty if found is None else found

    @cached_property
    def _empty(self) -> NDArray[np.object_]:
        return np.full(len(self.layer), "", object)

    def score(self, metric: str) -> ScoreColumn | None:
        told = self.principal
        return self.scores.get((*told, metric)) if told else None

    def rows_of(self, layer: int) -> slice:
        """Where the neurons of a layer stand."""
        low, high = np.searchsorted(self.layer, [layer, layer + 1])
        return slice(int(low), int(high))

    def rows(self, layers: NDArray[Any], indices: NDArray[Any]) -> NDArray[np.int64]:
        """[e] rows of many neurons, -1 for those that are not there."""
        at, known = _found(layers, indices, self.layer.astype(np.int64) << 32 | self.index)
        return np.where(known, at, -1)

    def row(self, layer: int, index: int) -> int | None:
        here = self.rows_of(layer)
        place = here.start + int(np.searchsorted(self.index[here], index))
        return place if place < here.stop and self.index[place] == index else None


def read_columns(run: Run, model: str) -> Columns:
    """Everything but the summaries may be missing or damaged: then `problems` says so.

    Raises one of `READ_ERRORS` where the summaries of the held-out split cannot be read.
    """
    wanted = ["site", "layer", "index", "firing_rate", "maximum"]
    table = pq.read_table(
        summaries_path(run.stage("activations", model).path, "held_out"), columns=wanted
    )
    layer, index = table["layer"].to_numpy(), table["index"].to_numpy()
    places = layer.astype(np.int64) << 32 | index
    texts: dict[Told, Any] = {}
    scores: dict[tuple[str, str, str], ScoreColumn] = {}
    problems: list[str] = []
    for name in set_names(run, model):
        explained, scored = (run.stage(s, set_name(model, name)) for s in _SET_STAGES)
        try:
            if explained.completion() is not None:
                found = _texts(explained.path, places)
                texts |= {(name, explainer): column for explainer, column in found.items()}
        except (*READ_ERRORS, InputError) as error:
            problems.append(f"{explained.path} cannot be read ({one_line(error)})")
        try:
            if scored.completion() is not None:
                for (explainer, metric), column in _scores(scored.path, places).items():
                    scores[name, explainer, metric] = column
        except (*READ_ERRORS, InputError) as error:
            problems.append(f"{scored.path} cannot be read ({one_line(error)})")
    return Columns(
        site=str(table["site"][0]) if len(table) else "",
        layer=layer,
        index=index,
        firing_rate=table["firing_rate"].to_numpy(),
        maximum=table["maximum"].to_numpy(),
        texts=texts,
        scores=scores,
        problems=tuple(problems),
    )


def set_names(run: Run, model: str) -> list[str]:
    """Names of the sets of explanations and scores; the empty one is that without a language model."""
    return ["", *sets_of((n for stage in _SET_STAGES for n in run.models(stage)), model)]


def changed_at(run: Run) -> int:
    """When a stage was finished last, in ns; 0 where none ever was."""
    try:
        return (run.path / "manifest.json").stat().st_mtime_ns
    except OSError:
        return 0


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _texts(folder: Path, places: NDArray[np.int64]) -> dict[str, NDArray[np.object_]]:
    columns = ["layer", "index", "explainer", "text"]
    table = pq.read_table(folder / "explanations.parquet", columns=columns)
    found = {}
    explainers = table["explainer"].to_numpy()
    for explainer in np.unique(explainers.astype(str)).tolist():
        mine = table.filter(pa.array(explainers == explainer))
        rows, known = _rows(mine, places)
        column = np.full(len(places), "", object)
        column[rows] = mine["text"].to_numpy()[known]
        found[explainer] = column
    return found


def _scores(folder: Path, places: NDArray[np.int64]) -> dict[tuple[str, str], ScoreColumn]:
    columns = ["layer", "index", "explainer", "metric", "value", "status", "reason"]
    table = pq.read_table(
        folder / "scores.parquet", columns=columns, filters=[("control", "=", "none")]
    )
    found = {}
    explainers, metrics = (table[c].to_numpy() for c in ("explainer", "metric"))
    usual = {m: place for place, m in enumerate(SCORERS)}
    pairs = set(zip(explainers, metrics, strict=True))
    for explainer, metric in sorted(pairs, key=lambda p: (p[0], usual.get(p[1], len(usual)), p)):
        mine = table.filter(pa.array((explainers == explainer) & (metrics == metric)))
        rows, known = _rows(mine, places)
        values = np.full(len(places), np.nan)
        status, reasons = np.full(len(places), "", object), np.full(len(places), "", object)
        values[rows] = 100 * mine["value"].to_numpy()[known].astype(float)
        status[rows] = mine["status"].to_numpy()[known]
        reasons[rows] = mine["reason"].to_numpy()[known]
        found[explainer, metric] = ScoreColumn(values, status, reasons)
    return found


def _rows(
    table: pa.Table, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Row of each neuron of a table among the model's, and which rows of the table are of one of them."""
    at, known = _found(table["layer"].to_numpy(), table["index"].to_numpy(), places)
    return at[known], known


def _found(
    layers: NDArray[Any], indices: NDArray[Any], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where neurons stand among sorted `places`, and which are there at all. [e]"""
    mine = layers.astype(np.int64) << 32 | indices
    at = np.searchsorted(places, mine).clip(0, max(0, len(places) - 1))
    known = places[at] == mine if len(places) else np.zeros(len(mine), bool)
    return at, known
