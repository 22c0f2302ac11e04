"""Cross-entropy of next tokens, and the validation loss.

Shape legend: B sequences, T tokens of a sequence, V vocabulary, n validation sequences.
"""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.tokens.shards import TokenSplit
from cratelm.train.config import Recipe
from cratelm.train.data import read_batch, spread


def next_token_loss(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token, of targets [B, T] after tokens [B, T].

    Outside the model: its own loss shifts the labels, which would waste the last target of each
    sequence.
    """
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def token_losses(
    model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each target in nats [B, T], and whether it was the likeliest token [B, T]."""
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets), logits.argmax(-1) == targets


class Validation:
    """Loss on a fixed set of held-out sequences, evenly spread over the split.

    Raises `InputError` where the held-out split holds no whole sequence.
    """

    def __init__(self, split: TokenSplit, numbers: Recipe, accelerator: Accelerator):
        self.split, self.length, self.accelerator = split, numbers.sequence_length, accelerator
        self.batch_size = numbers.micro_batch_size
        available = split.n_sequences(self.length)
        if available == 0:
            raise InputError(
                f"the held_out split has {split.n_tokens} tokens, {self.length + 1} were expected at"
                " least: give more text, or a lower --sequence-length"
            )
        self.indices = spread(available, numbers.validation_sequences)  # [n]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean over sequences, and its standard error (0 where there is one sequence)."""
        was_training = model.training
        model.eval()
        losses = self._sequence_losses(model)
        model.train(was_training)
        deviation = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
        return {
            "validation_loss": float(losses.mean()),
            "validation_standard_error": deviation / len(losses) ** 0.5,
        }

    def _sequence_losses(self, model: nn.Module) -> Any:
        """Mean loss of each sequence [n], in float64 and in one order, however many ranks share them."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        n = len(self.indices)
        share = -(-n // ranks)  # the same for each rank, so that collective calls match
        mine = self.indices[(np.arange(share) * ranks + rank) % n]
        device = self.accelerator.device
        parts = []
        for start in range(0, share, self.batch_size):
            batch = mine[start : start + self.batch_size]
            losses, _ = token_losses(model, *read_batch(self.split, batch, self.length, device))
            parts.append(losses.mean(-1))  # [b]
        gathered: Any = self.accelerator.gather(torch.cat(parts))  # [ranks * share]
        return gathered.view(ranks, share).T.flatten()[:n].double().cpu().numpy()
