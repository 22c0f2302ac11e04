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
    full = _Grown(
        *(np.concatenate([getattr(g, f) for g in levels]) for f in _Grown.__annotations__)
    )
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
    tokens, counts, weights, totals = evidence.by_token
    above = np.full(len(tokens), mean)
    levels = [_grown(np.full(len(tokens), ROOT), tokens, counts, weights, totals, above, strength)]
    index = np.zeros(int(tokens.max(initial=0)) + 1, np.int64)
    index[tokens] = np.arange(len(tokens))
    node = index[evidence.contexts[:, 0]]
    # the evidence still in a node of the last level, and that node's index in its level
    rows = np.flatnonzero(
        counts[node] >= MIN_COUNT
    )  # a rarer context cannot be in a node further down
    node = node[rows]
    first_node = 0
    for back in range(1, depth):
        tokens = evidence.contexts[:, back][rows]
        inside = np.flatnonzero(tokens != NO_TOKEN)
        rows, node, tokens = rows[inside], node[inside], tokens[inside]
        if not len(rows):
            break
        # One number per (parent, token), so that one sort groups the rows of all parents at once. Tokens are
        # below 2^32, nodes below 2^31: no overflow.
        base = int(tokens.max()) + 1
        keys, counts, node = _frequent(node * base + tokens)
        inside = np.flatnonzero(node >= 0)
        rows, node = rows[inside], node[inside]
        parents = keys // base
        level = _grown(
            first_node + parents,
            keys % base,
            counts,
            np.bincount(node, evidence.weights[rows], len(keys)),
            np.bincount(node, evidence.weighted[rows], len(keys)),
            levels[-1].values[parents],
            strength,
        )
        first_node += len(levels[-1].values)
        levels.append(level)
    return levels


def _grown(
    parents: NDArray,
    tokens: NDArray,
    counts: NDArray,
    weights: NDArray,
    totals: NDArray,
    above: NDArray,
    strength: float,
) -> _Grown:
    """Return nodes with values and gains; `above` are the values of their parents. All are [nodes]."""
    values = (totals + strength * above) / (weights + strength)
    gains = weights * (values - above) ** 2
    return _Grown(parents, tokens, values, counts, gains, weights, totals)


def _frequent(keys: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the keys [K] that occur `MIN_COUNT` times, in order, their counts [K], and each row's index in them.

    The index is -1 for other rows. `np.unique` gives the same of all keys, and takes ten times as long.
    """
    n = len(keys)
    bits = n.bit_length()
    if int(keys.max()) < 2 ** (63 - bits):
        # key and row in one number: to sort numbers takes a third of the time to sort their indices
        packed = np.sort(keys << bits | np.arange(n))
        order, ordered = packed & (1 << bits) - 1, packed >> bits
    else:
        order = np.argsort(keys)
        ordered = keys[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    counts = np.diff(begins, append=n)
    often = counts >= MIN_COUNT
    which = np.full(n, -1)
    which[order[np.repeat(often, counts)]] = np.repeat(np.arange(often.sum()), counts[often])
    return ordered[begins[often]], counts[often], which
