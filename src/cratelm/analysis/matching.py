"""Neurons of two models on the same tokens: correlations of their activations, from sums over the text.

Memory: 8 A B bytes per layer, 75 MB for A = B = 3,072 neurons, and the activations of one batch.

Shape legend: N text tokens of a batch, A and B neurons of a layer in the two models.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.activations.batches import Batch, SearchPlan
from cratelm.models.sites import Site, hooked

Array = NDArray[np.float64]
Layers = dict[int, torch.Tensor]
"""activations [N, H] of the text of a batch, by place of the layer in the site"""
_CONSTANT = 1e-12
"""share of the mean square below which a variance is what rounding leaves of a constant"""


class CrossSums:
    """Sums over tokens from which the correlations of the neurons of two models are computed."""

    def __init__(self, n_a: int, n_b: int) -> None:
        self.n = 0
        self.sum = [torch.zeros(n, dtype=torch.float64) for n in (n_a, n_b)]
        self.squares = [torch.zeros(n, dtype=torch.float64) for n in (n_a, n_b)]
        self.products = torch.zeros(n_a, n_b, dtype=torch.float64)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add activations [N, A] and [N, B] of the same tokens."""
        self.n += len(a)
        for side, of in enumerate((a, b)):
            exact = of.double()
            self.sum[side] += exact.sum(0).cpu()
            self.squares[side] += (exact**2).sum(0).cpu()
        # products are in the precision of the activations; their sum over batches, in which rounding errors
        # would accumulate, is in float64
        self.products += (a.T @ b).double().cpu()

    def correlation(self) -> tuple[Array, int]:
        """Return the correlations [A, B], and how many neurons are constant: those correlate with none, 0."""
        mean = [of.numpy() / self.n for of in self.sum]
        square = [of.numpy() / self.n for of in self.squares]
        variance = [s - m**2 for s, m in zip(square, mean, strict=True)]
        varies = [v > _CONSTANT * s for v, s in zip(variance, square, strict=True)]
        deviation = [np.sqrt(np.where(of, v, 1)) for of, v in zip(varies, variance, strict=True)]
        covariance = self.products.numpy() / self.n - np.outer(*mean)
        correlation = covariance / np.outer(*deviation) * np.outer(*varies)
        return np.clip(correlation, -1, 1), sum(int((~of).sum()) for of in varies)


def cross_sums(
    models: tuple[Any, Any],
    site: Site,
    plan: SearchPlan,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> list[CrossSums]:
    """Run two models with the same site on the tokens of a plan, and return the sums of each layer [L]."""
    sums = [CrossSums(n, n) for n in site.n_neurons]
    for _, (a, b) in read_activations(models, site, plan, batch_tokens, progress):
        for place, of_layer in enumerate(sums):
            of_layer.add(a[place], b[place])
    return sums


def read_activations(
    models: Sequence[Any],
    site: Site,
    plan: SearchPlan,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[Batch, list[Layers]]]:
    """Yield the batches of a plan that have text, and the activations of their text in each of the models."""
    for batch in plan.batches(batch_tokens, torch.device("cpu")):
        progress(batch.input_ids.numel())
        text = batch.segment_of >= 0
        if text.any():
            yield batch, [_activations(model, site, batch, text) for model in models]


def _activations(model: Any, site: Site, batch: Batch, text: torch.Tensor) -> Layers:
    found: Layers = {}
    where, ids = text.to(model.device), batch.input_ids.to(model.device)

    def collect(place: int, activations: torch.Tensor) -> None:
        found[place] = activations.flatten(0, 1)[where].float()

    with torch.no_grad(), hooked(model, site, collect):
        model.base_model(input_ids=ids, use_cache=False)
    return found
