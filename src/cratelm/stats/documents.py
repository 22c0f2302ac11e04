"""Figures of losses with intervals over documents, paired: every figure is computed on the same resamples.

Tokens of one document are not independent, so documents are resampled (Efron & Tibshirani 1993, chapter 13). A mean loss
is the ratio of two sums over the documents of a resample.

Shape legend: C documents, R resamples.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.records import Interval
from cratelm.stats.intervals import percentile_bounds

Float64 = NDArray[np.float64]


class DocumentResamples:
    """Resamples of the documents, on which figures are computed. Memory: 8 * R * C bytes."""

    def __init__(self, n_tokens: ArrayLike, resamples: int, seed: int):
        """`n_tokens` [C] is the number of predicted tokens of each document."""
        self._tokens = np.asarray(n_tokens, np.float64)
        n = len(self._tokens)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples) if n else np.zeros((0, 0))
        self._drawn = drawn.astype(np.float64)
        """[R, C] how often each document is drawn"""

    def mean(self, losses: ArrayLike) -> Interval:
        """Return the loss per token, from sums of losses over documents [C]."""
        figure = self.figure(lambda loss: loss, losses)
        assert figure is not None
        return figure

    def figure(self, of: Callable[..., Float64], *losses: ArrayLike) -> Interval | None:
        """Return `of` of the losses per token, from several sums over documents [C], with its 95% interval.

        `of` takes arrays of equal shape, and returns NaN where the figure does not exist. Returns None if it does not
        exist over all documents, and no bounds for a single document, or if it does not exist on one resample in 40.
        """
        sums = [np.asarray(of_loss, np.float64) for of_loss in losses]
        n = len(self._tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(of(*(np.array(s.sum() / self._tokens.sum()) for s in sums)))
            if not np.isfinite(value):
                return None
            if n < 2:
                return Interval(value, None, None, n)
            tokens = self._drawn @ self._tokens
            values = np.asarray(of(*(self._drawn @ s / tokens for s in sums)))
        finite = values[np.isfinite(values)]
        if len(finite) < 0.975 * len(values):
            return Interval(value, None, None, n)
        return Interval(value, *percentile_bounds(finite, 0.95), n)
