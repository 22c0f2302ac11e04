"""Figures of the weights of one layer: dictionary, step size, subspaces of the heads.

Shape legend: H atoms, D width, K heads, P width of a head.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from cratelm.analysis.dictionary import (
    Coherence,
    coherence,
    effective_rank,
    overlaps,
    random_bases,
    spectral_norm,
    stable_rank,
    welch_bound,
)
from cratelm.models import CrateForCausalLM
from cratelm.models.sites import Site

Array = NDArray[np.float64]
DRAWS = 5
"""draws of random subspaces that the heads are compared with"""
Figures = dict[tuple[str, str], float]
"""by quantity and setting"""


def atoms_of(model: Any, site: Site, layer: int) -> Array | None:
    """Return the atoms [H, D] of the neurons; None for other models and sites.

    CRATE's dictionary (of a decoupled one the encoder), or the rows of the last projection of GPT-2's MLP.
    """
    if isinstance(model, CrateForCausalLM) and site.name == "ista":
        return _array(_block(model, layer).ista.dictionary)
    if isinstance(model, GPT2LMHeadModel) and site.name == "mlp":
        return _array(_block(model, layer).mlp.c_proj.weight)
    return None


def _block(model: Any, layer: int) -> Any:
    blocks = model.model.layers if isinstance(model, CrateForCausalLM) else model.transformer.h
    return blocks[layer]


def bases_of(model: Any, layer: int) -> Array | None:
    """Return U_k^T [K, P, D] of MSSA's heads; None for attention with query, key and value projections."""
    if not isinstance(model, CrateForCausalLM):
        return None
    weight = _array(_block(model, layer).mssa.projection.weight)  # [D, D]
    return weight.reshape(model.config.num_attention_heads, -1, weight.shape[1])


def dictionary_figures(atoms: Array, alike: Coherence) -> Figures:
    """Return the figures of atoms [H, D] and of how alike they are."""
    return {
        ("spectral_norm", ""): spectral_norm(atoms),
        ("mutual_coherence", ""): alike.mutual,
        ("median_coherence", ""): float(np.median(alike.cosine)),
        ("welch_bound", ""): welch_bound(*atoms.shape),
        ("duplicated", ""): float(alike.duplicated.mean()),
    }


def step_figures(model: Any, layer: int, norm: float) -> Figures:
    """Return the number of steps, their size, and the largest size that is sure to lower the lasso objective.

    `norm` is the spectral norm of the dictionary. Empty for models other than CRATE.
    """
    if not isinstance(model, CrateForCausalLM):
        return {}
    ista = _block(model, layer).ista
    return {
        ("ista_steps", ""): float(ista.steps),
        ("step_size", ""): float(ista.step_size),
        ("step_size_bound", ""): norm**-2,
    }


def head_figures(bases: Array, seed: int) -> Figures:
    """Return ranks of the heads [K, P, D] and angles between them, and the angles between random subspaces.

    Means over heads, and over pairs of heads.
    """
    figures = {
        ("head_stable_rank", ""): float(np.mean([stable_rank(u) for u in bases])),
        ("head_effective_rank", ""): float(np.mean([effective_rank(u) for u in bases])),
    }
    drawn = [random_bases(bases.shape, seed + i) for i in range(DRAWS)]
    for setting, draws in (("", [bases]), ("random", drawn)):
        pairs = np.concatenate([overlaps(heads) for heads in draws])
        if len(pairs):
            figures["head_overlap", setting] = float(pairs[:, 0].mean())
            figures["head_angle", setting] = float(pairs[:, 1].mean())
    return figures


def coherence_of(atoms: Array | None) -> Coherence | None:
    """Return how alike the atoms are; None if there are none, or only one."""
    return None if atoms is None or len(atoms) < 2 else coherence(atoms)


def _array(weight: Any) -> Array:
    return weight.detach().double().cpu().numpy()
