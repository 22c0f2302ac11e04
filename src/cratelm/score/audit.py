"""Audit of metrics: does a metric fall when labels are missing from an explanation, or when it has too many?

*Planted* (after Oikarinen, Yan & Weng, ICML 2025, arXiv 2506.05774): true activations a in {0, 1}, 1 at a rate g, and the
perfect simulation s = a. Then

    missing labels   half of the ones in s become 0
    extra labels     as many zeros in s become 1 as there are ones: the explanation is twice too broad

and the change of the metric M, relative to its range, is

    delta = (M(a, s') - M(a, s)) / (M_max - M_min).

A metric passes if delta < -0.001 in nearly all trials (`NEARLY_ALL`) at every rate of `RATES`. One that does not fall
rewards, or overlooks, an explanation that is too narrow or too broad.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cratelm.records import OPENAI_QUANTILES
from cratelm.score.config import PER_BIN
from cratelm.stats.grouped import Groups, Ranking
from cratelm.stats.stratified import stratified_correlation
from cratelm.text.table import align

Change = Literal["missing", "extra"]
CHANGES: tuple[Change, ...] = ("missing", "extra")
RATES = (0.499, 0.1, 0.01, 0.001, 0.0001)
"""share of tokens on which the planted neuron is active"""
FALL = 0.001
"""a metric has noticed a change if it fell by more than this part of its range"""
NEARLY_ALL = 0.95
"""share of trials in which a metric must notice"""
SAMPLED = 25
"""tokens of each kind in the top-and-random sample"""
Bits = NDArray[np.int64]
Metric = Callable[[Bits, Bits, np.random.Generator], float]
"""of true and simulated activations [n], all 0 or 1"""


@dataclass(frozen=True)
class PlantedAudit:
    """How often a metric noticed a planted change, at one rate."""

    metric: str
    change: Change
    rate: float
    """share of tokens on which the neuron is active"""
    delta: float
    """mean change over the trials, in parts of the metric's range"""
    noticed: float
    """share of trials in which it fell by more than `FALL`"""
    trials: int


def planted_audit(
    n_tokens: int = 100_000,
    trials: int = 100,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
) -> list[PlantedAudit]:
    """Return how often each metric notices each change, by metric, change and rate; None: all of `METRICS`.

    At the lowest rate `n_tokens` must have several ones: 100,000 tokens have 10.
    """
    chosen = {name: METRICS[name] for name in (METRICS if metrics is None else metrics)}
    found = []
    for change in CHANGES:
        for rate in RATES:
            deltas: dict[str, list[float]] = {name: [] for name in chosen}
            for trial in range(trials):
                rng = np.random.default_rng([seed, CHANGES.index(change), RATES.index(rate), trial])
                true = _planted(n_tokens, rate, rng)
                simulated = changed_labels(true, change, rng)
                drawn = int(rng.integers(2**63))
                for name, (metric, low, high) in chosen.items():
                    # both are computed on the same sample, so that only the labels differ
                    before, after = (
                        metric(true, s, np.random.default_rng(drawn)) for s in (true, simulated)
                    )
                    deltas[name].append((after - before) / (high - low))
            for name, of_metric in deltas.items():
                fell = float(np.mean(np.array(of_metric) < -FALL))
                found.append(
                    PlantedAudit(name, change, rate, float(np.mean(of_metric)), fell, trials)
                )
    return sorted(found, key=lambda a: (list(chosen).index(a.metric), CHANGES.index(a.change)))


def passes(audits: list[PlantedAudit], metric: str, change: Change) -> bool:
    """Return whether a metric noticed a change in nearly all trials at every rate."""
    of = [a for a in audits if a.metric == metric and a.change == change]
    return all(a.noticed >= NEARLY_ALL for a in of)


def table(audits: list[PlantedAudit]) -> list[str]:
    """Return the audit as lines of text: the share of trials in which each metric noticed."""
    rows = [["metric", "change", *(f"{rate:g}" for rate in RATES), "passes"]]
    for metric in dict.fromkeys(a.metric for a in audits):
        for change in CHANGES:
            of = [a for a in audits if a.metric == metric and a.change == change]
            shares = [f"{a.noticed:.3g}" for a in of]
            rows.append(
                [metric, change, *shares, "yes" if passes(audits, metric, change) else "no"]
            )
    return align(rows, [False, False, *[True] * len(RATES), False])


