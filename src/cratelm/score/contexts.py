"""Look-up tables and tries simulated over a whole split: sums over the tokens at which each node predicts.

A node of a trie is a context: the last k tokens. If the tokens of a batch are sorted by their contexts, the tokens at
which a context occurs stand next to each other, whatever the neuron; so sums over them are differences of two cumulated
sums, for all nodes of all neurons at once. A look-up table is a trie of depth 1.

Memory: a batch of activations, sorted and cumulated, of some neurons at a time; 40 bytes per node.

Shape legend: n tokens of a batch, D depth of contexts, H neurons, K nodes of all neurons, E explanations.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.trie import ROOT
from cratelm.stats.grouped import Groups, Ranking

Int64 = NDArray[np.int64]
_COLUMNS = 256
"""neurons whose cumulated sums are held at a time: 16 MiB for a batch of 8,192 tokens"""
N_POSITIVE = 2
"""number of ways in which a token can be positive"""


class SortedContexts:
    """The tokens of a batch in the order of their contexts, and the groups with the same last 1, 2, ..., D tokens."""

    def __init__(self, contexts: Int64):
        """`contexts` [n, D]: column 0 the token itself, column j the j-th before it, -1 where there is none."""
        self.order = np.lexsort(contexts.T[::-1])
        """[n] tokens by context"""
        ordered = contexts[self.order]
        self._base = int(contexts.max(initial=0)) + 2
        begins = np.zeros(len(ordered), bool)
        begins[:1] = True
        group = np.zeros(len(ordered), np.int64)
        self._keys: list[Int64] = []
        """[D][groups] a number for parent group and token, ascending"""
        self._edges: list[Int64] = []
        """[D][groups + 1] first token of each group in `order`, and n"""
        for level in range(contexts.shape[1]):
            begins[1:] |= ordered[1:, level] != ordered[:-1, level]
            first = np.flatnonzero(begins)
            self._keys.append(group[first] * self._base + ordered[first, level] + 1)
            self._edges.append(np.append(first, len(ordered)))
            group = np.cumsum(begins) - 1

    @property
    def single(self) -> tuple[Int64, Int64]:
        """Return the ids of the distinct tokens [G], ascending, and where each begins in `order`, and n, [G + 1]."""
        return self._keys[0] - 1, self._edges[0]

    def spans(self, level: int, parents: Int64, tokens: Int64) -> tuple[Int64, Int64, Int64]:
        """Return group, first and one past the last token [m] of contexts: a token [m] before that of a parent group.

        `parents` are groups of the level above, -1 for one that does not occur, all 0 at level 0. A context that does
        not occur has group -1 and no tokens.
        """
        keys, edges = self._keys[level], self._edges[level]
        wanted = parents * self._base + tokens + 1
        at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        found = (parents >= 0) & (tokens + 1 < self._base)
        found &= (keys[at] == wanted) if len(keys) else False
        group = np.where(found, at, -1)
        return group, np.where(found, edges[at], 0), np.where(found, edges[at + 1], 0)


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes of E explanations, each of which is scored on one neuron or several."""

    defaults: NDArray[np.float64]
    """[E] value where no node matches"""
    owner: Int64
    """[K] explanation of each node, ascending"""
    parents: Int64
    """[K] number of the parent node, `ROOT` for single tokens"""
    tokens: Int64
    """[K]"""
    values: NDArray[np.float64]
    """[K]"""

    @classmethod
    def of(cls, payloads: Sequence[Mapping[str, Any]]) -> "Nodes":
        """Return the nodes of look-up tables and tries. Raises `InputError` for another kind of explanation."""
        first = 0
        owner, parents, tokens = ([np.zeros(0, np.int64)] for _ in range(3))
        values = [np.zeros(0)]
        for number, payload in enumerate(payloads):
            if "tokens" not in payload or "values" not in payload:
                raise InputError(
                    "only look-up tables and tries can be simulated over a whole split"
                )
            n = len(payload["tokens"])
            of = np.asarray(payload.get("parents", np.full(n, ROOT)), np.int64)
            owner.append(np.full(n, number))
            parents.append(np.where(of == ROOT, ROOT, of + first))
            tokens.append(np.asarray(payload["tokens"], np.int64))
            values.append(np.asarray(payload["values"], np.float64))
            first += n
        defaults = np.array([float(payload["default"]) for payload in payloads])
        return cls(
            defaults,
            np.concatenate(owner),
            np.concatenate(parents),
            np.concatenate(tokens),
            np.concatenate(values),
        )

    @cached_property
    def roots(self) -> Int64:
        """Return the single-token node that each node is below, [K]."""
        roots = np.arange(len(self.parents))
        for of in self.levels[1:]:
            roots[of] = roots[self.parents[of]]
        return roots

    @cached_property
    def levels(self) -> list[Int64]:
        """Return the nodes of each level; a parent is in the level above."""
        depth, above = np.zeros(len(self.parents), np.int64), self.parents
        while (above != ROOT).any():
            depth += above != ROOT
            above = np.where(above == ROOT, ROOT, self.parents[above])
        return [np.flatnonzero(depth == level) for level in range(int(depth.max(initial=-1)) + 1)]


