"""What every neuron does at every context of the fit text, from one pass over it: look-up tables and context tries.

The explainers of `cratelm explain` see the excerpts of a neuron, chosen for their activations. Here all fit tokens
count the same, and the contexts are shared (`cratelm.replace.contexts`), so that all neurons of a layer are explained
by one product of matrices. The value of a context c is the mean activation at its tokens, shrunk toward the value of
its parent p:

    v_c = (sum_{i in c} a_i + k_l v_p) / (n_c + k_l),      k_l = variance within contexts / variance among siblings

with the mean over all tokens above the single tokens. Both variances are estimated for each neuron and level l by the
analysis of variance of nested groups (Searle, Casella & McCulloch 1992, chapter 3), so that no constant is tuned: where
the contexts of a level differ by chance alone, k is infinite and they predict what their parents do.

Sums must not depend on the order of the batches, nor on how many processes share them. So the sums of each batch are
rounded to multiples of a power of two that is fine enough to lose nothing in practice, and coarse enough that float64
adds them without an error.

Shape legend: n tokens, D levels, C contexts, H neurons of a layer, K nodes kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cratelm.replace.contexts import ROOT, Contexts
from cratelm.replace.exact import rounded
from cratelm.score.token_share import TokenGroups

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
_ROWS = 4096
"""contexts that are computed on at a time"""
_COLUMNS = 64
"""neurons whose values are copied at a time"""


class ContextSums:
    """Sums of the activations of the neurons of a layer at the contexts of a text. Memory: 8 * C * H bytes."""

    def __init__(self, contexts: Contexts, n_neurons: int, quantum: float):
        """Sums of a batch are rounded to multiples of `quantum`, see `cratelm.replace.exact`."""
        self.contexts = contexts
        self.deepest = np.zeros((len(contexts) + 1, n_neurons))
        """[C + 1, H] sums over the tokens whose longest context it is; last, over tokens without a context"""
        self.squares = np.zeros((contexts.depth, n_neurons))
        """[D, H] sums of squares over the tokens that have a context of each level"""
        self.n = 0
        self._quantum = quantum

    def add(self, activations: Float32, matched: Int64) -> None:
        """Add activations [n, H] at tokens whose contexts are `matched` [D, n] (`Contexts.match`)."""
        deepest = deepest_of(matched)
        groups = TokenGroups.of(np.where(deepest == ROOT, len(self.contexts), deepest))
        values = activations.astype(np.float64)
        self.deepest[groups.tokens] += rounded(groups.sums(values), self._quantum)
        # a token that has a context of a level has one of each level above it
        n_levels = np.count_nonzero(matched != ROOT, axis=0)
        by_number = TokenGroups.of(n_levels)
        squares = np.zeros((self.contexts.depth + 1, values.shape[1]))
        squares[by_number.tokens] = by_number.sums(np.square(values, out=values))
        at_least = np.cumsum(squares[::-1], axis=0)[::-1]
        self.squares += rounded(at_least[1:], self._quantum)
        self.n += len(activations)

    def merge(self, other: "ContextSums") -> None:
        """Add the sums over other tokens."""
        self.deepest += other.deepest
        self.squares += other.squares
        self.n += other.n

    def tables(self) -> "FittedTables":
        """Return the values of all contexts. The sums are used up: they become those of the tables."""
        contexts, total = self.contexts, self.deepest
        for level in range(contexts.depth - 1, 0, -1):
            parents, first = contexts.families(level)
            if len(first):
                total[parents] += _sums_by_family(total[contexts.level(level)], first)
        single = total[contexts.level(0)].sum(0) + total[-1]
        mean = single / max(1, self.n)
        values = np.empty((len(contexts) + 1, total.shape[1]), np.float32)
        values[-1] = mean
        for level in range(contexts.depth):
            of = contexts.level(level)
            counts = contexts.counts[of].astype(np.float64)
            strength = self._strength(level, total[of], counts)
            for low in range(of.start, of.stop, _ROWS):
                rows = slice(low, min(low + _ROWS, of.stop))
                above = values[contexts.parents[rows]].astype(np.float64)  # `ROOT` is the last row
                n = contexts.counts[rows, None]
                with np.errstate(invalid="ignore"):
                    shrunk = (total[rows] + strength * above) / (n + strength)
                values[rows] = np.where(np.isinf(strength), above, shrunk)
        return FittedTables(Tables(contexts, values), total)

    def _strength(self, level: int, total: Float64, counts: Float64) -> Float64:
        """Return k [H] of a level: the number of tokens that the parent's value counts as."""
        n, n_contexts = counts.sum(), len(counts)
        _, first = self.contexts.families(level)
        if level == 0:  # all single tokens are siblings, and `first` is that of `ROOT`
            assert len(first) <= 1
        n_between, n_within = n_contexts - len(first), n - n_contexts
        if n_between < 1 or n_within < 1:
            return np.full(total.shape[1], np.inf if n_between < 1 else 0.0)
        family_counts = np.add.reduceat(counts, first)
        family_totals = _sums_by_family(total, first)
        explained = np.einsum("ch,ch,c->h", total, total, 1 / counts)
        by_family = np.einsum("ph,ph,p->h", family_totals, family_totals, 1 / family_counts)
        within = np.maximum(0, self.squares[level] - explained) / n_within
        among = np.maximum(0, explained - by_family) / n_between
        size = (n - (np.add.reduceat(counts**2, first) / family_counts).sum()) / n_between
        between = (among - within) / size
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(between > 0, within / between, np.inf)


