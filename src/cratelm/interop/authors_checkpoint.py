"""Read the checkpoints of the paper's authors without running any code that they contain.

A checkpoint is a torch file with `model` (whose keys may have the names of wrappers, such as `_orig_mod.`, which
`torch.compile` adds, and `module.`, which DistributedDataParallel adds), `model_args`, and training state that is not needed here (arXiv 2410.16443, public code). Reading it takes the memory
of the model, and pages of the mapped file, which the operating system can drop. (An old file that is not a zip
archive is read into memory as a whole.)
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from cratelm.errors import InputError, one_line
from cratelm.models.crate import CrateConfig, CrateForCausalLM
from cratelm.models.gpt2 import as_twin, gpt2_config
from cratelm.models.torch_files import check_tensor, read_torch_file, without_wrappers
from cratelm.runs.arguments import checked_arguments

_MASK = ".attn.bias"
"""suffix of the causal mask, a buffer of attention without the fused kernel; no weight has this suffix"""


@dataclass(frozen=True, eq=False)
class AuthorsCheckpoint:
    """Contents of a checkpoint: the model, and the training information stored in the file."""

    model: CrateForCausalLM | GPT2LMHeadModel
    """the model, in evaluation mode"""
    arguments: dict[str, Any]
    """`model_args` of the file"""
    steps: int | None
    """`iter_num`: number of optimizer steps; None if the file does not state it"""
    best_validation_loss: float | None
    """`best_val_loss`, nats per token; None if the file does not state it, or if it is not a finite number"""
    training: dict[str, Any]
    """plain values of `config`, the settings of the training script"""
    changes: tuple[str, ...]
    """differences between the weights of the model and those in the file, in words"""


@checked_arguments()
def load_authors_checkpoint(path: str | Path) -> CrateForCausalLM | GPT2LMHeadModel:
    """Return the model of a CRATE or GPT-2 checkpoint of the authors, in evaluation mode.

    Raises `InputError` if the file does not exist, is truncated, contains more than tensors and plain values (which
    could run code), or if its keys or shapes do not match either architecture.
    """
    return read_authors_checkpoint(path).model


def read_authors_checkpoint(path: str | Path) -> AuthorsCheckpoint:
    """Return the contents of a checkpoint. Raises as `load_authors_checkpoint`."""
    path = Path(path)
    content = read_torch_file(path)
    weights, changes = _weights(content, path)
    layout = _layout(weights, path)
    config = _config(content.get("model_args"), weights, layout, path)
    model = _filled(layout, config, weights, path)
    settings = content.get("config")
    return AuthorsCheckpoint(
        model=model,
        arguments=_plain(content["model_args"]),
        steps=None if (steps := _number(content.get("iter_num"))) is None else int(steps),
        best_validation_loss=_number(content.get("best_val_loss")),
        training=_plain(settings) if isinstance(settings, Mapping) else {},
        changes=(*changes, *layout.changes(model)),
    )


def _weights(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights by the authors' keys without wrappers, and the differences from the file, in words."""
    if isinstance(content, Mapping) and "W_enc" in content:
        raise InputError(
            f"{path} contains W_enc, a sparse autoencoder: read it with `cratelm import sae`"
        )
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise InputError(f"{path} has no entry 'model' with weights: is it a checkpoint?")
    tensors, wrappers = without_wrappers(content["model"], path)
    weights = {k: v for k, v in tensors.items() if not k.endswith(_MASK)}
    for key, tensor in weights.items():
        check_tensor(tensor, key, path)
    changes = ["optimizer state omitted"]
    changes += [f"`{name}` removed from the keys" for name in wrappers]
    if len(tensors) > len(weights):
        changes.append(f"causal masks omitted (`*{_MASK}`, {len(tensors) - len(weights)})")
    kinds = {t.dtype for t in weights.values()} - {torch.float32}
    if kinds:
        changes.append(f"{', '.join(sorted(map(str, kinds)))} converted to float32")
    return weights, changes


