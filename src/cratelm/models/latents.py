"""Latents of sparse autoencoders as a site: harvested, explained, scored and steered like neurons.

Autoencoders are named by `--sae`: those of a run (`cratelm sae train`), a folder of SAELens, sparsify or
dictionary_learning (`autoencoder_files`), or RELEASE/ID of SAELens' registry (`sae_lens`). They say which tensor of the
model they read: in cratelm's own words, or by a name of another tool (`hook_names`).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.autoencoder_files import (
    autoencoder_folders,
    autoencoder_identity,
    layer_in_name,
    read_autoencoder,
)
from cratelm.models.hook_names import path_of
from cratelm.models.sae_lens import load_release, release_identity
from cratelm.models.sites import Site, layers_in_words, site_of
from cratelm.models.sparse_autoencoder import SparseAutoencoder
from cratelm.runs import Completion, Run
from cratelm.runs.names import autoencoder_name, set_name


@dataclass(frozen=True)
class AutoencoderSource:
    """Location of autoencoders, before they are loaded."""

    name: str
    """as `--sae` gives it"""
    folder: Path | None
    """None for a release of SAELens' registry"""
    record: Completion | None = None
    """record of the stage that trained them; None for autoencoders from elsewhere"""

    @property
    def identity(self) -> str:
        """Return a string that changes when the autoencoders do. Reads all files; loads a release."""
        if self.record is not None:
            return self.record.identity
        return (
            release_identity(self.name)
            if self.folder is None
            else autoencoder_identity(self.folder)
        )


def find_autoencoders(run: Run, model: str, sae: str) -> AutoencoderSource:
    """Return the location of the autoencoders that `--sae` calls `sae`, of the model called `model`.

    A name without a slash is one in the run, if the run has it; otherwise it is a folder if there is one, else a
    release. Raises `InputError` for a name that is none of these.
    """
    stage = run.stage("sae", set_name(Path(model).name, autoencoder_name(sae)))
    if "/" not in sae and stage.completion() is not None:
        return AutoencoderSource(sae, stage.path, stage.require("sae train"))
    if Path(sae).is_dir():
        return AutoencoderSource(sae, Path(sae))
    if "/" not in sae.strip("/"):
        raise InputError(
            f"--sae {sae} is neither a folder nor finished in the run ({stage.path}): type"
            f" `cratelm sae train --run {run.path} --model {model}` first, or name RELEASE/ID of SAELens' registry"
        )
    return AutoencoderSource(sae, None)


def latents_of(
    model: PreTrainedModel, source: AutoencoderSource | str | Path, site: str | None = None
) -> Site:
    """Return the site of the latents of autoencoders on `model`; `source` is what `find_autoencoders` returns, or a folder.

    `site` is the site that they read, in place of the one that their files name; without `*` in it, it is one layer.
    Raises `InputError` if there is no autoencoder, if its files name no tensor that the model has, and if it does not
    fit the model: several sites, a layer that the model does not have, or another width.
    """
    if not isinstance(source, AutoencoderSource):
        source = AutoencoderSource(str(source), Path(source))
    read = _read(source)
    places = [_place(model, label, sae, site) for label, sae in read]
    names = {name for name, _ in places}
    if len(names) > 1:
        raise InputError(
            f"{source.name} has autoencoders of several sites, {', '.join(sorted(names))}: name the folder of one site"
        )
    by_layer: dict[int, tuple[str, SparseAutoencoder]] = {}
    for (_, layer), of in zip(places, read, strict=True):
        if layer in by_layer:
            raise InputError(
                f"{source.name} has two autoencoders of layer {layer}, {by_layer[layer][0]} and {of[0]}: name one folder"
            )
        by_layer[layer] = of
    below = site_of(model, names.pop())
    _check(by_layer, below)
    layers = sorted(by_layer)
    saes = tuple(by_layer[layer][1].to(model.device) for layer in layers)
    return replace(
        below.only(tuple(layers)),
        name="latents",
        n_neurons=tuple(sae.config.d_sae for sae in saes),
        layers=tuple(layers),
        autoencoders=saes,
    )


def _read(source: AutoencoderSource) -> list[tuple[str, SparseAutoencoder]]:
    """Return the autoencoders, each with its folder or release."""
    if source.folder is None:
        return [(source.name, load_release(source.name))]
    read = []
    for folder in autoencoder_folders(source.folder):
        sae = read_autoencoder(folder)
        named = layer_in_name(folder)
        if named is not None and named != sae.config.layer:
            sae.config = replace(sae.config, layer=named)
        read.append((str(folder), sae))
    return read


def _place(
    model: PreTrainedModel, label: str, sae: SparseAutoencoder, site: str | None
) -> tuple[str, int]:
    """Return the name of the site that an autoencoder reads, with `*` for the layer, and the layer."""
    config = sae.config
    if site is not None:
        if "*" not in site and "." in site:  # one layer, which its path names
            return path_of(model, site)
        layer = config.layer
        if layer is None and config.hook_name:
            layer = path_of(model, config.hook_name)[1]
        if layer is None:
            raise InputError(
                f"{label} does not say of which layer it is: name the layer with --site, as in {site.replace('*', '0')}"
            )
        return site, layer
    if config.site and config.layer is not None:
        return config.site, config.layer
    if not config.hook_name:
        raise InputError(
            f"{label} does not say which tensor of the model it reads: name it with --site, such as"
            " blocks.0.hook_resid_pre or the path of a module"
        )
    try:
        path, layer = path_of(model, config.hook_name)
    except InputError as error:
        if config.module_name in ("", config.hook_name):
            raise InputError(f"{label}: {error}") from None
        path, layer = path_of(
            model, config.module_name
        )  # of a family without TransformerLens' names
    if "*" in path and config.layer not in (None, layer):
        raise InputError(
            f"{label} contradicts itself: layer {config.layer}, and {config.hook_name}: name the site with --site"
        )
    norm, _, side = path.replace("*", str(layer)).partition(":")
    if side == "normalized" and isinstance(model.get_submodule(norm), nn.LayerNorm):
        print(
            f"note: {label} reads {config.hook_name}, which is before the norm's weight and bias in TransformerLens 3,"
            f" and after them in version 2: name --site {norm} if it was trained with version 2",
            file=sys.stderr,
            flush=True,
        )
    return path, layer


def _check(by_layer: dict[int, tuple[str, SparseAutoencoder]], below: Site) -> None:
    for layer, (label, sae) in by_layer.items():
        if layer not in below.layer_numbers:
            numbers = layers_in_words(below.layer_numbers)
            raise InputError(
                f"{label} is of layer {layer}, but site {below.name} of this model has layers {numbers}: is it an"
                " autoencoder of another model?"
            )
        width = below.n_neurons[below.place(layer)]
        if sae.config.d_in != width:
            raise InputError(
                f"{label} reads {sae.config.d_in} activations, but site {below.name} of this model has {width}: is it"
                " an autoencoder of another model or site?"
            )
