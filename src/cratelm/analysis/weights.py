"""Figures of one layer's weights: dictionary, step size, subspaces of the heads."""

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
"""random subspaces that those of the heads are set beside"""
Figures = dict[tuple[str, str], float]
"""by quantity and setting"""


def atoms_of(model: Any, site: Site, layer: int) -> Array | None:
    """[H, D] the neurons' atoms: CRATE's dictionary (of a decoupled one the part that codes), the rows of GPT-2's
    last projection; None for other models."""
    if isinstance(model, CrateForCausalLM) and site.name == "ista":
        return _array(_block(model, layer).ista.dictionary)
    if isinstance(model, GPT2LMHeadModel) and site.name == "mlp":
        return _array(_block(model, layer).mlp.c_proj.weight)
    return None


def _block(model: Any, layer: int) -> Any:
    blocks = model.model.layers if isinstance(model, CrateForCausalLM) else model.transformer.h
    return blocks[layer]


def bases_of(model: Any, layer: int) -> Array | None:
    """[K, P, D] U_k^T of MSSA's heads; None for attention with projections of three kinds."""
    if not isinstance(model, CrateForCausalLM):
        return None
    weight = _array(_block(model, layer).mssa.projection.weight)  # [D, D]
    return weight.reshape(model.config.num_attention_heads, -1, weight.shape[1])


def dictionary_figures(atoms: Array, found: Coherence) -> Figures:
    return {
        ("spectral_norm", ""): spectral_norm(atoms),
        ("mutual_coherence", ""): found.mutual,
        ("median_coherence", ""): float(np.median(found.cosine)),
        ("welch_bound", ""): welch_bound(*atoms.shape),
        ("duplicated", ""): float(found.duplicated.mean()),
    }


def step_figures(model: Any, layer: int, norm: float) -> Figures:
    """Steps, and their size beside the largest that lowers the lasso objective for certain; CRATE alone."""
    if not isinstance(model, CrateForCausalLM):
        return {}
    ista = _block(model, layer).ista
    return {
        ("ista_steps", ""): float(ista.steps),
        ("step_size", ""): float(ista.step_size),
        ("step_size_bound", ""): norm**-2,
    }


def head_figures(bases: Array, seed: int) -> Figures:
    """Ranks of the heads and angles between them, means over heads and pairs, beside random subspaces."""
    found = {
        ("head_stable_rank", ""): float(np.mean([stable_rank(u) for u in bases])),
        ("head_effective_rank", ""): float(np.mean([effective_rank(u) for u in bases])),
    }
    drawn = [random_bases(bases.shape, seed + i) for i in range(DRAWS)]
    for setting, those in (("", [bases]), ("random", drawn)):
        pairs = np.concatenate([overlaps(these) for these in those])
        if len(pairs):
            found["head_overlap", setting] = float(pairs[:, 0].mean())
            found["head_angle", setting] = float(pairs[:, 1].mean())
    return found


def coherence_of(atoms: Array | None) -> Coherence | None:
    return None if atoms is None or len(atoms) < 2 else coherence(atoms)


def _array(weight: Any) -> Array:
    return weight.detach().double().cpu().numpy()
