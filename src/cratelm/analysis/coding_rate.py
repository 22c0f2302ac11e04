"""Coding rates: how many nats it takes to tell tokens apart, up to a distortion.

    R(Z)        = 1/2 logdet(I + p / (N eps^2) Z Z^T)          Z [p, N], N tokens
    R^c(Z; U)   = sum_k R(U_k^T Z)

Source: Yu et al. 2023, "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129), equations
2 and 5. MSSA is derived as a gradient step on R^c: tokens are to be compressed towards the subspaces.
Both depend on Z only through its second moment C = Z Z^T / N, and that is what is gathered.

Shape legend: G groups of documents, D width, K heads, P = D/K width of a head.
"""

import numpy as np
from numpy.typing import NDArray

from cratelm.records import Estimate

EPSILONS = (0.1, 0.5, 1.0)
"""distortions eps; tokens come from a LayerNorm, so that their entries have variance 1"""
Array = NDArray[np.float64]


def coding_rate(moment: Array, epsilon: float) -> float:
    """R in nats, from the second moment Z Z^T / N [p, p]."""
    p = len(moment)
    sign, value = np.linalg.slogdet(np.eye(p) + p / epsilon**2 * moment)
    assert sign > 0, "a second moment has no negative eigenvalue"
    return float(value / 2)


def compression_rate(moment: Array, bases: Array, epsilon: float) -> float:
    """R^c in nats, from the second moment [D, D] and the projections U_k^T [K, P, D]."""
    return sum(coding_rate(u @ moment @ u.T, epsilon) for u in bases)


def orthonormal(bases: Array) -> Array:
    """Bases of the same subspaces [K, P, D], rows orthonormal: what is left of U when its scale is not counted."""
    return np.stack([np.linalg.qr(u.T)[0].T for u in bases])


def jackknife(rate, sums: Array, counts: Array) -> Estimate:
    """`rate` of the second moment of all tokens, its standard error by leaving out a group at a time.

    `sums` [G, D, D] are Z Z^T of each group, `counts` [G] its tokens. Grouped jackknife: Efron & Tibshirani
    1993, chapter 11.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    whole, n = sums.sum(0), counts.sum()
    value = rate(whole / n)
    groups = len(counts)
    if groups < 2:
        return Estimate(value, None)
    left = np.array([rate((whole - s) / (n - c)) for s, c in zip(sums, counts, strict=True)])
    spread = (groups - 1) / groups * ((left - left.mean()) ** 2).sum()
    return Estimate(value, float(np.sqrt(spread)))
