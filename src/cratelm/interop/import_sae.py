"""`cratelm import sae`: write a sparse autoencoder of the paper's authors as a folder of open files.

Their file is a torch state dict (`W_enc`, `b_enc`, `W_dec`, `b_dec`) with a JSON file in the same folder. The JSON
names positions in the model as TransformerLens does (arXiv 2410.16443, public code).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cratelm.errors import InputError
from cratelm.interop.config import ImportSaeConfig
from cratelm.interop.model_card import PAPER, code_block, write_card
from cratelm.interop.out_folder import check_out, out_folder
from cratelm.interop.source_file import SourceFile, locate
from cratelm.models.hook_names import hooks_of_families, path_in_family
from cratelm.models.torch_files import check_tensor, read_torch_file, without_wrappers
from cratelm.runs import hash_file
from cratelm.runs.pretrained import json_object
from cratelm.sae.sae import DTYPES, Sae, SaeConfig

_NEURONS = "mlp.hook_post"
"""part of act_name after `blocks.L.` of the sites that have names: mlp in GPT-2, ista in CRATE"""


@dataclass(frozen=True)
class ImportSaeResult:
    """Result of `cratelm import sae`."""

    path: Path
    """folder that `cratelm.sae.sae.Sae.load` and SAELens read"""
    model_name: str
    site: str
    layer: int
    inputs: int
    """number of neurons of the site"""
    latents: int
    sha256: str
    """hash of the imported file"""


def import_sae(config: ImportSaeConfig) -> ImportSaeResult:
    """Read the file and its settings, and write the folder. After an error, nothing is left behind.

    Raises `InputError` if the file does not exist, is damaged, could run code or is not such an autoencoder, if the
    settings contradict it, or if the folder cannot be written.
    """
    source = locate(config.file)
    settings_path = _settings_path(config, source)
    check_out(config.out, (source.path, settings_path), force=config.force)
    weights = _weights(source.path)
    settings = json_object(settings_path, "the settings of an autoencoder")
    d_in, d_sae = _shape(settings, weights, settings_path, source.path)
    position = _position(settings, settings_path, config.site)
    sha256 = hash_file(source.path)
    origin = {"source": source.name, "revision": source.revision, "sha256": sha256}
    sae_config = SaeConfig(
        d_in=d_in,
        d_sae=d_sae,
        dtype=_dtype(weights, source.path),
        provenance={**origin, "settings": settings},
        **position,
    )
    sae = Sae.of(sae_config, weights, source.path)
    with out_folder(config.out, {"written_by": "cratelm import sae", **origin}) as folder:
        sae.save(folder)
        _write_card(folder, source, sae_config)
    return ImportSaeResult(
        path=config.out,
        model_name=sae_config.model_name,
        site=sae_config.site,
        layer=sae_config.layer,
        inputs=d_in,
        latents=d_sae,
        sha256=sha256,
    )


def _settings_path(config: ImportSaeConfig, source: SourceFile) -> Path:
    if config.config is not None:
        return config.config
    name = f"{source.path.stem}_cfg.json"
    path = source.beside(name)
    if path is None:
        raise InputError(
            f"there is no {name} in the folder of {source.name}: name the settings with --config"
        )
    return path


def _weights(path: Path) -> dict[str, torch.Tensor]:
    content = read_torch_file(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        raise InputError(
            f"{path} is a language model, not an autoencoder: read it with `cratelm import authors`"
        )
    weights, _ = without_wrappers(content if isinstance(content, Mapping) else {}, path)
    if "W_enc" not in weights:
        raise InputError(f"{path}: weight W_enc is missing: is it a sparse autoencoder?")
    for key, tensor in weights.items():
        check_tensor(tensor, key, path)
    return weights


def _shape(
    settings: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    settings_path: Path,
    path: Path,
) -> tuple[int, int]:
    """Return the number of inputs and of latents. Raises `InputError` if weights and settings disagree."""
    if weights["W_enc"].dim() != 2:
        shape = tuple(weights["W_enc"].shape)
        raise InputError(f"{path}: weight W_enc has shape {shape} instead of [inputs, latents]")
    d_in, d_sae = weights["W_enc"].shape
    expected = {"act_size": d_in, "dict_size": d_sae}
    for key, number in expected.items():
        if settings.get(key, number) != number:
            raise InputError(
                f"{settings_path} has {key} {settings[key]!r}, but W_enc of {path} has {number}: the two files do"
                " not belong to the same autoencoder"
            )
    return d_in, d_sae


def _dtype(weights: Mapping[str, torch.Tensor], path: Path) -> str:
    """Return the name of the data type of all weights. Raises `InputError` for mixed or unsupported types."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not dtypes <= set(names):
        found = ", ".join(sorted(map(str, dtypes)))
        raise InputError(f"{path}: weights are {found}; they must be one of {', '.join(DTYPES)}")
    return names[dtypes.pop()]


