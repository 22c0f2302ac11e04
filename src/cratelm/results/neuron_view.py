"""One neuron, from the files of its run: excerpts, statistics, explanations, what it writes."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.activations.store import ExcerptFile, NeuronFile, summaries_path
from cratelm.errors import InputError
from cratelm.records import Excerpt, NeuronId, Split
from cratelm.report.sections.effects import promoted
from cratelm.results.excerpts import excerpt_views, favourite_tokens
from cratelm.results.neuron_table import READ_ERRORS, Columns, changed_at, one_line
from cratelm.results.views import (
    ExcerptView,
    ExplanationView,
    Neighbour,
    NeuronView,
    NotFound,
    ScoreView,
    Shown,
    TokenValue,
)
from cratelm.runs import Run
from cratelm.score.simulators import SIMULATORS
from cratelm.tokens.shards import TokenStore
from cratelm.viewer.cache import Kept

_T = TypeVar("_T")
_PLACE = ["source", "name", "line"]


@dataclass(frozen=True)
class NeuronQuery:
    """Which neuron, and how much of it."""

    key: str
    """of the run"""
    model: str
    layer: int
    index: int
    split: Split = "held_out"
    explainer: str = ""
    """who simulates; the principal one where it is left out"""
    shown: Shown = "some"


class NeuronFiles:
    """The files of a run, of which single neurons are read; open ones are kept."""

    def __init__(self, run: Run, kept: Kept):
        self.run, self._kept = run, kept

    def tokens(self) -> TokenStore:
        """Raises `InputError` where the shards are gone or damaged."""
        path = self.run.path / "tokens"
        return self._get(("tokens", path), lambda: TokenStore(path))

    def tokens_of(self, model: str) -> TokenStore:
        """The tokens that a harvest has read. Raises `InputError` where they were made again since: its
        token ids would be spelled as other words."""
        read = self.run.stage("activations", model).completion()
        tokens = self.run.stage("tokens").completion()
        if read and tokens and read.inputs.get("tokens", tokens.identity) != tokens.identity:
            raise InputError(f"{model} was harvested from earlier tokens")
        return self.tokens()

    def excerpts(self, asked: NeuronQuery) -> tuple[Excerpt, ...]:
        folder = self._folder(asked)
        name = ("excerpts", folder, asked.split)
        file = self._get(name, lambda: ExcerptFile(folder, asked.split))
        return file.of(asked.layer, asked.index)

    def summary(self, asked: NeuronQuery) -> dict[str, Any]:
        """Its row of the summaries."""
        file = self._file(summaries_path(self._folder(asked), asked.split))
        return next(iter(file.rows(asked.layer, asked.index).to_pylist()), {})

    def payload(self, asked: NeuronQuery, explainer: str) -> dict[str, Any] | None:
        """What the simulator of an explainer needs; None where there is no such explanation."""
        stage = self.run.stage("explanations", asked.model)
        if explainer not in SIMULATORS or stage.completion() is None:
            return None
        columns = ["layer", "index", "explainer", "payload"]
        file = self._file(stage.path / "explanations.parquet")
        rows = file.rows(asked.layer, asked.index, columns).to_pylist()
        found = (json.loads(r["payload"]) for r in rows if r["explainer"] == explainer)
        return next(found, None)

    def effect(self, asked: NeuronQuery, site: str) -> Any:
        """What it writes to the vocabulary; None where that was not measured."""
        neuron = NeuronId(asked.model, site, asked.layer, asked.index)
        return promoted(self.run.stage("steer", asked.model).path, neuron)

    def documents(self, ordinals: Collection[int]) -> Mapping[int, str]:
        """Where documents came from; nothing for those that the table has not."""
        path = self.run.path / "tokens" / "documents.parquet"
        found: dict[int, str] = {}
        metadata = self._get(("documents", path), lambda: pq.read_metadata(path))
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        for ordinal in sorted(o for o in ordinals if 0 <= o < metadata.num_rows):
            group = int(np.searchsorted(ends, ordinal, "right"))
            read = partial(_document_group, path, metadata, group)
            table = self._get(("documents", path, group), read)
            row = ordinal - int(ends[group] - sizes[group])
            found[ordinal] = _place_of(*(column[row].as_py() for column in table.columns))
        return found

    def _folder(self, asked: NeuronQuery) -> Path:
        return self.run.stage("activations", asked.model).path

    def _file(self, path: Path) -> NeuronFile:
        return self._get(("file", path), lambda: NeuronFile(path))

    def _get(self, name: tuple, read: Callable[[], _T]) -> _T:
        return self._kept.get(name, changed_at(self.run), read)


class _Tried:
    """Reads what may be damaged, and notes what is."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, what: str, read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except (*READ_ERRORS, InputError) as error:
            self.problems.append(f"{what} cannot be shown ({one_line(error)})")
            return otherwise


