"""The gallery of neurons: the best and some at random, with explanations and shaded excerpts.

Only the excerpts and explanations of these neurons are read, so memory use does not grow with the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from cratelm.activations.store import read_records
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.predict import is_concept_payload
from cratelm.explain.concepts.stored import concept_reader
from cratelm.records import Excerpt, Metric, NeuronId, NeuronKey, NeuronRecord, NeuronScore, Split
from cratelm.report.cells import METRIC_NAMES
from cratelm.report.config import ReportConfig
from cratelm.report.llm_explanations import LlmExplanation, llm_explanations
from cratelm.results.excerpts import largest, shade, simulate_excerpts, unit_at
from cratelm.results.neuron_view import read_explanations_of
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.score.selection import scored_on
from cratelm.stats.score_table import ScoreTable
from cratelm.steer.store import LogitEffect, read_logit_effect
from cratelm.text.display import printable, visible
from cratelm.text.shading import shaded_html
from cratelm.text.table import Cell, Column, Table
from cratelm.tokens.shards import TokenStore

BEFORE, AFTER = 24, 16
"""number of tokens shown before the peak of an excerpt, and from the peak on"""


@dataclass(frozen=True, eq=False)
class ShownExcerpt:
    """One excerpt of a card."""

    label: str
    rows: tuple[tuple[str, Markup], ...]
    """name (`true` or `simulated`) and shaded text of each row"""


@dataclass(frozen=True, eq=False)
class Card:
    """One neuron of the gallery."""

    neuron: NeuronId
    group: str
    """how the neuron was selected, in words"""
    scores: dict[Metric, NeuronScore]
    rank_by: Metric
    firing_rate: float
    """fraction of held-out tokens on which the neuron fires"""
    maximum: float
    """largest raw activation on the held-out split"""
    text: str
    """the explanation; empty if there is none"""
    llm_explanations: tuple[LlmExplanation, ...]
    excerpts: tuple[ShownExcerpt, ...]
    effect: LogitEffect | None = None
    """tokens that the neuron promotes and suppresses; None if this was not measured"""
    token_share: float | None = None
    """fraction of the variance that the last token alone explains; None if there is no figure"""

    @property
    def score(self) -> str:
        """Return the score that ranks the neuron, as text."""
        return _shown(self.scores.get(self.rank_by))

    @property
    def facts(self) -> str:
        """Return the neuron's scores, token share, firing rate and largest activation, as text."""
        scores = [f"{METRIC_NAMES[m]} {_shown(s)}" for m, s in self.scores.items()]
        if self.token_share is not None:
            scores.append(f"token share {100 * self.token_share:.0f}%")
        rate = f"fires on {100 * self.firing_rate:.3g}% of held-out tokens"
        return " · ".join([*scores, rate, f"largest activation {self.maximum:.3g}"])

    @property
    def effects(self) -> list[tuple[str, str]]:
        """Return the tokens that the neuron promotes and suppresses most when it fires, as two named lines."""
        if self.effect is None:
            return []
        sides = (("promotes", self.effect.promoted), ("suppresses", self.effect.suppressed))
        return [(name, "  ".join(map(visible, tokens))) for name, tokens in sides if tokens]


@dataclass(frozen=True, eq=False)
class Gallery:
    """The neurons of one model in the gallery, by group."""

    model: str
    groups: tuple[tuple[str, tuple[Card, ...]], ...]
    """how the neurons of each group were selected, and their cards"""


def galleries(results: RunResults, config: ReportConfig) -> list[Gallery]:
    """Return a gallery for each model that is not a null control and has tokens, a harvest and explanations."""
    if results.tokens is None or not config.neurons:
        return []
    store = TokenStore(results.run.stage("tokens").path)
    models = [
        m
        for m in results.principal
        if "activations" in m.completions
        and any("explanations" in s.completions for s in m.sets)
        # The token ids of a harvest of earlier tokens would be decoded to the wrong text.
        and m.completions["activations"].inputs.get("tokens") in (None, results.tokens.identity)
    ]
    of_models = [_gallery(results, m, config, store) for m in models]
    return [g for g in of_models if any(cards for _, cards in g.groups)]


def neuron_table(of_models: Sequence[Gallery], metrics: Sequence[Metric]) -> Table:
    """Return the neurons of the galleries as a table."""
    by_llm = any(
        card.llm_explanations for g in of_models for _, cards in g.groups for card in cards
    )
    columns = (
        Column("model", "model"),
        Column("group", "group"),
        Column("layer", "layer", "d"),
        Column("index", "index", "d"),
        *(Column(m, f"{METRIC_NAMES[m]} × 100", ".1f") for m in metrics),
        Column("firing_rate", "firing rate, %", ".3g"),
        Column("maximum", "largest activation", ".3g"),
        Column("explanation", "explanation"),
        *([Column("llm_explanation", "explanation by a language model")] if by_llm else []),
    )
    rows = [
        _table_row(card, metrics)[: len(columns)]
        for g in of_models
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
        _index_cell(card.neuron),
        *(None if v is None else 100 * v for v in values),
        100 * card.firing_rate,
        card.maximum,
        card.text,
        "; ".join(f"{e.source}: {e.text}" for e in card.llm_explanations),
    )


def _index_cell(neuron: NeuronId) -> Cell:
    """Return the index as a number, or an end of a neuron as it is written."""
    return neuron.index if neuron.n_ends == 1 else neuron.name


