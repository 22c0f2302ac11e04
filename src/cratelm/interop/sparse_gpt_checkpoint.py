"""Read a released checkpoint of a weight-sparse GPT: `beeg_config.json` and `final_model.pt` in one folder.

The file is read as tensors only, so that none of its code could run (Gao et al. 2025, arXiv 2511.13653, public code).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cratelm.errors import InputError, one_line
from cratelm.interop.authors_checkpoint import check_tensor, read_torch_file
from cratelm.models.sparse_gpt import SparseGptConfig, SparseGptForCausalLM
from cratelm.runs.arguments import LARGEST
from cratelm.runs.pretrained import json_object

CONFIG, WEIGHTS = "beeg_config.json", "final_model.pt"

_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
"""fields of the configuration that each file must have, and cratelm's names for them"""
_OPTIONAL_SIZES = {"d_head": "head_dim", "d_mlp": "intermediate_size"}
_SWITCHES = {
    "bias": "use_bias",
    "activation_type": "hidden_act",
    "dropout": "dropout",
    "sink": "attention_sink",
    "enable_bigram_table": "bigram_table",
    "tied_unembed": "tie_word_embeddings",
}
"""field of the file -> cratelm's name; one that the file lacks is read off the weights"""
_FOR_TRAINING = {"flash", "grad_checkpointing", "learnable_bigram_table", "ln_bias"}
"""fields that change nothing that the model computes; biases of norms are refused as unknown weights"""
_ONLY = {"rms_norm": (True, False), "residual_activation_type": ("identity", "identity")}
"""fields that must have one value, and the value where the file lacks the field"""
_RENAMED = {".attn.attn_imp.sink_logit": ".attn.sink_logit", "bigram_table": "bigram_table.weight"}


def read_sparse_gpt(folder: Path) -> tuple[SparseGptForCausalLM, dict[str, Any]]:
    """Return the model, in evaluation mode, and the content of its configuration file.

    Raises `InputError`, which names the file, if one is missing or damaged, could run code, describes another
    architecture, or if configuration and weights do not fit each other.
    """
    content = json_object(folder / CONFIG, "the configuration of a weight-sparse GPT")
    path = folder / WEIGHTS
    weights = _weights(read_torch_file(path), path)
    config = _config(content, weights, folder / CONFIG)
    config.weight_fraction = _fraction(weights)
    _check_shapes(config, weights, path)
    with torch.random.fork_rng():
        model = SparseGptForCausalLM(config)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval(), content


def _weights(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the file by cratelm's names."""
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} has no weights: it must be a dictionary of tensors by name")
    weights = {}
    for key, tensor in content.items():
        check_tensor(tensor, str(key), path)
        name = str(key)
        for theirs, ours in _RENAMED.items():
            name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
        weights[name] = tensor.float()
    return weights


def unread_fields(content: Mapping[str, Any]) -> list[str]:
    """Return the fields of a configuration file that cratelm does not know, and that might mean something."""
    known = {
        *_SIZES,
        *_OPTIONAL_SIZES,
        *_SWITCHES,
        *_FOR_TRAINING,
        *_ONLY,
        "afrac",
        "afrac_loctypes",
    }
    return sorted(str(name) for name in content if name not in known)


def _config(
    content: dict[str, Any], weights: Mapping[str, torch.Tensor], path: Path
) -> SparseGptConfig:
    fields: dict[str, Any] = {ours: _size(content, theirs, path) for theirs, ours in _SIZES.items()}
    for theirs, ours in _OPTIONAL_SIZES.items():
        if content.get(theirs) is not None:
            fields[ours] = _size(content, theirs, path)
    in_weights = {
        "use_bias": any(name.endswith("c_fc.bias") for name in weights),
        "attention_sink": any(name.endswith("sink_logit") for name in weights),
        "bigram_table": "bigram_table.weight" in weights,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    fields |= in_weights
    fields |= {ours: content[theirs] for theirs, ours in _SWITCHES.items() if theirs in content}
    for name, (only, default) in _ONLY.items():
        if content.get(name, default) != only:
            raise InputError(
                f"{path} has {name} {content.get(name, default)!r}, but cratelm computes only {only!r}"
            )
    fraction = content.get("afrac")
    places = content.get("afrac_loctypes")
    if fraction and not isinstance(places, str):
        raise InputError(
            f"{path} has afrac {fraction!r}, but no afrac_loctypes, which names the places where it is applied"
        )
    names = [p.strip() for p in str(places).split(",")] if fraction else []
    fields["activation_places"] = [p for p in names if p]
    fields["activation_fraction"] = fraction or 1.0
    return _or_input_error(path, lambda: SparseGptConfig(**fields))


def _size(content: dict[str, Any], name: str, path: Path) -> int:
    value = content.get(name)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise InputError(
            f"{path} has {name} {value!r:.40}, but it must be a whole number from 1 to {LARGEST:,}"
        )
    return value


def _fraction(weights: Mapping[str, torch.Tensor]) -> float:
    """Return the largest fraction of entries of a matrix in the blocks that are not 0; 1 without such a matrix."""
    matrices = [w for name, w in weights.items() if ".h." in name and w.ndim == 2]
    fractions = [int(w.count_nonzero()) / w.numel() for w in matrices if w.numel()]
    return max(fractions, default=1.0) or 1.0


def _check_shapes(config: SparseGptConfig, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `InputError` for weights that are missing, unknown or of another shape than the configuration's.

    On the meta device, which takes no memory: the configuration could ask for more than there is.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{path} has weights of {len(layers)} layers, but {CONFIG} has n_layer {config.num_hidden_layers}"
        )
    with torch.device("meta"):
        model = _or_input_error(path, lambda: SparseGptForCausalLM(config))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    optional = {"final_logits_bias"} | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for name, tensor in weights.items():
        if name not in shapes:
            raise InputError(f"{path}: weight {name} does not belong to the model of {CONFIG}")
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(
                f"{path}: weight {name} has shape {tuple(tensor.shape)}, but {CONFIG} requires {shapes[name]}"
            )
    missing = [name for name in shapes if name not in weights and name not in optional]
    if missing:
        raise InputError(f"{path}: weight {missing[0]} is missing ({len(missing)} in all)")
    embedding = weights["transformer.wte.weight"]
    head = weights.get("lm_head.weight", embedding)
    if config.tie_word_embeddings and not torch.equal(head, embedding):
        raise InputError(
            f"{path}: lm_head.weight differs from transformer.wte.weight, but {CONFIG} has tied_unembed true"
        )


def _or_input_error(path: Path, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:  # transformers' checks of its configurations share no base exception
        raise InputError(f"{path} describes no valid model: {one_line(error)}") from None
