"""Latents of sparse autoencoders as a site: harvested, explained, scored and steered like neurons.

An autoencoder is a folder in SAELens' format, written by `cratelm sae train`, `cratelm import sae` or
SAELens itself; a folder of several has `layer-0/`, `layer-1/` ... SAELens computes the latents, whatever
the architecture.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError, missing_extra, one_line
from cratelm.models.sites import Site, layers_in_words, site_of
from cratelm.runs.arguments import LARGEST
from cratelm.runs.pretrained import json_object, safetensors_shapes
from cratelm.runs.reading import verified

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def latents_of(model: PreTrainedModel, folder: str | Path) -> Site:
    """Return the site of the latents of the autoencoder or autoencoders in `folder`, on `model`.

    Raises `InputError` if SAELens is missing, if the folder has no autoencoder, or if one does not fit
    the model: another site, a layer that the model does not have, or another width.
    """
    folder = Path(folder)
    by_layer = {_layer(path): path for path in _folders(folder)}
    if -1 in by_layer and len(by_layer) == 1:
        sae = _load(by_layer[-1], model.device)
        by_layer = {_layer_of(sae, by_layer[-1]): by_layer[-1]}
    saes = {layer: _load(path, model.device) for layer, path in sorted(by_layer.items())}
    below = _site_below(model, saes, folder)
    for layer, sae in saes.items():
        _check(layer, sae, below, by_layer[layer])
    return replace(
        below.only(tuple(saes)),
        name="latents",
        n_neurons=tuple(int(sae.cfg.d_sae) for sae in saes.values()),
        layers=tuple(saes),
        autoencoders=tuple(saes.values()),
    )


def _folders(folder: Path) -> list[Path]:
    """Return the folder itself, or those of its layers."""
    if (folder / CONFIG).is_file():
        return [folder]
    folders = sorted(p.parent for p in folder.glob(f"layer-*/{CONFIG}"))
    if not folders:
        raise InputError(
            f"{folder} has no autoencoder ({CONFIG}, or layer-0/{CONFIG} ...): name a folder of"
            " `cratelm sae train`, `cratelm import sae` or SAELens"
        )
    return folders


def _layer(folder: Path) -> int:
    """Return the layer in the folder's name, -1 if it has none."""
    match = re.fullmatch(r"layer-(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def _layer_of(sae: Any, folder: Path) -> int:
    """Return the layer in the configuration: cratelm's entry, else the first number in the hook's name."""
    metadata = sae.cfg.metadata.to_dict()
    if isinstance(metadata.get("layer"), int):
        return metadata["layer"]
    match = re.search(r"\.(\d+)(?:\.|$)", str(metadata.get("hook_name", "")))
    if match is None:
        raise InputError(f"{folder / CONFIG} names no layer: give the folder a name like layer-0")
    return int(match.group(1))


def check_autoencoder(folder: Path) -> None:
    """Raise `InputError`, which names the file, if a folder's autoencoder lacks a file or has a damaged one.

    The configuration decides what SAELens allocates, so its sizes are compared with the weights first.
    """
    content = json_object(folder / CONFIG, "the configuration of an autoencoder")
    sizes: list[Any] = [content.get(name) for name in ("d_in", "d_sae")]
    if not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
        raise InputError(
            f"{folder / CONFIG} has d_in {sizes[0]!r:.40} and d_sae {sizes[1]!r:.40}: both must be whole"
            f" numbers from 1 to {LARGEST:,}"
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{weights} is missing: copy the folder of the autoencoder again")
    shapes = safetensors_shapes(weights)
    encoder = shapes.get("W_enc", tuple(sizes))
    if encoder != tuple(sizes) or sizes[0] * sizes[1] > 2 * weights.stat().st_size:
        raise InputError(
            f"{folder / CONFIG} describes {sizes[0]:,} inputs and {sizes[1]:,} latents, but {WEIGHTS} has"
            f" other weights: they do not belong together"
        )


def _load(folder: Path, device: torch.device) -> Any:
    for path in sorted(folder.iterdir()):
        verified(path)
    check_autoencoder(folder)
    os.environ.setdefault("WANDB_MODE", "disabled")  # SAELens imports wandb; nothing is sent
    try:
        from sae_lens import SAE
    except ImportError:
        raise missing_extra("sae", "an autoencoder", "sae-lens") from None
    try:
        return SAE.load_from_disk(folder, device=str(device)).eval()
    except Exception as error:  # SAELens and its parts share no base exception
        raise InputError(
            f"{folder} cannot be read as an autoencoder ({one_line(error, 160)})"
        ) from None


def _site_below(model: PreTrainedModel, saes: dict[int, Any], folder: Path) -> Site:
    """Return the one site that the autoencoders read: cratelm's entry, else the hook's name."""
    names = {_site_name(sae) for sae in saes.values()}
    if len(names) > 1:
        raise InputError(
            f"{folder} has autoencoders of several sites, {', '.join(sorted(map(str, names)))}:"
            " name the folder of one site"
        )
    return site_of(model, names.pop())


def _site_name(sae: Any) -> str | None:
    metadata = sae.cfg.metadata.to_dict()
    if metadata.get("site"):
        return str(metadata["site"])
    hook = str(metadata.get("hook_name") or "")
    return re.sub(r"\.\d+(?=\.|$)", ".*", hook, count=1) or None


def _check(layer: int, sae: Any, below: Site, folder: Path) -> None:
    if layer not in below.layer_numbers:
        numbers = layers_in_words(below.layer_numbers)
        raise InputError(
            f"{folder} is of layer {layer}, but site {below.name} of this model has layers {numbers}:"
            " is it an autoencoder of another model?"
        )
    width = below.n_neurons[below.place(layer)]
    if sae.cfg.d_in != width:
        raise InputError(
            f"{folder} reads {sae.cfg.d_in} activations, but site {below.name} of this model has"
            f" {width}: is it an autoencoder of another model or site?"
        )
