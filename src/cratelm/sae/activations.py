"""Activations of a site as shuffled batches, a pure function of the model, the tokens and the seed.

Sequences of the train split go through the model in a random order, a new one each epoch; their
activations, end marks left out, fill a buffer, whose tokens are served in a random order. What is
less than a batch at the end of a buffer is left out. A place in the stream is two numbers, so that
an interrupted training goes on after filling one buffer; SAELens' own mixing buffer would have to be
run from the start.

Memory: the buffer, `--buffer-mib` or two batches and the tokens of one forward pass, whichever is
more, and one forward pass.

Shape legend: b sequences of a forward pass, T tokens of a sequence, R rows (tokens) of the buffer,
B tokens of a batch, H inputs of a layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.sites import Site, hooked
from cratelm.tokens.shards import TokenSplit
from cratelm.train.data import BatchSampler, read_batch

_FLOAT_BYTES = 4


@dataclass
class Place:
    """Where in the stream one is."""

    first: int = 0
    """forward passes before the buffer at hand"""
    served: int = 0
    """batches served of it"""


class ActivationBuffer:
    """Batches of activations of some layers, the same tokens for each.

    Raises `InputError` where the split holds no sequence, and where an activation is not a number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        site: Site,
        layers: tuple[int, ...],
        split: TokenSplit,
        eot_id: int,
        *,
        sequence_length: int,
        batch_size: int,
        batch_tokens: int,
        buffer_bytes: int,
        most_rows: int,
        seed: int,
    ):
        self.model, self.site, self.layers, self.eot_id = model, site, layers, eot_id
        self.batch_size, self.seed = batch_size, seed
        b = max(1, batch_tokens // sequence_length)
        self.feed = BatchSampler(
            split,
            batch_size=b,
            micro_batch_size=b,
            sequence_length=sequence_length,
            seed=seed,
        )
        widths = [site.n_neurons[layer] for layer in layers]
        extra = b * sequence_length  # the last forward pass may reach beyond
        rows = buffer_bytes // (_FLOAT_BYTES * sum(widths)) - extra
        wanted = min(max(rows, 2 * batch_size), max(most_rows, batch_size))
        self._rows = -(-wanted // batch_size) * batch_size
        self._buffers = [
            torch.empty(self._rows + extra, width, device=model.device) for width in widths
        ]
        self._next = Place()
        self._passes = self._filled = 0
        self._order = np.empty(0, np.int64)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def n_bytes(self) -> int:
        """Of the buffer."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def place(self) -> Place:
        """Where the next batch is."""
        return Place(self._next.first, self._next.served)

    def seek(self, place: Place) -> None:
        """Go to a place that `place` told before."""
        self._next = Place(place.first, place.served)
        self._filled = 0

    def batch(self) -> list[torch.Tensor]:
        """The next batch [B, H] of each layer."""
        if not self._filled:
            self._fill()
        start = self._next.served * self.batch_size
        rows = torch.from_numpy(self._order[start : start + self.batch_size]).to(self.device)
        self._next.served += 1
        batch = [buffer[rows] for buffer in self._buffers]
        if self._next.served == self._filled // self.batch_size:
            self.seek(Place(self._next.first + self._passes))
        return batch

    def means(self) -> list[torch.Tensor]:
        """Mean activation [H] of each layer over the buffer at hand."""
        if not self._filled:
            self._fill()
        return [buffer[: self._filled].mean(0) for buffer in self._buffers]

    def mean_norms(self) -> list[float]:
        """Mean Euclidean norm of an activation vector of each layer, likewise."""
        if not self._filled:
            self._fill()
        return [float(buffer[: self._filled].norm(dim=1).mean()) for buffer in self._buffers]

    @torch.no_grad()
    def _fill(self) -> None:
        """The buffer from forward pass `first` on, and the order in which its rows are served."""
        self._passes = 0
        while self._filled < self._rows:
            indices = self.feed.indices(self._next.first + self._passes)
            tokens, _ = read_batch(
                self.feed.split, indices, self.feed.sequence_length, self.model.device
            )  # [b, T]
            text = (tokens != self.eot_id).flatten()  # [b * T]
            count = int(text.sum())
            found = layer_activations(self.model, self.site, self.layers, tokens)
            for buffer, activations in zip(self._buffers, found, strict=True):
                buffer[self._filled : self._filled + count] = activations.flatten(0, 1)[text]
            self._filled += count
            self._passes += 1
        generator = np.random.default_rng((self.seed, self._next.first, 1))
        self._order = generator.permutation(self._filled)


def layer_activations(
    model: PreTrainedModel, site: Site, layers: tuple[int, ...], tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Activations [b, T, H] of some layers on token ids [b, T], the head left out, in float32.

    Raises `InputError` that names the layer where one is not a finite number.
    """
    found: dict[int, torch.Tensor] = {}

    def see(layer: int, activations: torch.Tensor) -> None:
        if layer in layers:
            found[layer] = activations.float()
            check_finite(found[layer], site, layer)

    with hooked(model, site, see):
        model.base_model(input_ids=tokens, use_cache=False)
    return [found[layer] for layer in layers]


def check_finite(activations: torch.Tensor, site: Site, layer: int) -> None:
    """Raises `InputError` where an activation is not a finite number."""
    if not activations.isfinite().all():
        bad = activations[~activations.isfinite()][0].item()
        raise InputError(
            f"an activation of layer {layer} (site {site.name}) is {bad}, a number was expected: the"
            " model's weights are damaged or its training diverged; checkpoints so far are kept"
        )
