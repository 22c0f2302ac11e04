"""The contexts of a text: its last 1, 2, ..., D tokens, numbered so that all neurons share them.

A context of k tokens is a node; the context without its earliest token is its parent. So all contexts of a text are
one tree, and what a neuron does at each of them is one column of a table (`cratelm.replace.tables`).

Contexts stay inside one document and one sequence. Unlike those of excerpts, they know where these begin: `START` counts
as a token, so that the first token of a document has a context of its own.

Shape legend: n tokens, D depth, C contexts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cratelm.score.contexts import Nodes

Int64 = NDArray[np.int64]
ROOT = -1
"""parent of contexts of one token; number of a token without a context"""
START = -1
"""entry of a context for the beginning of its document or sequence, before which the model sees no text either"""
NO_TOKEN = -2
"""entry of a context before that"""
LEAST = 2
"""how often a context of several tokens must occur in the text; a single token must occur once"""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts that occur in a text, parents before their children."""

    tokens: Int64
    """[C] earliest token of each context; of one token: the token itself"""
    parents: Int64
    """[C] number of the context without it, `ROOT` for single tokens; ascending within a level"""
    counts: Int64
    """[C] number of tokens of the text at which the context occurs"""
    bounds: tuple[int, ...]
    """[D + 1] first context of each level, and C: contexts of level l have l + 1 tokens"""

    @classmethod
    def of(cls, contexts: Int64, least: int = LEAST) -> "Contexts":
        """Return the contexts of a text, `contexts` [n, D]: column 0 the token, column j the j-th before it.

        `START` stands at the beginning of a document, `NO_TOKEN` before that. A context of several tokens occurs at least `least` times.
        """
        distinct, node, count = np.unique(contexts[:, 0], return_inverse=True, return_counts=True)
        tokens, parents, counts = [distinct], [np.full(len(distinct), ROOT)], [count]
        bounds = [0, len(distinct)]
        rows = np.flatnonzero(count[node] >= least)
        node = node[rows]
        for level in range(1, contexts.shape[1]):
            token = contexts[rows, level]
            inside = token != NO_TOKEN
            rows, node, token = rows[inside], node[inside], token[inside]
            base = int(contexts.max(initial=0)) + 2
            keys, which, count = np.unique(
                node * base + token + 1, return_inverse=True, return_counts=True
            )
            often = np.flatnonzero(count >= least)
            renumbered = np.full(len(keys), ROOT)
            renumbered[often] = bounds[-1] + np.arange(len(often))
            tokens.append(keys[often] % base - 1)
            parents.append(keys[often] // base)
            counts.append(count[often])
            bounds.append(bounds[-1] + len(often))
            node = renumbered[which]
            rows, node = rows[node != ROOT], node[node != ROOT]
        return cls(
            np.concatenate(tokens), np.concatenate(parents), np.concatenate(counts), tuple(bounds)
        )

    @classmethod
    def of_nodes(cls, nodes: Nodes) -> "tuple[Contexts, Int64]":
        """Return the contexts of the nodes of several tries, and the context of each node [K]. Nothing is counted."""
        context = np.full(len(nodes.tokens), ROOT)
        base = int(nodes.tokens.max(initial=0)) + 1
        tokens, parents, bounds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [0]
        for of in nodes.levels or [np.zeros(0, np.int64)]:
            above = np.where(nodes.parents[of] == ROOT, ROOT, context[nodes.parents[of]])
            keys, which = np.unique((above + 1) * base + nodes.tokens[of], return_inverse=True)
            context[of] = bounds[-1] + which
            tokens.append(keys % base)
            parents.append(keys // base - 1)
            bounds.append(bounds[-1] + len(keys))
        n = np.zeros(bounds[-1], np.int64)
        return cls(np.concatenate(tokens), np.concatenate(parents), n, tuple(bounds)), context

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depth(self) -> int:
        """Return D, the number of tokens of the longest contexts that were sought."""
        return len(self.bounds) - 1

    def shallow(self, depth: int) -> "Contexts":
        """Return the contexts of at most `depth` tokens."""
        depth = min(depth, self.depth)
        n = self.bounds[depth]
        return Contexts(
            self.tokens[:n], self.parents[:n], self.counts[:n], self.bounds[: depth + 1]
        )

    def level(self, number: int) -> slice:
        """Return the contexts of `number` + 1 tokens."""
        return slice(self.bounds[number], self.bounds[number + 1])

    @cached_property
    def _base(self) -> int:
        return int(self.tokens.max(initial=0)) + 2

    @cached_property
    def _keys(self) -> Int64:
        """Return one number per parent and token [C], ascending within a level."""
        return (self.parents + 1) * self._base + self.tokens + 1

    def match(self, contexts: Int64) -> Int64:
        """Return, for each level, the context that occurs at tokens [n], [D, n]; `ROOT` where there is none.

        `contexts` [n, D'] are those of any text, as in `of`; deeper levels than D' match nothing.
        """
        matched = np.full((self.depth, len(contexts)), ROOT)
        rows, node = np.arange(len(contexts)), np.full(len(contexts), ROOT)
        for level in range(min(self.depth, contexts.shape[1])):
            token = contexts[rows, level]
            inside = (token != NO_TOKEN) & (token + 1 < self._base)
            rows, node, token = rows[inside], node[inside], token[inside]
            keys = self._keys[self.level(level)]
            if not len(keys):
                break
            wanted = (node + 1) * self._base + token + 1
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            equal = keys[at] == wanted
            rows, node = rows[equal], self.bounds[level] + at[equal]
            matched[level, rows] = node
        return matched

    def families(self, level: int) -> tuple[Int64, Int64]:
        """Return the distinct parents [P] of the contexts of a level, and where the children of each begin in it [P]."""
        of = self.parents[self.level(level)]
        first = np.flatnonzero(np.append(True, of[1:] != of[:-1])) if len(of) else of
        return of[first], first
