"""Both ends of a neuron count as one: their values are averaged before neurons are resampled.

`17+` and `17-` share the activation they are made of, so their scores are not independent. A mean over neurons of the
mean over the ends of each has the ends of one neuron in every resample together (a cluster bootstrap: Davison & Hinkley
1997, section 3.8).

Shape legend: n values, m neurons.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cratelm.records import NeuronId

Array = NDArray[np.float64]


def neuron_means(
    neurons: Iterable[NeuronId], values: Iterable[float | None]
) -> dict[tuple[int, int], float]:
    """Return the mean value over the ends of each neuron, by layer and number, in the order of the first ends.

    Ends without a value are left out. For neurons with one end it is their value.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for neuron, value in zip(neurons, values, strict=True):
        if value is not None:
            found.setdefault((neuron.layer, neuron.index // neuron.n_ends), []).append(value)
    return {key: sum(of) / len(of) for key, of in found.items()}


def clustered(values: Array, clusters: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """Return the mean of the values [n] of each cluster [n], and the first value of each, in the order of these, [m]."""
    _, first, which = np.unique(clusters, return_index=True, return_inverse=True)
    if len(first) == len(values):
        return values, np.arange(len(values))
    means = np.bincount(which, values) / np.bincount(which)
    order = np.argsort(first)
    return means[order], first[order]
