"""Agreement of a simulation with the truth over any number of tokens, from sums over groups of tokens.

A simulation that has few distinct values, such as a table or a trie, divides the tokens into groups in which it is
constant. What all measures here need of a group is its value, its number of tokens, the sum of the true activations and
the number of positive tokens; so tokens can be streamed, and the result is that of all tokens at once, not an estimate.

Shape legend: K groups.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Groups:
    """Tokens in groups with the same simulated value s; a is the true activation."""

    value: Array
    """[K] s"""
    n: NDArray[np.int64]
    """[K] number of tokens"""
    total: Array
    """[K] sum of a"""
    squares: float
    """sum of a^2 over all tokens"""

    def correlation(self) -> float | None:
        """Return the Pearson correlation of a and s; None if one of them is constant."""
        n = int(self.n.sum())
        if n == 0:
            return None
        mean_s, mean_a = float(self.value @ self.n) / n, float(self.total.sum()) / n
        s = self.value - mean_s
        spread_s = float(s**2 @ self.n)
        spread_a = self.squares - n * mean_a**2
        # what rounding leaves of the spread of a constant
        if spread_s <= 1e-12 * float(self.value**2 @ self.n) or spread_a <= 1e-9 * self.squares:
            return None
        return _within(float(s @ (self.total - mean_a * self.n)) / sqrt(spread_s * spread_a))

    def cosine(self) -> float | None:
        """Return sum(a s) / sqrt(sum(a^2) sum(s^2)); None if a or s is 0 everywhere."""
        product = float(self.value**2 @ self.n) * self.squares
        return _within(float(self.value @ self.total) / sqrt(product)) if product > 0 else None

    def ordered(self, positive: NDArray[np.int64]) -> "Ranking":
        """Return the tokens ordered by s; `positive` [K] is the number of positive tokens of each group."""
        occurs = self.n > 0
        values, which = np.unique(-self.value[occurs], return_inverse=True)
        n, found = (
            np.bincount(which, counts[occurs], len(values)).astype(np.float64)
            for counts in (self.n, positive)
        )
        return Ranking(-values, n, found)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Tokens in descending order of a simulated value s, some of which are positive; equal values are one group."""

    value: Array
    """[K] s, descending"""
    n: Array
    """[K] number of tokens"""
    positive: Array
    """[K] number of positive tokens among them"""

    @property
    def base_rate(self) -> float | None:
        """Return the share of positive tokens, which is the average precision of chance; None for no tokens."""
        n = self.n.sum()
        return float(self.positive.sum() / n) if n else None

    def average_precision(self) -> float | None:
        """Return the area under the precision-recall curve, sum_n (R_n - R_{n-1}) P_n; None for no positives.

        P_n and R_n are precision and recall if the first n groups are taken as positive. Not interpolated, as in Davis
        & Goadrich (2006), who say why.
        """
        all_positive = self.positive.sum()
        if not all_positive:
            return None
        precision = np.cumsum(self.positive) / np.cumsum(self.n)
        return float(precision @ self.positive / all_positive)

    def roc_area(self) -> float | None:
        """Return the probability that a positive token has a higher s than another one, ties counting half.

        None unless there are tokens of both kinds (Hanley & McNeil 1982).
        """
        negative = self.n - self.positive
        pairs = self.positive.sum() * negative.sum()
        if not pairs:
            return None
        below = negative.sum() - np.cumsum(negative)
        return float(self.positive @ (below + negative / 2) / pairs)

    def overlap(self) -> tuple[float, float] | None:
        """Return F1 and IoU of the positive tokens and those with s of at least half its maximum.

        None if no token is positive, or if s is never above 0.
        """
        all_positive = self.positive.sum()
        if not all_positive or not len(self.value) or self.value[0] <= 0:
            return None
        chosen = self.value >= self.value[0] / 2
        both, either = self.positive[chosen].sum(), self.n[chosen].sum() + all_positive
        return float(2 * both / either), float(both / (either - both))


def _within(value: float) -> float:
    return min(1.0, max(-1.0, value))
