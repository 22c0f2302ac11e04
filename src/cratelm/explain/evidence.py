"""The fit excerpts of one neuron as flat arrays that explainers aggregate.

Shapes: n tokens of all excerpts; N of them after removing repeated positions of the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.records import Excerpt, NeuronRecord

NO_TOKEN = -1
"""entry of a context for positions before the excerpt"""
WEIGHT = 0.5
"""Weight of a token that occurs only in excerpts chosen for their peak, see `collect_evidence`. Tuned on
held-out scores like `cratelm.explain.lookup.STRENGTH`: 0.5 and 1 are within 0.4 points of each other in all
metrics, while 0.1 loses 2 to 3 points: the loss of evidence on rare tokens outweighs the bias."""


class TokenSums(NamedTuple):
    """Sums over the evidence by its token; each field is [distinct tokens], in the order of the token ids."""

    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: NDArray[np.float64]
    totals: NDArray[np.float64]
    """sum of weight times activation"""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Tokens with known activations of one neuron, each with the tokens before it."""

    contexts: NDArray[np.int64]
    """[N, depth]: column 0 the token itself, column j the j-th token before it, `NO_TOKEN` where the
    excerpt begins later"""
    activations: NDArray[np.float64]
    """[N], raw activations"""
    weights: NDArray[np.float64]
    """[N], 1 for a token of a random excerpt, less for one that occurs only in excerpts chosen for a peak"""
    positions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N] position of each token in the split, ascending; empty if not known"""

    @cached_property
    def weighted(self) -> NDArray[np.float64]:
        """Return weight times activation, [N]."""
        return self.weights * self.activations

    @cached_property
    def by_token(self) -> TokenSums:
        """Return the sums over the evidence with the same token."""
        own = self.contexts[:, 0]
        counts = np.bincount(own)
        tokens = np.flatnonzero(counts)
        weights: NDArray = np.bincount(own, self.weights)
        totals: NDArray = np.bincount(own, self.weighted)
        return TokenSums(tokens, counts[tokens], weights[tokens], totals[tokens])


def collect_evidence(record: NeuronRecord, depth: int, weight: float) -> Evidence:
    """Return the evidence from all excerpts of `record`, with `depth` tokens of context each.

    Excerpts of several kinds overlap, so each position of the split counts once, in the excerpt with the
    most context before it. A token of a random excerpt has weight 1. One that occurs only in excerpts
    chosen because the neuron was high (or in a given bin) has weight `weight`, since such excerpts contain
    a token where it activates the neuron more than on average.
    """
    return evidence_of(record.excerpts, depth, weight)


def evidence_of(excerpts: Sequence[Excerpt], depth: int, weight: float) -> Evidence:
    """Return the evidence from these excerpts of one neuron, as `collect_evidence` does for a record."""
    table = ExcerptTable.of(excerpts)
    alone = table.is_kind("out_of_context")
    if alone.any():
        table = table.of_rows(np.flatnonzero(~alone))
    lengths = table.lengths
    n, offsets = len(table.token_ids), offsets_of(lengths)
    places, n_places = _places(table.positions - table.peaks, lengths)
    places = np.repeat(places, lengths) + offsets  # of all tokens, [n]
    # Of the tokens at each place, the one with the most context is kept, and of several the last.
    best = np.zeros(n_places, np.int64)
    np.maximum.at(best, places, offsets * n + np.arange(n))
    kept = best % max(1, n)
    drawn = np.zeros(n_places, bool)
    drawn[places[np.repeat(table.is_kind("random"), lengths)]] = True
    starts = np.repeat(table.positions - table.peaks, lengths)
    return Evidence(
        _contexts(table.token_ids, offsets, kept, depth),
        table.activations[kept].astype(np.float64),
        np.where(drawn, 1.0, weight),
        starts[kept] + offsets[kept],
    )


def _places(starts: NDArray, lengths: NDArray) -> tuple[NDArray[np.int64], int]:
    """Return the places at which excerpts begin, and the number of places.

    Places are the positions that any excerpt covers, numbered in their order without the gaps between
    excerpts, so that arrays over them take the place of a sort of all tokens.
    """
    if not len(starts):
        return np.zeros(0, np.int64), 0
    order = np.argsort(starts)
    reached = np.maximum.accumulate((starts + lengths)[order])
    gaps = np.maximum(0, starts[order][1:] - reached[:-1])
    before = np.empty(len(starts), np.int64)  # positions before the excerpt that are no places
    before[order] = starts[order[0]] + np.concatenate([[0], np.cumsum(gaps)])
    return starts - before, int(reached[-1] - before[order[-1]])


def contexts_of(token_ids: list[NDArray], depth: int) -> NDArray[np.int64]:
    """Return the contexts of all tokens of excerpts, [n, depth]; n is the excerpts' total length."""
    offsets = offsets_of(np.array([len(t) for t in token_ids]))
    return _contexts(np.concatenate(token_ids), offsets, np.arange(len(offsets)), depth)


def _contexts(token_ids: NDArray, offsets: NDArray, rows: NDArray, depth: int) -> NDArray[np.int64]:
    """Return the contexts [N, depth] of the tokens in `rows` [N], from all tokens [n] and their offsets [n]."""
    columns = np.empty((depth, len(rows)), np.int64)  # columns are read one at a time
    offsets = offsets[rows]
    for back, column in enumerate(columns):
        # a negative index is that of another excerpt's token, and overwritten
        column[:] = token_ids[rows - back] if back < len(token_ids) else NO_TOKEN
        column[offsets < back] = NO_TOKEN
    return columns.T


def offsets_of(lengths: NDArray) -> NDArray[np.int64]:
    """Return the offset of each token in its excerpt, [n], for consecutive excerpts of these lengths."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
