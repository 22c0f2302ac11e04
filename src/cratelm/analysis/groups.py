"""Group neurons by the similarity of their firing: Pearson correlation over tokens, average linkage.

Shape legend: N tokens, H neurons of a layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

TOGETHER = 0.5
"""smallest mean correlation at which neurons form a group"""
NONE = -1
"""value instead of the number of a group or the index of a neuron if there is none"""


class CorrelationSums:
    """Sums over tokens from which correlations are computed; they need 8 H^2 bytes."""

    def __init__(self, n_neurons: int) -> None:
        self.n = 0
        self.sum = torch.zeros(n_neurons, dtype=torch.float64)
        self.products = torch.zeros(n_neurons, n_neurons, dtype=torch.float64)

    def add(self, activations: torch.Tensor) -> None:
        """Add activations [N, H]."""
        self.n += len(activations)
        self.sum += activations.sum(0, dtype=torch.float64).cpu()
        # products are in the precision of the activations; their sum over batches, in which rounding errors
        # would accumulate, is in float64
        self.products += (activations.T @ activations).double().cpu()

    def correlation(self) -> NDArray[np.float64]:
        """Return the correlations [H, H]: 1 on the diagonal, 0 elsewhere for neurons that never vary."""
        mean = self.sum / self.n
        covariance = (self.products / self.n - mean[:, None] * mean).numpy()
        deviation = np.sqrt(np.clip(np.diag(covariance), 0, None))
        # for a constant neuron, E[x^2] - E[x]^2 is a rounding error rather than 0
        varies = deviation > 1e-6 * np.maximum(1, np.abs(mean.numpy()))
        scale = np.outer(deviation, deviation)
        correlation = np.divide(
            covariance, scale, out=np.zeros_like(covariance), where=np.outer(varies, varies)
        )
        np.fill_diagonal(correlation, 1)
        return np.clip(correlation, -1, 1)


@dataclass(frozen=True, eq=False)
class NeuronGroups:
    """Groups of neurons of a layer that fire alike."""

    group: NDArray[np.int64]
    """[H] number of the group, where 0 is the largest; `NONE` for neurons in no group"""
    nearest: NDArray[np.int64]
    """[H] the other neuron with the highest correlation"""
    correlation: NDArray[np.float64]
    """[H] that correlation"""


def group_neurons(correlation: NDArray[np.float64]) -> NeuronGroups:
    """Return the average-linkage clusters for correlations [H, H], with H >= 2.

    Clusters are merged as long as the mean correlation between them is at least `TOGETHER`.
    """
    distance = squareform(1 - correlation, checks=False)  # [H (H - 1) / 2], as SciPy expects it
    label = fcluster(linkage(distance, "average"), 1 - TOGETHER, "distance")  # [H] from 1
    size = np.bincount(label)  # by label; 0 at label 0, which SciPy does not use
    # clusters of two or more get the numbers 0, 1, ... in descending order of size; the others get NONE
    by_size = [g for g in np.argsort(-size, kind="stable") if size[g] > 1]
    number = np.full(len(size), NONE)
    number[by_size] = np.arange(len(by_size))
    others = correlation.copy()
    np.fill_diagonal(others, -np.inf)
    nearest = others.argmax(1)
    return NeuronGroups(number[label], nearest, others[np.arange(len(others)), nearest])