def _planted(n_tokens: int, rate: float, rng: np.random.Generator) -> Bits:
    true = np.zeros(n_tokens, np.int64)
    true[rng.choice(n_tokens, round(rate * n_tokens), replace=False)] = 1
    return true


def changed_labels(true: Bits, change: Change, rng: np.random.Generator) -> Bits:
    """Return the perfect simulation of `true` [n] with half of its ones missing, or with as many more."""
    ones, zeros = np.flatnonzero(true), np.flatnonzero(true == 0)
    simulated = true.copy()
    if change == "missing":
        simulated[rng.choice(ones, len(ones) // 2, replace=False)] = 0
    else:
        simulated[rng.choice(zeros, min(len(ones), len(zeros)), replace=False)] = 1
    return simulated


def _groups(true: Bits, simulated: Bits) -> Groups:
    n = np.bincount(simulated, minlength=2)
    total = np.bincount(simulated, true, minlength=2).astype(np.float64)
    return Groups(np.array([0.0, 1.0]), n, total, float(true.sum()))


def _of_groups(measure: Callable[[Groups], float | None]) -> Metric:
    return lambda true, simulated, _: measure(_groups(true, simulated)) or 0.0


def _of_ranking(measure: Callable[[Ranking], float | None]) -> Metric:
    def metric(true: Bits, simulated: Bits, _: np.random.Generator) -> float:
        groups = _groups(true, simulated)
        return measure(groups.ordered(groups.total.astype(np.int64))) or 0.0

    return metric


def _recall(true: Bits, simulated: Bits, _: np.random.Generator) -> float:
    return float(simulated @ true / true.sum())


def _precision(true: Bits, simulated: Bits, _: np.random.Generator) -> float:
    return float(simulated @ true / max(1, simulated.sum()))


def _overlap(number: int) -> Metric:
    return _of_ranking(lambda ranking: (ranking.overlap() or (0.0, 0.0))[number])


def _top_and_random(true: Bits, simulated: Bits, rng: np.random.Generator) -> float:
    """Return the correlation on `SAMPLED` tokens with the highest activation and as many random ones."""
    ones = rng.permutation(np.flatnonzero(true))[:SAMPLED]
    chosen = np.concatenate([ones, rng.integers(0, len(true), SAMPLED)])
    return _groups(true[chosen], simulated[chosen]).correlation() or 0.0


def _estimated(true: Bits, simulated: Bits, rng: np.random.Generator) -> float:
    """Return the correlation over all tokens, estimated from `PER_BIN` draws in each quantile bin.

    Bins between equal quantiles are empty, as in a harvest: at rates of 0.1 and less all zeros are in one bin, and at
    the lowest rate the ones are in it, too.
    """
    edges = np.sort(true)[[int(q * (len(true) - 1)) for q in OPENAI_QUANTILES[:-1]]]
    bins = np.searchsorted(edges, true, side="right") - 1
    sizes = np.bincount(bins, minlength=len(edges))
    members = [np.flatnonzero(bins == b) for b in np.flatnonzero(sizes)]
    drawn = np.concatenate([of[rng.integers(0, len(of), PER_BIN)] for of in members])
    found = stratified_correlation(true[drawn], simulated[drawn], bins[drawn], sizes, resamples=0)
    return found.value or 0.0


METRICS: Mapping[str, tuple[Metric, float, float]] = {
    "correlation": (_of_groups(Groups.correlation), -1, 1),
    "cosine": (_of_groups(Groups.cosine), -1, 1),
    "average precision": (_of_ranking(Ranking.average_precision), 0, 1),
    "F1": (_overlap(0), 0, 1),
    "IoU": (_overlap(1), 0, 1),
    "AUC": (_of_ranking(Ranking.roc_area), 0, 1),
    "recall": (_recall, 0, 1),
    "precision": (_precision, 0, 1),
    "top and random": (_top_and_random, -1, 1),
    "all tokens, estimated": (_estimated, -1, 1),
}
"""metrics by name, each with the lowest and the highest value that it can have"""
