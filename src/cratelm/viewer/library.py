"""Runs, read as pages ask for them: nothing is read before, and never a whole run.

Files may be missing, half-finished or damaged; what is there is shown, and what is not is said.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.activations.store import ExcerptFile, NeuronFile, summaries_path
from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.report.effects import promoted
from cratelm.runs import Run
from cratelm.score.simulators import SIMULATORS
from cratelm.tokens.shards import TokenStore
from cratelm.viewer.cards import run_card
from cratelm.viewer.columns import DAMAGED, Columns, changed_at, one_line, read_columns
from cratelm.viewer.excerpts import excerpt_views, favourite_tokens
from cratelm.viewer.index import Index
from cratelm.viewer.layers import layer_page
from cratelm.viewer.records import (
    ExplanationView,
    IndexState,
    LayerPage,
    LayerQuery,
    MapPoint,
    Neighbour,
    NeuronView,
    NotFound,
    RunCard,
    ScoreView,
    SearchHit,
    SearchResults,
    Shown,
    Spread,
    TokenValue,
)

_KEPT = 64
"""open files and tables that are kept at a time, for all runs together"""
_NEAREST = 8
_SPREAD_BINS = 20
RARELY = 0.2
"""firing rate below which a neuron is selective enough to be shown first"""
_T = TypeVar("_T")


class Library:
    """Some run directories. Methods may be called from several threads.

    Raises `InputError` where a run is not there, and `NotFound` for what is not in it.
    """

    def __init__(self, runs: Sequence[Path]):
        self._runs: dict[str, Run] = {}
        for path in runs:
            if not Path(path).is_dir():
                raise InputError(
                    f"{path} is not there: a run directory was expected, such as one that `cratelm demo`"
                    " makes in runs/demo"
                )
            name, key, number = Path(path).resolve().name, Path(path).resolve().name, 1
            while key in self._runs:
                number += 1
                key = f"{name}-{number}"
            self._runs[key] = Run(Path(path))
        self._kept: OrderedDict[tuple, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._indexes = {key: Index(run) for key, run in self._runs.items()}

    # ---- what there is ----------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._runs)

    def run_of(self, key: str) -> Run:
        if key not in self._runs:
            raise NotFound(f"there is no run {key!r} here: there are {', '.join(self._runs)}")
        return self._runs[key]

    def run(self, key: str) -> RunCard:
        """The run's models with their losses and scores."""
        run = self.run_of(key)
        return self._cached(("card", key), changed_at(run), lambda: run_card(key, run))

    def columns(self, key: str, model: str) -> Columns:
        """The neurons of a model as columns."""
        run = self.run_of(key)
        if model not in run.models("activations"):
            self.run(key).model(model)
            raise NotFound(f"{key} has no finished harvest of {model}")
        try:
            return self._cached(
                ("columns", key, model), changed_at(run), lambda: read_columns(run, model)
            )
        except DAMAGED as error:
            raise NotFound(
                f"the harvest of {model} cannot be read ({one_line(error)}): type `cratelm harvest --run"
                f" {run.path} --model {model} --force`"
            ) from None

    def layer(self, key: str, model: str, layer: int, query: LayerQuery) -> LayerPage:
        """The neurons of a layer that a query asks for."""
        columns = self.columns(key, model)
        here = columns.rows_of(layer)
        if here.start == here.stop:
            layers = ", ".join(map(str, np.unique(columns.layer).tolist()))
            raise NotFound(f"{model} has no layer {layer}: it has {layers}")
        on_token, note = None, ""
        if query.token:
            on_token, note = self.index_of(key).on_token(model, query.token)
        return layer_page(model, layer, columns, query, on_token, note)

    def spreads(self, key: str, model: str, layer: int) -> tuple[Spread, ...]:
        """The scores of a layer by metric, as its principal explainer has them."""
        columns = self.columns(key, model)
        here = columns.rows_of(layer)
        told = {m.metric: m.by_layer for m in self.run(key).model(model).metrics}
        found = []
        for metric in columns.metrics:
            column = columns.score(metric)
            assert column is not None
            values = column.values[here]
            known = values[~np.isnan(values)].clip(0, 100)
            counts = np.histogram(known, _SPREAD_BINS, (0, 100))[0] / max(1, len(known))
            scored = int((column.status[here] != "").sum())
            mean = told.get(metric, {}).get(layer)
            found.append(Spread(metric, mean, len(known), scored, tuple(counts.tolist())))
        return tuple(found)

    def best(self, key: str, model: str, n: int = 5) -> tuple[SearchHit, ...]:
        """The best explained neurons of a model that fire on less than `RARELY` of the tokens."""
        columns = self.columns(key, model)
        column = columns.score(columns.metrics[0]) if columns.metrics else None
        if column is None:
            return ()
        values = np.where(columns.firing_rate < RARELY, column.values, np.nan)
        order = np.lexsort((np.arange(len(values)), -values))[:n]  # without a value last
        return tuple(
            _hit(model, columns, int(r), float(values[r]), 0) for r in order if values[r] > 0
        )

    # ---- one neuron -------------------------------------------------------------------------------

    def neuron(
        self,
        key: str,
        model: str,
        layer: int,
        index: int,
        split: Split = "held_out",
        explainer: str = "",
        shown: Shown = "some",
    ) -> NeuronView:
        """One neuron. `explainer` simulates, the principal one where it is left out."""
        run, columns = self.run_of(key), self.columns(key, model)
        row = columns.row(layer, index)
        if row is None:
            here = columns.rows_of(layer)
            there = (
                f"it has 0 to {here.stop - here.start - 1}"
                if here.stop > here.start
                else "no such layer"
            )
            raise NotFound(f"{model} has no neuron {index} in layer {layer}: {there}")
        problems: list[str] = []

        def tried(what: str, read: Callable[[], _T], otherwise: _T) -> _T:
            try:
                return read()
            except (*DAMAGED, InputError) as error:
                problems.append(f"{what} cannot be shown ({one_line(error)})")
                return otherwise

        harvest = run.stage("activations", model).path
        file = tried("excerpts", lambda: self._excerpts(key, harvest, split), None)
        found = tried("excerpts", lambda: file.of(layer, index), ()) if file is not None else ()
        store = tried("text", lambda: self._tokens(key), None)
        told = columns.principal
        chosen = explainer or (told[1] if told and not told[0] and shown != "top" else "")
        payload = tried(
            "the simulation", lambda: self._payload(key, model, layer, index, chosen), None
        )
        views, held_back = tried(
            "excerpts",
            lambda: excerpt_views(
                found, store, chosen, payload, partial(self._documents, key), shown
            ),
            ((), 0),
        )
        summary = tried("statistics", lambda: self._summary(key, harvest, split, layer, index), {})
        effect = tried(
            "effects",
            lambda: promoted(
                run.stage("steer", model).path, _neuron_id(model, columns, layer, index)
            ),
            None,
        )
        here = columns.rows_of(layer)

        def near() -> tuple[Neighbour, ...]:
            return self.nearest(key, model, layer, index)

        return NeuronView(
            run=key,
            model=model,
            site=columns.site,
            layer=layer,
            index=index,
            split=split,
            explainer=chosen if payload is not None and chosen in SIMULATORS else "",
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
            nearest=() if shown == "top" else tried("nearest neurons", near, ()),
            previous=int(columns.index[row - 1]) if row > here.start else None,
            following=int(columns.index[row + 1]) if row + 1 < here.stop else None,
            problems=(*columns.problems, *problems),
        )

    def effects_command(self, key: str, model: str) -> str:
        """What measures what a neuron writes; where some neurons were drawn for it, all of them."""
        run = self.run_of(key)
        again = " --neurons 0 --force" if model in run.models("steer") else ""
        return f"cratelm effects --run {run.path} --model {model}{again}"

    def nearest(
        self, key: str, model: str, layer: int, index: int, n: int = _NEAREST
    ) -> tuple[Neighbour, ...]:
        """Neurons that fire on the same tokens: `n` of this model, `n` of its twin; none without the index."""
        twin = self.run(key).twin(model)
        names = [model, twin] if twin else [model]
        found: list[Neighbour] = []
        for name in names:
            columns = self.columns(key, name)
            hits = self.index_of(key).nearest(
                model, (layer, index), name, n, self.columns(key, model), columns
            )
            texts = columns.text()
            found += [
                Neighbour(name, int(columns.layer[r]), int(columns.index[r]), s, str(texts[r]))
                for r, s in hits
            ]
        return tuple(found)

    # ---- the index --------------------------------------------------------------------------------

    def index_of(self, key: str) -> Index:
        """The index of a run; of one that has changed since, it is built again in the background."""
        self.run_of(key)
        index = self._indexes[key]
        index.follow()
        return index

    def index_state(self, key: str) -> IndexState:
        return self.index_of(key).state

    def start_indexing(self) -> None:
        """Builds the indexes of all runs, one after another, in the background."""
        threading.Thread(
            target=lambda: [index.build() for index in self._indexes.values()], daemon=True
        ).start()

    def map(self, key: str, model: str, layer: int) -> tuple[MapPoint, ...] | None:
        """The neurons of a layer in a plane, those that fire on the same tokens near to each other."""
        columns = self.columns(key, model)
        places = self.index_of(key).map(model, layer)
        here = columns.rows_of(layer)
        if places is None or len(places) != here.stop - here.start:
            return None
        metrics = columns.metrics
        column = columns.score(metrics[0]) if metrics else None
        scores = column.values[here] if column else np.full(len(places), np.nan)
        texts = columns.text()[here]
        return tuple(
            MapPoint(int(i), float(x), float(y), None if np.isnan(s) else float(s), str(t))
            for i, (x, y), s, t in zip(columns.index[here], places, scores, texts, strict=True)
        )

    def drawn_map(
        self, key: str, model: str, layer: int, draw: Callable[[Sequence[MapPoint]], _T]
    ) -> _T | None:
        """The map as `draw` makes it, which is kept: it is the same for every page of the layer."""
        place = self.index_of(key).map_path(model, layer)
        if place is None:
            return None
        state = (changed_at(self.run_of(key)), place)

        def made() -> _T | None:
            points = self.map(key, model, layer)
            return draw(points) if points else None

        return self._cached(("map", key, model, layer), state, made)

    def search(
        self, key: str, text: str = "", token: str = "", limit: int = 100, model: str = ""
    ) -> SearchResults:
        """Neurons by words of their explanation, or by a token that they fire on.

        Of one model, or of all but the untrained controls.
        """
        hits: list[SearchHit] = []
        notes: set[str] = set()
        run = self.run(key)
        searched = [run.model(model)] if model else [m for m in run.models if not m.null_of]
        for card in searched:
            if not card.neurons:
                continue
            columns = self.columns(key, card.name)
            if token:
                found, note = self.index_of(key).on_token(card.name, token)
                notes.add(note)
                ranked = sorted(found.items(), key=lambda hit: -hit[1][0])[:limit]
                rows = [(columns.row(*place), told) for place, told in ranked]
                hits += [_hit(card.name, columns, r, v, n) for r, (v, n) in rows if r is not None]
            else:
                metric = columns.score(columns.metrics[0]) if columns.metrics else None
                rows_found = columns.holding(text)
                values = metric.values[rows_found] if metric else np.full(len(rows_found), np.nan)
                order = np.lexsort((rows_found, -values))[:limit]  # without a value last
                hits += [
                    _hit(card.name, columns, int(rows_found[i]), float(values[i]), 0) for i in order
                ]
        hits.sort(key=lambda h: -h.value if h.value == h.value else 1e9)
        return SearchResults(tuple(hits[:limit]), " ".join(sorted(notes - {""})))

    # ---- files that are kept open -----------------------------------------------------------------

    def tokens(self, key: str) -> TokenStore:
        """Raises `InputError` where the shards are gone or damaged."""
        return self._tokens(key)

    def _tokens(self, key: str) -> TokenStore:
        run = self.run_of(key)
        return self._cached(
            ("tokens", key), changed_at(run), lambda: TokenStore(run.path / "tokens")
        )

    def _excerpts(self, key: str, harvest: Path, split: Split) -> ExcerptFile:
        state = changed_at(self.run_of(key))
        return self._cached(
            ("excerpts", harvest, split), state, lambda: ExcerptFile(harvest, split)
        )

    def _file(self, key: str, path: Path) -> NeuronFile:
        state = changed_at(self.run_of(key))
        return self._cached(("file", path), state, lambda: NeuronFile(path))

    def _payload(
        self, key: str, model: str, layer: int, index: int, explainer: str
    ) -> dict[str, Any] | None:
        """What the simulator of an explainer needs; None where there is no such explanation."""
        stage = self.run_of(key).stage("explanations", model)
        if explainer not in SIMULATORS or stage.completion() is None:
            return None
        columns = ["layer", "index", "explainer", "payload"]
        file = self._file(key, stage.path / "explanations.parquet")
        rows = file.rows(layer, index, columns).to_pylist()
        found = (json.loads(r["payload"]) for r in rows if r["explainer"] == explainer)
        return next(found, None)

    def _summary(
        self, key: str, harvest: Path, split: Split, layer: int, index: int
    ) -> dict[str, Any]:
        rows = self._file(key, summaries_path(harvest, split)).rows(layer, index).to_pylist()
        return rows[0] if rows else {}

    def _documents(self, key: str, ordinals: Collection[int]) -> Mapping[int, str]:
        """Where documents came from; nothing for those that the table has not, or cannot tell."""
        run = self.run_of(key)
        path, state = run.path / "tokens" / "documents.parquet", changed_at(run)
        found: dict[int, str] = {}
        try:
            metadata = self._cached(("documents", path), state, lambda: pq.read_metadata(path))
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            ends = np.cumsum(sizes)
            for ordinal in sorted(o for o in ordinals if 0 <= o < metadata.num_rows):
                group = int(np.searchsorted(ends, ordinal, "right"))
                read = partial(_document_group, path, metadata, group)
                table = self._cached(("documents", path, group), state, read)
                row = ordinal - int(ends[group] - sizes[group])
                found[ordinal] = _place_of(*(column[row].as_py() for column in table.columns))
        except DAMAGED:
            pass
        return found

    def _cached(self, name: tuple, state: Any, read: Callable[[], _T]) -> _T:
        """What was read before, if the run is still as it was; the latest `_KEPT` things are kept."""
        with self._lock:
            held = self._kept.get(name)
            if held is not None and held[0] == state:
                self._kept.move_to_end(name)
                return held[1]
        made = read()
        with self._lock:
            self._kept[name] = (state, made)
            self._kept.move_to_end(name)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


def _hit(model: str, columns: Columns, row: int, value: float, count: int) -> SearchHit:
    place = int(columns.layer[row]), int(columns.index[row])
    fires = float(columns.firing_rate[row])
    return SearchHit(model, *place, str(columns.text()[row]), value, count, fires)


def _pairs(tokens: Sequence[str], values: Sequence[float]) -> tuple[TokenValue, ...]:
    return tuple(TokenValue(t, float(v)) for t, v in zip(tokens, values, strict=True))


def _neuron_id(model: str, columns: Columns, layer: int, index: int) -> Any:
    from cratelm.records import NeuronId

    return NeuronId(model, columns.site, layer, index)


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


def _document_group(path: Path, metadata: pq.FileMetaData, group: int) -> pa.Table:
    with pq.ParquetFile(path, metadata=metadata) as file:
        columns = ["source", "name", "line"]
        return file.read_row_group(group, columns, use_threads=False).select(columns)


def _place_of(source: str, name: str, line: int | None) -> str:
    return f"{name or source}{f':{line}' if line else ''}"
