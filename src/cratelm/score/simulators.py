"""Simulators: from an explanation's payload and tokens alone to predicted activations.

A simulator is a function of the payload and of token ids: no activation can reach it. The tokens of
all excerpts of a neuron go through it together; n is their total number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.evidence import contexts_of
from cratelm.explain.trie import ROOT

Simulated = list[NDArray[np.float64]]


def simulate(explainer: str, payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
    """Activations predicted for each sequence of token ids, in the neuron's own unit.

    Raises `InputError` where no simulator is called `explainer`.
    """
    if explainer not in SIMULATORS:
        raise InputError(f"no simulator for {explainer!r}: expected one of {', '.join(SIMULATORS)}")
    lengths = [len(t) for t in token_ids]
    if not sum(lengths):
        return [np.zeros(0) for _ in lengths]
    flat = SIMULATORS[explainer](payload, list(token_ids))  # [n]
    return np.split(flat, np.cumsum(lengths)[:-1])


def simulate_constant(payload: Mapping[str, Any], token_ids: Sequence[NDArray]) -> Simulated:
    """The null control that says nothing: the explanation's default value at every token."""
    return [np.full(len(t), float(payload["default"])) for t in token_ids]


def _lookup(payload: Mapping[str, Any], token_ids: list[NDArray]) -> NDArray[np.float64]:
    """The table's value of each token. [n]"""
    tokens, values = _sorted(payload["tokens"], payload["values"])
    return _find(np.concatenate(token_ids), tokens, values, float(payload["default"]))


def _trie(payload: Mapping[str, Any], token_ids: list[NDArray]) -> NDArray[np.float64]:
    """The value of the deepest node that matches the tokens up to each token. [n]"""
    parents = np.asarray(payload["parents"], dtype=np.int64)
    tokens = np.asarray(payload["tokens"], dtype=np.int64)
    values = np.asarray(payload["values"], dtype=np.float64)
    depth = _depth(parents)
    contexts = contexts_of(token_ids, depth)  # [n, depth]
    simulated = np.full(len(contexts), float(payload["default"]))
    # One number for (parent, token), as in the trie: the highest id here or there bounds it.
    base = max(int(contexts.max(initial=0)), int(tokens.max(initial=0))) + 2
    keys, nodes = _sorted((parents + 1) * base + tokens + 1, np.arange(len(tokens)))
    at, node = np.arange(len(contexts)), np.full(len(contexts), ROOT)
    for level in range(depth):
        node = _find((node + 1) * base + contexts[at, level] + 1, keys, nodes, ROOT)
        at, node = at[node != ROOT], node[node != ROOT]
        simulated[at] = values[node]
    return simulated


SIMULATORS: dict[str, Callable[[Mapping[str, Any], list[NDArray]], NDArray[np.float64]]] = {
    "lookup": _lookup,
    "trie": _trie,
}
"""by the name of the explainer whose payload each reads"""


def _depth(parents: NDArray[np.int64]) -> int:
    depth = np.ones(len(parents), dtype=np.int64)
    for node in np.flatnonzero(parents != ROOT):  # parents come before their children
        depth[node] = depth[parents[node]] + 1
    return int(depth.max(initial=0))


def _sorted(keys: Any, values: Any) -> tuple[NDArray, NDArray]:
    keys, values = np.asarray(keys), np.asarray(values)
    order = np.argsort(keys)
    return keys[order], values[order]


def _find(wanted: NDArray, keys: NDArray, values: NDArray, default: float) -> NDArray:
    """`values` at each of `wanted` in the sorted `keys`, `default` where it is not among them."""
    if not len(keys):
        return np.full(len(wanted), default)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], default)
