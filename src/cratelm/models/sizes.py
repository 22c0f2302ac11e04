"""Models by name: the sizes of the paper (arXiv 2410.16443, table 1) for each family of `families.py`."""

import contextlib
import difflib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError, one_line
from cratelm.models.families import (
    FAMILIES,
    SIZES,
    Family,
    family_of,
    import_outside_families,
    model_of,
)
from cratelm.models.gpt2 import as_twin
from cratelm.runs.arguments import checked_arguments, checked_value
from cratelm.runs.memory import available_memory, size_in_words
from cratelm.runs.minis import is_mini, mini_folder
from cratelm.runs.pretrained import (
    SIZE_FIELDS,
    check_config,
    check_sizes_of,
    from_pretrained,
    least_memory,
    reason_of,
)
from cratelm.runs.remote_code import RemoteCode, commit_of, remote_code_of


@checked_arguments()
def build(
    name: str,
    *,
    vocab_size: int = 50304,
    max_position_embeddings: int = 1024,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a model of a named size (`crate-2l`, `gpt2-12l`, `crate-tssa-2l`, ...) with fresh weights.

    `overrides` are fields of the family's configuration (for all families also `hidden_size`,
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
    """Return a model of one of the families' configurations with fresh weights; see `build`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_of(config)


def config_of(name: str, **fields: Any) -> Any:
    """Return the configuration of a named size, with its values replaced by `fields`.

    Raises `InputError` for an unknown name or field, and for values that do not fit together.
    """
    import_outside_families()
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"there is no size {name!r}{hint}: choose from {', '.join(SIZES)}")
    family = FAMILIES[family_of(name)]
    shape = {**vars(SIZES[name]), **family.fields_at(SIZES[name]), **fields}
    _check_fields(shape, family)
    types = family.types()
    shape = {
        name: checked_value(name, value, types.get(name, Any)) for name, value in shape.items()
    }
    check_sizes_of(shape, name)
    try:
        config = family.config(**shape)
    except Exception as error:  # transformers' checks of its configurations share no base exception
        raise InputError(f"{name} cannot be built: {one_line(error)}") from None
    check_config(config, name)
    return config


def _check_fields(fields: dict[str, Any], family: Family) -> None:
    names = family.field_names()
    for field in fields:
        if field not in names:
            near = difflib.get_close_matches(field, names, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"{family.config_class.__name__} has no field {field!r}{hint}")


@checked_arguments()
def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Return a saved model, cratelm's or any Hugging Face causal language model, in evaluation mode.

    `path` is a folder, a Hub id, or `mini:NAME` for a model that comes with cratelm; `kwargs` go to `from_pretrained`. Raises `InputError`, which names the
    file, if nothing can be loaded from it: a file is missing or damaged, is not what `train` wrote, or weights
    do not fit the configuration or are missing.
    """
    if not str(path).strip():
        raise InputError("the path of the model is empty: name a folder or a Hub id")
    if is_mini(path):
        path = mini_folder(path)
    if os.path.isdir(path):
        from cratelm.runs.reading import verify_folder  # imports pyarrow

        verify_folder(path)
    import_outside_families()
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
    """Return the weights of learned position embeddings, `embed_positions` or `wpe` of the model without its head."""
    names = ("embed_positions", "wpe")
    tables = [getattr(model.base_model, name, None) for name in names]
    return [table.weight for table in tables if isinstance(table, torch.nn.Embedding)]
