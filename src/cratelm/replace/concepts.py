"""Formulas of concepts as explanations of all neurons of a layer.

`cratelm explain` finds the formula of a neuron in its excerpts. What it predicts where its terms hold, the means of its
cells, is taken from the pass over fit tokens instead: excerpts are chosen for their activations, so that means over them
are too high.

Shape legend: n tokens, H neurons of a layer, 8 cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.open_harvest import HarvestContext
from cratelm.activations.store import read_records
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.fit import FitFeatures
from cratelm.explain.concepts.formula import MAX_TERMS, STRENGTH, holds_in
from cratelm.explain.concepts.library import Library
from cratelm.explain.concepts.predict import cells_all
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.explain.lookup import residual_of, token_table
from cratelm.explain.neuron import best_concept
from cratelm.explain.phrases import Described
from cratelm.replace.exact import rounded
from cratelm.replace.text import BatchText

N_CELLS = 1 << MAX_TERMS
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Payload = Mapping[str, Any]


def formulas(
    opened: HarvestContext, place: int, features: FitFeatures, *, of_residual: bool
) -> list[Payload]:
    """Return the payloads of the concepts of all neurons at a place of the site, found in their fit excerpts.

    With `of_residual`, they are about what a look-up of the last token leaves. A dead neuron has no terms.
    """
    most = ExplainConfig().max_entries
    payloads: list[Payload] = []
    for record in read_records(opened.folder, "fit", [opened.site.layer_numbers[place]]):
        mean = record.summary.mean
        if record.summary.silent:
            payloads.append({"terms": [], "operators": [], "cells": [mean], "default": mean})
            continue
        evidence = collect_evidence(record, depth=1, weight=WEIGHT)
        described = Described(record, evidence, features.of(evidence), features.library, features.strings)  # fmt: skip
        targets, default = evidence.activations, mean
        if of_residual:
            targets, default = residual_of(evidence, token_table(evidence, mean, most)), 0.0
        concept = best_concept(described, targets, default, either=of_residual)
        payloads.append(concept.payload())
    return payloads


class CellSums:
    """Sums of activations over the tokens in each cell of the formulas of a layer."""

    def __init__(self, payloads: Sequence[Payload], reader: ConceptReader, quantum: float):
        """Sums of a batch are rounded to multiples of `quantum`, see `cratelm.replace.exact`."""
        self.payloads, self.reader = payloads, reader
        self.total = np.zeros((len(payloads), N_CELLS))
        self.n = np.zeros((len(payloads), N_CELLS))
        self._quantum = quantum

    def add(self, activations: Float32, text: BatchText) -> None:
        """Add activations [n, H] at the tokens of a batch; end marks are in no cell."""
        rows, cells = cells_of(self.payloads, self.reader, text)
        size, cells = self.n.size, cells.ravel()
        total = np.bincount(cells, activations[rows].ravel(), size).astype(np.float64)
        self.total += rounded(total.reshape(self.total.shape), self._quantum)
        self.n += np.bincount(cells, minlength=size).reshape(self.n.shape)

    def merge(self, other: "CellSums") -> None:
        """Add the sums over other tokens."""
        self.total += other.total
        self.n += other.n

    def explanations(self) -> "ByConcept":
        """Return the explanations, with means of cells shrunk as those of `cratelm explain` are."""
        default = self.total.sum(1) / np.maximum(1, self.n.sum(1))
        means = np.zeros(self.total.shape)
        for h, payload in enumerate(self.payloads):
            holds = holds_in(payload)
            n, total = self.n[h, : len(holds)], self.total[h, : len(holds)]
            side = np.empty(len(holds))
            for value in (False, True):
                of = holds == value
                side[of] = (total[of].sum() + STRENGTH * default[h]) / (n[of].sum() + STRENGTH)
            means[h, : len(holds)] = (total + STRENGTH * side) / (n + STRENGTH)
        return ByConcept(
            self.payloads, means.astype(np.float32), default.astype(np.float32), self.reader
        )


class EvaluatedFeatures:
    """Features of tokens that were evaluated before, as `cells_all` reads them."""

    def __init__(self, library: Library, holds: NDArray[np.bool_]):
        """`holds` [n, P]: where each predicate of the library holds."""
        self._library, self._holds = library, np.asfortranarray(holds)  # columns are read

    def __len__(self) -> int:
        return len(self._holds)

    def column(self, name: str) -> NDArray[np.bool_]:
        """Return at which tokens a predicate holds, [n]."""
        return self._holds[:, self._library.number[name]]


def share_features(
    text: BatchText, positions: NDArray[np.int64], reader: ConceptReader, features: FitFeatures
) -> None:
    """Let formulas read the features of a fit batch, at positions [n] of the split, from those that were evaluated."""
    rows = text_rows(text)
    text.shared(reader, lambda: EvaluatedFeatures(features.library, features.at(positions[rows])))


def text_rows(text: BatchText) -> NDArray[np.int64]:
    """Return which tokens of a batch are text, in order."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in text.segments())])


def cells_of(
    payloads: Sequence[Payload], reader: ConceptReader, text: BatchText
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the text tokens of a batch [rows], and the cell of each of them for each formula, [rows, H].

    The cells of formula h are numbered from `N_CELLS` * h.
    """
    segments = text.segments()
    features = text.shared(reader, lambda: reader.features([text.ids[a:b] for a, b in segments]))
    cells = np.ascontiguousarray(cells_all(payloads, features))  # one byte each, before they grow
    return text_rows(text), cells + N_CELLS * np.arange(len(payloads))


@dataclass(frozen=True, eq=False)
class ByConcept:
    """Formulas of named predicates, and what each neuron does in the cells of its formula."""

    payloads: Sequence[Payload]
    """[H] with the names of the terms, and what joins them"""
    means: Float32
    """[H, 8] by cell"""
    default: Float32
    """[H] value at end marks"""
    reader: ConceptReader = field(repr=False)

    @property
    def entries(self) -> float:
        """Return the mean number of cells of a formula."""
        return float(np.mean([1 << len(of["terms"]) for of in self.payloads]))

    @property
    def n_values(self) -> int:
        """Return the number of values of all neurons."""
        return self.means.size

    def predict(self, text: BatchText) -> Float32:
        """Return the mean of the cell at each token, [n, H]; made once for a text. Do not write to it."""
        return text.shared(self, lambda: self._predicted(text))

    def _predicted(self, text: BatchText) -> Float32:
        predicted = np.repeat(self.default[None], text.n_tokens, axis=0)
        rows, cells = cells_of(self.payloads, self.reader, text)
        predicted[rows] = np.take(self.means, cells)
        return predicted

    def context_length(self, text: BatchText, token: int, neuron: int) -> int:
        """Return 1: predicates are about the token, whatever else of the text they look at; 0 without a formula."""
        return int(len(self.payloads[neuron]["terms"]) > 0)


def concepts_as_found(payloads: Sequence[Payload], reader: ConceptReader) -> ByConcept:
    """Return formulas with the means of their cells over the excerpts that they were found in."""
    means = np.zeros((len(payloads), N_CELLS), np.float32)
    for h, payload in enumerate(payloads):
        means[h, : len(payload["cells"])] = payload["cells"]
    default = np.array(
        [payload.get("default", payload["cells"][0]) for payload in payloads], np.float32
    )
    return ByConcept(payloads, means, default, reader)
