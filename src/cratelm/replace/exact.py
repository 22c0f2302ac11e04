"""Sums that do not depend on the order in which their parts are added, so that any number of processes can share them.

Floating-point addition rounds, so that sums in another order differ in the last digits. If all parts are multiples of
one power of two, and their sum has at most 52 bits above it, float64 adds them without an error.
"""

import numpy as np
from numpy.typing import NDArray


def quantum_of(n: int, largest: float) -> float:
    """Return the finest power of two whose multiples up to `largest` can be added `n` times without an error."""
    return float(2.0 ** (np.ceil(np.log2(max(1, n) * max(largest, 1e-30))) - 52))


def rounded(values: NDArray[np.float64], quantum: float) -> NDArray[np.float64]:
    """Return the multiples of `quantum` that are nearest to the values."""
    return np.rint(values / quantum) * quantum