def _position(settings: Mapping[str, Any], path: Path, site: str) -> dict[str, Any]:
    """Return model, layer, site and hook name from the settings, as fields of `SaeConfig`."""
    for key in ("model_name", "act_name"):
        if not isinstance(settings.get(key), str):
            raise InputError(f"{path} has no {key}: it must be a name")
    match = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", settings["act_name"])
    if match is None:
        raise InputError(
            f"{path} has act_name {settings['act_name']!r}: it must have the form blocks.LAYER.HOOK"
        )
    layer, hook = int(match[1]), match[2]
    if settings.get("layer", layer) != layer:
        raise InputError(
            f"{path} contradicts itself: layer {settings['layer']}, act_name {match[0]}"
        )
    short = settings.get("site")
    if isinstance(short, str) and short not in hook:
        raise InputError(f"{path} contradicts itself: site {short}, act_name {match[0]}")
    is_crate = "crate" in settings["model_name"].lower()
    named = ("ista" if is_crate else "mlp") if hook == _NEURONS else ""
    named = site or named or path_in_family(hook, is_crate=is_crate)
    if named is None:
        raise InputError(
            f"{path} has act_name {match[0]}, whose site is unknown (known are {', '.join(hooks_of_families())}): name"
            " the site with --site"
        )
    return {
        "model_name": settings["model_name"],
        "layer": layer,
        "site": named,
        "hook_name": match[0],
    }


def _write_card(folder: Path, source: SourceFile, config: SaeConfig) -> None:
    facts = {
        "inputs": config.d_in,
        "latents": config.d_sae,
        "model": config.model_name,
        "site": config.site,
        "layer (from 0)": config.layer,
        "hook name in TransformerLens": config.hook_name,
        "weights": config.dtype,
        "file": source.name,
        "revision": source.revision or None,
        "sha256 of the file": config.provenance["sha256"],
    }
    loading = (
        "```python\nfrom cratelm.sae.sae import Sae\n\n"
        'sae = Sae.load("FOLDER")\nlatents = sae.encode(activations)  # [..., inputs]\n```\n\n'
        'or, with SAELens, `sae_lens.SAE.load_from_disk("FOLDER")`.'
    )
    sections = {
        "Computation": "`z = relu((x - b_dec) W_enc + b_enc)`, `y = z W_dec + b_dec`",
        "How to load it": loading,
        "Settings of the file": code_block(config.provenance["settings"]),
        "Licence": "The weights belong to their authors, whose terms apply. The file states no licence.",
    }
    summary = (
        f"A sparse autoencoder by the authors of {PAPER}, or in the format of their code, imported by"
        " cratelm. Weights and keys are unchanged."
    )
    write_card(
        folder,
        f"Sparse autoencoder imported from {source.path.name}",
        summary,
        facts,
        sections,
        library_name="saelens",
        tags=["sparse-autoencoder", "interpretability"],
    )
