"""What shows at a glance what a neuron responds to: the tokens that it fires on most, and its strongest excerpt.

The index holds both for every neuron, so that a map of thousands of neurons is drawn without reading excerpts.

Shape legend: N neurons, E entries of profiles, W tokens of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cratelm.records import levels
from cratelm.results.neuron_table import NeuronTable

FAVOURITES = 3
"""tokens per neuron"""
BEFORE, AFTER = 14, 5
"""tokens of a window before the strongest one, and after it"""
_WINDOW = BEFORE + 1 + AFTER
PEAK_FILES = ("peak_tokens", "peak_levels", "peak_values")
"""names of the arrays of `Peaks` in the index"""


@dataclass(frozen=True, eq=False)
class Peaks:
    """The strongest excerpt of each neuron: a window of tokens around the largest activation."""

    tokens: NDArray[np.int32]
    """[N, W] token ids, the strongest one in column `BEFORE`; -1 beyond the ends of an excerpt"""
    levels: NDArray[np.uint8]
    """[N, W] levels 0 to 10, relative to the largest activation"""
    values: NDArray[np.float32]
    """[N] the largest activation; 0 for a neuron without an excerpt"""

    @classmethod
    def empty(cls, n: int) -> "Peaks":
        """Return the windows of `n` neurons without excerpts."""
        shape = (n, _WINDOW)
        return cls(np.full(shape, -1, np.int32), np.zeros(shape, np.uint8), np.zeros(n, np.float32))

    @classmethod
    def joined(cls, parts: Sequence["Peaks"]) -> "Peaks":
        """Return the windows of several models, one after another."""
        if not parts:
            return cls.empty(0)
        arrays = zip(*((p.tokens, p.levels, p.values) for p in parts), strict=True)
        return cls(*map(np.concatenate, arrays))

    def part(self, rows: slice) -> "Peaks":
        """Return the windows of some of the neurons."""
        return Peaks(self.tokens[rows], self.levels[rows], self.values[rows])

    def save(self, folder: Path) -> None:
        """Write the arrays into `folder`, as `PEAK_FILES`."""
        for name, array in zip(PEAK_FILES, (self.tokens, self.levels, self.values), strict=True):
            np.save(folder / f"{name}.npy", array)

    def add(self, excerpts: pa.Table, table: NeuronTable) -> None:
        """Take over the strongest excerpt of each neuron of `excerpts` that is stronger than the present one.

        Excerpts out of context are not considered: they hold a token without the text around it.
        """
        excerpts = excerpts.filter(pa.array(excerpts["kind"].to_numpy() != "out_of_context"))
        if not len(excerpts):
            return
        ids, activations = (excerpts[c].combine_chunks() for c in ("token_ids", "activations"))
        bounds = ids.offsets.to_numpy()
        flat, values = ids.values.to_numpy(), activations.values.to_numpy()
        starts = bounds[:-1]
        filled = np.flatnonzero(np.diff(bounds))
        highest = np.zeros(len(excerpts), np.float32)
        highest[filled] = np.maximum.reduceat(values, starts[filled])
        rows = table.rows(excerpts["layer"].to_numpy(), excerpts["index"].to_numpy())
        # the strongest excerpt of each neuron comes first, of equals the earlier one
        order = np.lexsort((np.arange(len(rows)), -highest, rows))
        first = order[np.unique(rows[order], return_index=True)[1]]
        for at in first.tolist():
            row = int(rows[at])
            if row >= 0 and highest[at] > self.values[row]:
                span = slice(int(bounds[at]), int(bounds[at + 1]))
                self._set(row, flat[span], values[span])

    def _set(self, row: int, tokens: NDArray[Any], values: NDArray[Any]) -> None:
        peak = int(values.argmax())
        low, high = max(0, peak - BEFORE), min(len(tokens), peak + AFTER + 1)
        here = slice(low - peak + BEFORE, high - peak + BEFORE)
        self.tokens[row], self.levels[row] = -1, 0
        self.tokens[row, here] = tokens[low:high]
        self.levels[row, here] = levels(values[low:high], float(values[peak]))
        self.values[row] = values[peak]


def favourites(
    neurons: NDArray[Any],
    tokens: NDArray[Any],
    values: NDArray[Any],
    counts: NDArray[Any],
    *,
    n_neurons: int,
) -> NDArray[np.int32]:
    """Return the ids [N, FAVOURITES] of the tokens that each neuron fires on most, from profile entries [E]; -1: none.

    Tokens are ranked by count x value^2: a strong token that occurs once says less about a neuron than one that
    occurs often, and a frequent token on which it fires faintly says little, too.
    """
    best = np.full((n_neurons, FAVOURITES), -1, np.int32)
    if not len(neurons):
        return best
    weight = counts.astype(np.float64) * values.astype(np.float64) ** 2
    order = np.lexsort((tokens, -weight, neurons))
    sorted_neurons = neurons[order].astype(np.int64)
    # rank of an entry in its neuron: its position minus that of the neuron's first entry
    rank = np.arange(len(order)) - np.searchsorted(sorted_neurons, sorted_neurons)
    named = rank < FAVOURITES
    best[sorted_neurons[named], rank[named]] = tokens[order][named]
    return best
