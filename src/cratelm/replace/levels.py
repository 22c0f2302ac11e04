"""What a language model predicts of some neurons of a layer, from their explanations and the tokens of short pieces.

A piece is the text of one document in one sequence, at most `PIECE` tokens of it. The model reads an explanation and a
piece, and predicts the level of the neuron at each token (`cratelm.score.simulators`). Levels have no unit: they are
calibrated for each neuron by least squares on pieces of the fit split, as in Bills et al. 2023,

    activation ~ a + b * level,      b at least 0,

and a neuron whose activation does not rise with its level is predicted to have its mean over the fit tokens. So is
every neuron where there is no level: at the tokens of a piece whose call failed, and at end marks.

Shape legend: n tokens of a batch, m of a piece, H neurons of a layer, K of them explained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cratelm.replace.text import BatchText

PIECE = 64
"""most tokens of a piece, as many as an excerpt has"""
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def pieces_of(text: BatchText) -> list[tuple[int, int]]:
    """Return where each piece of a batch begins, and one past its end, as offsets in the batch."""
    return [
        (first, min(first + PIECE, high))
        for low, high in text.segments()
        for first in range(low, high, PIECE)
    ]


def tokens_of_pieces(texts: Sequence[BatchText]) -> dict[bytes, Int64]:
    """Return the token ids [m] of the different pieces of several batches, by their bytes, in the order of the text."""
    ids = [text.ids[low:high] for text in texts for low, high in pieces_of(text)]
    return {of.tobytes(): of for of in ids}


@dataclass(eq=False)
class Levels:
    """Levels of the explained neurons of a layer at the tokens of pieces."""

    neurons: Int64
    """[K] ascending"""
    by_piece: dict[bytes, Float64] = field(default_factory=dict)
    """[m, K] by the bytes of the piece's token ids; NaN where the call failed"""

    def put(self, piece: Int64, column: int, levels: Float64) -> None:
        """Add the levels [m] of the neuron with number `column` among those explained."""
        empty = np.full((len(piece), len(self.neurons)), np.nan)
        self.by_piece.setdefault(piece.tobytes(), empty)[:, column] = levels

    def at(self, text: BatchText) -> Float64:
        """Return the levels at the tokens of a batch, [n, K]: NaN at end marks, and where a call failed."""
        levels = np.full((text.n_tokens, len(self.neurons)), np.nan)
        for low, high in pieces_of(text):
            of_piece = self.by_piece.get(text.ids[low:high].tobytes())
            if of_piece is not None:
                levels[low:high] = of_piece
        return levels


@dataclass(frozen=True, eq=False)
class Simulated:
    """Explanations of some neurons of a layer, read by a language model. The others are predicted to have their means."""

    levels: Levels
    slope: Float64
    """[K] b"""
    intercept: Float64
    """[K] a"""
    means: Float32
    """[H] of the fit tokens"""

    @classmethod
    def calibrated(
        cls, levels: Levels, fit: Sequence[tuple[BatchText, Float32]], means: Float32
    ) -> "Simulated":
        """Return the simulation with levels calibrated on batches of fit tokens and their activations [n, H]."""
        x = np.concatenate([levels.at(text) for text, _ in fit])
        y = np.concatenate([of[:, levels.neurons] for _, of in fit]).astype(np.float64)
        has_level = np.isfinite(x)
        n = np.maximum(1, has_level.sum(0))
        mean_x = np.where(has_level, x, 0).sum(0) / n
        mean_y = np.where(has_level, y, 0).sum(0) / n
        dx, dy = np.where(has_level, x - mean_x, 0), np.where(has_level, y - mean_y, 0)
        spread, together = (dx**2).sum(0), (dx * dy).sum(0)
        rises = (together > 0) & (spread > 1e-12 * np.maximum(1, mean_x**2) * n)
        slope = np.divide(together, spread, out=np.zeros_like(spread), where=rises)
        intercept = np.where(rises, mean_y - slope * mean_x, means[levels.neurons])
        return cls(levels, slope, intercept, means)

    @property
    def entries(self) -> float:
        """Return 1: the explanation is one text."""
        return 1.0

    @property
    def n_values(self) -> int:
        """Return the number of levels."""
        return sum(of.size for of in self.levels.by_piece.values())

    def predict(self, text: BatchText) -> Float32:
        """Return the calibrated levels [n, H]; the mean of a neuron where it has no level."""
        predicted = np.repeat(self.means[None], text.n_tokens, axis=0)
        values = self.intercept + self.slope * self.levels.at(text)
        of_mean = predicted[:, self.levels.neurons]
        predicted[:, self.levels.neurons] = np.where(np.isnan(values), of_mean, values)
        return predicted

    def context_length(self, text: BatchText, token: int, neuron: int) -> int:
        """Return how many tokens of the piece, up to this one, the model has read; 0 where the neuron has its mean."""
        column = np.flatnonzero(self.levels.neurons == neuron)
        if not len(column) or np.isnan(self.levels.at(text)[token, column[0]]):
            return 0
        return next(token - low + 1 for low, high in pieces_of(text) if low <= token < high)
