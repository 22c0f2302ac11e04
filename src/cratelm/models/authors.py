"""Reads the checkpoints of the paper's authors, without running anything that they carry.

A checkpoint is a torch file with `model` (keys may start with `_orig_mod.`, which `torch.compile`
adds), `model_args`, and training state that is not needed here (arXiv 2410.16443, public code).
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar
from transformers import GPT2LMHeadModel

from cratelm.errors import InputError
from cratelm.models.crate import CrateConfig, CrateForCausalLM
from cratelm.models.gpt2 import as_twin, gpt2_config

# What a training script may leave beside tensors and plain Python values: numbers of NumPy.
ALLOWED_GLOBALS = [
    np.ndarray,
    np.dtype,
    _reconstruct,
    scalar,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]


def load_authors_checkpoint(path: str | Path) -> CrateForCausalLM | GPT2LMHeadModel:
    """A ready model in evaluation mode from a CRATE or GPT-2 checkpoint of the authors.

    Raises `InputError` for a file that is absent, truncated, hostile (it holds more than tensors and
    plain values), or whose keys or shapes are not those of the two architectures.
    """
    path = Path(path)
    checkpoint = _read(path)
    arguments = _arguments(checkpoint, path)
    weights = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    if any(".ista." in key for key in weights):
        return _fill(CrateForCausalLM(_crate_config(arguments)), _crate_weights(weights), path)
    biased = "transformer.ln_f.bias" in weights
    model = GPT2LMHeadModel(gpt2_config(**arguments, zero_biases=not biased))
    return _fill(as_twin(model), _gpt2_weights(weights), path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is not a file: name a checkpoint (ckpt.pt) of the authors")
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} was refused: it holds more than tensors and plain values"
            f" ({_named(error)}), which could run code; ask for a file of tensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a torch file ({str(error).splitlines()[0][:120]}):"
            " it may be truncated, fetch it again"
        ) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise InputError(f"{path} has no entry 'model' with weights: is it a checkpoint?")
    return checkpoint


def _named(error: Exception) -> str:
    """The line of torch's long message that names the object it refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    marked = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (marked or lines)[0][:160]


def _arguments(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    given = checkpoint.get("model_args")
    wanted = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
    }
    missing = [k for k in wanted if not isinstance(given, dict) or k not in given]
    if missing or not isinstance(given, dict):
        raise InputError(f"{path}: model_args lacks {', '.join(missing)}")
    return {ours: given[theirs] for theirs, ours in wanted.items()} | {
        "dropout": given.get("dropout", 0.0)
    }


def _crate_config(arguments: dict[str, Any]) -> CrateConfig:
    try:
        return CrateConfig(**arguments)
    except ValueError as error:
        raise InputError(f"model_args describe no CRATE model: {error}") from None


_CRATE_KEYS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.wpe.weight": "model.embed_positions.weight",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    ".prenorm_1.": ".norm_mssa.",
    ".prenorm_2.": ".norm_ista.",
    ".attn.c_attn.": ".mssa.projection.",
    ".attn.c_proj.": ".mssa.output.",
    ".ista.weight": ".ista.dictionary",  # both D^T, [H, D]
}


def _crate_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        for theirs, ours in _CRATE_KEYS.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    return renamed


_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _gpt2_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their linear weights are [out, in], transformers' GPT-2 keeps [in, out]."""
    kept = {k: v for k, v in weights.items() if not k.endswith(".attn.bias")}  # causal-mask buffer
    return {k: v.t().contiguous() if k.endswith(_TRANSPOSED) else v for k, v in kept.items()}


def _fill(model: Any, weights: dict[str, torch.Tensor], path: Path) -> Any:
    """Copies `weights` into `model`; every weight of either side must find its other."""
    own = model.state_dict()
    biases_absent = getattr(model.config, "zero_biases", False)
    for key, tensor in weights.items():
        if key not in own:
            raise InputError(f"{path}: weight {key} has no place in a {type(model).__name__}")
        if own[key].shape != tensor.shape:
            raise InputError(
                f"{path}: weight {key} has shape {tuple(tensor.shape)},"
                f" model_args ask for {tuple(own[key].shape)}"
            )
    missing = [k for k in own if k not in weights and not (biases_absent and k.endswith(".bias"))]
    missing = [k for k in missing if k != "lm_head.weight"]  # tied
    if missing:
        raise InputError(f"{path}: weight {missing[0]} is missing ({len(missing)} in all)")
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()