def neuron_view(
    files: NeuronFiles,
    columns: Columns,
    asked: NeuronQuery,
    nearest: Callable[[], tuple[Neighbour, ...]],
) -> NeuronView:
    """What is there of a neuron; `problems` says what is not. Raises `NotFound` for one that is not there."""
    row, here, tried = _row(columns, asked), columns.rows_of(asked.layer), _Tried()
    found = tried("excerpts", lambda: files.excerpts(asked), ())
    store = tried("text", lambda: files.tokens_of(asked.model), None)
    explainer, views, held_back = _excerpts(files, columns, asked, found, store, tried)
    summary = tried("statistics", lambda: files.summary(asked), {})
    effect = tried("effects", lambda: files.effect(asked, columns.site), None)
    return NeuronView(
        run=asked.key,
        model=asked.model,
        site=columns.site,
        layer=asked.layer,
        index=asked.index,
        split=asked.split,
        explainer=explainer,
        explanations=_explanations(columns, row),
        statistics={k: v for k, v in summary.items() if isinstance(v, int | float)},
        histogram=tuple(summary.get("histogram", ())),
        histogram_low=summary.get("histogram_low", 0.0),
        histogram_high=summary.get("histogram_high", 0.0),
        excerpts=views,
        held_back=held_back,
        tokens=tried("tokens", lambda: favourite_tokens(found, store), ()),
        promoted=_pairs(effect.promoted, effect.promoted_values) if effect else (),
        suppressed=_pairs(effect.suppressed, effect.suppressed_values) if effect else (),
        nearest=() if asked.shown == "top" else tried("nearest neurons", nearest, ()),
        previous=int(columns.index[row - 1]) if row > here.start else None,
        following=int(columns.index[row + 1]) if row + 1 < here.stop else None,
        problems=(*columns.problems, *tried.problems),
    )


def _row(columns: Columns, asked: NeuronQuery) -> int:
    row = columns.row(asked.layer, asked.index)
    if row is None:
        here = columns.rows_of(asked.layer)
        n = here.stop - here.start
        there = f"it has 0 to {n - 1}" if n else "no such layer"
        name = f"{asked.model} has no neuron {asked.index} in layer {asked.layer}"
        raise NotFound(f"{name}: {there}")
    return row


def _excerpts(
    files: NeuronFiles,
    columns: Columns,
    asked: NeuronQuery,
    found: Sequence[Excerpt],
    store: TokenStore | None,
    tried: _Tried,
) -> tuple[str, tuple[ExcerptView, ...], int]:
    """Who simulates (empty: nobody), the excerpts shown, and how many are held back."""
    told = columns.principal
    usual = told[1] if told and not told[0] and asked.shown != "top" else ""
    explainer = asked.explainer or usual
    payload = tried("the simulation", lambda: files.payload(asked, explainer), None)

    def documents(ordinals: Collection[int]) -> Mapping[int, str]:
        return tried("names of documents", lambda: files.documents(ordinals), {})

    views, held_back = tried(
        "excerpts",
        lambda: excerpt_views(found, store, explainer, payload, documents, asked.shown),
        ((), 0),
    )
    return explainer if payload is not None else "", views, held_back


def _explanations(columns: Columns, row: int) -> tuple[ExplanationView, ...]:
    told = sorted({*columns.texts, *((s, e) for s, e, _ in columns.scores)})
    principal = columns.principal
    views = []
    for name, explainer in sorted(told, key=lambda t: (t != principal, t)):
        column = columns.texts.get((name, explainer))
        text = str(column[row]) if column is not None else ""
        scores = tuple(
            ScoreView(
                metric,
                None if np.isnan(c.values[row]) else float(c.values[row]),
                str(c.status[row]),
                str(c.reasons[row]),
            )
            for (s, e, metric), c in columns.scores.items()
            if (s, e) == (name, explainer) and c.status[row]
        )
        if text or scores:
            views.append(ExplanationView(explainer, name, text, scores))
    return tuple(views)


def _pairs(tokens: Sequence[str], values: Sequence[float]) -> tuple[TokenValue, ...]:
    return tuple(TokenValue(t, float(v)) for t, v in zip(tokens, values, strict=True))


def _document_group(path: Path, metadata: pq.FileMetaData, group: int) -> pa.Table:
    with pq.ParquetFile(path, metadata=metadata) as file:
        return file.read_row_group(group, _PLACE, use_threads=False).select(_PLACE)


def _place_of(source: str, name: str, line: int | None) -> str:
    return f"{name or source}{f':{line}' if line else ''}"
