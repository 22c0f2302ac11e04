"""Models by name: the sizes of the paper (arXiv 2410.16443, table 1) for CRATE and its GPT-2 twin."""

import contextlib
import difflib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError, one_line
from cratelm.models.crate import CrateConfig, CrateForCausalLM, CrateModel
from cratelm.models.gpt2 import as_twin, build_gpt2, gpt2_config
from cratelm.runs.arguments import checked_arguments, checked_value
from cratelm.runs.memory import available_memory, size_in_words
from cratelm.runs.pretrained import (
    SIZE_FIELDS,
    check_config,
    check_sizes_of,
    from_pretrained,
    least_memory,
    reason_of,
)
from cratelm.runs.remote_code import RemoteCode, commit_of, remote_code_of

AutoConfig.register("crate", CrateConfig, exist_ok=True)
AutoModel.register(CrateConfig, CrateModel, exist_ok=True)
AutoModelForCausalLM.register(CrateConfig, CrateForCausalLM, exist_ok=True)


@dataclass(frozen=True)
class Size:
    """Shape of a model: width D, heads K, layers L; H = 4D neurons per layer."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int


_SIZES = {
    "1l": Size(128, 4, 1),
    "2l": Size(128, 4, 2),
    "3l": Size(128, 4, 3),
    "6l": Size(768, 12, 6),
    "12l": Size(768, 12, 12),
}
SIZES: dict[str, Size] = {
    f"{family}-{name}": size for family in ("crate", "gpt2") for name, size in _SIZES.items()
}


@checked_arguments()
def build(
    name: str,
    *,
    vocab_size: int = 50304,
    max_position_embeddings: int = 1024,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a model of a named size (`crate-2l`, `gpt2-12l`, ...) with fresh weights.

    `overrides` are fields of `CrateConfig` or of `GPT2Config` (for both families also `hidden_size`,
    `num_hidden_layers`, `num_attention_heads`, `dropout`). The same seed gives the same weights;
    the global random state does not change. Raises `InputError` for an unknown name or field, a value of
    a wrong type, and a model that does not fit into memory.
    """
    config = config_of(
        name,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        **overrides,
    )
    needed, free = least_memory(config), available_memory()
    if free is not None and needed > free:
        sizes = {"vocab_size": vocab_size, "max_position_embeddings": max_position_embeddings}
        sizes |= {field: overrides[field] for field in SIZE_FIELDS & overrides.keys()}
        raise InputError(
            f"{name} with these sizes would take at least {size_in_words(needed)} of memory, but"
            f" {size_in_words(free)} are available: lower {max(sizes, key=lambda field: sizes[field])}"
        )
    return build_of(config, seed)


def build_of(config: Any, seed: int) -> PreTrainedModel:
    """Return a CRATE model or a GPT-2 of a configuration with fresh weights; see `build`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(config, CrateConfig):
            return CrateForCausalLM(config)
        return build_gpt2(config)


def config_of(name: str, **fields: Any) -> CrateConfig | GPT2Config:
    """Return the configuration of a named size, with its values replaced by `fields`.

    Raises `InputError` for an unknown name or field, and for values that do not fit together.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"there is no size {name!r}{hint}: choose from {', '.join(SIZES)}")
    shape = {**vars(SIZES[name]), **fields}
    is_crate = name.startswith("crate")
    _check_fields(shape, CrateConfig if is_crate else GPT2Config, () if is_crate else _GPT2_NAMES)
    types = inspect.get_annotations(CrateConfig if is_crate else gpt2_config)
    shape = {
        name: checked_value(name, value, types.get(name, Any)) for name, value in shape.items()
    }
    check_sizes_of(shape, name)
    try:
        config = CrateConfig(**shape) if is_crate else gpt2_config(**shape)
    except Exception as error:  # transformers' checks of its configurations share no base exception
        raise InputError(f"{name} cannot be built: {one_line(error)}") from None
    check_config(config, name)
    return config


_GPT2_NAMES = tuple(inspect.signature(gpt2_config).parameters)


def _check_fields(fields: dict[str, Any], config: type, aliases: tuple[str, ...]) -> None:
    names = set(inspect.signature(config).parameters) | set(aliases)
    for field in fields:
        if field not in names:
            near = difflib.get_close_matches(field, names, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"{config.__name__} has no field {field!r}{hint}")


@checked_arguments()
def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Return a saved model, cratelm's or any Hugging Face causal language model, in evaluation mode.

    `path` is a folder or a Hub id; `kwargs` go to `from_pretrained`. Raises `InputError`, which names the
    file, if nothing can be loaded from it: a file is missing or damaged, is not what `train` wrote, or weights
    do not fit the configuration or are missing.
    """
    if not str(path).strip():
        raise InputError("the path of the model is empty: name a folder or a Hub id")
    if os.path.isdir(path):
        from cratelm.runs.reading import verify_folder  # imports pyarrow

        verify_folder(path)
    with _loading(path):
        model = from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    if isinstance(model, GPT2LMHeadModel):
        as_twin(model)
    return model.eval()


def hub_commit(name: str, revision: str | None = None) -> str:
    """Return the commit of the Hub's repository that `load` would read now, at a revision (None: the newest).

    Without a network, it is the commit in the local cache. Raises `InputError` as `load` does.
    """
    with _loading(f"{name}@{revision}" if revision else name):
        return commit_of(name, revision)


def code_of(location: str | Path, revision: str | None = None) -> RemoteCode | None:
    """Return the code that `load` would run for a model that transformers does not have; None for others.

    Raises `InputError` as `load` does.
    """
    with _loading(location):
        return remote_code_of(location, revision)


@contextlib.contextmanager
def _loading(path: str | Path):
    """Turn what transformers raises when nothing can be loaded into a one-line `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any library, or of the code behind a configuration
        raise InputError(
            f"no model can be loaded from {path} ({reason_of(error)}):"
            " name a folder written by `cratelm train` or a Hub id"
        ) from None


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of trainable parameters as the paper counts them.

    Tied weights count once, and the position embedding does not count.
    """
    excluded = {id(p) for p in position_parameters(model)}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in excluded)


def position_parameters(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the weights of learned position embeddings; none for models other than CRATE and GPT-2."""
    base = model.base_model
    if isinstance(base, CrateModel):
        return [base.embed_positions.weight]
    wpe = getattr(base, "wpe", None)
    return [wpe.weight] if wpe is not None else []
