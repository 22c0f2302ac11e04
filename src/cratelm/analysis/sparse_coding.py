"""Unrolled sparse coding: the objective that its steps minimise, and the sparsity of its codes.

    f(A) = 1/2 |x - D A|^2 + lambda |A|_1,  A >= 0            lasso, non-negative (Tibshirani 1996)
    A_0 = 0;  A_{k+1} = ReLU(A_k + eta D^T (x - D A_k) - eta lambda)      ISTA (Beck & Teboulle 2009)

With eta <= 1 / |D|^2 (spectral norm) no step increases f (Beck & Teboulle 2009, lemma 2.3 and theorem 3.1), and
with eta < 2 / |D|^2 the iteration converges; for a larger eta nothing is guaranteed.

Shape legend: N tokens, D width, H neurons.
"""

import torch
from torch.nn import functional as F

TENTH = 0.1
"""fraction of a vector's largest entry above which an entry counts in `above_tenth`"""


def objective(
    x: torch.Tensor, atoms: torch.Tensor, code: torch.Tensor, weight: float
) -> torch.Tensor:
    """Return f [N] for codes [N, H] >= 0 and inputs [N, D], with atoms D^T [H, D] and lambda = `weight`."""
    residual = x - code @ atoms
    return 0.5 * residual.square().sum(-1) + weight * code.sum(-1)


def objectives(
    x: torch.Tensor, atoms: torch.Tensor, step_size: float, weight: float, steps: int
) -> torch.Tensor:
    """Return f [steps + 1, N] for A_0 .. A_steps, with inputs [N, D], atoms D^T [H, D], eta and lambda = `weight`.

    These are the iterations of `models.crate.Ista.encode` in their plain form: a change of the solver there
    is a change here.
    """
    code = x.new_zeros(len(x), len(atoms))
    values = [objective(x, atoms, code, weight)]
    for _ in range(steps):
        gradient = (x - code @ atoms) @ atoms.T
        code = F.relu(code + step_size * gradient - step_size * weight)
        values.append(objective(x, atoms, code, weight))
    return torch.stack(values)


def sparsity(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return three sparsity measures [N] of vectors [N, n].

    `nonzero`: fraction of the entries that are not 0; `above_tenth`: fraction whose absolute value is above a
    tenth of the largest; `hoyer`: (sqrt(n) - |v|_1 / |v|_2) / (sqrt(n) - 1), which is 0 for equal entries and 1
    for a single nonzero entry (Hoyer 2004), NaN for a vector of zeros.
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
