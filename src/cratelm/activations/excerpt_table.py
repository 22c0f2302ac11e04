"""Excerpts of one neuron by columns: a sequence of `Excerpt` whose items are made when they are read.

A neuron has 450 excerpts by default. As objects they take longer to make than to explain, so that readers
make tables, and code that reads every excerpt or every token works on their columns.

Shapes: E excerpts, n tokens of all excerpts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from cratelm.records import EXCERPT_KINDS, Excerpt, ExcerptKind, FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class ExcerptTable(Sequence[Excerpt]):
    """Excerpts as columns, each [E] if no other shape is given; see `Excerpt` for their meaning."""

    kinds: NDArray[np.integer]
    """positions in `kind_names`"""
    kind_names: Sequence[ExcerptKind]
    bins: NDArray[np.integer]
    ranks: NDArray[np.integer]
    peaks: NDArray[np.integer]
    documents: NDArray[np.int64]
    positions: NDArray[np.int64]
    bounds: NDArray[np.integer]
    """[E + 1] where the tokens of each excerpt begin in the next two, then their number n"""
    token_ids: IntArray
    """[n]"""
    activations: FloatArray
    """[n]"""

    @classmethod
    def of(cls, excerpts: Iterable[Excerpt]) -> "ExcerptTable":
        """Return the excerpts as a table; a table is returned as it is."""
        if isinstance(excerpts, cls):
            return excerpts
        excerpts = list(excerpts)

        def column(values: Iterable[int]) -> NDArray[np.int64]:
            return np.fromiter(values, np.int64, len(excerpts))

        def flat(parts: list[NDArray], kind: type) -> NDArray:
            return np.concatenate([np.zeros(0, kind), *parts])

        return cls(
            kinds=column(EXCERPT_KINDS.index(e.kind) for e in excerpts),
            kind_names=EXCERPT_KINDS,
            bins=column(e.bin for e in excerpts),
            ranks=column(e.rank for e in excerpts),
            peaks=column(e.peak for e in excerpts),
            documents=column(e.document for e in excerpts),
            positions=column(e.position for e in excerpts),
            bounds=np.concatenate([[0], np.cumsum(column(map(len, excerpts)))]).astype(np.int64),
            token_ids=flat([e.token_ids for e in excerpts], np.int32),
            activations=flat([e.activations for e in excerpts], np.float32),
        )

    @overload
    def __getitem__(self, at: int) -> Excerpt: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Excerpt, ...]: ...
    def __getitem__(self, at: int | slice) -> Excerpt | tuple[Excerpt, ...]:
        rows = range(len(self))[at]
        return self._item(rows) if isinstance(rows, int) else self.items(rows)

    def __len__(self) -> int:
        return len(self.kinds)

    def __iter__(self) -> Iterator[Excerpt]:
        return map(self._item, range(len(self)))

    def items(self, rows: Iterable[int]) -> tuple[Excerpt, ...]:
        """Return the excerpts in these rows."""
        return tuple(map(self._item, rows))

    def of_rows(self, rows: NDArray[np.integer]) -> "ExcerptTable":
        """Return a table of the excerpts in rows [m]."""
        lengths = self.lengths[rows]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.repeat(self.bounds[:-1][rows] - bounds[:-1], lengths) + np.arange(bounds[-1])
        return ExcerptTable(
            kinds=self.kinds[rows],
            kind_names=self.kind_names,
            bins=self.bins[rows],
            ranks=self.ranks[rows],
            peaks=self.peaks[rows],
            documents=self.documents[rows],
            positions=self.positions[rows],
            bounds=bounds,
            token_ids=self.token_ids[tokens],
            activations=self.activations[tokens],
        )

    def is_kind(self, kind: ExcerptKind) -> NDArray[np.bool_]:
        """Return which excerpts are of a kind."""
        codes = [code for code, name in enumerate(self.kind_names) if name == kind]
        return self.kinds == (codes[0] if codes else -1)

    @cached_property
    def lengths(self) -> NDArray[np.integer]:
        """Return the number of tokens of each excerpt."""
        return np.diff(self.bounds)

    def _item(self, row: int) -> Excerpt:
        span = slice(self.bounds[row], self.bounds[row + 1])
        return Excerpt(
            self.kind_names[self.kinds[row]],
            int(self.ranks[row]),
            int(self.bins[row]),
            self.token_ids[span],
            self.activations[span],
            int(self.peaks[row]),
            int(self.documents[row]),
            int(self.positions[row]),
        )
