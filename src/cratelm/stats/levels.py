"""Activations as the integers 0..10 that a language model is shown (Bills et al. 2023). Pure NumPy."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.errors import InputError

MAX_LEVEL = 10
"""highest integer level that a language model is shown"""


def levels(activations: ArrayLike, max_activation: float) -> NDArray[np.int64]:
    """The integers 0..10 that a language model is shown: min(10, floor(10 relu(a) / max)).

    All 0 where `max_activation` is not above 0. Raises `InputError` on a value that is not finite.
    """
    raw = np.asarray(activations, dtype=np.float64)
    if not (np.isfinite(raw).all() and np.isfinite(max_activation)):
        raise InputError("activations hold NaN or infinity: finite values were expected")
    if max_activation <= 0:
        return np.zeros(raw.shape, dtype=np.int64)
    with np.errstate(over="ignore"):  # beyond the largest float is above 10 as well
        scaled = np.floor(MAX_LEVEL * np.maximum(raw, 0) / max_activation)
    return np.minimum(MAX_LEVEL, scaled).astype(np.int64)
