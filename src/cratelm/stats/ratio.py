"""Ratios of sums over documents with their standard errors; pure NumPy.

Every figure is a ratio of two sums over documents, sum(x) / sum(y). Tokens of one document are not
independent, so its standard error is taken over documents (ratio estimator; Cochran 1977, Sampling
Techniques, section 6.4):

    R = sum(x) / sum(y),    se(R) = sqrt(C / (C - 1) sum((x - R y)^2)) / |sum(y)|

R may be negative, its error is not.

A perplexity is exp(R), with the error exp(R) se(R) (delta method). Two models on the same documents
are compared by the ratio of (x_a - x_b) to y, whose error excludes the difficulty that a document has for
both.

Shape legend: C documents.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from cratelm.records import Estimate


def ratio(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Return sum(x) / sum(y) of documents [C] with its standard error; no error for one document."""
    over, under = np.asarray(x, np.float64), np.asarray(y, np.float64)
    total, n = under.sum(), len(under)
    value = over.sum() / total
    if n < 2:
        return Estimate(float(value), None)
    spread = n / (n - 1) * ((over - value * under) ** 2).sum()
    return Estimate(float(value), float(np.sqrt(spread) / abs(total)))


def perplexity(loss: Estimate) -> Estimate:
    """Return exp of a loss in nats; infinity if the result is too large for a float."""
    value = math.exp(loss.value) if loss.value < 700 else math.inf
    return Estimate(value, None if loss.error is None else value * loss.error)