class NodeSums:
    """Sums over the tokens at which each node's context occurs, of the neurons that its explanation is scored on."""

    def __init__(self, nodes: Nodes, neurons: Int64):
        """`neurons` [E]: the column of activations that each explanation is scored on, -1 for none."""
        self.nodes, self.neurons = nodes, neurons
        n = len(nodes.owner)
        self.n = np.zeros(n, np.int64)
        self.total = np.zeros(n)
        self.positive = np.zeros((N_POSITIVE, n), np.int64)
        column = neurons[nodes.owner] if n else np.zeros(0, np.int64)
        self._by_column = np.argsort(column, kind="stable")
        self._column = column[self._by_column]

    def add(self, low: Int64, high: Int64, first: int, cumulated: "Cumulated") -> None:
        """Add a batch: the tokens `low` to `high` [K] of each node, and the sums of neurons from `first` on."""
        edges = np.searchsorted(self._column, [first, first + cumulated.total.shape[1]])
        of = self._by_column[edges[0] : edges[1]]
        column, a, b = self._column[edges[0] : edges[1]] - first, low[of], high[of]
        self.n[of] += b - a
        self.total[of] += cumulated.total[b, column] - cumulated.total[a, column]
        for number, counts in enumerate(cumulated.positive):
            self.positive[number, of] += counts[b, column] - counts[a, column]

    def groups(self, whole: "Whole") -> "list[Simulated | None]":
        """Return the groups of tokens of each explanation; None for one that is scored on no neuron.

        A node predicts where none of its children does, the default where no node does.
        """
        n, total, positive = self.n.copy(), self.total.copy(), self.positive.copy()
        inner = np.flatnonzero(self.nodes.parents != ROOT)
        parents = self.nodes.parents[inner]
        np.subtract.at(n, parents, self.n[inner])
        np.subtract.at(total, parents, self.total[inner])
        for number in range(N_POSITIVE):
            np.subtract.at(positive[number], parents, self.positive[number, inner])
        edges = np.searchsorted(self.nodes.owner, np.arange(len(self.neurons) + 1))
        found: list[Simulated | None] = []
        for number, (neuron, (low, high)) in enumerate(
            zip(self.neurons.tolist(), pairwise(edges), strict=True)
        ):
            if neuron < 0:
                found.append(None)
                continue
            of = slice(low, high)
            groups = Groups(
                np.append(self.nodes.values[of], self.nodes.defaults[number]),
                np.append(n[of], whole.n - n[of].sum()),
                np.append(total[of], whole.total[neuron] - total[of].sum()),
                float(whole.squares[neuron]),
            )
            rest = whole.positive[:, neuron] - positive[:, of].sum(1)
            positives = np.hstack([positive[:, of], rest[:, None]])
            # of the two ways one is wider, so that the larger count is that of both
            silent = self._silent(whole, number, of, groups.n - positives.max(0))
            found.append(Simulated(neuron, groups, positives, *silent))
        return found

    def _silent(self, whole: "Whole", number: int, of: slice, silent: Int64) -> tuple[Int64, Int64]:
        """Return how many tokens of each group [K'] are positive in neither way, and how many of these are hard.

        A hard one has the id of a token that is positive in the first way.
        """
        positive = whole.positive_by_token[:, :, self.neurons[number]]  # [2, V]
        shared = np.flatnonzero(positive[0])
        is_shared = np.isin(self.nodes.tokens[self.nodes.roots[of]], shared)
        hard = np.where(is_shared, silent[:-1], 0)
        rest = int((whole.by_token - positive.max(0))[shared].sum() - hard.sum())
        return silent, np.append(hard, rest)


