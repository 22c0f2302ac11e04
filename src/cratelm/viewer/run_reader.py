"""Runs, read as pages ask for them: nothing is read before, and never a whole run.

Files may be missing, half-finished or damaged; what is there is shown, and what is not is said.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.results.neuron_table import READ_ERRORS, Columns, changed_at, one_line, read_columns
from cratelm.results.neuron_view import NeuronFiles, NeuronQuery, neuron_view
from cratelm.results.run_summary import run_card
from cratelm.results.views import (
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
    Shown,
)
from cratelm.runs import Run
from cratelm.tokens.shards import TokenStore
from cratelm.viewer.cache import Kept
from cratelm.viewer.index import Index
from cratelm.viewer.layers import layer_page

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
            name = Path(path).resolve().name or "run"  # "/" has none
            key, number = name, 1
            while key in self._runs:
                number += 1
                key = f"{name}-{number}"
            self._runs[key] = Run(Path(path))
        self._kept = Kept()
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
        return self._kept.get(("card", key), changed_at(run), lambda: run_card(key, run))

    def columns(self, key: str, model: str) -> Columns:
        """The neurons of a model as columns."""
        run = self.run_of(key)
        if model not in run.models("activations"):
            self.run(key).model(model)
            raise NotFound(f"{key} has no finished harvest of {model}")
        try:
            return self._kept.get(
                ("columns", key, model), changed_at(run), lambda: read_columns(run, model)
            )
        except READ_ERRORS as error:
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

    def spreads(self, key: str, model: str, layer: int) -> tuple[ScoreHistogram, ...]:
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
            found.append(ScoreHistogram(metric, mean, len(known), scored, tuple(counts.tolist())))
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
        asked = NeuronQuery(key, model, layer, index, split, explainer, shown)
        return neuron_view(
            self._files(key),
            self.columns(key, model),
            asked,
            lambda: self.nearest(key, model, layer, index),
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

        return self._kept.get(("map", key, model, layer), state, made)

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
        return self._files(key).tokens()

    def _files(self, key: str) -> NeuronFiles:
        return NeuronFiles(self.run_of(key), self._kept)


def _hit(model: str, columns: Columns, row: int, value: float, count: int) -> SearchHit:
    place = int(columns.layer[row]), int(columns.index[row])
    fires = float(columns.firing_rate[row])
    return SearchHit(model, *place, str(columns.text()[row]), value, count, fires)
