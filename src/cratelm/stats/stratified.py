"""Pearson correlation over a whole population, estimated from uniform draws within its strata.

Shape legend: n draws, B strata, R resamples.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError
from cratelm.stats.intervals import RESAMPLES

Array = NDArray[np.float64]
_NORMAL = 1.96
"""standard deviations on each side of the mean of a normal distribution that contain 95% of it"""
_MOST = 1 - 1e-6
"""correlations beyond this are taken as this on Fisher's scale, where 1 is infinite"""
_CONSTANT = 1e-12
"""largest fraction of a mean square that rounding can leave of the variance of a constant"""


@dataclass(frozen=True)
class StratifiedCorrelation:
    """A correlation over a population, and its 95% interval over the draws."""

    value: float | None
    """None if one of the two is constant over the draws"""
    low: float | None
    high: float | None
    """no bounds if a stratum was drawn from once only, or if most resamples have no correlation"""
    undefined: int
    """resamples without a correlation, which the bounds leave out"""


def stratified_correlation(
    true: ArrayLike,
    simulated: ArrayLike,
    stratum: ArrayLike,
    sizes: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> StratifiedCorrelation:
    """Return the correlation of a = `true` [n] with s = `simulated` [n] over all members of the strata.

    `stratum` [n] is the stratum of each draw, `sizes` [B] the exact number of members N_b of each stratum. Of the n_b
    draws in stratum b each stands for w = N_b / n_b members (Oikarinen, Yan & Weng, ICML 2025, arXiv 2506.05774):

        r = sum w (a - a')(s - s') / sqrt(sum w (a - a')^2 sum w (s - s')^2),  a' = sum w a / sum w, s' likewise

    The interval is a bootstrap within the strata: of the n_b draws of a stratum n_b - 1 are drawn again, with replacement
    and weights N_b / (n_b - 1), so that its spread is not underestimated (Rao & Wu 1988, JASA 83). The bounds are 1.96
    standard deviations of artanh r on each side of it (Fisher's z): percentiles of so few draws cover too little. A
    stratum whose members were all drawn is known and stays as it is. One that was drawn from once has no spread that
    could be resampled, so that there are no bounds. Resamples in which a or s is constant have no correlation: they are
    counted and left out, and without half of the resamples there are no bounds. With `resamples` 0 there are none.

    Raises `InputError` if a stratum has members but no draws, or draws but no members.
    """
    of, members = np.asarray(stratum, np.int64), np.asarray(sizes, np.int64)
    order = np.argsort(of, kind="stable")
    drawn = np.bincount(of, minlength=len(members))
    if len(drawn) != len(members) or ((drawn > 0) != (members > 0)).any():
        raise InputError(
            f"strata of {members.tolist()} members have {drawn.tolist()} draws: draw from each that has members"
        )
    weight = (members[of] / drawn[of])[order]
    a, s = (_scaled(np.asarray(x, np.float64)[order], weight) for x in (true, simulated))
    (value,) = _correlations(weight[None], a, s)
    is_fixed = drawn >= members
    if np.isnan(value):
        return StratifiedCorrelation(None, None, None, 0)
    if not resamples or (~is_fixed & (drawn == 1)).any():
        return StratifiedCorrelation(float(value), None, None, 0)
    occurs = drawn > 0
    counts = _counts(
        tuple(drawn[occurs].tolist()), tuple(is_fixed[occurs].tolist()), resamples, seed
    )
    resampled = _correlations(counts * weight, a, s)
    defined = resampled[~np.isnan(resampled)]
    undefined = resamples - len(defined)
    if 2 * undefined > resamples:
        return StratifiedCorrelation(float(value), None, None, undefined)
    low, high = _bounds(float(value), defined)
    return StratifiedCorrelation(float(value), low, high, undefined)


def _bounds(value: float, resampled: Array) -> tuple[float, float]:
    """Return the bounds of the interval around a correlation, from those of its resamples [R]."""
    z, resampled_z = (np.arctanh(np.clip(r, -_MOST, _MOST)) for r in (value, resampled))
    half = _NORMAL * float(resampled_z.std())
    return min(value, float(np.tanh(z - half))), max(value, float(np.tanh(z + half)))


def _scaled(x: Array, weight: Array) -> Array:
    """Return x [n] around its weighted mean and within -1..1, so that no square over- or underflows."""
    size = np.abs(x).max(initial=0)
    x = x / size if size > 0 else x
    centred = x - weight @ x / weight.sum()
    size = np.abs(centred).max(initial=0)
    # of a constant, rounding leaves less than this
    return centred / size if size > _CONSTANT else np.zeros_like(x)


def _correlations(weights: Array, a: Array, s: Array) -> Array:
    """Return the correlation of a [n] and s [n] under each row of weights [R, n]; NaN where one is constant."""
    total = weights.sum(1)
    mean_a, mean_s, square_a, square_s, product = (
        weights @ x / total for x in (a, s, a * a, s * s, a * s)
    )
    var_a, var_s = square_a - mean_a**2, square_s - mean_s**2
    is_constant = (var_a <= _CONSTANT * square_a) | (var_s <= _CONSTANT * square_s)
    spread = np.sqrt(np.where(is_constant, np.nan, var_a * var_s))
    return np.clip((product - mean_a * mean_s) / spread, -1, 1)


@lru_cache(maxsize=8)
def _counts(
    drawn: tuple[int, ...], is_fixed: tuple[bool, ...], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return how often each draw counts in each resample [R, n], strata one after another; n in total.

    They depend on the numbers of draws alone, so that most neurons share them.
    """
    rng = np.random.default_rng(seed)
    columns = [
        np.ones((resamples, n))
        if fixed
        else rng.multinomial(n - 1, np.full(n, 1 / n), resamples) * (n / (n - 1))
        for n, fixed in zip(drawn, is_fixed, strict=True)
    ]
    return np.concatenate(columns, axis=1, dtype=np.float64)
