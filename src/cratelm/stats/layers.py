"""Means over the layers of a model, with intervals over neurons: the rule of `cratelm.stats.scores` for any figure.

Shape legend: n neurons of all layers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cratelm.records import Interval
from cratelm.stats.intervals import percentile_bounds, resampled_means


@dataclass(frozen=True)
class LayeredMean:
    """The mean over layers of the mean over their neurons, and the counts behind it."""

    mean: Interval | None
    """95% bootstrap interval, neurons resampled within their layer; no bounds if a layer has one value. None without
    any value"""
    defined: int
    """neurons that have a value"""
    undefined: int
    """neurons that have none"""


def layered_mean(
    values: ArrayLike, layers: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> LayeredMean:
    """Return the mean over layers of `values` [n], NaN where there is none, by `layers` [n].

    Each layer that has a value counts the same (Bai & Ma 2025).
    """
    numbers, of = np.asarray(values, np.float64), np.asarray(layers)
    is_defined = np.isfinite(numbers)
    rng = np.random.default_rng(seed)
    groups = [numbers[is_defined & (of == layer)] for layer in np.unique(of[is_defined])]
    n = int(is_defined.sum())
    if not groups:
        return LayeredMean(None, 0, len(numbers))
    value = float(np.mean([group.mean() for group in groups]))
    low = high = None
    if min(map(len, groups)) > 1:
        resampled = [resampled_means(group, resamples, rng) for group in groups]
        low, high = percentile_bounds(np.mean(resampled, axis=0), 0.95)
    return LayeredMean(Interval(value, low, high, n), n, len(numbers) - n)
