"""Load a causal language model of transformers, after checks of its configuration and files.

A folder may come from anyone. Its files are read as data only: no file outside of the folder, no code, no
weights that a library would make up, and nothing whose size the files themselves contradict.
"""

import contextlib
import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cratelm.errors import InputError, one_line
from cratelm.runs.arguments import LARGEST
from cratelm.runs.remote_code import options_for

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_INDEX = ".index.json"
SIZE_FIELDS = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "expansion",
    "ista_steps",
    "n_inner",
    "n_embd",
    "n_head",
    "n_layer",
    "n_positions",
}
"""fields of configurations that count something, under the names that families share, and under GPT-2's"""
_LEARNED_POSITIONS = ("crate", "gpt2", "gpt2_activation", "sparse_gpt")
"""families with a learned vector for each position; in others any number of positions is free"""
_LAYER_BYTES = 20_000
"""bytes of Python objects of one layer, however narrow it is"""


# --- loading ---------------------------------------------------------------------------------------


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Return what `AutoModelForCausalLM.from_pretrained` returns, with all weights from the files.

    `path` is a folder or a Hub id. Raises `InputError`, which names the file, for a folder that lacks a file
    or has a damaged one, and for weights that do not fit the configuration or are missing; whatever the
    libraries raise for anything else. Code that comes with a model runs only with `trust_remote_code`, and only if
    transformers has no class for the model (`cratelm.runs.remote_code`).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path) / kwargs.get("subfolder", "")
    trusted = kwargs.pop("trust_remote_code", None)
    if not kwargs.get("gguf_file"):
        check_folder(folder)
        at = folder if folder.is_dir() else path
        hub = {k: kwargs[k] for k in ("cache_dir", "token", "local_files_only") if k in kwargs}
        kwargs |= options_for(at, kwargs.get("revision"), trusted=trusted, **hub)
        config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in _HUB & kwargs.keys()})
        check_config(config, folder / CONFIG if folder.is_dir() else path)
        check_sizes(config, folder)
    # Weights of another shape are reported by `check_loaded`, in one line and by name.
    options = {"ignore_mismatched_sizes": True, **kwargs, "output_loading_info": True}
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    model, information = loaded
    check_loaded(information, path)
    return model


_HUB = {"revision", "cache_dir", "token", "local_files_only", "subfolder", "trust_remote_code",
        "code_revision"}  # fmt: skip
"""arguments of `from_pretrained` that decide which configuration is read"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bar of the weights, which is short, and the report on them, which has many lines."""
    from transformers import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


# --- configurations ----------------------------------------------------------------------------------


def check_config(config: Any, source: str | Path) -> None:
    """Raise `InputError`, which names `source`, if a size in a configuration is not a positive whole number."""
    text = config.get_text_config()
    check_sizes_of({name: getattr(text, name, None) for name in SIZE_FIELDS}, source)


def check_sizes_of(fields: Mapping[str, Any], source: str | Path) -> None:
    """Raise `InputError`, which names `source`, if one of the fields that count something is no such number."""
    for name in SIZE_FIELDS & fields.keys():
        value = fields[name]
        for size in value if isinstance(value, list | tuple) else [value]:
            if size is not None and not (type(size) is int and 1 <= size <= LARGEST):
                raise InputError(
                    f"{source}: {name} is {size!r:.40}, but it must be a whole number from 1 to {LARGEST:,}"
                )


def fewest_parameters(config: Any) -> int:
    """Return a lower bound of the number of parameters of a model with this configuration.

    It holds for every family of transformers' causal language models: the embedding, and one square matrix
    per layer. For cratelm's families it is nearly all of the parameters.
    """
    text = config.get_text_config()
    width, layers = _size(text, "hidden_size"), _size(text, "num_hidden_layers")
    rows = _size(text, "vocab_size")
    of_layer = width * width
    if text.model_type in _LEARNED_POSITIONS:
        rows += _size(text, "max_position_embeddings")
    if text.model_type == "crate":
        of_layer = width * width * (2 + _crate_matrices(text) * _size(text, "expansion"))
    elif text.model_type in ("gpt2", "gpt2_activation"):
        of_layer = width * (4 * width + 2 * (_size(text, "n_inner") or 4 * width))
    elif text.model_type == "sparse_gpt":
        inner = _size(text, "num_attention_heads") * _size(text, "head_dim")
        of_layer = width * (4 * inner + 2 * _size(text, "intermediate_size"))
        table = _size(text, "vocab_size") ** 2 if getattr(text, "bigram_table", False) else 0
        return (rows + _size(text, "vocab_size")) * width + layers * of_layer + table
    return rows * width + layers * of_layer


