"""Cross-entropy of next tokens, and the validation loss.

Shape legend: B sequences, T tokens of a sequence, V vocabulary, n validation sequences.
"""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.sites import Site, hooked, site_of
from cratelm.train.config import Recipe
from cratelm.train.data import read_batch, spread
from cratelm.train.head_loss import head_loss

if TYPE_CHECKING:
    from cratelm.tokens.shards import TokenSplit


class NextTokenLoss(nn.Module):
    """A language model with its loss inside, so that logits [B, T, V] never leave it.

    The model's own loss is not used: it shifts the labels, which wastes the last target of each
    sequence, and it keeps the logits and their gradient. A model that does not state `head_is_linear` computes its
    logits itself, and keeps them.

    `l1` adds a penalty in training: the sum of the absolute values of a layer's neurons (the activations of the
    model's default site), averaged over tokens and layers, times `l1`.
    """

    def __init__(self, model: PreTrainedModel, l1: float = 0.0):
        super().__init__()
        self.model, self.l1 = model, l1
        self.penalties: list[torch.Tensor] = []
        """of the layers, from the last forward pass in training"""
        self.site: Site | None = site_of(model) if l1 else None
        if (
            self.site is not None
        ):  # open as long as the model: checkpointed blocks run again in the backward pass
            self._hooks = contextlib.ExitStack()
            self._hooks.enter_context(hooked(model, self.site, self._penalise))
        self.head_is_linear = getattr(model, "head_is_linear", isinstance(model, GPT2LMHeadModel))
        self._no_split_modules = model._no_split_modules  # read by FSDP's wrapping policy

    def tie_weights(self) -> None:
        """Tie the weights again: FSDP calls this after it has replaced the parameters."""
        self.model.tie_weights()

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, *, mean: bool = True
    ) -> torch.Tensor:
        """Return the cross-entropy in nats of targets [B, T] after tokens [B, T]: the mean, or each [B, T].

        In training the mean includes the penalty.
        """
        self.penalties.clear()
        loss = self._cross_entropy(tokens, targets, mean)
        if mean and self.penalties:
            loss = loss + self.l1 * torch.stack(self.penalties).mean()
        return loss

    def _penalise(self, place: int, activations: torch.Tensor) -> None:
        """Keep the penalty of a layer, a number, of activations [B, T, H]; nothing outside of training."""
        if not self.training or self.site is None:
            return
        penalty = activations.float().abs().sum(-1).mean()
        if len(self.penalties) < self.site.n_layers:  # not when a checkpointed block runs again
            self.penalties.append(penalty)

    def _cross_entropy(
        self, tokens: torch.Tensor, targets: torch.Tensor, mean: bool
    ) -> torch.Tensor:
        if not self.head_is_linear:
            logits = self.model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
            reduction = "mean" if mean else "none"
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction=reduction
            )
            return losses if mean else losses.view_as(targets)
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        losses = head_loss(hidden.flatten(0, 1), head.weight, targets.flatten(), mean=mean)
        return losses if mean else losses.view_as(targets)


class Validation:
    """Loss on a fixed set of held-out sequences, evenly spread over the split.

    Raises `InputError` if the held-out split has no whole sequence.
    """

    def __init__(self, split: "TokenSplit", recipe: Recipe, accelerator: Accelerator):
        self.split, self.length, self.accelerator = split, recipe.sequence_length, accelerator
        self.batch_size = recipe.micro_batch_size
        available = split.n_sequences(self.length)
        if available == 0:
            raise InputError(
                f"the held_out split has {split.n_tokens} tokens, but at least {self.length + 1} are"
                " needed: give more text, or a lower --sequence-length"
            )
        self.indices = spread(available, recipe.validation_sequences)  # [n]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss of a `NextTokenLoss` over the sequences, and its standard error (0 for one)."""
        was_training = model.training
        model.eval()
        losses = self._sequence_losses(model)
        model.train(was_training)
        deviation = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
        return {
            "validation_loss": float(losses.mean()),
            "validation_standard_error": deviation / len(losses) ** 0.5,
        }

    @torch.no_grad()
    def _sequence_losses(self, model: nn.Module) -> Any:
        """Return the mean loss of each sequence [n], in float64 and in one order for any number of ranks."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        n = len(self.indices)
        share = -(-n // ranks)  # the same on each rank, so that collective calls match
        of_rank = self.indices[(np.arange(share) * ranks + rank) % n]
        device = self.accelerator.device
        parts = []
        for start in range(0, share, self.batch_size):
            batch = of_rank[start : start + self.batch_size]
            tokens, targets = read_batch(self.split, batch, self.length, device)
            losses = model(tokens, targets, mean=False)  # [b, T]
            parts.append(losses.float().mean(-1))  # [b]
        gathered: Any = self.accelerator.gather(torch.cat(parts))  # [ranks * share]
        return gathered.view(ranks, share).T.flatten()[:n].double().cpu().numpy()