def _gallery(
    results: RunResults, model: ModelResults, config: ReportConfig, store: TokenStore
) -> Gallery:
    scores = model.scores.select(explainer=results.explainer)
    metric = config.ranking_metric(results.metrics)
    ranked = scores.select(metric=metric)
    chosen = {
        f"{config.neurons} best by {METRIC_NAMES[metric]}": _best(ranked, config.neurons),
        f"{config.neurons} at random": _random(ranked, config.neurons, config.seed),
    }
    by_llm_too = ranked.of_neurons(
        frozenset[NeuronKey]().union(*(s.neurons for s in model.llm_sets))
    )
    if len(by_llm_too):
        group = f"{config.neurons} at random among those for which a language model was used"
        chosen[group] = _random(by_llm_too, config.neurons, config.seed)
    neurons = sorted({neuron for group in chosen.values() for neuron in group})
    run = results.run
    explained = {}
    if "explanations" in model.completions:
        folder = run.stage("explanations", model.name).path
        explanations = read_explanations_of(folder, neurons, results.explainer)
        explained = {e.neuron.key: e for e in explanations}
    concepts = None
    if any(is_concept_payload(e.payload) for e in explained.values()):
        concepts = concept_reader(run.stage("explanations", model.name).path, store.token_strings)
    by_llm = llm_explanations(run, model, neurons)
    harvest, effects = (run.stage(s, model.name).path for s in ("activations", "steer"))
    held_out, fit = (_records(harvest, split, neurons) for split in ("held_out", "fit"))
    scores_of: dict[NeuronKey, dict[Metric, NeuronScore]] = {neuron: {} for neuron in neurons}
    for s in scores.of_neurons(neurons):
        scores_of[s.neuron.key][s.metric] = s

    def card(key: NeuronKey, group: str) -> Card:
        record, explanation = held_out[key], explained.get(key)
        payload = explanation.payload if explanation else None
        excerpts = _excerpts(
            fit[key], record, results.explainer, payload, config.excerpts, store, concepts
        )
        return Card(
            neuron=record.neuron,
            group=group,
            scores=scores_of[key],
            rank_by=metric,
            firing_rate=record.summary.firing_rate,
            maximum=record.summary.maximum,
            text=printable(explanation.text) if explanation else "",
            llm_explanations=by_llm.get(key, ()),
            excerpts=tuple(excerpts),
            effect=read_logit_effect(effects, record.neuron),
            token_share=model.token_shares.get(key),
        )

    groups = tuple((g, tuple(card(n, g) for n in members)) for g, members in chosen.items())
    return Gallery(model.name, groups)


def _best(scores: ScoreTable, n: int) -> list[NeuronKey]:
    valued = scores.where(scores.has("value"))
    order = np.lexsort((valued.places(), -valued.numbers("value")))
    return [s.neuron.key for s in valued.taken(order[:n])]


def _random(scores: ScoreTable, n: int, seed: int) -> list[NeuronKey]:
    """Return up to `n` random neurons among all that were selected for scoring, including those without a value."""
    neurons = sorted(scores.neurons())
    drawn = np.random.default_rng(seed).choice(len(neurons), min(n, len(neurons)), replace=False)
    return [neurons[i] for i in sorted(drawn)]


def _records(
    harvest: Path, split: Split, neurons: Sequence[NeuronKey]
) -> dict[NeuronKey, NeuronRecord]:
    records = {}
    for layer in sorted({n.layer for n in neurons}):
        indices = [n.index for n in neurons if n.layer == layer]
        for record in read_records(harvest, split, layers=[layer], indices=indices):
            records[record.neuron.key] = record
    return records


def _excerpts(
    fit: NeuronRecord,
    held_out: NeuronRecord,
    explainer: str,
    payload: Mapping[str, Any] | None,
    n: int,
    store: TokenStore,
    concepts: ConceptReader | None,
) -> Iterator[ShownExcerpt]:
    """Yield the strongest fit excerpt, then `n` held-out excerpts: the strongest, and last a random one."""
    if n == 0:
        return
    fit_excerpts = [e for e in fit.of_kind("top") if e.rank == 0]
    scored = scored_on(held_out, "top_and_random")
    strong, random = ([e for e in scored if e.kind == kind] for kind in ("top", "random"))
    unseen = [*strong[: max(1, n - 1)], *random][:n]
    top = largest([e.activations for e in [*fit_excerpts, *unseen]])
    for excerpt in fit_excerpts:
        label = "Fit split, strongest excerpt: seen by the explainer"
        yield ShownExcerpt(label, (_row("true", excerpt, excerpt.activations, top, store),))
    simulated = simulate_excerpts(explainer, payload, unseen, concepts)
    simulated_top = largest(simulated)
    for number, excerpt in enumerate(unseen):
        rows = [_row("true", excerpt, excerpt.activations, top, store)]
        if simulated:
            rows.append(_row("simulated", excerpt, simulated[number], simulated_top, store))
        origin = f"rank {excerpt.rank}" if excerpt.kind == "top" else "around a random token"
        yield ShownExcerpt(f"Held-out split, {origin}: not seen by the explainer", tuple(rows))


def _row(
    name: str, excerpt: Excerpt, values: ArrayLike, maximum: float, store: TokenStore
) -> tuple[str, Markup]:
    part = excerpt.narrowed(BEFORE, AFTER)
    start = excerpt.peak - part.peak
    activations = np.asarray(values)[start : start + len(part)]
    tokens = shade(store, part.token_ids, activations, maximum)
    peak = unit_at(store, part.token_ids, part.peak)
    return name, shaded_html(tokens, peak, every_value=False)


def _shown(score: NeuronScore | None) -> str:
    if score is None:
        return "–"
    return (
        str(score.score.status) if score.score.value is None else f"{100 * score.score.value:.1f}"
    )