@dataclass(frozen=True)
class _Layout:
    """Differences between the authors' weights of an architecture and those of cratelm."""

    build: Callable[[Any], Any]
    """configuration -> model"""
    names: Mapping[str, str] = field(default_factory=dict)
    """parts of the authors' keys -> parts of cratelm's keys"""
    transposed: tuple[str, ...] = ()
    """suffixes of keys whose weights are [out, in] in the authors' files and [in, out] in cratelm"""

    def theirs(self, key: str) -> str:
        """Return the authors' key for a key of cratelm."""
        for theirs, ours in self.names.items():
            key = key.replace(ours, theirs)
        return key

    def turned(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the weight, transposed if its key is one of `transposed`."""
        return tensor.t() if key.endswith(self.transposed) and self.transposed else tensor

    def changes(self, model: Any) -> list[str]:
        """Return the differences between the weights of `model` and those in the file, in words."""
        changes = []
        if self.names:
            renamed = ", ".join(f"`{a}` to `{b}`" for a, b in self.names.items())
            changes.append(f"weights renamed: {renamed}")
        if self.transposed:
            changes.append(f"transposed to [in, out]: {', '.join(self.transposed)}")
        if getattr(model.config, "zero_biases", False):
            changes.append("biases set to zero: GPT-2's class has biases, but this model has none")
        return changes


_CRATE = _Layout(
    build=CrateForCausalLM,
    names={
        "transformer.wte.": "model.embed_tokens.",
        "transformer.wpe.": "model.embed_positions.",
        "transformer.ln_f.": "model.norm.",
        "transformer.h.": "model.layers.",
        ".prenorm_1.": ".norm_mssa.",
        ".prenorm_2.": ".norm_ista.",
        ".attn.c_attn.": ".mssa.projection.",
        ".attn.c_proj.": ".mssa.output.",
        ".ista.weight": ".ista.dictionary",  # both D^T, [H, D]
    },
)
_GPT2 = _Layout(
    build=lambda config: as_twin(GPT2LMHeadModel(config)),
    transposed=(
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ),
)


def _layout(weights: Mapping[str, torch.Tensor], path: Path) -> _Layout:
    for part, layout in ((".ista.", _CRATE), (".mlp.", _GPT2)):
        if any(part in key for key in weights):
            return layout
    raise InputError(
        f"{path} has weights of neither architecture: it has no keys with '.ista.' (CRATE) or '.mlp.' (GPT-2),"
        f" its keys are {', '.join(list(weights)[:3]) or 'none'}"
    )


_WANTED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
}


def _config(
    model_args: Any, weights: Mapping[str, torch.Tensor], layout: _Layout, path: Path
) -> Any:
    """Return the configuration from `model_args`. Raises `InputError` if they contradict the weights."""
    arguments = model_args if isinstance(model_args, Mapping) else {}
    missing = [k for k in _WANTED if k not in arguments]
    if missing:
        raise InputError(f"{path}: model_args lacks {', '.join(missing)}")
    for name in _WANTED:
        if type(arguments[name]) is not int or arguments[name] < 1:
            raise InputError(
                f"{path}: model_args has {name} {arguments[name]!r}, but it must be a whole number of at least 1"
            )
    fields = {ours: arguments[theirs] for theirs, ours in _WANTED.items()}
    fields["dropout"] = _number(arguments.get("dropout", 0.0)) or 0.0
    _check_layers(arguments["n_layer"], weights, path)
    if layout is _CRATE:
        return _or_input_error(path, lambda: CrateConfig(**fields))
    biased = any(key.endswith(".bias") for key in weights)
    if arguments.get("bias", biased) != biased:
        has = "some" if biased else "none"
        raise InputError(
            f"{path}: model_args has bias {arguments['bias']}, but the weights have {has}"
        )
    return _or_input_error(path, lambda: gpt2_config(**fields, zero_biases=not biased))


def _check_layers(n_layer: int, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `InputError` if the weights do not have `n_layer` layers.

    Called before the model is built, because `n_layer` could ask for more memory than there is.
    """
    found = {int(m[1]) for k in weights if (m := re.match(r"transformer\.h\.(\d{1,6})\.", k))}
    if found != set(range(len(found))) or len(found) != n_layer:
        layers = ", ".join(map(str, sorted(found)[:8]))
        message = (
            f"{path}: model_args has n_layer {n_layer}, but the keys transformer.h.N have layers"
            f" {layers or 'none'}"
        )
        inner = next((k for k in weights if "transformer.h." in k and not found), "")
        prefix = inner.partition("transformer.h.")[0]
        if prefix:
            message += f": keys begin with {prefix!r}, save the weights without this prefix"
        raise InputError(message)


def _or_input_error(path: Path, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: model_args do not describe a valid model: {one_line(error)}"
        ) from None


def _filled(layout: _Layout, config: Any, weights: Mapping[str, torch.Tensor], path: Path) -> Any:
    """Return a model with `weights`. Raises `InputError` for weights that are missing, unknown or of another shape."""
    with torch.device(
        "meta"
    ):  # shapes without memory, since the file may ask for more than there is
        shapes = _or_input_error(path, lambda: layout.build(config)).state_dict()
    optional = {"lm_head.weight"}  # tied to the embedding
    if getattr(config, "zero_biases", False):
        optional |= {key for key in shapes if key.endswith(".bias")}
    ours = {layout.theirs(key): key for key in shapes}
    for key, tensor in weights.items():
        if key not in ours:
            raise InputError(f"{path}: weight {key} does not belong to a {config.model_type} model")
        expected = layout.turned(key, shapes[ours[key]]).shape
        if tensor.shape != expected:
            raise InputError(
                f"{path}: weight {key} has shape {tuple(tensor.shape)},"
                f" but model_args require {tuple(expected)}"
            )
    missing = [k for k, key in ours.items() if k not in weights and key not in optional]
    if missing:
        raise InputError(f"{path}: weight {missing[0]} is missing ({len(missing)} in all)")
    _check_tied(weights, path)
    with torch.random.fork_rng():
        model = layout.build(config)
    turned = {ours[k]: layout.turned(k, tensor) for k, tensor in weights.items()}
    model.load_state_dict(turned, strict=False)
    return model.eval()


def _check_tied(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    head = weights.get("lm_head.weight")
    if head is not None and not torch.equal(head, weights["transformer.wte.weight"]):
        raise InputError(
            f"{path}: lm_head.weight differs from transformer.wte.weight, although both architectures tie them:"
            " it is not clear which of the two was trained"
        )


def _number(value: Any) -> float | None:
    """Return a finite number (Python, NumPy or a tensor of one element) as float; None for anything else."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that JSON can represent."""
    kinds = (str, bool, int, type(None))
    return {
        str(k): v
        for k, v in settings.items()
        if isinstance(v, kinds) or (isinstance(v, float) and math.isfinite(v))
    }
