"""Area under the ROC curve: the chance that one value is above another."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


def roc_area(positive: ArrayLike, negative: ArrayLike) -> float:
    """Return the chance that one of `positive` [P] is above one of `negative` [Q], a tie counting half.

    The area under the ROC curve, by ranks (Hanley & McNeil 1982). P and Q are at least 1.
    """
    a, b = np.asarray(positive), np.asarray(negative)
    return roc_area_of_ranks(rankdata(np.concatenate([a, b]))[: len(a)], len(b))


def roc_area_of_ranks(ranks: NDArray[np.float64], n_negative: int) -> float:
    """Return the same from the `ranks` [P] of the positive values among all P + Q, from 1.

    For many questions about the same values, which need to be ranked only once.
    """
    n = len(ranks)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * n_negative))
