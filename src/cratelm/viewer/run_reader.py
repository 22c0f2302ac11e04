"""Read runs on demand: pages read only the files they need, and never a whole run.

Files may be missing, half-finished or damaged: readable files are shown, and all others are reported.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cachetools import LRUCache

from cratelm.errors import InputError, one_line
from cratelm.records import Split, named_index, neuron_name
from cratelm.results.finding import Finding, finding
from cratelm.results.neuron_groups import CONCEPTS, NeuronGroup, neuron_groups
from cratelm.results.neuron_table import NeuronTable, layer_page, read_neuron_table
from cratelm.results.neuron_view import NeuronFiles, NeuronQuery, neuron_view
from cratelm.results.replacement import read_stored_explainer
from cratelm.results.run_summary import run_card
from cratelm.results.stages import READ_ERRORS, changed_at
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
from cratelm.text.claim import claim
from cratelm.tokens.shards import TokenStore
from cratelm.viewer.featured import FeaturedNeuron, featured_rows, ranking, shown_excerpt
from cratelm.viewer.index import Index
from cratelm.viewer.layer_map import DrawnMap, colours, details, draw_map

_CACHED = 64
"""maximum number of cached files, tables and drawings, for all runs together"""
_NEAREST = 8
"""number of nearest neurons to return, per model"""
_HISTOGRAM_BINS = 20
_T = TypeVar("_T")


class FileCache:
    """Cache of the `_CACHED` files, tables and drawings used last. Safe for several threads.

    Two threads may read the same file at the same time: a lock around reading would make every page wait.
    """

    def __init__(self) -> None:
        self._cache: LRUCache[tuple, tuple[Any, Any]] = LRUCache(_CACHED)
        self._lock = threading.Lock()

    def get(self, state: Any, name: tuple, read: Callable[[], _T]) -> _T:
        """Return the cached value of `name` if it was read in the same `state`, else read it."""
        with self._lock:
            before = self._cache.get(name)
        if before is not None and before[0] == state:
            return before[1]
        value = read()
        with self._lock:
            self._cache[name] = (state, value)
        return value


def _no_run(path: Path) -> str:
    """Return what to type instead of a folder that is no run but may hold some."""
    with contextlib.suppress(InputError, OSError):
        for folder in sorted(path.iterdir()):
            if os.path.isdir(folder) and Run(folder).is_begun():
                return f"{path} has no stage of a run; {folder} has: type `cratelm view {folder}`"
    return f"{path} has no stage of a run: name a run directory, such as runs/demo"


class Library:
    """Several run directories. Methods may be called from several threads.

    The constructor raises `InputError` if a run does not exist. Methods raise `NotFound` for a run, model, layer
    or neuron that does not exist.
    """

    def __init__(self, runs: Sequence[Path]):
        self._runs: dict[str, Run] = {}
        for path in runs:
            if not os.path.isdir(path):
                raise InputError(
                    f"{path} does not exist: name a run directory, such as runs/demo, which `cratelm demo`"
                    " creates"
                )
            run = Run(path)
            if not run.is_begun():
                raise InputError(_no_run(path))
            name = Path(path).resolve().name or "run"  # "/" has no name
            key, number = name, 1
            while key in self._runs:
                number += 1
                key = f"{name}-{number}"
            self._runs[key] = run
        self._cache = FileCache()
        self._indexes = {key: Index(run) for key, run in self._runs.items()}

    # ---- runs, models, layers ---------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of the runs, by which addresses name them."""
        return tuple(self._runs)

    def run_of(self, key: str) -> Run:
        """Return a run directory. Raises `NotFound` if there is no run of this key."""
        if key not in self._runs:
            raise NotFound(f"there is no run {key!r}: the runs are {', '.join(self._runs)}")
        return self._runs[key]

    def run(self, key: str) -> RunCard:
        """Return the run's models with their losses and scores."""
        run = self.run_of(key)
        return self._cached(key, ("card", key), lambda: run_card(key, run))

    def table(self, key: str, model: str) -> NeuronTable:
        """Return the neurons of a harvested model. Raises `NotFound` without a readable harvest."""
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
        """Return the page of a layer's neurons that matches a query."""
        table = self.table(key, model)
        _layer_rows(table, model, layer)
        on_token, note = None, ""
        if query.token:
            on_token, note = self.index_of(key).on_token(model, query.token)
        return layer_page(model, layer, table, query, on_token, note)

    def histograms(self, key: str, model: str, layer: int) -> tuple[ScoreHistogram, ...]:
        """Return the distribution of the scores of a layer under each metric, for the principal explainer."""
        table = self.table(key, model)
        here = table.rows_of(layer)
        means = {m.metric: m.by_layer.get(layer) for m in self.run(key).model(model).metrics}
        histograms = []
        for metric in table.metrics:
            column = table.score(metric)
            assert column is not None
            values = column.values[here]
            defined = values[~np.isnan(values)].clip(0, 100)
            counts = np.histogram(defined, _HISTOGRAM_BINS, (0, 100))[0]
            shares = tuple((counts / max(1, len(defined))).tolist())
            scored = int((column.status[here] != "").sum())
            mean = means.get(metric)
            histograms.append(ScoreHistogram(metric, mean, len(defined), scored, shares))
        return tuple(histograms)

    def finding(self, key: str) -> Finding | None:
        """Return what the run shows, in a sentence with its figures; None if nothing is scored."""
        return self._cached(key, ("finding", key), lambda: finding(self.run(key)))

    def featured(
        self, key: str, model: str, eligible: Callable[[int, int], bool] | None = None, n: int = 5
    ) -> tuple[FeaturedNeuron, ...]:
        """Return up to `n` neurons worth opening, only of the `eligible` (layer, index); see `featured_rows`.

        Only the excerpts of these are read: if all neurons are eligible, once until the run or the state of its index
        changes.
        """
        if eligible is not None:
            return self._featured(key, model, eligible, n)
        name = ("featured", key, model, n, self.index_state(key).ready)
        return self._cached(key, name, lambda: self._featured(key, model, lambda *_: True, n))

    def _featured(
        self, key: str, model: str, eligible: Callable[[int, int], bool], n: int
    ) -> tuple[FeaturedNeuron, ...]:
        table, groups = self.table(key, model), self.groups(key, model)
        values, _ = ranking(table)
        simulated = table.principal[1] if table.principal and not table.principal[0] else ""
        neurons = []
        for row in featured_rows(table, groups, n, eligible):
            layer, index = int(table.layer[row]), int(table.index[row])
            view = self.neuron(key, model, layer, index, explainer=simulated, excerpts="top")
            value, text = float(values[row]), claim(str(table.explanations[row]))
            excerpt, family = shown_excerpt(view), groups[row].family
            name = neuron_name(index, table.site)
            neurons.append(FeaturedNeuron(model, layer, index, value, family, text, excerpt, name))
        return tuple(neurons)

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
        """Return one neuron. `explainer` is the explainer to simulate; empty stands for the principal one."""
        query = NeuronQuery(key, model, layer, index, split, explainer, excerpts)
        nearest = partial(self.nearest, key, model, layer, index)
        return neuron_view(self._files(key), self.table(key, model), query, nearest)

    def index_named(self, key: str, model: str, name: str) -> int:
        """Return the index of the neuron written as `name`: `17`, or `17+` and `17-` at a site with both ends.

        There `17` alone stands for `17+`. Raises `NotFound` if it is no such name, or without a readable harvest.
        """
        try:
            return named_index(name, self.table(key, model).site)
        except InputError as error:
            raise NotFound(str(error)) from None

    def neuron_name(self, key: str, model: str, index: int) -> str:
        """Return how a neuron of a model is written."""
        return neuron_name(index, self.table(key, model).site)

    def effects_command(self, key: str, model: str) -> str:
        """Return the command that measures which tokens neurons promote.

        If only a sample of neurons was measured, the command measures all of them.
        """
        run = self.run_of(key)
        again = " --neurons 0 --force" if model in run.models("steer") else ""
        return f"cratelm effects --run {run.path} --model {model}{again}"

    def nearest(
        self, key: str, model: str, layer: int, index: int, n: int = _NEAREST, other: str = ""
    ) -> tuple[Neighbour, ...]:
        """Return the neurons that fire on the most similar tokens: `n` of this model and `n` of its twin, or of `other`.

        Empty until the index is ready.
        """
        twin = other or self.run(key).twin(model)
        names = [model, twin] if twin else [model]
        neighbours: list[Neighbour] = []
        for name in names:
            table = self.table(key, name)
            hits = self.index_of(key).nearest(
                model, (layer, index), name, n, self.table(key, model), table
            )
            texts = table.explanations
            neighbours += [
                Neighbour(name, int(table.layer[r]), int(table.index[r]), s, claim(str(texts[r])))
                for r, s in hits
            ]
        return tuple(neighbours)

    def not_explained(self, key: str, models: Iterable[str]) -> dict[str, str]:
        """Return why models cannot be run on their explanations, with the command to type, by name of the model."""
        problems = {}
        for model in models:
            try:
                read_stored_explainer(self.run_of(key), model)
            except InputError as error:
                problems[model] = one_line(error)
        return problems

    # ---- the index --------------------------------------------------------------------------------

    def index_of(self, key: str) -> Index:
        """Return the index of a run. If the run has changed, the index is rebuilt in the background."""
        self.run_of(key)
        index = self._indexes[key]
        index.follow()
        return index

    def index_state(self, key: str) -> IndexState:
        """Return the progress of the index of a run."""
        return self.index_of(key).state

    def start_indexing(self) -> None:
        """Build the indexes of all runs, one after another, in the background."""
        threading.Thread(
            target=lambda: [index.build() for index in self._indexes.values()], daemon=True
        ).start()

    def map(self, key: str, model: str, layer: int) -> tuple[MapPoint, ...] | None:
        """Return a map of a layer, in which neurons that fire on the same tokens are close together.

        None until the map is computed.
        """
        table = self.table(key, model)
        points = self.index_of(key).map(model, layer)
        here = table.rows_of(layer)
        if points is None or len(points) != here.stop - here.start:
            return None
        column = table.best_score()
        scores = column.values[here] if column else np.full(len(points), np.nan)
        texts, groups = table.explanations[here], self.groups(key, model)[here]
        site = table.site
        columns = (np.asarray(of).tolist() for of in (table.index[here], points, scores, texts))
        return tuple(
            MapPoint(i, x, y, None if s != s else s, claim(str(t)), group, neuron_name(i, site))
            for i, (x, y), s, t, group in zip(*columns, groups, strict=True)
        )

    def groups(self, key: str, model: str) -> Sequence[NeuronGroup]:
        """Return the group of each neuron, in the order of `table`.

        Without an explanation by `concepts`, a neuron has no group until the index is ready.
        """
        index = self.index_of(key)
        name = ("groups", key, model, index.state.ready)
        return self._cached(key, name, partial(self._groups, key, model, index))

    def _groups(self, key: str, model: str, index: Index) -> Sequence[NeuronGroup]:
        table = self.table(key, model)
        favourites = index.favourites(model)
        strings = self._strings(key) if favourites is not None else []
        first = [-1] * len(table.layer) if favourites is None else favourites[:, 0].tolist()
        tokens = [strings[t] if 0 <= t < len(strings) else "" for t in first]
        sentences = table.texts.get(("", CONCEPTS))
        texts = [""] * len(tokens) if sentences is None else list(map(str, sentences))
        return neuron_groups(texts, tokens)

    def _strings(self, key: str) -> Sequence[str]:
        """Return the text of each token id; empty if the tokens are missing or damaged."""
        try:
            return self.tokens(key).token_strings
        except (*READ_ERRORS, InputError):
            return []

    def drawing(self, key: str, name: tuple, draw: Callable[[], _T]) -> _T:
        """Return the drawing `name` of a run, drawn once and cached until the run changes."""
        return self._cached(key, ("drawing", key, *name), draw)

    def drawn_map(
        self, key: str, model: str, layer: int, address: Callable[[int], str], *, cached: bool
    ) -> DrawnMap | None:
        """Return the map of a layer; None until it is computed. See `draw_map`.

        If `cached`, it is drawn once, so that `address` must always return the same.
        """

        def draw(points: Sequence[MapPoint]) -> DrawnMap:
            families = [group.family for group in self.groups(key, model)]
            return draw_map(points, colours(families), address)

        return self._of_map(key, model, layer, "map" if cached else "", draw)

    def map_details(self, key: str, model: str, layer: int) -> Any:
        """Return what the map of a layer shows of its neurons on hover, not cached; None until the map is computed.

        See `cratelm.viewer.layer_map.details`. No excerpts are read: the index holds the strongest of each neuron.
        """

        here = _layer_rows(self.table(key, model), model, layer)

        def made(points: Sequence[MapPoint]) -> Any:
            peaks, strings = self.index_of(key).peaks(model), self._strings(key)
            return details(points, peaks.part(here) if peaks and strings else None, strings)

        return self._of_map(key, model, layer, "", made)  # a page asks once; it takes 20 ms

    def _of_map(
        self,
        key: str,
        model: str,
        layer: int,
        name: str,
        make: Callable[[Sequence[MapPoint]], _T],
    ) -> _T | None:
        """Return what `make` makes of the points of a map, cached as `name` unless that is empty."""
        path = self.index_of(key).map_path(model, layer)
        if path is None:
            return None

        def made() -> _T | None:
            # the page and the details of a map are requested one after the other
            here = "points", model, layer, path
            points = self.drawing(key, here, lambda: self.map(key, model, layer))
            return make(points) if points else None

        return self.drawing(key, (name, model, layer, path), made) if name else made()

    def search(
        self, key: str, text: str = "", token: str = "", limit: int = 100, model: str = ""
    ) -> SearchResults:
        """Return the neurons whose explanation contains all words of `text`, or that fire on `token`.

        Searches one model, or all models except the untrained null controls if `model` is empty.
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
                order = np.lexsort((matching, -values))[:limit]  # neurons without a value come last
                hits += [
                    _hit(card.name, table, int(matching[i]), float(values[i]), 0) for i in order
                ]
        hits.sort(key=lambda h: -h.value if h.value == h.value else 1e9)
        return SearchResults(tuple(hits[:limit]), " ".join(sorted(notes - {""})))

    # ---- open files -------------------------------------------------------------------------------

    def tokens(self, key: str) -> TokenStore:
        """Return the run's tokens. Raises `InputError` if the shards are missing or damaged."""
        return self._files(key).tokens()

    def _files(self, key: str) -> NeuronFiles:
        return NeuronFiles(self.run_of(key), partial(self._cached, key))

    def _cached(self, key: str, name: tuple, read: Callable[[], _T]) -> _T:
        return self._cache.get(changed_at(self.run_of(key)), name, read)


def _layer_rows(table: NeuronTable, model: str, layer: int) -> slice:
    """Return the rows of a layer. Raises `NotFound` if the model does not have it."""
    here = table.rows_of(layer)
    if here.start == here.stop:
        layers = ", ".join(map(str, np.unique(table.layer).tolist()))
        raise NotFound(f"{model} has no layer {layer}: its layers are {layers}")
    return here


def _hit(model: str, table: NeuronTable, row: int, value: float, count: int) -> SearchHit:
    neuron = int(table.layer[row]), int(table.index[row])
    rate, text = float(table.firing_rate[row]), claim(str(table.explanations[row]))
    return SearchHit(model, *neuron, text, value, count, rate)
