"""Read one neuron from the files of its run: excerpts, statistics, explanations, effect on the vocabulary."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.activations.store import ExcerptFile, NeuronFile, summaries_path
from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.predict import is_concept_payload
from cratelm.explain.concepts.stored import concept_reader
from cratelm.explain.store import explanation_of
from cratelm.records import Excerpt, Explanation, NeuronId, NeuronKey, Split, neuron_name
from cratelm.results.excerpts import excerpt_views, favourite_tokens
from cratelm.results.neuron_table import NeuronTable
from cratelm.results.stages import Problems
from cratelm.results.views import (
    ExcerptChoice,
    ExcerptView,
    ExplanationView,
    Neighbour,
    NeuronView,
    NotFound,
    ScoreView,
    TokenValue,
)
from cratelm.runs import Run
from cratelm.runs.reading import read_rows, verified
from cratelm.score.simulators import SIMULATORS
from cratelm.steer.store import LogitEffect, read_logit_effect
from cratelm.text.claim import claim
from cratelm.tokens.shards import TokenStore

_T = TypeVar("_T")
_DOCUMENT_NAME = ["source", "name", "line"]


class Cache(Protocol):
    """A cache of values by name; calls `read` for a name that it does not hold."""

    def __call__(self, name: tuple, read: Callable[[], _T], /) -> _T: ...


def uncached(_: tuple, read: Callable[[], _T], /) -> _T:
    """Return the result of `read` without caching it."""
    return read()


@dataclass(frozen=True)
class NeuronQuery:
    """A request for one neuron."""

    key: str
    """name of the run in addresses"""
    model: str
    layer: int
    index: int
    split: Split = "held_out"
    explainer: str = ""
    """explainer whose explanation is simulated; empty: the principal explainer"""
    excerpts: ExcerptChoice = "some"


class NeuronFiles:
    """The files of a run from which single neurons are read. `cache` holds the open files."""

    def __init__(self, run: Run, cache: Cache = uncached):
        self.run, self._cache = run, cache

    def tokens(self) -> TokenStore:
        """Return the run's tokens. Raises `InputError` if the shards are missing or damaged."""
        path = self.run.path / "tokens"
        return self._cache(("tokens", path), lambda: TokenStore(path))

    def tokens_of(self, model: str) -> TokenStore:
        """Return the tokens that the harvest of `model` read.

        Raises `InputError` if the run was tokenized again since: the token ids of the harvest would then be
        decoded to the wrong text.
        """
        harvest = self.run.stage("activations", model).completion()
        tokens = self.run.stage("tokens").completion()
        if harvest and tokens and harvest.inputs.get("tokens", tokens.identity) != tokens.identity:
            raise InputError(f"{model} was harvested from earlier tokens")
        return self.tokens()

    def excerpts(self, query: NeuronQuery) -> Sequence[Excerpt]:
        """Return all excerpts of the neuron from the split."""
        folder = self._harvest(query)
        name = ("excerpts", folder, query.split)
        file = self._cache(name, lambda: ExcerptFile(folder, query.split))
        return file.of(query.layer, query.index)

    def summary(self, query: NeuronQuery) -> Mapping[str, Any]:
        """Return the neuron's row of the summaries; empty if it has none."""
        file = self._file(summaries_path(self._harvest(query), query.split))
        return next(iter(file.rows(query.layer, query.index).to_pylist()), {})

    def payload(self, query: NeuronQuery, explainer: str) -> dict[str, Any] | None:
        """Return the payload that the explainer's simulator needs; None if there is no such explanation."""
        stage = self.run.stage("explanations", query.model)
        if explainer not in SIMULATORS or stage.completion() is None:
            return None
        columns = ["layer", "index", "explainer", "payload"]
        file = self._file(stage.path / "explanations.parquet")
        rows = file.rows(query.layer, query.index, columns).to_pylist()
        payloads = (json.loads(r["payload"]) for r in rows if r["explainer"] == explainer)
        return next(payloads, None)

    def concepts(self, query: NeuronQuery) -> ConceptReader:
        """Return what evaluates the formulas in the explanations of a model. Raises `InputError` for damaged files."""
        folder = self.run.stage("explanations", query.model).path

        def read() -> ConceptReader:
            return concept_reader(folder, self.tokens_of(query.model).token_strings)

        return self._cache(("concepts", folder), read)

    def effect(self, query: NeuronQuery, site: str) -> LogitEffect | None:
        """Return the tokens that the neuron promotes and suppresses; None if they were not measured."""
        neuron = NeuronId(query.model, site, query.layer, query.index)
        return read_logit_effect(self.run.stage("steer", query.model).path, neuron)

    def documents(self, ordinals: Collection[int]) -> Mapping[int, str]:
        """Return the names of documents by ordinal, omitting documents that are not in the table."""
        path = self.run.path / "tokens" / "documents.parquet"
        names: dict[int, str] = {}
        metadata = self._cache(("documents", path), lambda: pq.read_metadata(verified(path)))
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        for ordinal in sorted(o for o in ordinals if 0 <= o < metadata.num_rows):
            group = int(np.searchsorted(ends, ordinal, "right"))
            read = partial(_document_group, path, metadata, group)
            table = self._cache(("documents", path, group), read)
            row = ordinal - int(ends[group] - sizes[group])
            names[ordinal] = _document_name(*(column[row].as_py() for column in table.columns))
        return names

    def _harvest(self, query: NeuronQuery) -> Path:
        return self.run.stage("activations", query.model).path

    def _file(self, path: Path) -> NeuronFile:
        return self._cache(("file", path), lambda: NeuronFile(path))


