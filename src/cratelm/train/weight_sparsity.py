"""Annealed weight sparsity: after each step, each tensor keeps only its largest entries.

Source: Gao et al., "Weight-sparse transformers have interpretable circuits" (2025, arXiv 2511.13653). The kept
fraction falls linearly from 1 to its target over the first half of the steps, and stays there. What is kept is
decided anew after each step, by magnitude alone: an entry that was set to 0 comes back if one update of the optimizer
makes it large enough. Nothing else is remembered, so that a training resumes exactly from weights, optimizer and step.
"""

import math
from typing import Any

import torch
from torch import nn


class WeightSparsity:
    """Sparsity of a model that names its sparse tensors by `sparse_parameters()`, over `steps` steps."""

    def __init__(self, model: Any, steps: int):
        self.target: float = model.config.weight_fraction
        self.steps = steps
        self.tensors: list[nn.Parameter] = [p for p in model.sparse_parameters() if p.requires_grad]

    def fraction(self, done: int) -> float:
        """Return the fraction of entries that is kept after `done` of all steps."""
        progress = min(1.0, 2 * done / self.steps)
        return 1 - (1 - self.target) * progress

    @torch.no_grad()
    def apply(self, done: int) -> None:
        """Set all but the largest entries of each tensor to 0, in place, after `done` steps."""
        fraction = self.fraction(done)
        for tensor in self.tensors:
            n_kept = max(1, round(fraction * tensor.numel()))
            if n_kept == tensor.numel():
                continue
            magnitudes = tensor.abs().flatten()
            # The smaller of the two sets is selected, which is faster; ties are resolved by place.
            if 2 * n_kept <= tensor.numel():
                kept = torch.zeros_like(magnitudes, dtype=torch.bool)
                kept[magnitudes.topk(n_kept, sorted=False).indices] = True
            else:
                n_cut = tensor.numel() - n_kept
                kept = torch.ones_like(magnitudes, dtype=torch.bool)
                kept[magnitudes.topk(n_cut, largest=False, sorted=False).indices] = False
            tensor.mul_(kept.view_as(tensor))


def gradient_limit(clip: float, model: nn.Module, *, is_sparse: bool) -> float:
    """Return the largest norm of the gradient over all trainable parameters; infinite for a `clip` of 0.

    For a weight-sparse model `clip` limits the root mean square over the entries, which is the norm divided by the
    square root of their number.
    """
    if not clip:
        return math.inf
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return clip * entries**0.5 if is_sparse else clip
