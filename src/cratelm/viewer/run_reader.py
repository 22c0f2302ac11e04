"""Runs, read as pages ask for them: nothing is read earlier, and never a whole run.

Files may be missing, half-finished or damaged: what can be read is shown, and the rest is reported.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cachetools import LRUCache

from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.results.neuron_table import NeuronTable, layer_page, read_neuron_table
from cratelm.results.neuron_view import NeuronFiles, NeuronQuery, neuron_view
from cratelm.results.run_summary import run_card
from cratelm.results.stages import READ_ERRORS, changed_at, one_line
from cratelm.results.views import (
    ExcerptChoice,
    IndexState,
    LayerPage,
    LayerQuery,
    MapPoint,
    Neighbour,
    NeuronView,
    NotFound,
    RunCard,
    ScoreHistogram,
    SearchHit,
    SearchResults,
)
from cratelm.runs import Run
from cratelm.tokens.shards import TokenStore
from cratelm.viewer.index import Index

_CACHED = 64
"""open files, tables and drawings kept at a time, for all runs together"""
_NEAREST = 8
_HISTOGRAM_BINS = 20
RARELY = 0.2
"""firing rate below which a neuron is selective enough to be shown first"""
_T = TypeVar("_T")


class FileCache:
    """The `_CACHED` files, tables and drawings used last. Safe for several threads.

    Two threads may read the same file at once: a lock around reading would make every page wait.
    """

    def __init__(self) -> None:
        self._cache: LRUCache[tuple, tuple[Any, Any]] = LRUCache(_CACHED)
        self._lock = threading.Lock()

    def get(self, state: Any, name: tuple, read: Callable[[], _T]) -> _T:
        """Return what was read before under `name` if that was in the same `state`, else read it."""
        with self._lock:
            before = self._cache.get(name)
        if before is not None and before[0] == state:
            return before[1]
        value = read()
        with self._lock:
            self._cache[name] = (state, value)
        return value


class Library:
    """Several run directories. Methods may be called from several threads.

    Raises `InputError` if a run does not exist, and `NotFound` for what it does not contain.
    """

    def __init__(self, runs: Sequence[Path]):
        self._runs: dict[str, Run] = {}
        for path in runs:
            if not Path(path).is_dir():
                raise InputError(
                    f"{path} is not there: a run directory was expected, such as one that `cratelm demo`"
                    " makes in runs/demo"
                )
            name = Path(path).resolve().name or "run"  # "/" has none
            key, number = name, 1
            while key in self._runs:
                number += 1
                key = f"{name}-{number}"
            self._runs[key] = Run(Path(path))
        self._cache = FileCache()
        self._indexes = {key: Index(run) for key, run in self._runs.items()}

    # ---- runs, models, layers ---------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the names of the runs in addresses."""
        return tuple(self._runs)

    def run_of(self, key: str) -> Run:
        """Return a run directory."""
        if key not in self._runs:
            raise NotFound(f"there is no run {key!r} here: there are {', '.join(self._runs)}")
        return self._runs[key]

    def run(self, key: str) -> RunCard:
        """Return the run's models with their losses and scores."""
        run = self.run_of(key)
        return self._cached(key, ("card", key), lambda: run_card(key, run))

    def table(self, key: str, model: str) -> NeuronTable:
        """Return the neurons of a harvested model."""
        run = self.run_of(key)
        if model not in run.models("activations"):
            self.run(key).model(model)
            raise NotFound(f"{key} has no finished harvest of {model}")
        try:
            return self._cached(key, ("table", key, model), lambda: read_neuron_table(run, model))
        except READ_ERRORS as error:
            raise NotFound(
                f"the harvest of {model} cannot be read ({one_line(error)}): type `cratelm harvest --run"
                f" {run.path} --model {model} --force`"
            ) from None

    def layer(self, key: str, model: str, layer: int, query: LayerQuery) -> LayerPage:
        """Return the neurons of a layer that a query asks for."""
        table = self.table(key, model)
        here = table.rows_of(layer)
        if here.start == here.stop:
            layers = ", ".join(map(str, np.unique(table.layer).tolist()))
            raise NotFound(f"{model} has no layer {layer}: it has {layers}")
        on_token, note = None, ""
        if query.token:
            on_token, note = self.index_of(key).on_token(model, query.token)
        return layer_page(model, layer, table, query, on_token, note)

    def histograms(self, key: str, model: str, layer: int) -> tuple[ScoreHistogram, ...]:
        """Return how the scores of a layer are distributed, by metric, of its principal explainer."""
        table = self.table(key, model)
        here = table.rows_of(layer)
        means = {m.metric: m.by_layer.get(layer) for m in self.run(key).model(model).metrics}
        found = []
        for metric in table.metrics:
            column = table.score(metric)
            assert column is not None
            values = column.values[here]
            defined = values[~np.isnan(values)].clip(0, 100)
            counts = np.histogram(defined, _HISTOGRAM_BINS, (0, 100))[0]
            shares = tuple((counts / max(1, len(defined))).tolist())
            scored = int((column.status[here] != "").sum())
            found.append(ScoreHistogram(metric, means.get(metric), len(defined), scored, shares))
        return tuple(found)

    def best(self, key: str, model: str, n: int = 5) -> tuple[SearchHit, ...]:
        """Return the best explained neurons of a model that fire on less than `RARELY` of the tokens."""
        table = self.table(key, model)
        column = table.best_score()
        if column is None:
            return ()
        values = np.where(table.firing_rate < RARELY, column.values, np.nan)
        order = np.lexsort((np.arange(len(values)), -values))[:n]  # without a value last
        return tuple(
            _hit(model, table, int(r), float(values[r]), 0) for r in order if values[r] > 0
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
        excerpts: ExcerptChoice = "some",
    ) -> NeuronView:
        """Return one neuron. `explainer`: whose explanation simulates; empty: the principal one."""
        query = NeuronQuery(key, model, layer, index, split, explainer, excerpts)
        nearest = partial(self.nearest, key, model, layer, index)
        return neuron_view(self._files(key), self.table(key, model), query, nearest)

    def effects_command(self, key: str, model: str) -> str:
        """Return the command that measures what neurons promote; after a sample, that for all of them."""
        run = self.run_of(key)
        again = " --neurons 0 --force" if model in run.models("steer") else ""
        return f"cratelm effects --run {run.path} --model {model}{again}"

    def nearest(
        self, key: str, model: str, layer: int, index: int, n: int = _NEAREST
    ) -> tuple[Neighbour, ...]:
        """Return neurons that fire on the same tokens: `n` of this model, `n` of its twin; none without the index."""
        twin = self.run(key).twin(model)
        names = [model, twin] if twin else [model]
        found: list[Neighbour] = []
        for name in names:
            table = self.table(key, name)
            hits = self.index_of(key).nearest(
                model, (layer, index), name, n, self.table(key, model), table
            )
            texts = table.explanations
            found += [
                Neighbour(name, int(table.layer[r]), int(table.index[r]), s, str(texts[r]))
                for r, s in hits
            ]
        return tuple(found)

    # ---- the index --------------------------------------------------------------------------------

    def index_of(self, key: str) -> Index:
        """Return the index of a run; after a change of the run it is rebuilt in the background."""
        self.run_of(key)
        index = self._indexes[key]
        index.follow()
        return index

    def index_state(self, key: str) -> IndexState:
        """Return how far the index of a run is."""
        return self.index_of(key).state

    def start_indexing(self) -> None:
        """Build the indexes of all runs, one after another, in the background."""
        threading.Thread(
            target=lambda: [index.build() for index in self._indexes.values()], daemon=True
        ).start()

    def map(self, key: str, model: str, layer: int) -> tuple[MapPoint, ...] | None:
        """Return the neurons of a layer in a plane, those that fire on the same tokens close together."""
        table = self.table(key, model)
        points = self.index_of(key).map(model, layer)
        here = table.rows_of(layer)
        if points is None or len(points) != here.stop - here.start:
            return None
        column = table.best_score()
        scores = column.values[here] if column else np.full(len(points), np.nan)
        texts = table.explanations[here]
        return tuple(
            MapPoint(int(i), float(x), float(y), None if np.isnan(s) else float(s), str(t))
            for i, (x, y), s, t in zip(table.index[here], points, scores, texts, strict=True)
        )

    def drawing(self, key: str, name: tuple, draw: Callable[[], _T]) -> _T:
        """Return a drawing of the run, made once: it is the same on every page until the run changes."""
        return self._cached(key, ("drawing", key, *name), draw)

    def drawn_map(
        self, key: str, model: str, layer: int, draw: Callable[[Sequence[MapPoint]], _T]
    ) -> _T | None:
        """Return the map of a layer as `draw` makes it, made once; None while it is being computed."""
        path = self.index_of(key).map_path(model, layer)
        if path is None:
            return None

        def drawn() -> _T | None:
            points = self.map(key, model, layer)
            return draw(points) if points else None

        return self.drawing(key, ("map", model, layer, path), drawn)

    def search(
        self, key: str, text: str = "", token: str = "", limit: int = 100, model: str = ""
    ) -> SearchResults:
        """Return neurons by words of their explanation, or by a token that they fire on.

        Of one model, or of all but the untrained null controls.
        """
        hits: list[SearchHit] = []
        notes: set[str] = set()
        run = self.run(key)
        searched = [run.model(model)] if model else [m for m in run.models if not m.null_of]
        for card in searched:
            if not card.neurons:
                continue
            table = self.table(key, card.name)
            notes.update(f"{card.name}: {line}." for line in card.stale)
            if token:
                on_token, note = self.index_of(key).on_token(card.name, token)
                notes.add(note)
                ranked = sorted(on_token.items(), key=lambda item: -item[1][0])[:limit]
                rows = [(table.row(*neuron), value_count) for neuron, value_count in ranked]
                hits += [_hit(card.name, table, r, v, n) for r, (v, n) in rows if r is not None]
            else:
                column = table.best_score()
                matching = table.containing(text)
                values = column.values[matching] if column else np.full(len(matching), np.nan)
                order = np.lexsort((matching, -values))[:limit]  # without a value last
                hits += [
                    _hit(card.name, table, int(matching[i]), float(values[i]), 0) for i in order
                ]
        hits.sort(key=lambda h: -h.value if h.value == h.value else 1e9)
        return SearchResults(tuple(hits[:limit]), " ".join(sorted(notes - {""})))

    # ---- open files -------------------------------------------------------------------------------

    def tokens(self, key: str) -> TokenStore:
        """Return the run's tokens. Raises `InputError` where the shards are missing or damaged."""
        return self._files(key).tokens()

    def _files(self, key: str) -> NeuronFiles:
        return NeuronFiles(self.run_of(key), partial(self._cached, key))

    def _cached(self, key: str, name: tuple, read: Callable[[], _T]) -> _T:
        return self._cache.get(changed_at(self.run_of(key)), name, read)


def _hit(model: str, table: NeuronTable, row: int, value: float, count: int) -> SearchHit:
    neuron = int(table.layer[row]), int(table.index[row])
    rate, text = float(table.firing_rate[row]), str(table.explanations[row])
    return SearchHit(model, *neuron, text, value, count, rate)