@dataclass(frozen=True, eq=False)
class Simulated:
    """What an explanation predicts of a neuron over all tokens; groups are its nodes, and last the default."""

    neuron: int
    """column of the neuron"""
    groups: Groups
    positive: Int64
    """[2, K'] positive tokens of each group, in each of the two ways"""
    silent: Int64
    """[K'] tokens that are positive in neither way"""
    hard: Int64
    """[K'] of these, those with the id of a token that is positive in the first way"""

    def against(self, negative: Int64) -> Ranking:
        """Return the ranking of the tokens that are positive in the first way and of negative ones, [K']."""
        strong = self.positive[0]
        g = self.groups
        return Groups(g.value, strong + negative, g.total, g.squares).ordered(strong)


@dataclass(frozen=True, eq=False)
class Cumulated:
    """Cumulated sums over the tokens of a batch in the order of their contexts, of some neurons."""

    total: NDArray[np.float64]
    """[n + 1, H] of activations"""
    positive: tuple[NDArray[np.int32], NDArray[np.int32]]
    """[2] of positive tokens, [n + 1, H]"""

    @classmethod
    def of(cls, ordered: NDArray[np.float32], thresholds: NDArray[np.float32]) -> "Cumulated":
        """Return the sums of activations [n, H] in their order; `thresholds` are [2, H]."""
        total = np.zeros((len(ordered) + 1, ordered.shape[1]))
        np.cumsum(ordered, axis=0, out=total[1:])
        # both counts in one number: the second in the upper half
        first, second = (ordered >= threshold for threshold in thresholds)
        both = np.zeros(total.shape, np.int64)
        np.cumsum(first + (second.astype(np.int64) << 32), axis=0, out=both[1:])
        halves = both.view(np.int32).reshape(*both.shape, 2)
        low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
        return cls(total, (halves[..., low], halves[..., high]))


class Whole:
    """Sums over all tokens, per neuron, and the sums of the nodes of explanations.

    Memory: 8 * V * H bytes for the positive tokens by their id.
    """

    def __init__(self, vocabulary: int, thresholds: NDArray[np.float32], sums: Sequence[NodeSums]):
        """`thresholds` [2, H]: a token is positive, in each of the two ways, if its activation reaches it."""
        n_neurons = thresholds.shape[1]
        self.n = 0
        self.by_token = np.zeros(vocabulary, np.int64)
        """[V] number of tokens with each id"""
        self.positive_by_token = np.zeros((N_POSITIVE, vocabulary, n_neurons), np.int32)
        """[2, V, H] number of them that are positive, in each of the two ways"""
        self.total = np.zeros(n_neurons)
        self.squares = np.zeros(n_neurons)
        self.maximum = np.full(n_neurons, -np.inf, np.float32)
        self.positive = np.zeros((N_POSITIVE, n_neurons), np.int64)
        self._thresholds, self._sums = thresholds, sums

    def add(self, activations: NDArray[np.float32], contexts: SortedContexts) -> None:
        """Add activations [n, H] of the tokens of a batch."""
        spans = [_spans(sums.nodes, contexts) for sums in self._sums]
        self.n += len(activations)
        tokens, edges = contexts.single
        self.by_token[tokens] += np.diff(edges)
        for first in range(0, activations.shape[1], _COLUMNS):
            of = slice(first, first + _COLUMNS)
            ordered = activations[contexts.order, of]
            cumulated = Cumulated.of(ordered, self._thresholds[:, of])
            self.total[of] += cumulated.total[-1]
            self.maximum[of] = np.maximum(self.maximum[of], ordered.max(0))
            self.squares[of] += np.einsum("nh,nh->h", ordered, ordered, dtype=np.float64)
            for number, counts in enumerate(cumulated.positive):
                self.positive[number, of] += counts[-1]
                self.positive_by_token[number, tokens, of] += np.diff(counts[edges], axis=0)
            for sums, (low, high) in zip(self._sums, spans, strict=True):
                sums.add(low, high, first, cumulated)


def _spans(nodes: Nodes, contexts: SortedContexts) -> tuple[Int64, Int64]:
    """Return the first token, and one past the last, at which each node's context occurs in a batch, [K] each."""
    group, low, high = (np.full(len(nodes.owner), value) for value in (-1, 0, 0))
    for level, of in enumerate(nodes.levels):
        parents = group[nodes.parents[of]] if level else np.zeros(len(of), np.int64)
        group[of], low[of], high[of] = contexts.spans(level, parents, nodes.tokens[of])
    return low, high
