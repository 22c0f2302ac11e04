"""Context trie: a neuron's activation by the last tokens (Neuron-to-Graph, Foote et al. 2023).

A node represents the last k tokens, including the activating token; its children add one more token
before them. A node's value is the mean activation where its context occurs, shrunk toward its parent's
value v, which counts as `STRENGTH` tokens:

    v_c = (sum_i w_i a_i + STRENGTH v) / (sum_i w_i + STRENGTH)        over the evidence i with context c

and the root's value is the neuron's mean over the whole fit split. The deepest matching node predicts.
So after pruning, a node with children predicts only where none of them matches: its value becomes the
mean activation over these tokens, shrunk toward v_c in the same way.

Difference from Neuron-to-Graph: N2G runs the model on prompts with tokens removed or replaced to find
which context an activation needs, and adds synonyms from a second model. Here no model is run: a context
is kept if it occurs at least `MIN_COUNT` times in the harvested excerpts and changes the prediction most,
and nothing is added. So a trie costs milliseconds per neuron, and has only contexts that occur in the
excerpts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.evidence import NO_TOKEN, Evidence

STRENGTH = 0.3
"""number of tokens of evidence that the parent's value counts as; tuned as in `cratelm.explain.lookup`, with
the same result"""
MIN_COUNT = 2
"""how often a context must occur; once suffices for a single token"""
ROOT = -1


@dataclass(frozen=True, eq=False)
class Trie:
    """A trie explanation with K nodes, parents before their children."""

    default: float
    """raw activation predicted if no node matches"""
    parents: NDArray[np.int64]
    """[K] index of the parent node, `ROOT` for single tokens"""
    tokens: NDArray[np.int64]
    """[K] the token that the node adds before its parent's context (for single tokens: the token itself)"""
    values: NDArray[np.float64]
    """[K] predicted raw activation"""
    counts: NDArray[np.int64]
    """[K] number of tokens of evidence"""

    def payload(self) -> dict[str, object]:
        """Return the trie in JSON values, as the explanation stores it."""
        return {
            "default": self.default,
            "parents": self.parents.tolist(),
            "tokens": self.tokens.tolist(),
            "values": [float(f"{v:.5g}") for v in self.values],
            "counts": self.counts.tolist(),
        }

    def context(self, node: int) -> list[int]:
        """Return the node's token ids in the order of the text; the last is the activating one."""
        ids = []
        while node != ROOT:
            ids.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return ids


def context_trie(
    evidence: Evidence, mean: float, max_nodes: int, *, depth: int, strength: float = STRENGTH
) -> Trie:
    """Return the trie of contexts of up to `depth` tokens in `evidence`, pruned to `max_nodes` nodes.

    `mean` is the neuron's mean over the split. A node's gain is the squared error that it removes in addition
    to its parent, (sum of weights) (v_c - v)^2. Nodes are ranked by the best gain in their subtree, so that
    the nodes that change the prediction most are kept together with their ancestors.
    """
    levels = _grow(evidence, mean, depth, strength)
    full = _Grown(*(np.concatenate([getattr(g, f) for g in levels]) for f in _Grown.__annotations__))
    best = full.gains.copy()
    end = len(best)
    for level in levels[:0:-1]:  # from the lowest level up to that below the single tokens
        start = end - len(level.gains)
        np.maximum.at(best, level.parents, best[start:end])
        end = start
    # Ties go to the smaller index, and a parent comes before its children and has at least their best
    # gain, so every ancestor of a kept node is kept.
    kept = np.sort(np.argsort(-best, kind="stable")[:max_nodes])
    kept = kept[best[kept] > 0]
    # Renumber parents by their index among the kept nodes. `ROOT` is -1, which indexes the extra last entry.
    renumbered = np.full(len(best) + 1, ROOT)
    renumbered[kept] = np.arange(len(kept))
    parents = np.where(full.parents[kept] == ROOT, ROOT, renumbered[full.parents[kept]])
    values = _values_after_pruning(full, kept, parents, strength)
    return Trie(mean, parents, full.tokens[kept], values, full.counts[kept])


