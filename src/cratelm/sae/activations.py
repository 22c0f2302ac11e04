"""Activations of a site as shuffled batches: a pure function of the model, the tokens and the seed.

Sequences of the train split are read by the model in a random order, a new one each epoch. Their activations,
excluding those at end-of-text tokens, begin tokens and the first tokens that are left out, fill a buffer, whose rows
are served in a random order; remaining rows that do not fill a batch are dropped. A position in the stream is therefore two numbers, and an interrupted training
resumes after filling one buffer. SAELens' mixing buffer, in contrast, carries old rows over into every refill, so
that its state can only be restored by running it from the start.

Memory: the buffer (`--buffer-mib`, or two batches plus the tokens of one forward pass if that is more), and one
forward pass.

Shape legend: b sequences of a forward pass, T tokens of a sequence, R rows (tokens) of the buffer,
B tokens of a batch, H inputs of a layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.sites import Site, hooked
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.tokens.shards import TokenSplit
from cratelm.train.data import BatchSampler, read_batch

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class StreamPosition:
    """The position of the next batch in the stream of activations."""

    first: int = 0
    """number of forward passes before those that filled the buffer"""
    served: int = 0
    """number of batches served from the buffer"""


class ActivationBuffer:
    """Batches of activations of several layers, with the same tokens for each layer.

    `layers` are places: numbers of layers among those of the site, from 0. Raises `InputError` if the split has no full sequence, or an activation is not a finite number.
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
        beginning: Beginning = PLAIN,
    ):
        """Allocate the buffer; no forward pass is run yet.

        `sequence_length` is with the begin token that `beginning` sets before every sequence. `batch_size` is in rows, `batch_tokens` in tokens of a forward pass; `most_rows` is the number of rows
        that are needed in total, which limits the size of the buffer.
        """
        self.model, self.site, self.layers, self.eot_id = model, site, layers, eot_id
        self.batch_size, self.seed, self.beginning = batch_size, seed, beginning
        b = max(1, batch_tokens // sequence_length)
        self.sampler = BatchSampler(
            split,
            batch_size=b,
            micro_batch_size=b,
            sequence_length=beginning.room(sequence_length),
            seed=seed,
        )
        widths = [site.n_neurons[layer] for layer in layers]
        # The buffer counts as filled at `rows`, a whole number of batches. The last forward pass can exceed
        # `rows` by less than its own number of tokens, so the buffer has room for that many more.
        extra = b * sequence_length
        rows = buffer_bytes // (_FLOAT_BYTES * sum(widths)) - extra
        rows = min(max(rows, 2 * batch_size), max(most_rows, batch_size))
        self.rows = -(-rows // batch_size) * batch_size
        """R: number of rows at which the buffer counts as filled"""
        self._buffers = [
            torch.empty(self.rows + extra, width, device=model.device) for width in widths
        ]
        self._position = StreamPosition()
        self._passes = self._filled = 0  # forward passes and rows in the buffer; 0: not filled yet
        self._order = np.empty(0, np.int64)  # [filled] the order in which rows are served

    @property
    def device(self) -> torch.device:
        """Device of the model, and of the batches."""
        return self.model.device

    @property
    def n_bytes(self) -> int:
        """Size of the buffer in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def position(self) -> StreamPosition:
        """Position of the next batch."""
        return self._position

    def seek(self, position: StreamPosition) -> None:
        """Continue from an earlier value of `position`: the next batch is the one at that position."""
        self._position = position
        self._filled = 0

    def batch(self) -> list[torch.Tensor]:
        """Return the next batch [B, H] of each layer."""
        if not self._filled:
            self._fill()
        first, served = self._position.first, self._position.served
        start = served * self.batch_size
        rows = torch.from_numpy(self._order[start : start + self.batch_size]).to(self.device)
        batch = [buffer[rows] for buffer in self._buffers]
        if served + 1 == self._filled // self.batch_size:  # the last whole batch of the buffer
            self.seek(StreamPosition(first + self._passes))
        else:
            self._position = StreamPosition(first, served + 1)
        return batch

    def means(self) -> list[torch.Tensor]:
        """Return the mean activation [H] of each layer over the buffer."""
        if not self._filled:
            self._fill()
        return [buffer[: self._filled].mean(0) for buffer in self._buffers]

    def mean_norms(self) -> list[float]:
        """Return the mean Euclidean norm of the activation vectors of each layer over the buffer."""
        if not self._filled:
            self._fill()
        return [float(buffer[: self._filled].norm(dim=1).mean()) for buffer in self._buffers]

    @torch.no_grad()
    def _fill(self) -> None:
        """Fill the buffer, beginning with forward pass `first`, and draw the order of its rows."""
        first = self._position.first
        self._passes = 0
        while self._filled < self.rows:
            indices = self.sampler.indices(first + self._passes)
            tokens, _ = read_batch(
                self.sampler.split, indices, self.sampler.sequence_length, self.model.device
            )  # [b, T]
            tokens, counts = self._begun(tokens)
            text = ((tokens != self.eot_id) & counts).flatten()  # [b * T]
            count = int(text.sum())
            by_layer = layer_activations(self.model, self.site, self.layers, tokens)
            for buffer, activations in zip(self._buffers, by_layer, strict=True):
                buffer[self._filled : self._filled + count] = activations.flatten(0, 1)[text]
            self._filled += count
            self._passes += 1
        # seeded by the first forward pass, so that seeking to a position in the buffer gives the same order
        generator = np.random.default_rng((self.seed, first, 1))
        self._order = generator.permutation(self._filled)

    def _begun(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [b, n] after the begin token, [b, T], and which of them count, but for end-of-text tokens."""
        begin, counts = self.beginning, torch.ones_like(tokens, dtype=torch.bool)
        if begin.is_plain:
            return tokens, counts
        if begin.token is not None:
            # A row that begins with it gets an end-of-text token at its end instead: no second one, same length.
            own = tokens[:, :1] == begin.token
            column = tokens.new_full(own.shape, begin.token)
            after = tokens.new_full(own.shape, self.eot_id)
            tokens = torch.where(own, torch.cat([tokens, after], 1), torch.cat([column, tokens], 1))
            counts = torch.ones_like(tokens, dtype=torch.bool)
            of_document = (tokens[:, 1:] == begin.token) & (tokens[:, :-1] == self.eot_id)
            counts[:, 1:] &= ~of_document  # begin tokens of the text
        counts[:, : begin.extra + begin.skip] = False
        return tokens, counts


def layer_activations(
    model: PreTrainedModel, site: Site, layers: tuple[int, ...], tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Return the activations [b, T, H] of `layers` on token ids [b, T], in float32; the head is not run.

    `layers` are places: numbers of layers among those of the site, from 0. Raises `InputError` with the layer if an activation is not a finite number.
    """
    by_layer: dict[int, torch.Tensor] = {}

    def on_activation(layer: int, activations: torch.Tensor) -> None:
        if layer in layers:
            by_layer[layer] = activations.float()
            check_finite(by_layer[layer], site, site.layer_numbers[layer])

    with hooked(model, site, on_activation):
        model.base_model(input_ids=tokens, use_cache=False)
    return [by_layer[layer] for layer in layers]


def check_finite(activations: torch.Tensor, site: Site, layer: int) -> None:
    """Raise `InputError` if an activation is not a finite number."""
    if not activations.isfinite().all():
        bad = activations[~activations.isfinite()][0].item()
        raise InputError(
            f"an activation of layer {layer} (site {site.name}) is {bad}, not a finite number: the"
            " model's weights are damaged or its training diverged; checkpoints so far are kept"
        )
