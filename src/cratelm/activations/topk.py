"""Keeps, for many cells at once, the few candidates of each with the smallest keys.

Shape legend: C cells (a cell is one neuron, or one bin of one neuron), K places of a cell,
W tokens of a window, n candidates offered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

EMPTY = torch.iinfo(torch.int64).max
_WAVES = 6
"""where no cell is offered more candidates at once they are inserted one by one a cell, which is
several times faster than sorting them with what the cells hold"""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens that may be kept, each for one cell. All [n] int64."""

    cell: torch.Tensor
    key: torch.Tensor
    """smaller is better; below `EMPTY`"""
    position: torch.Tensor
    """breaks ties where documents are unique: the smaller is better; elsewhere keys have no ties"""
    start: torch.Tensor
    """first position of the excerpt"""
    stop: torch.Tensor
    """one past its last"""
    document: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "Candidates":
        return Candidates(*(tensor[index] for tensor in self.columns()))

    def columns(self) -> tuple[torch.Tensor, ...]:
        return (self.cell, self.key, self.position, self.start, self.stop, self.document)


class TopKBuffers:
    """C cells of K places. Memory: C * K * (5 * 8 + 4 * W) bytes, whatever is offered.

    With `unique_documents` a cell keeps at most one candidate of a document, its best.
    """

    def __init__(
        self,
        cells: int,
        places: int,
        window: int,
        device: torch.device,
        *,
        unique_documents: bool = False,
    ):
        self.places, self.unique_documents = places, unique_documents
        shape = (cells, places)
        self.key = torch.full(shape, EMPTY, device=device)
        self.position = torch.zeros(shape, dtype=torch.int64, device=device)
        self.start = torch.zeros_like(self.position)
        self.stop = torch.zeros_like(self.position)
        self.document = torch.full_like(self.position, -1)
        self.window = torch.zeros((*shape, window), device=device)
        self.threshold = torch.full((cells,), EMPTY, device=device)
        """[C] a candidate must have a smaller key than this to be kept"""

    def offer(
        self, candidates: Candidates, windows: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Keeps the best of what is held and offered.

        `windows(index [m])` gives the activations [m, W] of candidates by number; it is called for
        those that are kept alone.
        """
        index = torch.nonzero(candidates.key < self.threshold[candidates.cell]).flatten()
        if not len(index):
            return
        if int(torch.bincount(candidates.cell[index]).max()) > _WAVES:
            self._merge(candidates[index], index, windows)
            return
        index = index[_lexsort(candidates.cell[index], candidates.position[index])]
        offered = candidates[index]
        wave = _rank_in_group(offered.cell)
        for number in range(int(wave.max()) + 1):
            some = torch.nonzero(wave == number).flatten()
            self._insert(offered[some], index[some], windows)

    def _insert(
        self,
        offered: Candidates,
        index: torch.Tensor,
        windows: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """One candidate a cell at most: it takes the place of the worst held, where it is better.

        Of the document's own, where documents are unique and the cell holds it.
        """
        keys, positions = self.key[offered.cell], self.position[offered.cell]  # [n, K]
        at_worst = keys == keys.amax(1, keepdim=True)
        place = torch.where(at_worst, positions, -1).argmax(1)
        if self.unique_documents:
            own = (self.document[offered.cell] == offered.document[:, None]) & (keys < EMPTY)
            place = torch.where(own.any(1), own.int().argmax(1), place)
        rows = torch.arange(len(place), device=place.device)
        key, position = keys[rows, place], positions[rows, place]
        tie = (offered.key == key) & (offered.position < position)
        better = torch.nonzero((offered.key < key) | tie).flatten()
        self._put(offered[better], place[better], index[better], windows)
        self.threshold[offered.cell] = self.key[offered.cell].amax(1)

    def _merge(
        self,
        offered: Candidates,
        index: torch.Tensor,
        windows: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Any number of candidates a cell, by sorting them with what is held."""
        touched, cell = torch.unique(offered.cell, return_inverse=True)  # U cells
        kept_old, kept_new = self._survivors(touched, cell, offered)
        self.key[touched] = torch.where(kept_old, self.key[touched], EMPTY)
        new = torch.nonzero(kept_new).flatten()
        new = new[torch.argsort(cell[new], stable=True)]
        place = _nth_free(~kept_old, cell[new], _rank_in_group(cell[new]))
        self._put(offered[new], place, index[new], windows)
        self.threshold[touched] = self.key[touched].amax(1)

    def _put(
        self,
        offered: Candidates,
        place: torch.Tensor,
        index: torch.Tensor,
        windows: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Writes candidates [n] into places [n] of their cells; what else is held stays where it is."""
        row = offered.cell
        self.key[row, place] = offered.key
        self.position[row, place] = offered.position
        self.start[row, place] = offered.start
        self.stop[row, place] = offered.stop
        self.document[row, place] = offered.document
        self.window[row, place] = windows(index)

    def _survivors(
        self, touched: torch.Tensor, cell: torch.Tensor, offered: Candidates
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the held [U, K] and of the offered [n] are among the best K of their cell."""
        device, n_old = cell.device, len(touched) * self.places
        rows = torch.arange(len(touched), device=device).repeat_interleave(self.places)
        cells = torch.cat([rows, cell])
        keys = torch.cat([self.key[touched].flatten(), offered.key])
        positions = torch.cat([self.position[touched].flatten(), offered.position])
        order = torch.nonzero(keys < EMPTY).flatten()
        if self.unique_documents:
            documents = torch.cat([self.document[touched].flatten(), offered.document])
            order = order[_lexsort(cells[order], documents[order], keys[order], positions[order])]
            order = order[_is_first(cells[order], documents[order])]
            order = order[_lexsort(cells[order], keys[order], positions[order])]
        else:
            order = order[_lexsort(cells[order], keys[order])]
        kept = order[_rank_in_group(cells[order]) < self.places]
        survives = torch.zeros(n_old + len(cell), dtype=torch.bool, device=device)
        survives[kept] = True
        return survives[:n_old].view(-1, self.places), survives[n_old:]


def _nth_free(free: torch.Tensor, row: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Column of the n-th (from 0) free place of each row: free [U, K], row and n [m] -> [m]."""
    count = free.sum(1)
    first = torch.cumsum(count, 0) - count
    columns = torch.nonzero(free)[:, 1]
    return columns[first[row] + n]


def _lexsort(*columns: torch.Tensor) -> torch.Tensor:
    """Order that sorts by the first column, ties by the second, and so on."""
    order = torch.arange(len(columns[0]), device=columns[0].device)
    for column in reversed(columns):
        order = order[torch.argsort(column[order], stable=True)]
    return order


def _is_first(*columns: torch.Tensor) -> torch.Tensor:
    """True where a row differs from the one before it: the first of each group of equal rows."""
    first = torch.ones(len(columns[0]), dtype=torch.bool, device=columns[0].device)
    if len(first) > 1:
        first[1:] = torch.stack([c[1:] != c[:-1] for c in columns]).any(0)
    return first


def _rank_in_group(group: torch.Tensor) -> torch.Tensor:
    """Number of each row within its run of equal values, from 0."""
    index = torch.arange(len(group), device=group.device)
    starts = torch.where(_is_first(group), index, torch.zeros_like(index))
    return index - torch.cummax(starts, 0).values if len(group) else index
