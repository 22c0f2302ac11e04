"""Top-k buffers: many buffers at once, each of which keeps the few candidates with the smallest keys.

Every excerpt of a harvest is chosen by one rule: each buffer (one neuron, or one bin of one neuron) holds
the K candidates with the smallest keys so far. For top excerpts the key is the negative activation, for
samples of a bin a pseudo-random number. A candidate that is not among the best K now can never be later,
so memory does not depend on the number of tokens, and the result does not depend on how they are batched
(exactly: keys have no ties, or `position` breaks them).

All tensors have one row per buffer, so that the buffers of a layer (18 per neuron) are updated by a few
tensor operations; one heap per buffer would be a million Python calls per batch.

Shape legend: C buffers, K slots of a buffer, W tokens of a window, n candidates, U buffers touched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

EMPTY = torch.iinfo(torch.int64).max
"""key of an empty slot: any candidate is better"""
_WAVES = 6
"""most candidates of one buffer that are inserted one after another; if a buffer has more, all candidates
are sorted together with what the buffers hold"""

_MERGED = 2**16
"""number of candidates of another process that are offered at a time; with windows of 64 tokens they take 20 MB"""

Windows = Callable[[torch.Tensor], torch.Tensor]
"""from numbers of candidates [m] to their activations [m, W]"""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens that may be kept, each for one buffer. All [n] int64."""

    buffer: torch.Tensor
    """row of the buffer"""
    key: torch.Tensor
    """smaller is better; below `EMPTY`"""
    position: torch.Tensor
    """breaks ties if documents are unique: the smaller is better; otherwise keys have no ties"""
    start: torch.Tensor
    """first position of the excerpt"""
    stop: torch.Tensor
    """one past its last position"""
    document: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "Candidates":
        columns = (self.buffer, self.key, self.position, self.start, self.stop, self.document)
        return Candidates(*(column[index] for column in columns))


def slot_bytes(window: int) -> int:
    """Return the bytes of one slot of a buffer whose windows have W = `window` tokens."""
    return 5 * 8 + 4 * window


