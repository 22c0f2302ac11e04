"""Means over the layers of a model, with intervals over neurons: the rule of `cratelm.stats.scores` for any figure.

Shape legend: n neurons of all layers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.records import Interval
from cratelm.stats.ends import clustered
from cratelm.stats.intervals import percentile_bounds, resampled_means, resampled_medians


@dataclass(frozen=True)
class LayeredMean:
    """The mean over layers of the mean (or median) over their neurons, and the counts behind it."""

    mean: Interval | None
    """95% bootstrap interval, neurons resampled within their layer; no bounds if a layer has one value. None without
    any value"""
    defined: int
    """neurons that have a value"""
    undefined: int
    """neurons that have none"""


def layered_mean(
    values: ArrayLike,
    layers: ArrayLike,
    *,
    numbers_in_layer: ArrayLike | None = None,
    medians: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> LayeredMean:
    """Return the mean over layers of `values` [n], NaN where there is none, by `layers` [n].

    Each layer that has a value counts the same (Bai & Ma 2025). Values with the same of `numbers_in_layer` [n], which are
    ends of one neuron, are averaged first. `medians` takes the median over the neurons of a layer: a mean is that of
    a few neurons if the values of these have no bound.
    """
    numbers, of = np.asarray(values, np.float64), np.asarray(layers)
    if numbers_in_layer is not None:
        numbers, of = _by_neuron(numbers, of, np.asarray(numbers_in_layer))
    is_defined = np.isfinite(numbers)
    rng = np.random.default_rng(seed)
    groups = [numbers[is_defined & (of == layer)] for layer in np.unique(of[is_defined])]
    n = int(is_defined.sum())
    if not groups:
        return LayeredMean(None, 0, len(numbers))
    of_layer, resampled_of = (
        (np.median, resampled_medians) if medians else (np.mean, resampled_means)
    )
    value = float(np.mean([of_layer(group) for group in groups]))
    low = high = None
    if min(map(len, groups)) > 1:
        resampled = [resampled_of(group, resamples, rng) for group in groups]
        low, high = percentile_bounds(np.mean(resampled, axis=0), 0.95)
    return LayeredMean(Interval(value, low, high, n), n, len(numbers) - n)


def _by_neuron(
    values: NDArray[np.float64], layers: NDArray[np.int64], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return one value per neuron, the mean of those that it has, and its layer; NaN for one that has none."""
    keys = layers.astype(np.int64) << 32 | numbers.astype(np.int64)
    has = np.isfinite(values)
    means, first = clustered(values[has], keys[has])
    # what is left are neurons without any value, once each
    without, at = np.unique(keys[~has], return_index=True)
    lost = ~np.isin(without, keys[has])
    values = np.concatenate([means, np.full(int(lost.sum()), np.nan)])
    return values, np.concatenate([layers[has][first], layers[~has][at[lost]]])
