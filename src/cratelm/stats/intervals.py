"""Means over neurons with their bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean with the bounds of its 95% interval: percentile bootstrap over neurons."""

    value: float
    low: float | None
    """None for a single value"""
    high: float | None
    n: int

    def show(self, form: str) -> str:
        if self.low is None or self.high is None:
            return format(self.value, form)
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean_of(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Mean | None:
    """Mean of `values`; None where there are none."""
    if not values:
        return None
    known = np.asarray(values, np.float64)
    if len(known) == 1:
        return Mean(float(known[0]), None, None, 1)
    rng = np.random.default_rng(seed)
    means = [known[rng.integers(0, len(known), len(known))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(known.mean()), float(low), float(high), len(known))