def read_explanations_of(
    folder: Path, neurons: Collection[NeuronKey], explainer: str = ""
) -> list[Explanation]:
    """Return the explanations of `neurons`, by one `explainer` or, if it is empty, by all.

    Only these rows are read, because the payloads of a large model take gigabytes.
    """
    filters: list[tuple[str, str, Any]] = [("index", "in", sorted({n.index for n in neurons}))]
    filters += [("explainer", "==", explainer)] if explainer else []
    found = read_rows(folder / "explanations.parquet", explanation_of, filters)
    wanted = set(neurons)
    return [explanation for explanation in found if explanation.neuron.key in wanted]


def neuron_view(
    files: NeuronFiles,
    table: NeuronTable,
    query: NeuronQuery,
    nearest: Callable[[], tuple[Neighbour, ...]],
) -> NeuronView:
    """Return everything that can be read about a neuron; its `problems` report what cannot be read.

    `nearest` returns the neurons with the most similar profiles. Raises `NotFound` if the model does not have
    the neuron.
    """
    row, here, problems = _row(table, query), table.rows_of(query.layer), Problems()

    def attempt(label: str, read: Callable[[], _T], default: _T) -> _T:
        return problems.attempt(f"{label} cannot be shown", read, default)

    excerpts = attempt("excerpts", lambda: files.excerpts(query), ())
    store = attempt("text", lambda: files.tokens_of(query.model), None)
    explainer, views, held_back = _shown_excerpts(files, table, query, excerpts, store, problems)
    summary = attempt("statistics", lambda: files.summary(query), {})
    effect = attempt("effects", lambda: files.effect(query, table.site), None)
    return NeuronView(
        run=query.key,
        model=query.model,
        site=table.site,
        layer=query.layer,
        index=query.index,
        split=query.split,
        explainer=explainer,
        sentence=claim(str(table.explanations[row])),
        explanations=_explanations(table, row),
        statistics={k: v for k, v in summary.items() if isinstance(v, int | float)},
        histogram=tuple(summary.get("histogram", ())),
        histogram_low=summary.get("histogram_low", 0.0),
        histogram_high=summary.get("histogram_high", 0.0),
        excerpts=views,
        held_back=held_back,
        tokens=attempt("tokens", lambda: favourite_tokens(excerpts, store), ()),
        promoted=_token_values(effect.promoted, effect.promoted_values) if effect else (),
        suppressed=_token_values(effect.suppressed, effect.suppressed_values) if effect else (),
        nearest=() if query.excerpts == "top" else attempt("nearest neurons", nearest, ()),
        previous=int(table.index[row - 1]) if row > here.start else None,
        following=int(table.index[row + 1]) if row + 1 < here.stop else None,
        problems=(*table.problems, *problems.lines),
        last_token=table.last_token.row(row) if table.last_token else None,
        name=neuron_name(query.index, table.site),
    )


