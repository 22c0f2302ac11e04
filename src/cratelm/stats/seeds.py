"""Statistics of several seeds of the same recipe: intervals over seeds and neurons, families of tests, matched neurons.

One trained model is one draw: the interval over its neurons says nothing about another seed. Here seeds are resampled
with replacement, and within each drawn seed the neurons of each layer. Layers are not resampled, because every seed has
exactly these, and each counts the same (`cratelm.stats.scores`). Two models are compared within their seeds, which share
data and order.

Shape legend: S seeds, L layers, n neurons of a layer, R resamples, N tokens, A and B neurons of two models.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError
from cratelm.records import Interval
from cratelm.stats.intervals import percentile_bounds, resampled_means

Layers = Mapping[int, ArrayLike]
"""values [n] of the neurons of each layer, of one seed"""
Array = NDArray[np.float64]


def mean_over_seeds(
    seeds: Sequence[Layers], *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Return the mean over S seeds of the mean over layers, with its hierarchical bootstrap interval.

    `n` of the interval is S. With one seed the interval is over its neurons alone. Raises `InputError` for no seeds, or
    for layers without values.
    """
    means = np.array([mean_over_layers(of) for of in _checked(seeds)])
    drawn = _resampled(seeds, resamples, np.random.default_rng(seed))
    low, high = percentile_bounds(drawn.mean(1), confidence)
    return Interval(float(means.mean()), low, high, len(seeds))


class SeedComparison(NamedTuple):
    """Models a minus models b of the same seeds."""

    difference: Interval
    """mean over S pairs; `n` is S"""
    p_value: float
    """two-sided, at least 2 / (R + 1)"""


def compare_over_seeds(
    a: Sequence[Layers],
    b: Sequence[Layers],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> SeedComparison:
    """Return the mean of a - b over S pairs of models with the same seed, its interval, and the p-value of no difference.

    The interval is a hierarchical bootstrap: pairs are resampled, and within each the neurons of both. p comes from the
    same R resamples: it is twice the share of resampled differences on the other side of 0, or on 0, with 1 added to both counts (Davison
    and Hinkley 1997, chapter 4), at most 1: the smallest level at which the percentile interval still excludes 0. It is
    as optimistic as that interval where seeds are few: with S pairs, a test of signs alone cannot fall below 2^(1 - S).
    Raises `InputError` if the numbers of seeds differ.
    """
    if len(a) != len(b):
        raise InputError(f"{len(a)} seeds are compared with {len(b)}: give the same seeds of both")
    rng = np.random.default_rng(seed)
    means = [
        mean_over_layers(x) - mean_over_layers(y)
        for x, y in zip(_checked(a), _checked(b), strict=True)
    ]
    chosen = rng.integers(0, len(a), (resamples, len(a)))
    drawn = _resampled(a, resamples, rng, chosen) - _resampled(b, resamples, rng, chosen)
    drawn = drawn.mean(1)
    low, high = percentile_bounds(drawn, confidence)
    return SeedComparison(Interval(float(np.mean(means)), low, high, len(a)), two_sided(drawn))


def two_sided(drawn: Array) -> float:
    """Return the p-value of no difference from 0, from R resampled differences (`compare_over_seeds`)."""
    other_side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (1 + other_side) / (1 + len(drawn)))


def _checked(seeds: Sequence[Layers]) -> Sequence[Layers]:
    if not seeds:
        raise InputError("no seeds were given: give the values of at least one")
    if any(not len(np.asarray(values)) for of in seeds for values in of.values()):
        raise InputError("a layer has no values: leave out neurons without one, and empty layers")
    return seeds


def mean_over_layers(layers: Layers) -> float:
    """Return the mean over layers of the mean over the neurons of each, of one seed."""
    return float(np.mean([np.asarray(values, np.float64).mean() for values in layers.values()]))


