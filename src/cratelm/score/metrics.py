"""Agreement of simulated with true activations. Shapes: n is the number of tokens of all records together.

The three figures are those of OpenAI's scorer (Bills et al. 2023, automated-interpretability): the
correlation and two explained fractions, all pooled over the tokens of all records.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError
from cratelm.records import Excerpt, Score, Status

CONSTANT = "the simulation is constant"
"""reason of an undefined score"""
IsDuplicate = Callable[[Excerpt], bool]


def simulation_score(
    excerpts: Sequence[Excerpt], simulated: Sequence[NDArray], is_duplicate: IsDuplicate
) -> Score:
    """Return the score of simulated activations, including its value without near-duplicate excerpts.

    `simulated` has one array per excerpt, as long as the excerpt. Raises `InputError` if lengths differ.
    """
    score = correlation_score([e.activations for e in excerpts], simulated)
    distinct = [i for i, e in enumerate(excerpts) if not is_duplicate(e)]
    if len(distinct) == len(excerpts):
        return score
    without = correlation_score(
        [excerpts[i].activations for i in distinct], [simulated[i] for i in distinct]
    )
    return replace(
        score,
        n_duplicates=len(excerpts) - len(distinct),
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
    a, b = _pool(true, simulated)
    counts = {"n_tokens": len(a), "n_records": len(true)}
    if reason := _not_numbers(a, b):
        return Score(None, Status.UNDEFINED, reason, **counts)
    extra = {"r2": _explained(a, b, 2), "absolute_deviation": _explained(a, b, 1), **counts}
    if reason := _no_variance(a, b):
        return Score(None, Status.UNDEFINED, reason, **extra)
    return Score(_pearson(a, b), **extra)


def _pool(true: Sequence[ArrayLike], simulated: Sequence[ArrayLike]) -> tuple[NDArray, NDArray]:
    rows_a = [np.asarray(r, dtype=np.float64).ravel() for r in true]
    rows_b = [np.asarray(r, dtype=np.float64).ravel() for r in simulated]
    lengths_a, lengths_b = [len(r) for r in rows_a], [len(r) for r in rows_b]
    if lengths_a != lengths_b:
        raise InputError(
            f"the true activations are {_lengths(lengths_a)} tokens, the simulated ones"
            f" {_lengths(lengths_b)}: give one simulated value per token"
        )
    empty = np.zeros(0)
    return np.concatenate([empty, *rows_a]), np.concatenate([empty, *rows_b])


def _lengths(lengths: list[int]) -> str:
    return f"{len(lengths)} records of " + ", ".join(map(str, lengths[:8]))


def _not_numbers(a: NDArray, b: NDArray) -> str:
    """Return why no figure can be computed; empty if one can."""
    if len(a) == 0:
        return "no tokens"
    if not np.isfinite(a).all():
        return "the truth is not finite"
    return "" if np.isfinite(b).all() else "the simulation is not finite"


def _no_variance(a: NDArray, b: NDArray) -> str:
    """Return why the correlation does not exist; empty if it does."""
    if a.min() == a.max():
        return "the truth is constant"
    return CONSTANT if b.min() == b.max() else ""


def _explained(a: NDArray, b: NDArray, power: int) -> float | None:
    """Return 1 - mean|a - b|^power / mean|a|^power; None if not finite (truth all zero, or overflow)."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        value = 1 - np.mean(np.abs(a - b) ** power) / np.mean(np.abs(a) ** power)
    return float(value) if np.isfinite(value) else None


def _pearson(a: NDArray, b: NDArray) -> float:
    # Each is scaled to -1..1 around its mean first, so that no square over- or underflows.
    a, b = _centred(a), _centred(b)
    value = np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))
    return float(np.clip(value, -1.0, 1.0))


def _centred(x: NDArray) -> NDArray:
    x = x / np.abs(x).max()
    x = x - x.mean()
    return x / np.abs(x).max()
