"""Area under the ROC curve: the probability that one value is above another."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def roc_area(positive: ArrayLike, negative: ArrayLike) -> float:
    """Return the probability that one of `positive` [P] is above one of `negative` [Q]; ties count half.

    This is the area under the ROC curve, from ranks (Hanley & McNeil 1982). P and Q must be at least 1.
    """
    from scipy.stats import rankdata  # takes a second, and few scores are such areas

    a, b = np.asarray(positive), np.asarray(negative)
    return roc_area_of_ranks(rankdata(np.concatenate([a, b]))[: len(a)], len(b))


def roc_area_of_ranks(ranks: NDArray[np.float64], n_negative: int) -> float:
    """Return the same from the `ranks` [P] of the positive values among all P + Q, from 1.

    Many choices of positives among the same values then need only one ranking.
    """
    n = len(ranks)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * n_negative))