def _resampled(
    seeds: Sequence[Layers],
    resamples: int,
    rng: np.random.Generator,
    chosen: NDArray[np.int64] | None = None,
) -> Array:
    """Return [R, S] means of drawn seeds, each with its own draw of neurons; `chosen` [R, S] are the seeds drawn."""
    n = len(seeds)
    if chosen is None:
        chosen = rng.integers(0, n, (resamples, n))
    drawn = np.empty(chosen.shape)
    for number, layers in enumerate(seeds):
        places = chosen == number
        count = int(places.sum())
        if count:
            of_layers = [
                resampled_means(np.asarray(values, np.float64), count, rng)
                for values in layers.values()
            ]
            drawn[places] = np.mean(of_layers, axis=0)
    return drawn


def holm(p_values: ArrayLike) -> Array:
    """Return p-values [m] adjusted for m tests, which control the chance of any false one (Holm 1979).

    Ascending, p_(i) becomes the largest of (m - j + 1) p_(j) for j up to i, at most 1.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, stepped)
    return adjusted


class Matching(NamedTuple):
    """Neurons of two models in pairs."""

    a: NDArray[np.int64]
    """[min(A, B)] neurons of the first model, ascending"""
    b: NDArray[np.int64]
    """[min(A, B)] the neuron of the second model that each is paired with"""
    value: Array
    """[min(A, B)] similarity of each pair, at least 0"""

    @property
    def mean(self) -> float:
        """Return the mean similarity of the pairs: PW-MCC if similarities are correlations (Song et al. 2025)."""
        return float(self.value.mean())


def match(similarity: ArrayLike) -> Matching:
    """Return the pairs, each neuron in one at most, with the largest sum of |similarity| [A, B] (Hungarian algorithm).

    The null is the same figure of two untrained models: unrelated neurons have a mean well above 0, since each gets the
    most similar of many.
    """
    from scipy.optimize import linear_sum_assignment  # takes a quarter of a second

    size = np.abs(np.asarray(similarity, np.float64))
    a, b = linear_sum_assignment(size, maximize=True)
    return Matching(a, b, size[a, b])


def correlations(a: ArrayLike, b: ArrayLike) -> Array:
    """Return the correlation [A, B] of each neuron of a [N, A] with each of b [N, B]; 0 if one is constant."""
    x, y = (_standardized(np.asarray(of, np.float64)) for of in (a, b))
    return x.T @ y


def cosines(a: ArrayLike, b: ArrayLike) -> Array:
    """Return the cosine [A, B] of each atom of a [d, A] with each of b [d, B]; 0 if one is 0."""
    x, y = (_normed(np.asarray(of, np.float64)) for of in (a, b))
    return x.T @ y


def _standardized(x: Array) -> Array:
    centred = x - x.mean(0)
    # what rounding leaves of a constant
    centred[:, np.linalg.norm(centred, axis=0) <= 1e-9 * np.linalg.norm(x, axis=0)] = 0
    return _normed(centred)


def _normed(x: Array) -> Array:
    norm = np.linalg.norm(x, axis=0)
    return x / np.where(norm > 0, norm, 1)


def transfer(own: ArrayLike, on_match: ArrayLike) -> Interval | None:
    """Return the score of explanations on the matches of their neurons, over their score on the neurons themselves.

    `own` and `on_match` are scores [n]: of the explanation of neuron i of seed A on that neuron, and on its match in seed
    B. A ratio of means, bounded by a bootstrap over neurons; None if the mean of `own` is not above 0.
    """
    a, b = np.asarray(own, np.float64), np.asarray(on_match, np.float64)
    if len(a) != len(b):
        raise InputError(f"{len(a)} scores are compared with {len(b)}: give both of each neuron")
    if not len(a) or a.mean() <= 0:
        return None
    chosen = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    below = a[chosen].mean(1)
    if (below <= 0).any() or len(a) == 1:
        return Interval(float(b.mean() / a.mean()), None, None, len(a))
    low, high = percentile_bounds(b[chosen].mean(1) / below, 0.95)
    return Interval(float(b.mean() / a.mean()), low, high, len(a))
