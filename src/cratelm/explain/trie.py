"""Context trie: what a neuron does after which tokens (Neuron-to-Graph, Foote et al. 2023).

A node stands for the last k tokens, the activating token among them; its children for the same with
one token more before. A node's value is the mean activation where its context was seen, shrunk
toward its parent's value v by as much as `STRENGTH` tokens would:

    v_c = (sum_i w_i a_i + STRENGTH v) / (sum_i w_i + STRENGTH)        over the evidence i with context c

and the root's value is the neuron's mean over the whole fit split. The deepest node that matches
predicts. So after pruning, a node with children answers only for what none of them matches: its value
becomes the mean activation over that rest, shrunk toward v_c in the same way.

How this differs from Neuron-to-Graph: N2G asks the model, on prompts with tokens removed or
replaced, which context an activation needs, and adds synonyms from a second model. Here no model is
asked: a context is kept where it was seen at least `MIN_COUNT` times in the harvested excerpts and
changes the prediction most, and nothing is added. So it costs milliseconds a neuron, and it can only
know contexts that the excerpts hold.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.evidence import NO_TOKEN, Evidence

STRENGTH = 0.3
"""tokens of evidence that the parent's value is worth; chosen as in `cratelm.explain.lookup`, with the
same outcome"""
MIN_COUNT = 2
"""times a context must have been seen; a single token is kept from its first time on"""
ROOT = -1


@dataclass(frozen=True, eq=False)
class Trie:
    """What a trie explanation says. K nodes, parents before their children."""

    default: float
    """raw activation predicted where no node matches"""
    parents: NDArray[np.int64]
    """[K] index of the parent node, `ROOT` for single tokens"""
    tokens: NDArray[np.int64]
    """[K] the token that the node adds before its parent's context (for single tokens: the token itself)"""
    values: NDArray[np.float64]
    """[K] raw activation predicted"""
    counts: NDArray[np.int64]
    """[K] tokens of evidence"""

    def payload(self) -> dict[str, object]:
        return {
            "default": self.default,
            "parents": self.parents.tolist(),
            "tokens": self.tokens.tolist(),
            "values": [float(f"{v:.5g}") for v in self.values],
            "counts": self.counts.tolist(),
        }

    def context(self, node: int) -> list[int]:
        """The node's token ids in the order of the text; the last is the one that activates."""
        ids = []
        while node != ROOT:
            ids.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return ids


def context_trie(
    evidence: Evidence, mean: float, max_nodes: int, *, depth: int, strength: float = STRENGTH
) -> Trie:
    """The trie over `evidence`, contexts of up to `depth` tokens, pruned to at most `max_nodes` nodes.

    A node's gain is how much squared error it takes away beyond its parent, (sum of weights)
    (v_c - v)^2, and it is ranked by the best gain in its subtree: so what is kept is what changes
    the prediction most, with the way to it.
    """
    full = _grow(evidence, mean, depth, strength)
    best = full.gains.copy()
    for node in range(len(best) - 1, -1, -1):
        parent = full.parents[node]
        if parent != ROOT and best[node] > best[parent]:
            best[parent] = best[node]
    # Ties go to the smaller index, and a parent comes before its children: none loses its way.
    kept = np.sort(np.argsort(-best, kind="stable")[:max_nodes])
    kept = kept[best[kept] > 0]
    place = np.full(len(best) + 1, ROOT)
    place[kept] = np.arange(len(kept))
    parents = np.where(full.parents[kept] == ROOT, ROOT, place[full.parents[kept]])
    values = _of_the_rest(full, kept, parents, strength)
    return Trie(mean, parents, full.tokens[kept], values, full.counts[kept])


def _of_the_rest(
    full: "_Grown", kept: NDArray, parents: NDArray, strength: float
) -> NDArray[np.float64]:
    """[K] values of the kept nodes, for the evidence that none of their kept children covers."""
    values, weights, totals = (f[kept] for f in (full.values, full.weights, full.totals))
    inner = np.flatnonzero(parents != ROOT)
    rest_weights, rest_totals = weights.copy(), totals.copy()
    np.subtract.at(rest_weights, parents[inner], weights[inner])
    np.subtract.at(rest_totals, parents[inner], totals[inner])
    rest = (rest_totals + strength * values) / (rest_weights + strength)
    return np.where(np.isin(np.arange(len(kept)), parents), rest, values)


@dataclass(frozen=True, eq=False)
class _Grown:
    """Nodes before pruning, [nodes] each."""

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    gains: NDArray[np.float64]
    weights: NDArray[np.float64]
    """sum of the weights of the evidence"""
    totals: NDArray[np.float64]
    """sum of weight times activation"""


def _grow(evidence: Evidence, mean: float, depth: int, strength: float) -> _Grown:
    """All nodes seen often enough, level by level."""
    levels: list[_Grown] = []
    rows = np.arange(len(evidence.contexts))  # evidence still in a node of the last level
    node = np.full(len(rows), ROOT)  # that node, numbered over all levels
    above = np.full(len(rows), mean)  # that node's value
    n_nodes = 0
    for back in range(depth):
        level, which = _level(evidence, rows, node, above, back, strength)
        levels.append(level)
        inside = which >= 0
        rows, which = rows[inside], which[inside]
        node, above = n_nodes + which, level.values[which]
        n_nodes += len(level.values)
    return _Grown(
        *(np.concatenate([getattr(g, f) for g in levels]) for f in _Grown.__annotations__)
    )


def _level(
    evidence: Evidence,
    rows: NDArray,
    node: NDArray,
    above: NDArray,
    back: int,
    strength: float,
) -> tuple[_Grown, NDArray[np.int64]]:
    """The nodes one level down, and for each of `rows` which of them it is in, -1 for none."""
    tokens = evidence.contexts[rows, back]
    # One number for (parent, token): tokens are below 2^32, nodes below 2^31.
    key = (node + 1) * (int(evidence.contexts.max(initial=0)) + 2) + (tokens + 1)
    _, first, which, counts = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    weights = evidence.weights[rows]
    weight: NDArray = np.bincount(which, weights, len(first))
    total: NDArray = np.bincount(which, weights * evidence.activations[rows], len(first))
    parent_value = above[first]
    values = (total + strength * parent_value) / (weight + strength)
    gains = weight * (values - parent_value) ** 2
    ok = (tokens[first] != NO_TOKEN) & (counts >= (MIN_COUNT if back else 1))
    renumbered = np.where(ok, np.cumsum(ok) - 1, -1)
    grown = _Grown(
        parents=node[first][ok],
        tokens=tokens[first][ok],
        values=values[ok],
        counts=counts[ok],
        gains=gains[ok],
        weights=weight[ok],
        totals=total[ok],
    )
    return grown, renumbered[which]
