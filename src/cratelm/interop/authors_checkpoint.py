"""Reads the checkpoints of the paper's authors, without running anything that they carry.

A checkpoint is a torch file with `model` (keys may start with `_orig_mod.`, which `torch.compile`
adds), `model_args`, and training state that is not needed here (arXiv 2410.16443, public code).
Memory: the model, and pages of the mapped file, which the system can drop (an old file that is no
zip archive is read whole).
"""

import contextlib
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
_COMPILED = "_orig_mod."
_MASK = ".attn.bias"
"""their causal mask, a buffer of attention without the fused kernel; no weight of either ends so"""


@dataclass(frozen=True, eq=False)
class AuthorsCheckpoint:
    """A checkpoint that was read: the model, and what the file says of its training."""

    model: CrateForCausalLM | GPT2LMHeadModel
    """in evaluation mode"""
    arguments: dict[str, Any]
    """`model_args` as the file has them"""
    steps: int | None
    """`iter_num`: optimizer steps taken; None where the file does not say"""
    best_validation_loss: float | None
    """`best_val_loss`, nats a token; None where the file does not say, or not a finite number"""
    training: dict[str, Any]
    """plain values of `config`, the training script's settings"""
    changes: tuple[str, ...]
    """how the model's weights differ from the file's, in words"""


def load_authors_checkpoint(path: str | Path) -> CrateForCausalLM | GPT2LMHeadModel:
    """A ready model in evaluation mode from a CRATE or GPT-2 checkpoint of the authors.

    Raises `InputError` for a file that is absent, truncated, hostile (it holds more than tensors and
    plain values), or whose keys or shapes are not those of the two architectures.
    """
    return read_authors_checkpoint(path).model


def read_authors_checkpoint(path: str | Path) -> AuthorsCheckpoint:
    """The model of a checkpoint and what the file says of it. Raises as `load_authors_checkpoint`."""
    path = Path(path)
    held = read_torch_file(path)
    weights, dropped = _weights(held, path)
    layout = _layout(weights, path)
    config = _config(held.get("model_args"), weights, layout, path)
    model = _filled(layout, config, weights, path)
    settings = held.get("config")
    return AuthorsCheckpoint(
        model=model,
        arguments=_plain(held["model_args"]),
        steps=None if (steps := _number(held.get("iter_num"))) is None else int(steps),
        best_validation_loss=_number(held.get("best_val_loss")),
        training=_plain(settings) if isinstance(settings, Mapping) else {},
        changes=(*_changes(held["model"], dropped), *layout.changes(model)),
    )


def read_torch_file(path: Path) -> Any:
    """What a torch file holds, by the reader that makes tensors and plain values and nothing else.

    Raises `InputError` for a file that is absent, damaged, or holds anything else.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file: name one that torch saved, such as ckpt.pt")
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, before the refusal that follows
            mapped = zipfile.is_zipfile(path)  # optimizer states then stay on the disk
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(_refused(path, str(error))) from None
    except Exception as error:  # bytes in disorder make the reader raise whatever comes
        told = (str(error).splitlines() or [""])[0][:120]
        raise InputError(
            f"{path} cannot be read as a torch file ({type(error).__name__}: {told}):"
            " it may be truncated or damaged, fetch it again"
        ) from None


def _refused(path: Path, told: str) -> str:
    """The line of torch's long message that names the object it refused, where it names one."""
    named = re.search(r"GLOBAL (\S+)", told) or re.search(r"(\S+\.\S+) was not an allowed", told)
    if named:
        return (
            f"{path} was refused: it holds more than tensors and plain values ({named[1]}), which"
            " could run code; ask for a file of tensors"
        )
    why = next((line.strip() for line in told.splitlines() if "Unsupported" in line), "no tensors")
    return f"{path} was refused: it is no file of tensors that torch saved ({why}); fetch it again"


def check_tensor(tensor: Any, key: str, path: Path) -> None:
    """Raises `InputError` for what is no plain tensor of finite floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"{path}: {key} is a {type(tensor).__name__}, a plain tensor was expected")
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {key} holds {tensor.dtype}, floating point was expected")
    if not tensor.isfinite().all():
        raise InputError(
            f"{path}: {key} holds numbers that are not finite: no model computes these"
        )


def _weights(held: Any, path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Weights by the authors' keys, less the prefix; and how many causal masks were left out."""
    if isinstance(held, Mapping) and "W_enc" in held:
        raise InputError(
            f"{path} holds W_enc, a sparse autoencoder: `cratelm import sae` reads these"
        )
    if not isinstance(held, Mapping) or not isinstance(held.get("model"), Mapping):
        raise InputError(f"{path} has no entry 'model' with weights: is it a checkpoint?")
    given = {str(k).removeprefix(_COMPILED): v for k, v in held["model"].items()}
    weights = {k: v for k, v in given.items() if not k.endswith(_MASK)}
    for key, tensor in weights.items():
        check_tensor(tensor, key, path)
    return weights, len(given) - len(weights)


