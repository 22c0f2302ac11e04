"""Agreement of simulated with true activations. Shapes: n is the number of tokens of all records together.

The three figures are those of OpenAI's scorer (Bills et al. 2023, automated-interpretability): the
correlation and two explained fractions, all pooled over the tokens of all records.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError
from cratelm.records import Excerpt, Score, Status

CONSTANT = "the simulation is constant"
"""reason of an undefined score"""
FindDuplicates = Callable[[Sequence[Excerpt]], NDArray[np.bool_]]
"""returns which of the excerpts are near-duplicates of text explained from, one value per excerpt"""


@dataclass(frozen=True, eq=False)
class Sample:
    """The excerpts of one neuron that a metric is computed on, for any number of simulations."""

    excerpts: Sequence[Excerpt]
    find_duplicates: FindDuplicates

    @cached_property
    def documents(self) -> tuple[int, ...]:
        """Return the ordinals of the documents of the excerpts, sorted."""
        return tuple(sorted({e.document for e in self.excerpts}))

    @cached_property
    def classes(self) -> Sequence[Hashable]:
        """Return the class of each excerpt; without one of each there is no score (`scorers.is_enough`)."""
        return [e.kind for e in self.excerpts]

    @cached_property
    def token_ids(self) -> list[NDArray]:
        """Return what simulators get: the token ids of each excerpt, never its activations."""
        return [e.token_ids for e in self.excerpts]

    @cached_property
    def _truth(self) -> "Truth":
        return Truth([e.activations for e in self.excerpts])

    @cached_property
    def _distinct(self) -> NDArray[np.bool_]:
        return ~self.find_duplicates(self.excerpts)

    @cached_property
    def _distinct_truth(self) -> "Truth":
        return Truth([e.activations for e in compress(self.excerpts, self._distinct)])

    def where(self, mask: Sequence[bool]) -> "Sample":
        """Return the excerpts at which `mask` is True, one value per excerpt, as a sample."""
        return self if all(mask) else replace(self, excerpts=list(compress(self.excerpts, mask)))

    def score(self, simulated: Sequence[ArrayLike]) -> Score:
        """Return the score of simulated activations, including its value without near-duplicate excerpts.

        `simulated` has one array per excerpt, as long as the excerpt. Raises `InputError` if lengths differ.
        """
        return self.score_pooled(self._truth.pooled(simulated))

    def score_pooled(self, simulated: NDArray[np.float64]) -> Score:
        """Return what `score` does; `simulated` [n] has the values of all excerpts, one after another."""
        score = self._truth.score(simulated)
        if self._distinct.all():
            return score
        lengths = [len(e) for e in self.excerpts]
        without = self._distinct_truth.score(simulated[np.repeat(self._distinct, lengths)])
        return replace(
            score,
            n_duplicates=int((~self._distinct).sum()),
            without_duplicates=without.value,
        )


def correlation_score(true: Sequence[ArrayLike], simulated: Sequence[ArrayLike]) -> Score:
    """Return the Pearson correlation of simulated with true activations, pooled over all tokens.

    `true` and `simulated` contain one sequence of floats per record, of equal lengths. If the correlation
    does not exist, the value is None, the status UNDEFINED, and `reason` says why: no tokens, a constant
    truth, a constant simulation, or a value that is not finite.

    `r2` = 1 - mean((true - simulated)^2) / mean(true^2) and `absolute_deviation` =
    1 - mean|true - simulated| / mean|true|. Both are relative to 0 and without calibration, as in OpenAI's
    scorer, so that they are meaningful only for a simulation in the neuron's unit. They are None if the
    truth is all zero.

    Raises `InputError` if the records or their lengths do not match.
    """
    truth = Truth(true)
    return truth.score(truth.pooled(simulated))


class Truth:
    """True activations, with what their comparisons with all simulations share."""

    def __init__(self, true: Sequence[ArrayLike]):
        """`true` contains one sequence of floats per record."""
        self._a, self._lengths = _pool(true)

    def pooled(self, simulated: Sequence[ArrayLike]) -> NDArray[np.float64]:
        """Return simulated records as one array [n]; raise `InputError` if their lengths are not those of the truth."""
        b, lengths = _pool(simulated)
        if lengths != self._lengths:
            raise InputError(
                f"the true activations are {_lengths(self._lengths)} tokens, the simulated ones"
                f" {_lengths(lengths)}: give one simulated value per token"
            )
        return b

    def score(self, b: NDArray[np.float64]) -> Score:
        """Return the score of a simulation [n], see `correlation_score`."""
        counts = {"n_tokens": len(self._a), "n_records": len(self._lengths)}
        if self._not_numbers:
            return Score(None, Status.UNDEFINED, self._not_numbers, **counts)
        low, high = b.min(), b.max()
        if not (
            isfinite(low) and isfinite(high)
        ):  # NaN too: it would be the lowest and the highest
            return Score(None, Status.UNDEFINED, "the simulation is not finite", **counts)
        extra = {**self._explained(b), **counts}
        if self._is_constant:
            return Score(None, Status.UNDEFINED, "the truth is constant", **extra)
        if low == high:
            return Score(None, Status.UNDEFINED, CONSTANT, **extra)
        return Score(self._pearson(b), **extra)

    @cached_property
    def _not_numbers(self) -> str:
        """Return why no figure can be computed; empty if one can."""
        if not len(self._a):
            return "no tokens"
        return "" if np.isfinite(self._a).all() else "the truth is not finite"

    @cached_property
    def _is_constant(self) -> bool:
        return bool(self._a.min() == self._a.max())

    @cached_property
    def _mean_powers(self) -> tuple[np.float64, np.float64]:
        """Return mean a^2 and mean |a|."""
        with np.errstate(over="ignore"):
            return _mean(np.square(self._a)), _mean(np.abs(self._a))

    def _explained(self, b: NDArray) -> dict[str, float | None]:
        """Return `r2` and `absolute_deviation`; None if not finite (truth all zero, or overflow)."""
        square, absolute = self._mean_powers
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            error = self._a - b
            values = {
                "r2": float(1 - _mean(np.square(error)) / square),
                "absolute_deviation": float(1 - _mean(np.abs(error)) / absolute),
            }
        return {name: value if isfinite(value) else None for name, value in values.items()}

    @cached_property
    def _centred(self) -> tuple[NDArray, np.float64]:
        """Return the truth as `_centred` scales it, and the sum of its squares."""
        a = _centred(self._a)
        return a, np.dot(a, a)

    def _pearson(self, b: NDArray) -> float:
        # Each is scaled to -1..1 around its mean first, so that no square over- or underflows.
        (a, squares), b = self._centred, _centred(b)
        value = np.dot(a, b) / np.sqrt(squares * np.dot(b, b))
        return float(value if abs(value) <= 1 else np.clip(value, -1.0, 1.0))


def _pool(records: Sequence[ArrayLike]) -> tuple[NDArray[np.float64], list[int]]:
    """Return the values of all records as one array [n], and the length of each record."""
    rows = [np.asarray(r, dtype=np.float64).ravel() for r in records]
    return np.concatenate([np.zeros(0), *rows]), [len(r) for r in rows]


def _lengths(lengths: list[int]) -> str:
    return f"{len(lengths)} records of " + ", ".join(map(str, lengths[:8]))


def _mean(x: NDArray) -> np.float64:
    # the sum and the quotient of `np.mean`, which takes four times as long for a thousand numbers
    return np.add.reduce(x) / len(x)


def _centred(x: NDArray) -> NDArray:
    x = x / np.abs(x).max()
    x = x - _mean(x)
    return x / np.abs(x).max()
