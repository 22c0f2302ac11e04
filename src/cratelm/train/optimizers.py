"""Which optimizer updates which tensor, and at what learning rate.

    tensor                                      adamw            muon
    matrices inside the blocks                  AdamW, decay     Muon, decay
    embeddings (the tied head is one of them)   AdamW, decay     AdamW, decay
    vectors (biases, norms, numbers per head)   AdamW            AdamW

Inside the blocks: in CRATE the projection U, the output map and the dictionary D; in GPT-2 the four
matrices of a block (query, key and value are one fused matrix there and are treated as one). In Muon
(Jordan et al. 2024) the update is the orthogonalised momentum. It is scaled to a size of 0.2 per weight,
about that of AdamW (`match_rms_adamw`; Liu et al. 2025, arXiv 2502.16982), so that one learning rate
and one weight decay serve both.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers.modeling_utils import PreTrainedModel

from cratelm.models.parts import is_matrix
from cratelm.train.config import Recipe

BETAS = (0.9, 0.95)


def make_optimizers(
    model: PreTrainedModel, kind: str, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return AdamW over all trainable parameters, or Muon and AdamW; the loop sets the learning rate.

    Frozen parameters have no state. Without a trainable matrix in the blocks there is no Muon.
    """
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    if kind == "adamw":
        return [_adamw(list(trainable.values()), weight_decay)]
    matrices = block_matrices(model)
    with_muon = {id(p) for p in matrices}
    others = [p for key, p in trainable.items() if key not in with_muon]
    if not matrices:
        return [_adamw(others, weight_decay)]
    muon = Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw(others, weight_decay)]


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` that orthogonalises whole matrices, also where they are split over processes.

    On split tensors torch's own products are right up to the rounding of bf16 sums, but each of the 15 exchanges
    parts. Here one matrix at a time is gathered, gradient and momentum, updated exactly as in one process, and
    its momentum is split again.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update each matrix."""
        groups = self.param_groups
        try:
            for group in groups:
                for matrix in group["params"]:
                    if matrix.grad is not None:
                        self.param_groups = [{**group, "params": [matrix]}]
                        self._gather(matrix)
                        super().step()
                        self._split(matrix)
        finally:
            self.param_groups = groups

    def _gather(self, matrix: nn.Parameter) -> None:
        if isinstance(matrix, DTensor):
            whole = [Replicate()] * matrix.device_mesh.ndim
            matrix.grad = matrix.grad.redistribute(placements=whole)  # pyright: ignore
            momentum = self.state[matrix].get("momentum_buffer")
            if momentum is not None:
                self.state[matrix]["momentum_buffer"] = momentum.redistribute(placements=whole)

    def _split(self, matrix: nn.Parameter) -> None:
        if isinstance(matrix, DTensor):
            state = self.state[matrix]
            state["momentum_buffer"] = state["momentum_buffer"].redistribute(
                placements=matrix.placements
            )


def block_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the trainable matrices that are neither an embedding nor the head."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = model.get_output_embeddings()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    return [
        p for p in model.parameters() if p.requires_grad and is_matrix(p) and id(p) not in outside
    ]


def learning_rate(step: int, recipe: Recipe, minimum_ratio: float) -> float:
    """Return the rate of a step: a linear rise over `warmup` steps, then a cosine down to a fraction.

    The cosine ends at `minimum_ratio` times the peak, with the last step; `step` counts from 0.
    """
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * (minimum_ratio + (1 - minimum_ratio) * cosine)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all parameters of all optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _adamw(parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
    ]
    # Fused: one pass over each tensor instead of ten, on CPU as well.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS, fused=True)
