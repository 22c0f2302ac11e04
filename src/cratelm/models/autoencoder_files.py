"""Find autoencoders in a folder, and read them: SAELens, sparsify and dictionary_learning.

| tool | files of one autoencoder | tensor that it reads |
|---|---|---|
| SAELens, `cratelm sae train`, `cratelm import sae` | `cfg.json`, `sae_weights.safetensors` | in `cfg.json` |
| sparsify (EleutherAI) | `cfg.json`, `sae.safetensors` | the folder's name, such as `layers.5.mlp` |
| dictionary_learning | `config.json`, `ae.pt` | `submodule_name` in `config.json`, or a folder's name |

Only tensors and settings are read: a pickle that holds anything else is refused.
"""

from pathlib import Path

import torch

from cratelm.errors import InputError
from cratelm.models.autoencoder_formats import (
    from_dictionary_learning,
    from_sae_lens,
    from_sparsify,
)
from cratelm.models.sparse_autoencoder import SparseAutoencoder
from cratelm.models.torch_files import check_tensor, read_torch_file, without_wrappers
from cratelm.runs import hash_file, hash_json
from cratelm.runs.pretrained import json_object, safetensors_shapes
from cratelm.runs.reading import verified

SETTINGS, SAE_LENS, SPARSIFY = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
DICTIONARY_SETTINGS, DICTIONARY = "config.json", "ae.pt"
SCALER = "activation_scaler.json"
"""of a checkpoint of SAELens: the factor of the activations, which only a finished training folds into the weights"""
_ABOVE = 3
"""levels of folders above an autoencoder of dictionary_learning whose names may say what it reads"""


def autoencoder_folders(folder: Path) -> list[Path]:
    """Return `folder` itself if it is an autoencoder, else those in it that are, sorted.

    Raises `InputError`, which says what was found, if there is none.
    """
    if _has_autoencoder(folder):
        return [folder]
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in inside if _has_autoencoder(path)]
    if found:
        return found
    files = [path.name for path in inside[:6]]
    raise InputError(
        f"{folder} has no autoencoder, but {', '.join(files) or 'no files'}: an autoencoder is {SETTINGS} with {SAE_LENS}"
        f" (SAELens, cratelm) or {SPARSIFY} (sparsify), or {DICTIONARY_SETTINGS} with {DICTIONARY} (dictionary_learning)"
    )


def _has_autoencoder(folder: Path) -> bool:
    return (folder / SETTINGS).is_file() or (folder / DICTIONARY).is_file()


def read_autoencoder(folder: Path) -> SparseAutoencoder:
    """Return the autoencoder in a folder, on the CPU.

    Raises `InputError`, which names the file, if one is missing or damaged, if settings and weights do not belong
    together, if the architecture is not supported, or if a pickle holds more than tensors.
    """
    for path in sorted(folder.iterdir()):
        verified(path)
    if (folder / DICTIONARY).is_file():
        return _dictionary(folder)
    if (folder / SPARSIFY).is_file():
        return _sparsify(folder)
    settings = json_object(folder / SETTINGS, "the configuration of an autoencoder")
    scale = None
    if (folder / SCALER).is_file():
        scale = json_object(folder / SCALER, "the factor of the activations").get("scaling_factor")
        if scale is not None and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise InputError(
                f"{folder / SCALER} has scaling_factor {scale!r:.40}: it must be above 0"
            )
    if not (folder / SAE_LENS).is_file():
        raise InputError(
            f"{folder / SAE_LENS} is missing: copy the folder of the autoencoder again"
        )
    return from_sae_lens(settings, _tensors(folder / SAE_LENS), folder / SETTINGS, scale)


def _sparsify(folder: Path) -> SparseAutoencoder:
    settings = json_object(folder / SETTINGS, "the configuration of an autoencoder of sparsify")
    # with several seeds, sparsify appends a folder to that of the module
    place = folder.parent if folder.name.startswith("seed") else folder
    training = place.parent / DICTIONARY_SETTINGS
    trained = json_object(training, "the training's configuration") if training.is_file() else {}
    mode, hook = str(trained.get("hook_mode", "output")), place.name
    if mode not in ("output", "input"):
        raise InputError(
            f"{training} has hook_mode {mode!r}, but only output and input are supported"
        )
    hook = f"{hook}:input" if mode == "input" else hook
    weights = _tensors(folder / SPARSIFY)
    return from_sparsify(settings, weights, folder / SETTINGS, hook, str(trained.get("model", "")))


def _dictionary(folder: Path) -> SparseAutoencoder:
    path = folder / DICTIONARY_SETTINGS
    settings = json_object(path, "the configuration of an autoencoder of dictionary_learning")
    content = read_torch_file(folder / DICTIONARY)
    if not isinstance(content, dict):
        raise InputError(
            f"{folder / DICTIONARY} has a {type(content).__name__}, but must have weights by name"
        )
    weights, _ = without_wrappers(content, folder / DICTIONARY)
    for name, tensor in weights.items():
        if name not in ("k", "group_sizes"):  # whole numbers
            check_tensor(tensor, name, folder / DICTIONARY)
    inner = folder.resolve()
    folders = tuple(p.name for p in (inner, *inner.parents[:_ABOVE]))
    return from_dictionary_learning(settings, weights, path, folders)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file. Raises `InputError`, which names it, if it is damaged."""
    from safetensors.torch import load_file

    safetensors_shapes(path)
    weights = load_file(path)
    for name, tensor in weights.items():
        check_tensor(tensor, name, path)
    return weights


def autoencoder_identity(folder: Path) -> str:
    """Return a sha256 over the settings and weights of the autoencoders in a folder.

    Raises `InputError` if there is none.
    """
    names = (SETTINGS, "*.safetensors", DICTIONARY, DICTIONARY_SETTINGS, SCALER)
    inside = autoencoder_folders(folder)
    files = sorted({path for of in inside for name in names for path in of.glob(name)})
    return hash_json({str(p.relative_to(folder)): hash_file(p) for p in files})


def layer_in_name(folder: Path) -> int | None:
    """Return the layer in the name `layer-N` of a folder, as `cratelm sae train` names them; None for other names."""
    start, _, number = folder.name.partition("layer-")
    return int(number) if not start and number.isdecimal() else None
