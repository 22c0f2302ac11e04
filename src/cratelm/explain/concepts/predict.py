"""Predictions of many payloads at once: of `concepts`, and of `lookup+concepts`, which add to a look-up of the token.

Shape legend: n tokens, E explanations.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.concepts.features import ConceptFeatures
from cratelm.explain.concepts.formula import cells_of

Payload = Mapping[str, Any]


def is_concept_payload(payload: Payload) -> bool:
    """Return whether a payload has the cells of a formula."""
    return "cells" in payload


class Columns(Protocol):
    """Where predicates hold at n tokens."""

    def __len__(self) -> int: ...

    def column(self, name: str, /) -> NDArray[np.bool_]:
        """Return at which tokens a predicate holds, [n]."""
        ...


def cells_all(payloads: Sequence[Payload], features: Columns) -> NDArray[np.uint8]:
    """Return the cell of each token for each explanation, [n, E].

    Cell c of payload e has the mean `payloads[e]["cells"][c]`, of activations for `concepts` and of what the look-up
    leaves for `lookup+concepts`. Bit k of c is set where the term `payloads[e]["terms"][k]` holds. Raises `InputError`
    if the library of `features` lacks a term.
    """
    found = np.empty((len(payloads), len(features)), np.uint8)
    for number, payload in enumerate(payloads):
        columns = [features.column(name) for name in payload["terms"]]
        found[number] = cells_of(columns, len(features))
    return found.T


def predict_all(payloads: Sequence[Payload], features: ConceptFeatures) -> NDArray[np.float32]:
    """Return the activation that each explanation predicts at each token, [n, E], in the unit of its neuron.

    Raises `InputError` if the library of `features` lacks a term.
    """
    found = np.empty((len(payloads), len(features)), np.float32)
    cells = cells_all(payloads, features).T
    for number, payload in enumerate(payloads):
        found[number] = np.asarray(payload["cells"], np.float32)[cells[number]]
        if "tokens" in payload:
            found[number] += looked_up(payload, features.texts.ids).astype(np.float32)
    return found.T


def looked_up(payload: Payload, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the value of each token id [n] in the table of a payload, the default for one that is not in it."""
    return np.append(np.asarray(payload["values"], np.float64), float(payload["default"]))[
        entries_of(payload, ids)
    ]


def entries_of(payload: Payload, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the entry of each token id [n] in the table of a payload; the number of entries for one not in it."""
    tokens = np.asarray(payload["tokens"], np.int64)
    if not len(tokens):
        return np.zeros(len(ids), np.int64)
    entry = np.full(int(max(tokens.max(), ids.max(initial=0))) + 1, len(tokens))
    entry[tokens] = np.arange(len(tokens))
    return entry[ids]


def group_values(payload: Payload) -> NDArray[np.float64]:
    """Return what a payload predicts for each entry of its table, if it has one, and each cell, [K]."""
    cells = np.asarray(payload["cells"], np.float64)
    if "tokens" not in payload:
        return cells
    table = np.append(np.asarray(payload["values"], np.float64), float(payload["default"]))
    return (table[:, None] + cells).ravel()