def deepest_of(matched: Int64) -> Int64:
    """Return the longest context of each token [n], of those of each level [D, n]; `ROOT` without one."""
    node = matched[0]
    for of_level in matched[1:]:
        node = np.where(of_level != ROOT, of_level, node)
    return node


@dataclass(frozen=True, eq=False)
class Tables:
    """The value of every context for every neuron of a layer: explanations without a limit of their size."""

    contexts: Contexts
    values: Float32
    """[C + 1, H]; last the mean over all tokens, the value of tokens without a context"""

    @property
    def entries(self) -> float:
        """Return the number of values per neuron."""
        return float(len(self.contexts))

    @property
    def n_values(self) -> int:
        """Return the number of values of all neurons."""
        return self.values.size

    def predict(self, matched: Int64) -> Float32:
        """Return the values [n, H] at tokens whose contexts are `matched` [D, n]."""
        return self.values[deepest_of(matched)]


@dataclass(frozen=True, eq=False)
class FittedTables:
    """Tables with the sums that they were made from, of which smaller explanations can be made."""

    tables: Tables
    totals: Float64
    """[C + 1, H] sums of activations at the tokens of each context; last over tokens without one"""

    def shallow(self, depth: int) -> "FittedTables":
        """Return the tables of the contexts of at most `depth` tokens."""
        contexts, values = self.tables.contexts.shallow(depth), self.tables.values
        rows = np.append(np.arange(len(contexts)), len(values) - 1)
        return FittedTables(Tables(contexts, values[rows]), self.totals[rows])

    def pruned(self, most: int, weights: Float32 | None = None, *, shared: bool = False) -> "Tries":
        """Return the `most` contexts of each neuron that change its prediction most, and their ancestors among them.

        The gain of a context is the squared error that it removes in addition to its parent, n_c (v_c - v_p)^2; with
        `weights` [C, H], sums of the weights of the tokens of each context take the place of n_c. Contexts are ranked
        by the best gain in their subtree, as in `cratelm.explain.trie`, so that ancestors are kept. If they are `shared`,
        the limit is `most` times H for all neurons of the layer together, so that those that vary more get more.

        A context predicts only where none of its kept children does. So its value becomes the mean activation over
        these tokens, in which its value in the tables counts as one more token; and likewise the default.
        """
        values, best = self.tables.values, self._best_gains(weights)
        n_neurons = values.shape[1]
        if shared:
            chosen = _highest(best.ravel(), most * n_neurons)  # context * H + neuron
            order = np.argsort(chosen % n_neurons, kind="stable")
            edges = np.searchsorted(chosen[order] % n_neurons, np.arange(1, n_neurons))
            kept = np.split(chosen[order] // n_neurons, edges)
        else:
            kept = [_highest(of, most) for of in _columns(best)]
        totals, own = _columns(self.totals), _columns(values)
        predicted = [
            self._uncovered(of, *of_neuron)
            for of, *of_neuron in zip(kept, totals, own, strict=True)
        ]
        default = np.array([of[-1] for of in predicted], np.float32)
        return Tries.of(self.tables.contexts, default, kept, [of[:-1] for of in predicted])

    def _uncovered(self, kept: Int64, totals: Float64, values: Float32) -> Float64:
        """Return the values of the kept contexts [K] of a neuron, and its default, where no kept child predicts.

        `totals` and `values` [C + 1] are those of the neuron.
        """
        contexts = self.tables.contexts
        parents = contexts.parents[kept]
        # parents among the kept contexts, of which the default is the last
        above = np.where(parents == ROOT, len(kept), np.searchsorted(kept, parents))
        single = contexts.level(0)
        n = np.append(contexts.counts[kept], contexts.counts[single].sum()).astype(np.float64)
        total = np.append(totals[kept], totals[single].sum() + totals[-1])
        left_n, left_total = n.copy(), total.copy()
        np.subtract.at(left_n, above, n[:-1])
        np.subtract.at(left_total, above, total[:-1])
        own = np.append(values[kept], values[-1])
        inner = np.zeros(len(n), bool)
        inner[above] = True
        return np.where(inner, (left_total + own) / (left_n + 1), own)

    def _best_gains(self, weights: Float32 | None) -> Float32:
        """Return the highest gain [C, H] among each context and those below it."""
        contexts, values = self.tables.contexts, self.tables.values
        best = np.empty((len(contexts), values.shape[1]), np.float32)
        for low in range(0, len(contexts), _ROWS):
            rows = slice(low, min(low + _ROWS, len(contexts)))
            rise = values[rows] - values[contexts.parents[rows]]
            of = contexts.counts[rows, None] if weights is None else weights[rows]
            best[rows] = of * rise**2
        for level in range(contexts.depth - 1, 0, -1):
            parents, first = contexts.families(level)
            if len(first):
                below = _highest_by_family(best[contexts.level(level)], first)
                best[parents] = np.maximum(best[parents], below)
        return best


def _sums_by_family(values: Float64, first: Int64) -> Float64:
    """Return the sums [P, H] of values [C, H] over families, which begin at `first` [P].

    The values are multiples of one power of two, so that the order of the sum does not matter. A product with a sparse
    matrix takes a thirtieth of the time of `np.add.reduceat` along the first axis.
    """
    from scipy.sparse import csr_array  # takes a quarter of a second

    n = len(values)
    members = np.ones(n), np.arange(n), np.append(first, n)
    return csr_array(members, (len(first), n)) @ values


def _highest_by_family(values: Float32, first: Int64) -> Float32:
    """Return the maxima [P, H] of values [C, H] over families, which begin at `first` [P].

    One step for the second member of each family, one for the third, and so on: a ninth of the time of
    `np.maximum.reduceat` along the first axis.
    """
    highest, size = values[first], np.diff(first, append=len(values))
    for number in range(1, int(size.max(initial=0))):
        families = np.flatnonzero(size > number)
        highest[families] = np.maximum(highest[families], values[first[families] + number])
    return highest


def _columns(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield the columns [C] of values [C, H], each with its numbers next to each other in memory.

    Copying some at a time reads each line of memory once.
    """
    for first in range(0, values.shape[1], _COLUMNS):
        yield from np.ascontiguousarray(values[:, first : first + _COLUMNS].T)


def _highest(best: Float32, most: int) -> Int64:
    """Return the indices of the `most` highest values above 0, ascending; ties go to the smaller index.

    A parent comes before its children and has at least their value, so the parents of those returned are among them.
    """
    if most >= len(best):
        return np.flatnonzero(best > 0)
    bound = np.partition(best, len(best) - most)[len(best) - most]
    if bound <= 0:
        return np.flatnonzero(best > 0)
    above = np.flatnonzero(best > bound)
    level = np.flatnonzero(best == bound)[: most - len(above)]
    return np.sort(np.concatenate([above, level]))


@dataclass(frozen=True, eq=False)
class Tries:
    """Explanations of a limited size: some contexts of each neuron, each with the value that it predicts."""

    contexts: Contexts
    default: Float32
    """[H] value of tokens without a kept context"""
    rise: "csr_array"
    """[C, H] what each kept context adds to the value of the next shorter one that is kept"""

    @classmethod
    def of(
        cls,
        contexts: Contexts,
        default: Float32,
        kept: Sequence[Int64],
        values: Sequence[Float64],
    ) -> "Tries":
        """Return the tries of neurons [H] with these contexts, whose parents are among them, and their values."""
        from scipy.sparse import csr_array  # takes a quarter of a second

        rows = np.concatenate([np.zeros(0, np.int64), *kept])
        columns = np.repeat(np.arange(len(kept)), [len(of) for of in kept])
        rises = [np.zeros(0)]
        for h, (of, value) in enumerate(zip(kept, values, strict=True)):
            parents = contexts.parents[of]
            above = np.append(value, default[h])
            at = np.where(parents == ROOT, len(of), np.searchsorted(of, parents))
            rises.append(value - above[at])
        shape = len(contexts), len(kept)
        return cls(contexts, default, csr_array((np.concatenate(rises), (rows, columns)), shape))

    @property
    def entries(self) -> float:
        """Return the mean number of contexts of a neuron."""
        return self.n_values / max(1, len(self.default))

    @property
    def n_values(self) -> int:
        """Return the number of contexts of all neurons."""
        return len(self.rise.data)

    def predict(self, matched: Int64) -> Float32:
        """Return the values [n, H] at tokens whose contexts are `matched` [D, n]."""
        from scipy.sparse import csr_array

        deepest, first, which = np.unique(
            deepest_of(matched), return_index=True, return_inverse=True
        )
        paths = matched[:, first].T  # [G, D]
        inside = paths != ROOT
        row = np.repeat(np.arange(len(deepest)), inside.sum(1))
        shape = len(deepest), len(self.contexts)
        chosen = csr_array((np.ones(len(row)), (row, paths[inside])), shape)
        rises: Any = chosen @ self.rise
        values = rises.toarray() + self.default
        return values.astype(np.float32)[which]
