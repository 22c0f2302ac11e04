"""Atoms of a dictionary and subspaces of heads: linear algebra on the weights.

Shape legend: H atoms, D width, K heads, P width of a head.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import subspace_angles

Array = NDArray[np.float64]
DUPLICATE = 0.95
"""smallest cosine with another atom at which an atom counts as a duplicate"""
_BLOCK = 1024
"""number of atoms whose cosines with all others are in memory at a time: 25 MB at H = 3,072"""


@dataclass(frozen=True, eq=False)
class Coherence:
    """Similarity of the atoms of one dictionary."""

    nearest: NDArray[np.int64]
    """[H] the other atom with the largest |cosine|"""
    cosine: Array
    """[H] that |cosine|"""
    signed: Array
    """[H] the largest cosine with another atom: duplicates point the same way"""

    @property
    def mutual(self) -> float:
        """Mutual coherence: the largest |cosine| of two atoms (Donoho & Elad 2003)."""
        return float(self.cosine.max())

    @property
    def duplicated(self) -> NDArray[np.bool_]:
        """[H] whether each atom has a cosine of at least `DUPLICATE` with another atom."""
        return self.signed >= DUPLICATE


def coherence(atoms: Array) -> Coherence:
    """Return the similarity of atoms [H, D], with H >= 2; an atom of zeros has cosine 0 with all others."""
    norm = np.linalg.norm(atoms, axis=1, keepdims=True)
    unit = np.divide(atoms, norm, out=np.zeros_like(atoms), where=norm > 0)
    nearest, cosine, signed = [], [], []
    for low in range(0, len(unit), _BLOCK):
        block = unit[low : low + _BLOCK] @ unit.T  # [block, H]
        rows = np.arange(len(block))
        block[rows, low + rows] = 0  # row i of the block is atom low + i: its cosine with itself
        most_alike = np.abs(block).argmax(1)
        nearest.append(most_alike)
        cosine.append(np.abs(block)[rows, most_alike])
        signed.append(block.max(1))
    return Coherence(np.concatenate(nearest), np.concatenate(cosine), np.concatenate(signed))


def welch_bound(n_atoms: int, width: int) -> float:
    """Return the lowest possible mutual coherence of H atoms in D dimensions (Welch 1974); 0 if H <= D."""
    if n_atoms <= width:
        return 0.0
    return float(np.sqrt((n_atoms - width) / (width * (n_atoms - 1))))


def spectral_norm(matrix: Array) -> float:
    """Return the largest singular value."""
    return float(np.linalg.norm(matrix, 2))


def stable_rank(matrix: Array) -> float:
    """Return |M|_F^2 / |M|_2^2, which is at most the rank (Rudelson & Vershynin 2007)."""
    return float(np.linalg.norm(matrix) ** 2 / spectral_norm(matrix) ** 2)


def effective_rank(matrix: Array) -> float:
    """Return exp of the entropy of the singular values normalised to a sum of 1 (Roy & Vetterli 2007)."""
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def overlap(a: Array, b: Array) -> tuple[float, float]:
    """Return two figures of the principal angles of two row spaces [P, D]: mean squared cosine, smallest angle.

    The angle is in degrees (Björck & Golub 1973). The mean squared cosine is 1 for equal subspaces, 0 for
    orthogonal ones, and P/D on average for random ones.
    """
    angles = subspace_angles(a.T, b.T)
    return float(np.mean(np.cos(angles) ** 2)), float(np.degrees(angles.min()))


def overlaps(bases: Array) -> Array:
    """Return the `overlap` [pairs, 2] of every pair of heads in [K, P, D]."""
    pairs = [(i, j) for i in range(len(bases)) for j in range(i)]
    return np.array([overlap(bases[i], bases[j]) for i, j in pairs]).reshape(-1, 2)


def random_bases(shape: tuple[int, ...], seed: int) -> Array:
    """Return bases [K, P, D] of random subspaces, with normally distributed entries."""
    return np.random.default_rng(seed).standard_normal(shape)
