"""The neurons shown: the best and some at random, with explanation and shaded excerpts.

Only their excerpts and explanations are read, so memory does not grow with the model.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.activations.store import read_records
from cratelm.records import Excerpt, Metric, NeuronId, NeuronRecord, NeuronScore
from cratelm.report.cells import METRIC_NAMES
from cratelm.report.config import ReportConfig
from cratelm.report.llm_explanations import Told, told
from cratelm.report.sections.effects import LogitEffect, promoted
from cratelm.results.run_results import ModelResults, Place, RunResults
from cratelm.score.selection import scored_on
from cratelm.score.simulators import SIMULATORS, simulate
from cratelm.text.display import printable, visible
from cratelm.text.shading import Piece, pieces
from cratelm.text.table import Cell, Column, Table
from cratelm.tokens.shards import TokenStore

BEFORE, AFTER = 24, 16
"""tokens shown before the peak of an excerpt, and from it on"""


@dataclass(frozen=True, eq=False)
class ShownExcerpt:
    label: str
    rows: tuple[tuple[str, tuple[Piece, ...]], ...]
    """name of each row (`true`, `simulated`) and its shaded text"""


@dataclass(frozen=True, eq=False)
class Card:
    """One neuron of the page."""

    neuron: NeuronId
    group: str
    scores: dict[Metric, NeuronScore]
    rank_by: Metric
    firing_rate: float
    """fraction of held-out tokens"""
    maximum: float
    """largest raw activation on the held-out split"""
    text: str
    """the explanation; empty where there is none"""
    told: tuple[Told, ...]
    """what language models say of it"""
    excerpts: tuple[ShownExcerpt, ...]
    effect: LogitEffect | None = None
    """what it writes to the vocabulary; None where that was not measured"""

    @property
    def score(self) -> str:
        return _shown(self.scores.get(self.rank_by))

    @property
    def facts(self) -> str:
        figures = [f"{METRIC_NAMES[m]} {_shown(s)}" for m, s in self.scores.items()]
        rate = f"above 0 on {100 * self.firing_rate:.3g}% of held-out tokens"
        return " · ".join([*figures, rate, f"largest activation {self.maximum:.3g}"])

    @property
    def effects(self) -> list[tuple[str, str]]:
        """Tokens that it promotes and suppresses most where it fires."""
        if self.effect is None:
            return []
        sides = (("promotes", self.effect.promoted), ("suppresses", self.effect.suppressed))
        return [(name, "  ".join(map(visible, tokens))) for name, tokens in sides if tokens]


@dataclass(frozen=True, eq=False)
class Gallery:
    model: str
    groups: tuple[tuple[str, tuple[Card, ...]], ...]


def galleries(results: RunResults, config: ReportConfig) -> list[Gallery]:
    """A gallery of each model that is not a null; none where tokens, harvest or explanations are gone."""
    if results.tokens is None or not config.neurons:
        return []
    store = TokenStore(results.run.stage("tokens").path)
    shown = [
        m
        for m in results.principal
        if "activations" in m.completions and any("explanations" in s.completions for s in m.sets)
    ]
    made = [_gallery(results, m, config, store) for m in shown]
    return [g for g in made if any(cards for _, cards in g.groups)]


def neuron_table(shown: Sequence[Gallery], metrics: Sequence[Metric]) -> Table:
    """The neurons shown, as a table."""
    with_model = any(card.told for g in shown for _, cards in g.groups for card in cards)
    columns = (
        Column("model", "model"),
        Column("group", "chosen"),
        Column("layer", "layer", "d"),
        Column("index", "index", "d"),
        *(Column(m, f"{METRIC_NAMES[m]} × 100", ".1f") for m in metrics),
        Column("firing_rate", "firing rate, %", ".3g"),
        Column("maximum", "largest activation", ".3g"),
        Column("explanation", "explanation"),
        *([Column("told", "explanation by a language model")] if with_model else []),
    )
    rows = [
        _table_row(card, metrics)[: len(columns)]
        for g in shown
        for _, cards in g.groups
        for card in cards
    ]
    return Table("neurons", "Neurons shown", columns, tuple(rows))


def _table_row(card: Card, metrics: Sequence[Metric]) -> tuple[Cell, ...]:
    values = [card.scores[m].score.value if m in card.scores else None for m in metrics]
    return (
        card.neuron.model,
        card.group,
        card.neuron.layer,
        card.neuron.index,
        *(None if v is None else 100 * v for v in values),
        100 * card.firing_rate,
        card.maximum,
        card.text,
        "; ".join(f"{t.who}: {t.text}" for t in card.told),
    )


def _gallery(
    results: RunResults, model: ModelResults, config: ReportConfig, store: TokenStore
) -> Gallery:
    mine = [s for s in model.scores if s.explainer == results.explainer]
    metric = results.rank_by(config)
    ranked = [s for s in mine if s.metric == metric]
    chosen = {
        f"{config.neurons} best by {METRIC_NAMES[metric]}": _best(ranked, config.neurons),
        f"{config.neurons} at random": _random(ranked, config.neurons, config.seed),
    }
    asked = [s for s in ranked if any(_at(s) in found.places for found in model.with_model)]
    if asked:
        group = f"{config.neurons} at random of those that a language model was asked about"
        chosen[group] = _random(asked, config.neurons, config.seed)
    places = sorted({place for group in chosen.values() for place in group})
    explained = {}
    if "explanations" in model.completions:
        folder = results.run.stage("explanations", model.name).path
        explained = _explanations(folder, results.explainer, places)
    by_model = told(results.run, model, places)
    harvest = results.run.stage("activations", model.name).path
    effects = results.run.stage("steer", model.name).path
    held_out, fit = (_records(harvest, split, places) for split in ("held_out", "fit"))
    scores: dict[Place, dict[Metric, NeuronScore]] = {place: {} for place in places}
    for s in mine:
        place = (s.neuron.layer, s.neuron.index)
        if place in scores:
            scores[place][s.metric] = s

    def card(place: Place, group: str) -> Card:
        record, (text, payload) = held_out[place], explained.get(place, ("", None))
        excerpts = _excerpts(fit[place], record, results.explainer, payload, config.excerpts, store)
        return Card(
            neuron=record.neuron,
            group=group,
            scores=scores[place],
            rank_by=metric,
            firing_rate=record.summary.firing_rate,
            maximum=record.summary.maximum,
            text=printable(text),
            told=by_model.get(place, ()),
            excerpts=tuple(excerpts),
            effect=promoted(effects, record.neuron),
        )

    groups = tuple((g, tuple(card(p, g) for p in members)) for g, members in chosen.items())
    return Gallery(model.name, groups)


def _at(s: NeuronScore) -> Place:
    return s.neuron.layer, s.neuron.index


def _best(scores: Sequence[NeuronScore], n: int) -> list[Place]:
    valued = [(s.score.value, s.neuron) for s in scores if s.score.value is not None]
    ordered = sorted(valued, key=lambda pair: (-pair[0], pair[1]))
    return [(neuron.layer, neuron.index) for _, neuron in ordered[:n]]


def _random(scores: Sequence[NeuronScore], n: int, seed: int) -> list[Place]:
    """Of all neurons that were to be scored, those without a value among them."""
    places = sorted({(s.neuron.layer, s.neuron.index) for s in scores})
    drawn = np.random.default_rng(seed).choice(len(places), min(n, len(places)), replace=False)
    return [places[i] for i in sorted(drawn)]


def _explanations(
    folder: Path, explainer: str, places: Sequence[Place]
) -> dict[Place, tuple[str, dict[str, Any]]]:
    """Text and payload of these neurons alone: a large model's payloads are gigabytes."""
    rows = pq.read_table(
        folder / "explanations.parquet",
        columns=["layer", "index", "text", "payload"],
        filters=[("explainer", "==", explainer), ("index", "in", sorted({i for _, i in places}))],
    ).to_pylist()
    wanted = set(places)
    return {
        (r["layer"], r["index"]): (r["text"], json.loads(r["payload"]))
        for r in rows
        if (r["layer"], r["index"]) in wanted
    }


