"""Predicted activations of all neurons of a layer at the tokens of a batch, from explanations and text alone.

Shape legend: n tokens of a batch, H neurons of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.replace.contexts import ROOT
from cratelm.replace.tables import Tables, Tries
from cratelm.replace.text import BatchText

Float32 = NDArray[np.float32]


class Predictor(Protocol):
    """Explanations of all neurons of a layer, ready to be simulated."""

    @property
    def entries(self) -> float:
        """Return the size of an explanation: its mean number of entries."""
        ...

    @property
    def n_values(self) -> int:
        """Return the number of values of the explanations of all neurons, which is what they take in memory."""
        ...

    def predict(self, text: BatchText) -> Float32:
        """Return the predicted activations [n, H] at each token."""
        ...

    def context_length(self, text: BatchText, token: int, neuron: int) -> int:
        """Return how many tokens, up to token number `token` of the text, decide the prediction of a neuron there."""
        ...


@dataclass(frozen=True, eq=False)
class ByContext:
    """Look-up tables, tries, and tables of all contexts."""

    tables: Tables | Tries

    @property
    def entries(self) -> float:
        """Return the mean number of contexts."""
        return self.tables.entries

    @property
    def n_values(self) -> int:
        """Return the number of values of all neurons."""
        return self.tables.n_values

    def predict(self, text: BatchText) -> Float32:
        """Return the value of the longest context in the explanation, or its default, [n, H]."""
        return self.tables.predict(text.matched(self.tables.contexts))

    def context_length(self, text: BatchText, token: int, neuron: int) -> int:
        """Return how many tokens, up to this one, decide the prediction of a neuron; 0 if it is its default."""
        nodes = text.matched(self.tables.contexts)[:, token]
        nodes = nodes[nodes != ROOT]
        if isinstance(self.tables, Tries):
            kept = self.tables.rise[nodes, np.full(len(nodes), neuron)] if len(nodes) else nodes
            return int(np.flatnonzero(kept).max(initial=-1)) + 1
        return len(nodes)


@dataclass(frozen=True, eq=False)
class Constant:
    """The same value at every token: the mean, or 0."""

    values: Float32
    """[H]"""

    @property
    def entries(self) -> float:
        """Return 1."""
        return 1.0

    @property
    def n_values(self) -> int:
        """Return the number of neurons."""
        return len(self.values)

    def predict(self, text: BatchText) -> Float32:
        """Return the values at each token, [n, H]."""
        return np.broadcast_to(self.values, (text.n_tokens, len(self.values)))

    def context_length(self, text: BatchText, token: int, neuron: int) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True, eq=False)
class Stacked:
    """Explanations of which each was made from what those before it leave unexplained: their predictions add up."""

    parts: Sequence[Predictor]

    @property
    def entries(self) -> float:
        """Return the entries of all parts."""
        return sum(part.entries for part in self.parts)

    @property
    def n_values(self) -> int:
        """Return the number of values of all parts."""
        return sum(part.n_values for part in self.parts)

    def predict(self, text: BatchText) -> Float32:
        """Return the sum of the predictions, [n, H]."""
        first, *others = (part.predict(text) for part in self.parts)
        return sum(others, start=first)

    def context_length(self, text: BatchText, token: int, neuron: int) -> int:
        """Return how many tokens decide the prediction of the part that reads most."""
        return max(part.context_length(text, token, neuron) for part in self.parts)
