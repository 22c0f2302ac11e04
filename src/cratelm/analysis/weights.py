"""Figures computed from the weights of one layer: dictionary, step size, subspaces of the heads.

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
from cratelm.models import CrateForCausalLM, SparseGptForCausalLM
from cratelm.models.sites import Site

Array = NDArray[np.float64]
DRAWS = 5
"""number of draws of random subspaces with which the heads are compared"""
Figures = dict[tuple[str, str], float]
"""by quantity and setting"""


def atoms_of(model: Any, site: Site, layer: int) -> Array | None:
    """Return the atoms [H, D] of the neurons at the site `ista` or `mlp` of cratelm's families; None for others.

    These are CRATE's dictionary (the encoder, if it is decoupled), or what each neuron of an MLP adds to the output
    of its last projection.
    """
    if isinstance(model, CrateForCausalLM) and site.name == "ista":
        return _array(_block(model, layer).ista.dictionary)
    if site.name != "mlp":
        return None
    if isinstance(model, GPT2LMHeadModel):
        return _array(_block(model, layer).mlp.c_proj.weight)
    if isinstance(model, SparseGptForCausalLM):
        return _array(_block(model, layer).mlp.c_proj.weight.T)
    if isinstance(model, CrateForCausalLM):
        return _array(_block(model, layer).mlp.fc2.weight.T)
    return None


def _block(model: Any, layer: int) -> Any:
    blocks = model.model.layers if isinstance(model, CrateForCausalLM) else model.transformer.h
    return blocks[layer]


def bases_of(model: Any, layer: int) -> Array | None:
    """Return U_k^T [K, P, D] of the heads of MSSA or TSSA; None where query, key and value are all different."""
    if not isinstance(model, CrateForCausalLM) or model.config.attention == "standard":
        return None
    weight = _array(_block(model, layer).mssa.projection.weight)  # [D, D]
    return weight.reshape(model.config.num_attention_heads, -1, weight.shape[1])


def dictionary_figures(atoms: Array, alike: Coherence) -> Figures:
    """Return the figures of atoms [H, D] and of their similarity `alike`."""
    return {
        ("spectral_norm", ""): spectral_norm(atoms),
        ("mutual_coherence", ""): alike.mutual,
        ("median_coherence", ""): float(np.median(alike.cosine)),
        ("welch_bound", ""): welch_bound(*atoms.shape),
        ("duplicated", ""): float(alike.duplicated.mean()),
    }


def step_figures(model: Any, layer: int, norm: float) -> Figures:
    """Return the number of steps, the step size, and the largest size that never raises the lasso objective.

    `norm` is the spectral norm of the dictionary. Empty for models without sparse coding.
    """
    if not isinstance(model, CrateForCausalLM) or model.config.feedforward != "ista":
        return {}
    ista = _block(model, layer).ista
    return {
        ("ista_steps", ""): float(ista.steps),
        ("step_size", ""): float(ista.step_size),
        ("step_size_bound", ""): norm**-2,
    }


def head_figures(bases: Array, seed: int) -> Figures:
    """Return the ranks of the heads [K, P, D], the angles between them, and those between random subspaces.

    Ranks are means over heads, angles and overlaps means over pairs of heads.
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
    """Return the similarity of the atoms; None if there are none, or only one."""
    return None if atoms is None or len(atoms) < 2 else coherence(atoms)


def _array(weight: Any) -> Array:
    return weight.detach().double().cpu().numpy()
