"""Several seeds of one model in a run: which models these are, and the scores of their neurons.

A name alone does not make a seed: models are grouped by their usual names (`crate-2l`, `crate-2l-seed1`), and compared
by their records. A model that was not made with the options of the others, or with a seed that another has, is excluded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.analysis.seeds_store import different_option
from cratelm.records import Metric, Status
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.results.stages import MODEL_STAGES
from cratelm.runs.names import seed_of
from cratelm.score.store import read_token_shares, read_whole_scores
from cratelm.score.whole_records import WholeScore
from cratelm.score.whole_summary import ALL_TOKENS

TOKEN_SHARE, PRECISION = "token_share", "precision_top"
WHOLE_FIGURES = {ALL_TOKENS: "correlation", PRECISION: "precision_top"}
"""measures over all held-out tokens that depend on the explainer, and their fields in `WholeScore`"""
Layers = Mapping[int, NDArray[np.float64]]
"""values [n] of the neurons of each layer that have one"""


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Models of a run that differ only in their seed."""

    base: str
    """usual name of the model with seed 0"""
    models: Mapping[int, ModelResults]
    """by seed, ascending"""
    excluded: Mapping[str, str]
    """models with such a name that do not belong to the group, each with the reason"""


@dataclass(frozen=True)
class SeedScores:
    """The scores of the neurons of one seed under one measure."""

    values: Layers
    undefined: int
    dead: int
    failed: int


Measure = tuple[str, str]
"""explainer, empty if there is none, and a metric, `ALL_TOKENS`, `PRECISION` or `TOKEN_SHARE`"""


def seed_groups(results: RunResults) -> list[SeedGroup]:
    """Return the models of a report of which there are two or more seeds, in the order of the report."""
    return [group for group in _groups(results) if len(group.models) > 1]


def excluded_seeds(results: RunResults) -> list[str]:
    """Return a line for each model that has the name of a seed, but is not one, with the reason."""
    return [
        f"{name} as a seed of {group.base}: it {why}"
        for group in _groups(results)
        for name, why in group.excluded.items()
    ]


def _groups(results: RunResults) -> list[SeedGroup]:
    by_base: dict[str, list[ModelResults]] = {}
    for m in results.models:
        by_base.setdefault(seed_of(m.name)[0], []).append(m)
    return [_group(base, models) for base, models in by_base.items()]


def _group(base: str, models: Iterable[ModelResults]) -> SeedGroup:
    by_seed: dict[int, ModelResults] = {}
    excluded: dict[str, str] = {}
    for m in models:
        seed, first = _seed(m), next(iter(by_seed.values()), None)
        different = _different_option(first, m) if first else ""
        if different:
            excluded[m.name] = different
        elif seed in by_seed:
            excluded[m.name] = f"has seed {seed}, as {by_seed[seed].name} has"
        else:
            by_seed[seed] = m
    return SeedGroup(base, dict(sorted(by_seed.items())), excluded)


def _seed(m: ModelResults) -> int:
    """Return the seed of the training, by its record, or by the name if the model was not trained in the run.

    The record of a control made from a trained model has the seed of the control.
    """
    done = m.completions.get("model")
    if done is None or done.config.get("null"):
        return seed_of(m.name)[1]
    return int(done.config["seed"])


def _different_option(first: ModelResults, m: ModelResults) -> str:
    """Return the first option, in words, by which the stages of two models differ; empty if only the seeds do."""
    pairs = ((first.completions.get(stage), m.completions.get(stage)) for stage in MODEL_STAGES)
    found = (different_option(a, b) for a, b in pairs if a and b)
    return next(filter(None, found), "")


def read_seed_scores(results: RunResults, group: SeedGroup) -> dict[Measure, dict[int, SeedScores]]:
    """Return the scores of each measure that every seed of the group has, by seed."""
    by_seed = {seed: read_model_scores(results, m) for seed, m in group.models.items()}
    first = next(iter(by_seed.values()))
    return {
        measure: {seed: scores[measure] for seed, scores in by_seed.items()}
        for measure in first
        if all(measure in scores for scores in by_seed.values())
    }


def read_model_scores(
    results: RunResults,
    m: ModelResults,
    figures: Mapping[str, str] = MappingProxyType(WHOLE_FIGURES),
) -> dict[Measure, SeedScores]:
    """Return the scores of one model under each measure; `figures` are those over all held-out tokens, as `WHOLE_FIGURES`."""
    found: dict[Measure, SeedScores] = {}
    whole: dict[str, list[WholeScore]] = {}
    folder = results.run.stage("scores", m.name).path
    if m.all_tokens is not None:
        for score in read_whole_scores(folder):
            if score.control == "none":
                whole.setdefault(score.explainer, []).append(score)
        shares = read_token_shares(folder)
        values = _by_layer((s.neuron.layer, s.token_share) for s in shares)
        undefined = sum(s.token_share is None for s in shares)
        found["", TOKEN_SHARE] = SeedScores(values, undefined, 0, 0)
    for explainer in results.explainers:
        for metric in results.metrics:
            if (scores := _of_metric(m, explainer, metric)) is not None:
                found[explainer, metric] = scores
        for measure, figure in figures.items():
            if explainer in whole:
                found[explainer, measure] = _of_whole(whole[explainer], figure)
    return found


def _of_metric(m: ModelResults, explainer: str, metric: Metric) -> SeedScores | None:
    statistics = m.find(explainer, metric)
    if statistics is None:
        return None
    scores = m.scores.select(explainer=explainer, metric=metric)
    scores = scores.where(scores.has("value"))
    pairs = zip(scores.numbers("layer").tolist(), scores.numbers("value").tolist(), strict=True)
    counts = statistics.counts
    return SeedScores(_by_layer(pairs), counts.undefined, counts.dead, counts.failed)


def _of_whole(scores: list[WholeScore], figure: str) -> SeedScores:
    dead = sum(s.status is Status.DEAD for s in scores)
    missing = sum(getattr(s, figure) is None for s in scores if s.status is not Status.DEAD)
    alive = (s for s in scores if s.status is not Status.DEAD)
    return SeedScores(
        _by_layer((s.neuron.layer, getattr(s, figure)) for s in alive), missing, dead, 0
    )


def _by_layer(pairs: Iterable[tuple[int, Any]]) -> Layers:
    """Return pairs of a layer and a value, without those whose value is None, as arrays."""
    lists: dict[int, list[float]] = {}
    for layer, value in pairs:
        if value is not None:
            lists.setdefault(int(layer), []).append(float(value))
    return {layer: np.array(values) for layer, values in sorted(lists.items())}