def _crate_matrices(config: Any) -> int:
    """Return the number of matrices [H, D] of the second step of a CRATE's block."""
    kind = getattr(config, "feedforward", "ista")
    if kind == "none":
        return 0
    return 2 if kind == "mlp" or getattr(config, "decoupled_dictionary", False) else 1


def least_memory(config: Any) -> int:
    """Return a lower bound of the bytes that a new model of this configuration takes, in float32."""
    layers = _size(config.get_text_config(), "num_hidden_layers")
    return 4 * fewest_parameters(config) + _LAYER_BYTES * layers


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if type(value) is int and value > 0 else 0


# --- folders -----------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise `InputError`, which names the file, if a model's folder lacks a file or has a damaged one.

    Nothing is loaded: of the weights only the headers are read.
    """
    if not folder.is_dir():
        return
    content = json_object(folder / CONFIG, "the configuration of a model")
    if not isinstance(content.get("model_type"), str):
        raise InputError(
            f"{folder / CONFIG} names no model_type, so that nothing can read it: name a folder written"
            " by `cratelm train` or by transformers' save_pretrained"
        )
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            safetensors_shapes(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder, all of which exist, inside of it.

    Raises `InputError` if there are none, if a file in the index is missing, or if the index names one
    outside of the folder.
    """
    for name in (WEIGHTS, _PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / (name + _INDEX)
        if index.is_file():
            return _shards(index)
    raise InputError(
        f"{folder} has no weights ({WEIGHTS}, or {WEIGHTS}{_INDEX} with the files that it names): name"
        " a folder written by `cratelm train` or by transformers' save_pretrained"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = json_object(index, "an index of weight files").get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{index} has no weight_map, which names the file of each weight")
    names = {name: None for name in weight_map.values() if isinstance(name, str)}
    if len(names) < len({json.dumps(name) for name in weight_map.values()}):
        raise InputError(f"{index} has something else than names of files in its weight_map")
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
            raise InputError(
                f"{index} names the file {name!r:.80}, which is outside of its folder: nothing is read"
            )
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing, but {index.name} names it")
    return [index.parent / name for name in names]


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file, from its header.

    Raises `InputError`, which names the file, if it is not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({one_line(error, 120)}): it is damaged or was copied"
            " in part; copy it again"
        ) from None


def check_sizes(config: Any, folder: Path) -> None:
    """Raise `InputError` if a configuration describes a much larger model than the weights in its folder.

    Such a model would be built, and its weights made up, before anybody noticed.
    """
    if not folder.is_dir():
        return
    files = weight_files(folder)
    size = sum(path.stat().st_size for path in files)
    fewest = fewest_parameters(config)
    if fewest > 2 * size:  # a weight takes at least 4 bits
        raise InputError(
            f"{folder / CONFIG} describes a model of at least {fewest:,} parameters, but its weights"
            f" ({files[0].name}) have {size:,} bytes: they do not belong together, or one is damaged"
        )


def check_loaded(information: Mapping[str, Any], source: str | Path) -> None:
    """Raise `InputError` if weights are missing, in place of which transformers made up random ones.

    Weights that the model does not use are reported on stderr. `information` is what `from_pretrained`
    returns with `output_loading_info`.
    """
    problems = {
        "mismatched_keys": "has another shape",
        "missing_keys": "is missing",
        "unexpected_keys": "is not used",
    }
    for kind, problem in problems.items():
        keys = information.get(kind) or ()
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if not names:
            continue
        more = f", and {len(names) - 1:,} more" if len(names) > 1 else ""
        if kind != "unexpected_keys":
            raise InputError(
                f"{source} has weights that do not fit its {CONFIG}: {names[0]} {problem}{more}"
            )
        print(f"note: {source}: weight {names[0]} {problem}{more}", file=sys.stderr, flush=True)


def json_object(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `InputError`, which names the file, for anything else."""
    if not path.is_file():
        raise InputError(f"{path} is missing: it must be {what}, in JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({one_line(error, 120)}): it must be {what}"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} has a JSON {type(content).__name__}: it must be {what}, an object"
        )
    return content


def reason_of(error: BaseException) -> str:
    """Return why transformers could not load a model, on one line.

    torch's own message for a pickle that holds more than weights advises to run what is in it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, pickle.UnpicklingError) or "weights_only" in str(cause):
            return (
                "its pickle, such as pytorch_model.bin, is damaged or holds more than weights, which"
                " could run code, so it is not opened: convert it to safetensors where you trust it"
            )
        cause = cause.__cause__ or cause.__context__
    return one_line(error)
