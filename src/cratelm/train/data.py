"""Which sequences a step reads: a pure function of the step, the seed and the corpus.

No state is kept between steps, so resuming needs no loader state, and any two models trained with the
same seed see the same tokens in the same order.

Shape legend: B sequences per step over all ranks, b of one micro-batch, T tokens of a sequence.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.errors import InputError

if TYPE_CHECKING:
    from cratelm.tokens.shards import TokenSplit


class BatchSampler:
    """Sampler of one rank's share of each step's batch, from memory-mapped shards.

    An epoch is a permutation of all sequences of the split (8 bytes per sequence in memory: 0.8 GB for
    100B tokens at T = 1,024); batches cross epoch boundaries, so every sequence is read once before any
    is read again. Raises `InputError` if the split has no whole sequence, or if the ranks cannot share
    the batch evenly.
    """

    def __init__(
        self,
        split: "TokenSplit",
        *,
        batch_size: int,
        micro_batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        n_ranks: int = 1,
    ):
        self.split, self.batch_size, self.sequence_length = split, batch_size, sequence_length
        self.seed, self.rank, self.n_ranks = seed, rank, n_ranks
        self.n_sequences = split.n_sequences(sequence_length)
        if self.n_sequences == 0:
            raise InputError(
                f"the train split has {split.n_tokens} tokens, but at least {sequence_length + 1}"
                " are needed: give more text, or a lower --sequence-length"
            )
        share, remainder = divmod(batch_size, n_ranks)
        micro = min(micro_batch_size, share)
        if remainder or share % micro:
            raise InputError(
                f"--batch-size {batch_size} cannot be divided among {n_ranks} processes in micro-batches"
                f" of {micro_batch_size} sequences: choose a multiple of {n_ranks * micro_batch_size}"
            )
        self.n_micro = share // micro
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the sequences of the whole batch of `step` (from 0), [B], the same on every rank."""
        # The batch as positions in an endless sequence of epochs; if it crosses into the next epoch, each
        # part is looked up in its own permutation.
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, offsets = np.divmod(positions, self.n_sequences)
        sequences = np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            sequences[in_epoch] = self._permutation(int(epoch))[offsets[in_epoch]]
        return sequences

    def micro_batches(
        self, step: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's inputs [b, T] and next-token targets [b, T] of `step`, by micro-batch.

        Reading is a copy out of the page cache, and a GPU works asynchronously, so a loader process
        would gain nothing.
        """
        shares = self.indices(step).reshape(self.n_micro, self.n_ranks, -1)
        for micro in shares[:, self.rank]:
            yield read_batch(self.split, micro, self.sequence_length, device)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(self.n_sequences)
        return self._order


def read_batch(
    split: "TokenSplit", indices: NDArray[np.int64], sequence_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, [b, T] each, of the sequences `indices` [b]."""
    rows = np.stack([split.sequence(int(i), sequence_length) for i in indices])  # [b, T + 1]
    tokens = torch.from_numpy(rows)
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def spread(n: int, count: int) -> NDArray[np.int64]:
    """Return `count` (or all) of the numbers 0..n-1, evenly spread: [min(n, count)]."""
    return np.linspace(0, n - 1, min(n, count)).astype(np.int64)
