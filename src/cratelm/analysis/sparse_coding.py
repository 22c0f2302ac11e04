"""Sparse coding as it is unrolled: the objective it descends, and how sparse its codes are.

    f(A) = 1/2 |x - D A|^2 + lambda |A|_1,  A >= 0            lasso, non-negative (Tibshirani 1996)
    A_0 = 0;  A_{k+1} = ReLU(A_k + eta D^T (x - D A_k) - eta lambda)      ISTA (Beck & Teboulle 2009)

With eta <= 1 / |D|^2 (spectral norm) no step raises f (Beck & Teboulle 2009, lemma 2.3 and theorem 3.1), and
with eta < 2 / |D|^2 the iteration converges; a larger eta promises nothing.

Shape legend: N tokens, D width, H neurons.
"""

import torch
from torch.nn import functional as F

TENTH = 0.1
"""of the largest entry of the same vector: what counts as more than faint"""


def objective(x: torch.Tensor, atoms: torch.Tensor, code: torch.Tensor, weight: float):
    """f [N] of codes [N, H] >= 0 for inputs [N, D], with atoms D^T [H, D] and lambda `weight`."""
    residual = x - code @ atoms
    return 0.5 * residual.square().sum(-1) + weight * code.sum(-1)


def objectives(
    x: torch.Tensor, atoms: torch.Tensor, step_size: float, weight: float, steps: int
) -> torch.Tensor:
    """f [steps + 1, N] of A_0 .. A_steps."""
    code = x.new_zeros(len(x), len(atoms))
    found = [objective(x, atoms, code, weight)]
    for _ in range(steps):
        gradient = (x - code @ atoms) @ atoms.T
        code = F.relu(code + step_size * gradient - step_size * weight)
        found.append(objective(x, atoms, code, weight))
    return torch.stack(found)


def sparsity(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each vector [N, n], [N] each: the part of its entries that are not 0, the part whose size is
    above a tenth of its largest entry's, and Hoyer's measure, 0 for equal entries and 1 for a single one.

    Hoyer 2004: (sqrt(n) - |v|_1 / |v|_2) / (sqrt(n) - 1); a vector of zeros counts as NaN.
    """
    size = vectors.abs()
    largest = size.amax(-1, keepdim=True)
    root = vectors.shape[-1] ** 0.5
    hoyer = (root - size.sum(-1) / size.square().sum(-1).sqrt()) / (root - 1)
    return {
        "nonzero": (vectors != 0).float().mean(-1),
        "above_tenth": (size > TENTH * largest).float().mean(-1),
        "hoyer": hoyer,
    }
