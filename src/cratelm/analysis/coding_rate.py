"""Coding rates: the number of nats needed to encode a token up to a distortion.

    R(Z)        = 1/2 logdet(I + p / (N eps^2) Z Z^T)          Z [p, N], N tokens
    R^c(Z; U)   = sum_k R(U_k^T Z)

Source: Yu et al. 2023, "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129), equations
2 and 5. MSSA is derived as a gradient step on R^c, which compresses tokens towards the subspaces. Both
depend on Z only through its second moment Z Z^T / N, so only that is summed over the text.

Shape legend: D width, K heads, P = D/K width of a head, p either of these.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def coding_rate(moment: Array, epsilon: float) -> float:
    """Return R in nats, from the second moment Z Z^T / N [p, p]."""
    p = len(moment)
    sign, value = np.linalg.slogdet(np.eye(p) + p / epsilon**2 * moment)
    assert sign > 0, "a second moment has no negative eigenvalue"
    return float(value / 2)


def compression_rate(moment: Array, bases: Array, epsilon: float) -> float:
    """Return R^c in nats, from the second moment [D, D] and the projections U_k^T [K, P, D]."""
    return sum(coding_rate(u @ moment @ u.T, epsilon) for u in bases)


def orthonormal(bases: Array) -> Array:
    """Return bases [K, P, D] of the same subspaces with orthonormal rows, that is, without the scale of U."""
    return np.stack([np.linalg.qr(u.T)[0].T for u in bases])