def _values_after_pruning(
    full: "_Grown", kept: NDArray, parents: NDArray, strength: float
) -> NDArray[np.float64]:
    """Return values [K] of the kept nodes, for the evidence that none of their kept children covers."""
    values, weights, totals = (f[kept] for f in (full.values, full.weights, full.totals))
    inner = np.flatnonzero(parents != ROOT)
    uncovered_weights, uncovered_totals = weights.copy(), totals.copy()
    np.subtract.at(uncovered_weights, parents[inner], weights[inner])
    np.subtract.at(uncovered_totals, parents[inner], totals[inner])
    uncovered = (uncovered_totals + strength * values) / (uncovered_weights + strength)
    return np.where(np.isin(np.arange(len(kept)), parents), uncovered, values)


@dataclass(frozen=True, eq=False)
class _Grown:
    """Nodes before pruning; each field is [nodes]."""

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    gains: NDArray[np.float64]
    weights: NDArray[np.float64]
    """sum of the weights of the evidence"""
    totals: NDArray[np.float64]
    """sum of weight times activation"""


def _grow(evidence: Evidence, mean: float, depth: int, strength: float) -> list[_Grown]:
    """Return all nodes that occur often enough, level by level. Nodes are numbered over all levels."""
    levels: list[_Grown] = []
    rows = np.arange(len(evidence.contexts))  # evidence still in a node of the last level
    node = np.full(len(rows), ROOT)  # that node, numbered over all levels
    above = np.full(len(rows), mean)  # that node's value
    n_nodes = 0
    for back in range(depth):
        level, rows, which = _level(evidence, rows, node, above, back, strength)
        levels.append(level)
        often = level.counts[which] >= MIN_COUNT  # the others cannot be in a node further down
        rows, which = rows[often], which[often]
        if not len(rows):
            break
        node, above = n_nodes + which, level.values[which]
        n_nodes += len(level.values)
    return levels


def _level(
    evidence: Evidence,
    rows: NDArray,
    node: NDArray,
    above: NDArray,
    back: int,
    strength: float,
) -> tuple[_Grown, NDArray[np.int64], NDArray[np.int64]]:
    """Return the nodes one level down, those of `rows` that are in one, and the index of that node for each."""
    tokens = evidence.contexts[:, back][rows]
    # One number per (parent, token), so that one sort groups the rows of all parents at once; node and token
    # are shifted by 1 since both can be -1. Tokens are below 2^32, nodes below 2^31: no overflow.
    first, which, counts = _grouped((node + 1) * (int(tokens.max(initial=0)) + 2) + (tokens + 1))
    ok = (tokens[first] != NO_TOKEN) & (counts >= (MIN_COUNT if back else 1))
    first = first[ok]
    which = np.where(ok, np.cumsum(ok) - 1, -1)[which]
    inside = which >= 0
    rows, which = rows[inside], which[inside]
    weights = evidence.weights[rows]
    weight: NDArray = np.bincount(which, weights, len(first))
    total: NDArray = np.bincount(which, weights * evidence.activations[rows], len(first))
    parent_value = above[first]
    values = (total + strength * parent_value) / (weight + strength)
    grown = _Grown(
        parents=node[first],
        tokens=tokens[first],
        values=values,
        counts=counts[ok],
        gains=weight * (values - parent_value) ** 2,
        weights=weight,
        totals=total,
    )
    return grown, rows, which


def _grouped(keys: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return for each distinct key, in order, a row that has it; for each row [n] its key's number; and key counts.

    `np.unique` gives the same in six times as long, since its sort is stable.
    """
    n = len(keys)
    bits = n.bit_length()
    if int(keys.max(initial=0)) < 2 ** (63 - bits):
        # key and row in one number: to sort numbers takes a third of the time to sort their indices
        packed = np.sort(keys << bits | np.arange(n))
        order, ordered = packed & (1 << bits) - 1, packed >> bits
    else:
        order = np.argsort(keys)
        ordered = keys[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[:n])
    counts = np.diff(begins, append=n)
    which = np.empty(n, np.int64)
    which[order] = np.repeat(np.arange(len(begins)), counts)
    return order[begins], which, counts
