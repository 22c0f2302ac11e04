"""Uncertainty of means: the percentile bootstrap and the grouped jackknife.

The bootstrap draws its own resamples instead of calling `scipy.stats.bootstrap`. Both draw the same
resamples from the same generator (a test compares them), but SciPy's has no strata, no second moment of
the same draws and, without a batch size, no bound on its memory; `stats.scores` needs all of these. Its
quantiles also differ from published figures in the last digit.

Shape legend: n values, R resamples, G groups.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.records import Estimate, Interval

RESAMPLES = 2000
_BLOCK = 2_000_000
"""numbers drawn at a time: 16 MB"""
Array = NDArray[np.float64]


def bootstrap(values: ArrayLike, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """Return the mean of `values` [n] with its 95% percentile bootstrap interval over them.

    Returns None for no values, and no bounds for a single one (Efron & Tibshirani 1993, chapter 13).
    """
    array = np.asarray(values, np.float64)
    n = len(array)
    if n == 0:
        return None
    mean = float(array.mean())
    if n == 1:
        return Interval(mean, None, None, 1)
    means = resampled_means(array, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high), n)


def resampled_means(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Return [R] means of `values` [n] drawn with replacement; zeros for no values."""
    return np.concatenate([drawn.mean(axis=1) for drawn in _drawn(values, resamples, rng)])


def resampled_medians(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Return [R] medians of `values` [n] drawn with replacement; zeros for no values."""
    return np.concatenate([np.median(d, axis=1) for d in _drawn(values, resamples, rng)])


def resampled_moments(
    values: Array, resamples: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return [R] means and [R] population variances of `values` [n] drawn with replacement.

    They are drawn in blocks of bounded memory; the draws do not depend on the size of the blocks.
    """
    moments = [(d.mean(axis=1), d.var(axis=1)) for d in _drawn(values, resamples, rng)]
    means, variances = zip(*moments, strict=True)
    return np.concatenate(means), np.concatenate(variances)


def _drawn(values: Array, resamples: int, rng: np.random.Generator) -> Iterator[Array]:
    """Yield blocks of resamples [r, n], together R of them; for no values one block [R, 1] of zeros."""
    if not len(values):
        yield np.zeros((resamples, 1))
        return
    step = max(1, _BLOCK // len(values))
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        yield values[rng.integers(0, len(values), (n, len(values)))]


def wilson(successes: int, n: int) -> Interval:
    """Return a fraction of `n` independent trials with its 95% score interval (Wilson 1927), also for 0 and `n` successes."""
    z = 1.959964
    p, spread = successes / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(p, min(low, p), max(high, p), 1)


def percentile_bounds(resampled: Array, confidence: float) -> tuple[float, float]:
    """Return the bounds of the percentile interval of [R] resampled figures."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def jackknife(statistic: Callable[[Array], float], sums: Array, counts: Array) -> Estimate:
    """Return `statistic` of the mean over all groups, with its error from leaving out one at a time.

    `sums` [G, ...] are sums over each group, `counts` [G] the numbers of values summed; `statistic` takes
    their ratio [...]. There is no error for fewer than two groups. Grouped jackknife: Efron & Tibshirani
    1993, chapter 11.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    whole, n = sums.sum(0), counts.sum()
    value = statistic(whole / n)
    groups = len(counts)
    if groups < 2:
        return Estimate(value, None)
    reduced = np.array(
        [statistic((whole - s) / (n - c)) for s, c in zip(sums, counts, strict=True)]
    )
    spread = (groups - 1) / groups * ((reduced - reduced.mean()) ** 2).sum()
    return Estimate(value, float(np.sqrt(spread)))
