"""Formulas of concepts simulated over a whole split: sums over the tokens in each cell of a formula.

The tokens at which a simulation has the same value are a group: those in one cell of the formula and, where a look-up is
added, with one entry of its table. Activations are summed by group while the model runs. Which tokens are positive is kept
as bits, and so are the predicates that any formula uses, so that all counts are made once at the end.

Memory: N / 4 bytes per neuron, N / 8 per predicate in use and 8 per token, for N held-out tokens.

Shape legend: n tokens of a batch, N of the split, H neurons of a layer, E explanations, R roles of an explanation (scored
on its own neuron, on another), K groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.concepts.features import ConceptFeatures
from cratelm.explain.concepts.formula import cells_of
from cratelm.explain.concepts.predict import entries_of, group_values
from cratelm.score.contexts import N_POSITIVE, Simulated, Whole
from cratelm.stats.grouped import Groups

Int64 = NDArray[np.int64]
Payload = Mapping[str, Any]


class SplitFeatures:
    """Tokens of a split and where predicates hold at them, added batch by batch."""

    def __init__(self, names: Sequence[str]):
        """`names` are those of the predicates that are kept."""
        self._names = list(dict.fromkeys(names))
        self._ids: list[Int64] = []
        self._bits: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in self._names}

    def add(self, features: ConceptFeatures) -> None:
        """Add the tokens of a batch."""
        self._ids.append(features.texts.ids)
        for name, bits in self._bits.items():
            bits.append(np.packbits(features.column(name)))

    def ids(self) -> Int64:
        """Return all token ids, [N]."""
        return np.concatenate([np.zeros(0, np.int64), *self._ids])

    def columns(self) -> dict[str, NDArray[np.bool_]]:
        """Return where each predicate holds, [N] by its name."""
        sizes = [len(ids) for ids in self._ids]
        return {name: _unpacked(bits, sizes) for name, bits in self._bits.items()}


def _unpacked(parts: Sequence[NDArray[np.uint8]], sizes: Sequence[int]) -> NDArray[np.bool_]:
    pairs = zip(parts, sizes, strict=True)
    unpacked = [np.unpackbits(part, count=size) for part, size in pairs]
    return np.concatenate([np.zeros(0, np.uint8), *unpacked]).view(bool)


class CellSums:
    """Sums of activations over the groups of explanations, and which tokens are positive, for one layer."""

    def __init__(
        self, payloads: Sequence[Payload], neurons: Int64, thresholds: NDArray[np.float32]
    ):
        """`neurons` [R, E]: columns of activations that each explanation is scored on, -1 for none.

        `thresholds` [2, H]: a token is positive, in each of the two ways, if its activation reaches it.
        """
        self.payloads, self.neurons = payloads, neurons
        self._thresholds = thresholds
        n_groups = [(len(p.get("tokens", ())) + 1) * len(p["cells"]) for p in payloads]
        self._totals = [np.zeros((len(neurons), n)) for n in n_groups]
        self._bits: list[NDArray[np.uint8]] = []
        """by batch, [2, H, n / 8]"""
        self._sizes: list[int] = []

    def add(self, activations: NDArray[np.float32], features: ConceptFeatures) -> None:
        """Add a batch of activations [n, H]."""
        by_neuron = np.ascontiguousarray(activations.T)
        positive = by_neuron >= self._thresholds[:, :, None]
        self._bits.append(np.packbits(positive, axis=2))
        self._sizes.append(len(activations))
        for number, payload in enumerate(self.payloads):
            columns = [features.column(name) for name in payload["terms"]]
            group = groups_of(payload, features.texts.ids, columns)
            total = self._totals[number]
            for role, neuron in enumerate(self.neurons[:, number].tolist()):
                if neuron >= 0:
                    total[role] += np.bincount(group, by_neuron[neuron], total.shape[1])

    def simulated(
        self, whole: Whole, ids: Int64, columns: Mapping[str, NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Simulated]]:
        """Yield the groups of each explanation that is scored on a neuron, with the role. `whole` is of its layer.

        `ids` and `columns` are those of all tokens of the split.
        """
        for number, payload in enumerate(self.payloads):
            group = groups_of(payload, ids, [columns[name] for name in payload["terms"]])
            values = group_values(payload)
            n = np.bincount(group, minlength=len(values))
            for role, neuron in enumerate(self.neurons[:, number].tolist()):
                if neuron < 0:
                    continue
                bits = [[part[way, neuron] for part in self._bits] for way in range(N_POSITIVE)]
                first, second = (_unpacked(parts, self._sizes) for parts in bits)
                positive = np.stack(
                    [np.bincount(group[of], minlength=len(values)) for of in (first, second)]
                )
                silent = ~(first | second)
                # hard negatives have the id of a token that is positive in the first way
                shared = whole.positive_by_token[0, :, neuron] > 0
                hard = np.bincount(group[silent & shared[ids]], minlength=len(values))
                groups = Groups(values, n, self._totals[number][role], float(whole.squares[neuron]))
                of_silent = np.bincount(group[silent], minlength=len(values))
                yield role, Simulated(neuron, groups, positive, of_silent, hard)


def groups_of(payload: Payload, ids: Int64, columns: Sequence[NDArray[np.bool_]]) -> Int64:
    """Return the group of each token [n], for where each term of the formula holds."""
    cells = cells_of(columns, len(ids)).astype(np.int64)
    if "tokens" not in payload:
        return cells
    return entries_of(payload, ids) * len(payload["cells"]) + cells