def _row(table: NeuronTable, query: NeuronQuery) -> int:
    row = table.row(query.layer, query.index)
    if row is None:
        here = table.rows_of(query.layer)
        n = here.stop - here.start
        last = n // (2 if table.has_ends else 1) - 1
        range_ = f"it has 0 to {last}" if n else "no such layer"
        name = neuron_name(query.index, table.site)
        neuron = f"{query.model} has no neuron {name} in layer {query.layer}"
        raise NotFound(f"{neuron}: {range_}")
    return row


def _shown_excerpts(
    files: NeuronFiles,
    table: NeuronTable,
    query: NeuronQuery,
    excerpts: Sequence[Excerpt],
    store: TokenStore | None,
    problems: Problems,
) -> tuple[str, tuple[ExcerptView, ...], int]:
    """Return the explainer that is simulated (empty: none), the excerpts, and the number of excerpts not shown."""
    principal = table.principal
    usual = principal[1] if principal and not principal[0] and query.excerpts != "top" else ""
    explainer = query.explainer or usual
    payload = problems.attempt(
        "the simulation cannot be shown", lambda: files.payload(query, explainer), None
    )

    concepts = None
    if payload is not None and is_concept_payload(payload):
        read_concepts = partial(files.concepts, query)
        concepts = problems.attempt("the simulation cannot be shown", read_concepts, None)
        payload = payload if concepts is not None else None

    def documents(ordinals: Collection[int]) -> Mapping[int, str]:
        read = partial(files.documents, ordinals)
        return problems.attempt("names of documents cannot be shown", read, {})

    views, held_back = problems.attempt(
        "excerpts cannot be shown",
        lambda: excerpt_views(
            excerpts, store, explainer, payload, documents, query.excerpts, concepts
        ),
        ((), 0),
    )
    return explainer if payload is not None else "", views, held_back


def _explanations(table: NeuronTable, row: int) -> tuple[ExplanationView, ...]:
    views = []
    for name, explainer in table.explainers:
        column = table.texts.get((name, explainer))
        text = str(column[row]) if column is not None else ""
        scores = tuple(
            ScoreView(
                metric,
                None if np.isnan(c.values[row]) else float(c.values[row]),
                str(c.status[row]),
                str(c.reasons[row]),
            )
            for (s, e, metric), c in table.scores.items()
            if (s, e) == (name, explainer) and c.status[row]
        )
        if text or scores:
            views.append(ExplanationView(explainer, name, text, scores))
    return tuple(views)


def _token_values(tokens: Sequence[str], values: Sequence[float]) -> tuple[TokenValue, ...]:
    return tuple(TokenValue(t, float(v)) for t, v in zip(tokens, values, strict=True))


def _document_group(path: Path, metadata: pq.FileMetaData, group: int) -> pa.Table:
    with pq.ParquetFile(path, metadata=metadata) as file:
        table = file.read_row_group(group, _DOCUMENT_NAME, use_threads=False)
        return table.select(_DOCUMENT_NAME)


def _document_name(source: str, name: str, line: int | None) -> str:
    return f"{name or source}{f':{line}' if line else ''}"
