"""Figures of several seeds with all their bootstrap replicates, so that differences and ratios of figures are paired.

Every figure of a study is computed on the same R draws of seeds. Within a drawn seed its neurons are drawn again, each
model's by itself; documents are drawn once for all models, because all read the same ones. So the replicates of two
figures can be subtracted: the seeds, and the documents, of both are the same (`cratelm.stats.seeds`).

Shape legend: S seeds, R resamples, L layers, n neurons of a layer, C documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError
from cratelm.records import Interval
from cratelm.stats.intervals import percentile_bounds, resampled_means
from cratelm.stats.seeds import Layers, two_sided

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Replicates:
    """A figure, and the same figure of every resample."""

    value: float
    """mean over seeds"""
    drawn: Array
    """[R]"""
    by_seed: tuple[float, ...]
    """the figure of each seed alone"""

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the bounds of the 95% percentile interval."""
        return percentile_bounds(self.drawn, 0.95)

    @property
    def interval(self) -> Interval:
        """Return the figure with its interval; `n` is the number of seeds."""
        return Interval(self.value, *self.bounds, len(self.by_seed))

    @property
    def p_value(self) -> float:
        """Return the two-sided p-value of no difference from 0, at least 2 / (R + 1) (`stats.seeds.two_sided`)."""
        return two_sided(self.drawn)

    def __sub__(self, other: "Replicates") -> "Replicates":
        if len(self.by_seed) != len(other.by_seed):
            raise InputError(
                f"{len(self.by_seed)} seeds are compared with {len(other.by_seed)}: give the same seeds of both"
            )
        each = (a - b for a, b in zip(self.by_seed, other.by_seed, strict=True))
        return Replicates(self.value - other.value, self.drawn - other.drawn, tuple(each))


class SeedResamples:
    """R draws of S seeds, the same for every figure of models that have these seeds."""

    def __init__(self, n_seeds: int, resamples: int, seed: int):
        self._seed, self.n_seeds = seed, n_seeds
        rng = np.random.default_rng((seed, n_seeds))
        drawn = rng.integers(0, n_seeds, (resamples, n_seeds))
        self._share = (
            np.stack([(drawn == number).sum(1) for number in range(n_seeds)], axis=1) / n_seeds
        )
        """[R, S] how often each seed is drawn, over S"""

    def of_neurons(
        self,
        seeds: Sequence[Layers],
        name: str,
        over_layers: Callable[[Array], Array] = lambda means: means.mean(-1),
    ) -> Replicates:
        """Return a figure of the layers' means [..., L], their mean by default, of models with S seeds.

        Values [n, k] of k figures per neuron have means [..., k, L]. `name` is that of the model and measure: the neurons of each are drawn independently. Neurons are drawn anew
        for every resample, in each seed. Raises `InputError` for another number of seeds, or a layer without values.
        """
        self._check(len(seeds))
        if any(not len(np.asarray(v)) for of in seeds for v in of.values()) or not seeds[0]:
            raise InputError(f"{name} has a layer without values: leave out empty layers")
        values, drawn = [], np.zeros(len(self._share))
        for number, of in enumerate(seeds):
            rng = np.random.default_rng((self._seed, crc32(name.encode()), number))
            layers = [np.asarray(v, np.float64) for v in of.values()]
            values.append(float(over_layers(np.stack([v.mean(0) for v in layers], axis=-1))))
            means = [resampled_means(v, len(self._share), rng) for v in layers]
            drawn += self._share[:, number] * over_layers(np.stack(means, axis=-1))
        return Replicates(float(np.mean(values)), drawn, tuple(values))

    def of_documents(
        self, n_tokens: ArrayLike, of: Callable[..., Array], *losses: Sequence[ArrayLike]
    ) -> Replicates:
        """Return `of` of losses per token, from several sums over documents [S, C] of the same documents.

        `n_tokens` [C] is the number of predicted tokens of each document.
        """
        tokens = np.asarray(n_tokens, np.float64)
        sums = [np.asarray(of_loss, np.float64) for of_loss in losses]  # [S, C] each
        self._check(len(sums[0]))
        n = len(tokens)
        rng = np.random.default_rng(self._seed)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=len(self._share)).astype(np.float64)
        per = counts @ tokens  # [R]
        values, drawn = [], np.zeros(len(self._share))
        for number in range(self.n_seeds):
            values.append(float(of(*(s[number].sum() / tokens.sum() for s in sums))))
            drawn += self._share[:, number] * of(*((counts @ s[number]) / per for s in sums))
        return Replicates(float(np.mean(values)), drawn, tuple(values))

    def of_values(self, values: Sequence[float]) -> Replicates:
        """Return the mean of one value per seed, over seeds alone."""
        self._check(len(values))
        array = np.asarray(values, np.float64)
        return Replicates(float(array.mean()), self._share @ array, tuple(map(float, values)))

    def _check(self, n: int) -> None:
        if n != self.n_seeds:
            raise InputError(f"{n} seeds are given, and {self.n_seeds} were to be resampled")