def _records(harvest: Path, split: Any, places: Sequence[Place]) -> dict[Place, NeuronRecord]:
    found = {}
    for layer in sorted({layer for layer, _ in places}):
        indices = [index for at, index in places if at == layer]
        for record in read_records(harvest, split, layers=[layer], indices=indices):
            found[layer, record.neuron.index] = record
    return found


def _excerpts(
    fit: NeuronRecord,
    held_out: NeuronRecord,
    explainer: str,
    payload: dict[str, Any] | None,
    n: int,
    store: TokenStore,
) -> Iterator[ShownExcerpt]:
    """The strongest fit excerpt, then `n` of those scored on: strong ones, the last a random one."""
    if n == 0:
        return
    seen = [e for e in fit.of_kind("top") if e.rank == 0]
    scored = scored_on(held_out, "top_and_random")
    strong, random = ([e for e in scored if e.kind == kind] for kind in ("top", "random"))
    unseen = [*strong[: max(1, n - 1)], *random][:n]
    maximum = max((float(e.activations.max()) for e in [*seen, *unseen]), default=0.0)
    for excerpt in seen:
        label = "Fit split, its strongest excerpt: the explainer saw it"
        yield ShownExcerpt(label, (_row("true", excerpt, excerpt.activations, maximum, store),))
    simulated = _simulated(explainer, payload, unseen)
    top = max((float(values.max()) for values in simulated or []), default=0.0)
    for place, excerpt in enumerate(unseen):
        rows = [_row("true", excerpt, excerpt.activations, maximum, store)]
        if simulated:
            rows.append(_row("simulated", excerpt, simulated[place], top, store))
        which = f"rank {excerpt.rank}" if excerpt.kind == "top" else "around a random token"
        yield ShownExcerpt(f"Held-out split, {which}: unseen by the explainer", tuple(rows))


def _simulated(
    explainer: str, payload: dict[str, Any] | None, excerpts: Sequence[Excerpt]
) -> list[NDArray[np.float64]] | None:
    """None where there is no explanation, or its simulator is not one that runs here."""
    if payload is None or explainer not in SIMULATORS or not excerpts:
        return None
    return simulate(explainer, payload, [e.token_ids for e in excerpts])


def _row(
    name: str, excerpt: Excerpt, values: Any, maximum: float, store: TokenStore
) -> tuple[str, tuple[Piece, ...]]:
    part = excerpt.narrowed(BEFORE, AFTER)
    start = excerpt.peak - part.peak
    shown = values[start : start + len(part)]
    return name, pieces(store.decode_tokens(part.token_ids), shown, maximum, part.peak)


def _shown(score: NeuronScore | None) -> str:
    if score is None:
        return "–"
    return (
        str(score.score.status) if score.score.value is None else f"{100 * score.score.value:.1f}"
    )