class TopKBuffers:
    """C buffers of K slots. Memory: C * K * `slot_bytes(W)` bytes, however many candidates there are.

    With `unique_documents` a buffer keeps at most one candidate per document, the best one.
    """

    def __init__(
        self,
        buffers: int,
        slots: int,
        window: int,
        device: torch.device,
        *,
        unique_documents: bool = False,
    ):
        self.slots, self.unique_documents = slots, unique_documents
        shape = (buffers, slots)
        self.key = torch.full(shape, EMPTY, device=device)
        """[C, K] in no order: until the end it only matters which slots are taken"""
        self.position = torch.zeros(shape, dtype=torch.int64, device=device)
        self.start = torch.zeros_like(self.position)
        self.stop = torch.zeros_like(self.position)
        self.document = torch.full_like(self.position, -1)
        self.window = torch.zeros((*shape, window), device=device)
        self.threshold = torch.full((buffers,), EMPTY, device=device)
        """[C] largest key held: a candidate must have a smaller key to be kept"""

    def update(self, candidates: Candidates, windows: Windows) -> None:
        """Keep the best K of each buffer's slots and candidates.

        `windows` is called only for candidates that are kept: soon these are one in thousands, and
        cutting the window costs more than everything else.
        """
        index = torch.nonzero(candidates.key < self.threshold[candidates.buffer]).flatten()
        if not len(index):
            return
        # Once the buffers are full, few candidates pass the threshold, mostly one per buffer. Those are
        # inserted in waves of at most one per buffer, at the cost of the K keys of the buffers they
        # touch. Sorting them with all that these buffers hold takes 2 to 7 times as long (200 to 9,000
        # candidates, K = 20). But there are as many waves as one buffer has candidates, which is why the
        # first batches are sorted.
        if int(torch.bincount(candidates.buffer[index]).max()) > _WAVES:
            self._merge(candidates[index], index, windows)
            return
        index = index[_lexsort(candidates.buffer[index], candidates.position[index])]
        passed = candidates[index]
        wave = _rank_in_group(passed.buffer)
        for number in range(int(wave.max()) + 1):
            in_wave = torch.nonzero(wave == number).flatten()
            self._insert(passed[in_wave], index[in_wave], windows)

    def filled(self) -> dict[str, torch.Tensor]:
        """Return the filled slots, n of them, as columns [n] and their windows [n, W], on the CPU."""
        buffer, slot = torch.nonzero(self.key < EMPTY, as_tuple=True)
        columns = ("key", "position", "start", "stop", "document", "window")
        return {
            "buffer": buffer.cpu(),
            **{name: getattr(self, name)[buffer, slot].cpu() for name in columns},
        }

    def merge(self, filled: Mapping[str, torch.Tensor]) -> None:
        """Keep the best K of each buffer's slots and of those that the same buffer of another process filled.

        The other process searched tokens after those of this one: of equal keys, the smaller position is kept.
        """
        device = self.key.device
        for low in range(0, len(filled["buffer"]), _MERGED):
            part = {name: column[low : low + _MERGED].to(device) for name, column in filled.items()}
            window = part.pop("window")
            self.update(Candidates(**part), lambda i, w=window: w[i])

    def _insert(self, new: Candidates, index: torch.Tensor, windows: Windows) -> None:
        """Insert at most one candidate per buffer, in the slot of the worst one held, if it is better.

        With unique documents, if the buffer holds a candidate of the same document, use that slot instead.
        """
        keys, positions = self.key[new.buffer], self.position[new.buffer]  # [n, K]
        # The worst has the largest key and, among equal keys, the largest position. An empty slot has
        # key EMPTY.
        at_worst = keys == keys.amax(1, keepdim=True)
        slot = torch.where(at_worst, positions, -1).argmax(1)
        if self.unique_documents:
            same = (self.document[new.buffer] == new.document[:, None]) & (keys < EMPTY)
            slot = torch.where(same.any(1), same.int().argmax(1), slot)
        rows = torch.arange(len(slot), device=slot.device)
        key, position = keys[rows, slot], positions[rows, slot]
        tie = (new.key == key) & (new.position < position)
        better = torch.nonzero((new.key < key) | tie).flatten()
        self._put(new[better], slot[better], index[better], windows)
        self.threshold[new.buffer] = self.key[new.buffer].amax(1)

    def _merge(self, new: Candidates, index: torch.Tensor, windows: Windows) -> None:
        """Keep the best of any number of candidates per buffer, by sorting them with what it holds."""
        touched, row = torch.unique(new.buffer, return_inverse=True)  # [U], [n] row in touched
        kept_old, kept_new = self._survivors(touched, row, new)
        # Candidates that stay keep their slots, so that their windows of W numbers are not moved; new ones
        # fill the slots that became free, in the order of the candidates.
        self.key[touched] = torch.where(kept_old, self.key[touched], EMPTY)
        survivors = torch.nonzero(kept_new).flatten()
        survivors = survivors[torch.argsort(row[survivors], stable=True)]
        slot = _nth_free(~kept_old, row[survivors], _rank_in_group(row[survivors]))
        self._put(new[survivors], slot, index[survivors], windows)
        self.threshold[touched] = self.key[touched].amax(1)

    def _put(
        self, new: Candidates, slot: torch.Tensor, index: torch.Tensor, windows: Windows
    ) -> None:
        """Write candidates [n] into slots [n] of their buffers."""
        row = new.buffer
        self.key[row, slot] = new.key
        self.position[row, slot] = new.position
        self.start[row, slot] = new.start
        self.stop[row, slot] = new.stop
        self.document[row, slot] = new.document
        self.window[row, slot] = windows(index)

    def _survivors(
        self, touched: torch.Tensor, row: torch.Tensor, new: Candidates
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which held [U, K] and which new [n] candidates are among the best K of their buffer."""
        device, n_old = row.device, len(touched) * self.slots
        old_rows = torch.arange(len(touched), device=device).repeat_interleave(self.slots)
        rows = torch.cat([old_rows, row])
        keys = torch.cat([self.key[touched].flatten(), new.key])
        positions = torch.cat([self.position[touched].flatten(), new.position])
        order = torch.nonzero(keys < EMPTY).flatten()
        if self.unique_documents:
            # First the best of each document, then the best K of those.
            documents = torch.cat([self.document[touched].flatten(), new.document])
            order = order[_lexsort(rows[order], documents[order], keys[order], positions[order])]
            order = order[_is_first(rows[order], documents[order])]
            order = order[_lexsort(rows[order], keys[order], positions[order])]
        else:
            order = order[_lexsort(rows[order], keys[order])]
        kept = order[_rank_in_group(rows[order]) < self.slots]
        survives = torch.zeros(n_old + len(row), dtype=torch.bool, device=device)
        survives[kept] = True
        return survives[:n_old].view(-1, self.slots), survives[n_old:]


def _nth_free(free: torch.Tensor, row: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Return the column of the n-th (from 0) free slot of each row: free [U, K], row and n [m] -> [m]."""
    count = free.sum(1)
    first = torch.cumsum(count, 0) - count  # [U] free slots in the rows before
    columns = torch.nonzero(free)[:, 1]  # of all free slots, row by row
    return columns[first[row] + n]


def _lexsort(*columns: torch.Tensor) -> torch.Tensor:
    """Return the order that sorts by the first column, ties by the second, and so on."""
    order = torch.arange(len(columns[0]), device=columns[0].device)
    for column in reversed(columns):
        order = order[torch.argsort(column[order], stable=True)]
    return order


def _is_first(*columns: torch.Tensor) -> torch.Tensor:
    """Return whether each row differs from the one before it, as the first of a group of equal rows does."""

    first = torch.ones(len(columns[0]), dtype=torch.bool, device=columns[0].device)
    if len(first) > 1:
        first[1:] = torch.stack([c[1:] != c[:-1] for c in columns]).any(0)
    return first


def _rank_in_group(group: torch.Tensor) -> torch.Tensor:
    """Return the number of each row within its run of equal values, from 0."""
    index = torch.arange(len(group), device=group.device)
    starts = torch.where(_is_first(group), index, torch.zeros_like(index))
    return index - torch.cummax(starts, 0).values if len(group) else index