@dataclass(frozen=True)
class _Layout:
    """How the authors keep the weights of an architecture, and how ours keeps them."""

    build: Callable[[Any], Any]
    """configuration -> model"""
    names: Mapping[str, str] = field(default_factory=dict)
    """parts of their keys -> parts of ours"""
    transposed: tuple[str, ...] = ()
    """ends of the keys whose weights are [out, in] there and [in, out] here"""

    def theirs(self, key: str) -> str:
        for theirs, ours in self.names.items():
            key = key.replace(ours, theirs)
        return key

    def turned(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t() if key.endswith(self.transposed) and self.transposed else tensor

    def changes(self, model: Any) -> list[str]:
        told = []
        if self.names:
            renamed = ", ".join(f"`{a}` is `{b}`" for a, b in self.names.items())
            told.append(f"weights renamed: {renamed}")
        if self.transposed:
            told.append(f"transposed to [in, out]: {', '.join(self.transposed)}")
        if getattr(model.config, "zero_biases", False):
            told.append("biases, which this model does not have and GPT-2's class has, are zero")
        return told


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
        f"{path} has weights of neither architecture: keys with '.ista.' (CRATE) or '.mlp.' (GPT-2)"
        f" were expected, found {', '.join(list(weights)[:3]) or 'none'}"
    )


_WANTED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
}


def _config(given: Any, weights: Mapping[str, torch.Tensor], layout: _Layout, path: Path) -> Any:
    """Configuration from `model_args`, which must not contradict the weights."""
    arguments = given if isinstance(given, Mapping) else {}
    missing = [k for k in _WANTED if k not in arguments]
    if missing:
        raise InputError(f"{path}: model_args lacks {', '.join(missing)}")
    for name in _WANTED:
        if type(arguments[name]) is not int or arguments[name] < 1:
            raise InputError(
                f"{path}: model_args has {name} {arguments[name]!r}, a whole number from 1 on was"
                " expected"
            )
    fields = {ours: arguments[theirs] for theirs, ours in _WANTED.items()}
    fields["dropout"] = _number(arguments.get("dropout", 0.0)) or 0.0
    _check_layers(arguments["n_layer"], weights, path)
    if layout is _CRATE:
        return _told_of(path, lambda: CrateConfig(**fields))
    biased = any(key.endswith(".bias") for key in weights)
    if arguments.get("bias", biased) != biased:
        has = "some" if biased else "none"
        raise InputError(f"{path}: model_args has bias {arguments['bias']}, the weights have {has}")
    return _told_of(path, lambda: gpt2_config(**fields, zero_biases=not biased))


def _check_layers(n_layer: int, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Before a model of `n_layer` layers is built, which may be more than memory holds."""
    found = {int(m[1]) for k in weights if (m := re.match(r"transformer\.h\.(\d{1,6})\.", k))}
    if found != set(range(len(found))) or len(found) != n_layer:
        told = ", ".join(map(str, sorted(found)[:8]))
        message = (
            f"{path}: model_args has n_layer {n_layer}, the keys transformer.h.N are of layers"
            f" {told or 'none'}"
        )
        inner = next((k for k in weights if "transformer.h." in k and not found), "")
        prefix = inner.partition("transformer.h.")[0]
        if prefix:
            message += f": keys begin with {prefix!r}, save the weights without this prefix"
        raise InputError(message)


def _told_of(path: Path, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError) as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: model_args describe no such model: {told}") from None


def _filled(layout: _Layout, config: Any, weights: Mapping[str, torch.Tensor], path: Path) -> Any:
    """A model that computes with `weights`; every weight of either side must find its other."""
    with torch.device("meta"):  # shapes without memory: the file may ask for more than there is
        shapes = _told_of(path, lambda: layout.build(config)).state_dict()
    optional = {"lm_head.weight"}  # tied
    if getattr(config, "zero_biases", False):
        optional |= {key for key in shapes if key.endswith(".bias")}
    ours = {layout.theirs(key): key for key in shapes}
    for key, tensor in weights.items():
        if key not in ours:
            raise InputError(f"{path}: weight {key} has no place in a {config.model_type} model")
        expected = layout.turned(key, shapes[ours[key]]).shape
        if tensor.shape != expected:
            raise InputError(
                f"{path}: weight {key} has shape {tuple(tensor.shape)},"
                f" model_args ask for {tuple(expected)}"
            )
    missing = [k for k, own in ours.items() if k not in weights and own not in optional]
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
            f"{path}: lm_head.weight differs from transformer.wte.weight, to which both"
            " architectures tie it: which of the two was trained cannot be told"
        )


def _changes(given: Mapping[str, Any], dropped: int) -> list[str]:
    told = ["optimizer state left out"]
    if any(str(key).startswith(_COMPILED) for key in given):
        told.append(f"prefix `{_COMPILED}` taken off the keys")
    if dropped:
        told.append(f"causal masks left out (`*{_MASK}`, {dropped})")
    kinds = {t.dtype for t in given.values() if isinstance(t, torch.Tensor)} - {torch.float32}
    if kinds:
        told.append(f"{', '.join(sorted(map(str, kinds)))} converted to float32")
    return told


def _number(value: Any) -> float | None:
    """A finite number as float, whether Python's, NumPy's or a tensor of one; None for the rest."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that JSON can hold."""
    kinds = (str, bool, int, type(None))
    return {
        str(k): v
        for k, v in given.items()
        if isinstance(v, kinds) or (isinstance(v, float) and math.isfinite(v))
    }
