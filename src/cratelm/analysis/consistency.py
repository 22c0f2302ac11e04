"""Consistency and distinctiveness of a neuron: the paper's account of where interpretability comes from.

An explanation covers a token where its simulator predicts much:

    covered(t)  <=>  s(t) >= s_0 + x (s_max - s_0)

with s_0 the explanation's default, s_max the largest value it holds, and x a half (and others, to see how
much hangs on it). Explanations were made from the fit split, and so was the threshold at which a neuron
counts as firing, a tenth of its largest activation there; everything below is counted on held-out tokens.

    consistency       part of the covered tokens at which the neuron fires
    evenness          (sum a)^2 / (n sum a^2) over the n covered tokens: 1 where all activations are equal, 1/n
                      where one token has it all (participation ratio; 1 / (1 + squared variation coefficient))
    distinctiveness   part of the other tokens at which it does not fire
    contrast          (m - m') / (m + m') of the mean activations m on covered and m' on other tokens, which hangs
                      on no threshold: 1 for a neuron that is 0 elsewhere, 0 for one that makes no difference
    AUROC             chance that a covered token has the higher activation than another one, ties half

The two ideas are those of Bai & Ma (arXiv 2410.16443, section 5); as numbers they are defined here.

Shape legend: N text tokens, n neurons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cratelm.records import Status
from cratelm.stats.auc import roc_area_of_ranks

SHARES = (0.25, 0.5, 0.75)
"""x: how far between the default and the largest value a token must be predicted to be covered"""
SHARE = 0.5
"""the one that is shown"""
FIRING = 0.1
"""of the largest activation on the fit split: above it a neuron fires"""
MEASURES = ("consistency", "evenness", "distinctiveness", "contrast", "auroc")


@dataclass(frozen=True)
class Reading:
    """One neuron against the tokens that one explanation covers. None where there is no value."""

    status: Status
    n_covered: int
    """tokens"""
    n_elsewhere: int
    consistency: float | None = None
    any_consistency: float | None = None
    """the same with every activation above 0 as firing"""
    evenness: float | None = None
    distinctiveness: float | None = None
    any_distinctiveness: float | None = None
    contrast: float | None = None
    """of activations that are never negative: None where one is, or all are 0"""
    auroc: float | None = None


@dataclass(frozen=True, eq=False)
class Observed:
    """One neuron on held-out tokens."""

    activations: NDArray[np.float32]
    """[N]"""
    ranks: NDArray[np.float64]
    """[N] from 1, ties share their mean"""
    firing: float
    """raw activation above which it fires; 0 or less: dead on the fit split"""

    @classmethod
    def of(cls, activations: NDArray[np.float32], fit_maximum: float) -> "Observed":
        return cls(activations, rankdata(activations), FIRING * fit_maximum)


def covered(
    payload: Mapping[str, Any], simulated: NDArray[np.float64], share: float
) -> NDArray[np.bool_]:
    """[N] tokens that an explanation covers; none where it holds no value above its default."""
    default = float(payload["default"])
    top = max(payload["values"], default=default)
    if top <= default:
        return np.zeros(len(simulated), bool)
    return simulated >= default + share * (top - default)


def read(neuron: Observed, mask: NDArray[np.bool_]) -> Reading:
    """The neuron against covered tokens [N]."""
    n, rest = int(mask.sum()), int((~mask).sum())
    if neuron.firing <= 0:
        return Reading(Status.DEAD, n, rest)
    if not n or not rest:
        return Reading(Status.UNDEFINED, n, rest)
    inside, outside = neuron.activations[mask], neuron.activations[~mask]
    energy = float((inside.astype(np.float64) ** 2).sum())
    return Reading(
        status=Status.DEFINED,
        n_covered=n,
        n_elsewhere=rest,
        consistency=float((inside > neuron.firing).mean()),
        any_consistency=float((inside > 0).mean()),
        evenness=float(inside.sum(dtype=np.float64) ** 2 / (n * energy)) if energy else None,
        distinctiveness=float((outside <= neuron.firing).mean()),
        any_distinctiveness=float((outside <= 0).mean()),
        contrast=contrast(inside, outside),
        auroc=roc_area_of_ranks(neuron.ranks[mask], rest),
    )


def contrast(inside: NDArray[np.float32], outside: NDArray[np.float32]) -> float | None:
    """Of activations on covered and on other tokens; None where one is negative or all are 0."""
    if min(inside.min(), outside.min()) < 0:
        return None
    m, rest = (float(part.mean(dtype=np.float64)) for part in (inside, outside))
    return (m - rest) / (m + rest) if m + rest else None


def others(n: int, seed: int) -> NDArray[np.int64]:
    """[n] another neuron for each, every one once: whose explanation the null takes. n at least 2."""
    order = np.random.default_rng(seed).permutation(n)
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, 1)
    return partner
