"""How much of a neuron's activation the last token alone explains, on all held-out tokens.

    R2_token = 1 - sum_i (a_i - m(v_i))^2 / sum_i (a_i - mean a)^2

with the activation a_i and the token v_i at each held-out position, and m(v), the mean activation on token v over the fit
split, shrunk towards the mean m over all its tokens:

    m(v) = (n_v mean_v + k m) / (n_v + k),        k = variance within tokens / variance between tokens

with both variances as the analysis of variance estimates them (one-way random effects; Searle, Casella & McCulloch 1992,
chapter 3). So a token that was seen once counts for little where neurons vary within tokens, and no constant is tuned.
The context share is 1 - R2_token. R2_token is 1 if a neuron is a function of the token, about 0 if the token says
nothing, and below 0 if the fit split misleads.

The token entropy is H = -sum_v p(v) ln p(v) in nats, with p(v) the share of the activation above 0 that falls on token
v: 0 for a neuron that fires on one token, at most ln V.

Heap et al. (2025, arXiv 2501.17727) show why such a figure belongs beside every score: scores of language models are high
for random networks, too.

Shape legend: n tokens of a batch, V vocabulary, H neurons, G distinct tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_ROWS = 1024
"""tokens of the vocabulary that are converted to float64 at a time"""


class TokenMeans:
    """Sums of activations by token over the fit split, of some neurons. Memory: 4 * V * H bytes, or twice that.

    Twice if activations are ever below 0, because those above are then summed separately.
    """

    def __init__(self, vocabulary: int, n_neurons: int):
        self.counts = np.zeros(vocabulary, np.int64)
        """[V]"""
        self._sums = np.zeros((vocabulary, n_neurons), np.float32)
        self._above = self._sums
        """[V, H] sums of activations above 0"""
        self._squares = np.zeros(n_neurons)

    def add(self, activations: Float32, tokens: NDArray[np.int64]) -> None:
        """Add activations [n, H] at tokens [n]."""
        groups = TokenGroups.of(tokens)
        if self._above is self._sums and activations.min(initial=0) < 0:
            self._above = self._sums.copy()
        self.counts[groups.tokens] += groups.counts
        self._sums[groups.tokens] += groups.sums(activations)
        if self._above is not self._sums:
            self._above[groups.tokens] += groups.sums(np.maximum(activations, 0))
        self._squares += np.einsum("nh,nh->h", activations, activations, dtype=np.float64)

    def entropy(self) -> Float64:
        """Return the token entropy [H] in nats; NaN for neurons that were never above 0."""
        total, weighted = np.zeros((2, self._sums.shape[1]))
        for first in range(0, len(self._above), _ROWS):
            part = self._above[first : first + _ROWS].astype(np.float64)
            total += part.sum(0)
            weighted += np.where(part > 0, part * np.log(np.where(part > 0, part, 1)), 0).sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = np.log(total) - weighted / total
        return np.maximum(entropy, 0)

    def shrunk(self) -> "ShrunkMeans":
        """Return the means by token, shrunk; they take the memory of the sums, which are gone afterwards."""
        n, seen = self.counts.sum(), np.flatnonzero(self.counts)
        mean, by_token_squares = np.zeros((2, self._sums.shape[1]))
        for first in range(0, len(seen), _ROWS):
            rows = seen[first : first + _ROWS]
            part = self._sums[rows].astype(np.float64)
            mean += part.sum(0)
            by_token_squares += (part**2 / self.counts[rows, None]).sum(0)
        mean /= max(n, 1)
        strength = self._strength(mean, by_token_squares)
        for first in range(0, len(seen), _ROWS):
            rows = seen[first : first + _ROWS]
            part, counts = self._sums[rows].astype(np.float64), self.counts[rows, None]
            own = part / counts
            weight = np.where(np.isinf(strength), 0.0, counts / (counts + strength))
            self._sums[rows] = weight * own + (1 - weight) * mean
        unseen = np.flatnonzero(self.counts == 0)
        self._sums[unseen] = mean
        return ShrunkMeans(self._sums)

    def _strength(self, mean: Float64, by_token_squares: Float64) -> Float64:
        """Return k [H]: the number of tokens that the mean counts as; infinite if tokens make no difference."""
        counts = self.counts[self.counts > 0].astype(np.float64)
        n, groups = counts.sum(), len(counts)
        if groups < 2 or n <= groups:  # no variance between, or none within tokens
            return np.full(len(mean), np.inf if groups < 2 else 0.0)
        within = np.maximum(0, self._squares - by_token_squares) / (n - groups)
        of_groups = np.maximum(0, by_token_squares - n * mean**2) / (groups - 1)
        size = (n - (counts**2).sum() / n) / (groups - 1)
        between = (of_groups - within) / size
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(between > 0, within / between, np.inf)


class ShrunkMeans:
    """Means by token, [V, H], and what comparing them with held-out activations adds up."""

    def __init__(self, means: Float32):
        self._means = means
        self._n = 0
        self._total, self._squares, self._error = np.zeros((3, means.shape[1]))

    def add(self, activations: Float32, tokens: NDArray[np.int64]) -> None:
        """Compare with held-out activations [n, H] at tokens [n]."""
        groups = TokenGroups.of(tokens)
        sums = groups.sums(activations)  # [G, H]
        squares = np.einsum("nh,nh->h", activations, activations, dtype=np.float64)
        means = self._means[groups.tokens].astype(np.float64)
        self._n += len(tokens)
        self._total += sums.sum(0)
        self._squares += squares
        # sum (a - m)^2 over the tokens of each group
        self._error += squares - 2 * (means * sums).sum(0) + groups.counts @ means**2

    def share(self) -> Float64:
        """Return R2_token [H]; NaN for neurons that are constant on the held-out split."""
        spread = self._squares - self._total**2 / max(self._n, 1)
        constant = spread <= 1e-9 * self._squares  # what rounding leaves of 0
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(constant, np.nan, 1 - self._error / spread)


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """The tokens of a batch by their id."""

    tokens: NDArray[np.int64]
    """[G] distinct ids, ascending"""
    counts: NDArray[np.int64]
    """[G] number of tokens with each"""
    _members: "csr_array"
    """[G, n] 1 where a token has the id"""

    @classmethod
    def of(cls, tokens: NDArray[np.int64]) -> "TokenGroups":
        """Return the groups of tokens [n]."""
        from scipy.sparse import csr_array  # takes a quarter of a second

        distinct, which, counts = np.unique(tokens, return_inverse=True, return_counts=True)
        order = np.argsort(which, kind="stable")
        edges = np.concatenate([[0], np.cumsum(counts)])
        shape = len(distinct), len(tokens)
        return cls(distinct, counts, csr_array((np.ones(len(tokens)), order, edges), shape))

    def sums(self, activations: Float32 | Float64) -> Float64:
        """Return the sums [G, H] of activations [n, H] over each group.

        A product with a sparse matrix takes a fifth of the time of `np.add.reduceat` along the first axis.
        """
        return self._members @ activations


class Highest:
    """The highest activations of each neuron, of which the threshold of its top firings is taken."""

    def __init__(self, n_neurons: int, n_tokens: int, fraction: float):
        """At most `fraction` of `n_tokens` values are kept per neuron."""
        self._fraction = fraction
        self._kept = int(np.ceil(fraction * n_tokens))
        self._values = np.zeros((n_neurons, 0), np.float32)
        """[H, kept] in no order"""
        self._fired = np.zeros(n_neurons, np.int64)

    def add(self, activations: Float32) -> None:
        """Add activations [n, H]."""
        self._fired += np.count_nonzero(activations > 0, axis=0)
        together = np.concatenate([self._values, activations.T], axis=1)
        if together.shape[1] > self._kept:
            together.partition(together.shape[1] - self._kept, axis=1)
            together = together[:, -self._kept :].copy()
        self._values = together

    def threshold(self) -> Float32:
        """Return [H] the value that this fraction of the activations above 0 reach; infinity if none was."""
        n_kept = self._values.shape[1]
        if not n_kept:
            return np.full(len(self._fired), np.inf, np.float32)
        ascending = np.sort(self._values, axis=1)
        wanted = np.clip(np.ceil(self._fraction * self._fired).astype(np.int64), 1, n_kept)
        value = ascending[np.arange(len(wanted)), n_kept - wanted]
        return np.where(self._fired > 0, value, np.inf).astype(np.float32)

    def maximum(self) -> Float32:
        """Return [H] the highest activation; -infinity without any."""
        return self._values.max(1, initial=-np.inf)
