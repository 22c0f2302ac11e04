"""`cratelm import sae`: a sparse autoencoder of the paper's authors as a folder of open files.

Their file is a torch state dict (`W_enc`, `b_enc`, `W_dec`, `b_dec`) with a JSON beside it; places in
the model are in TransformerLens' words (arXiv 2410.16443, public code).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cratelm.errors import InputError
from cratelm.interop.authors_checkpoint import check_tensor, read_torch_file
from cratelm.interop.config import ImportSaeConfig
from cratelm.interop.model_card import PAPER, code_block, write_card
from cratelm.interop.out_folder import check_out, out_folder
from cratelm.interop.source_file import SourceFile, locate
from cratelm.runs import hash_file
from cratelm.sae.sae import DTYPES, Sae, SaeConfig, read_json

_SITES = {
    "mlp.hook_post": ("mlp", "ista"),
    "hook_mlp_out": ("transformer.h.*.mlp", "model.layers.*.ista"),
    "hook_resid_pre": ("transformer.h.*:input", "model.layers.*:input"),
    "hook_resid_post": ("transformer.h.*", "model.layers.*"),
}
"""act_name after `blocks.L.` -> site of a GPT-2, of a CRATE"""


@dataclass(frozen=True)
class ImportSaeResult:
    """What was imported."""

    path: Path
    """folder that `cratelm.sae.sae.Sae.load` and SAELens read"""
    model_name: str
    site: str
    layer: int
    inputs: int
    """neurons of the site"""
    latents: int
    sha256: str
    """of the file"""


def import_sae(config: ImportSaeConfig) -> ImportSaeResult:
    """Read the file and its settings, and write the folder; on an error nothing is left behind.

    Raises `InputError` for a file that is absent, damaged, hostile or no such autoencoder, for
    settings that contradict it, and for a folder that cannot be written.
    """
    source = locate(config.file)
    settings_path = _settings_path(config, source)
    check_out(config.out, (source.path, settings_path), force=config.force)
    weights = _weights(source.path)
    settings = read_json(settings_path)
    d_in, d_sae = _shape(settings, weights, settings_path, source.path)
    place = _place(settings, settings_path, config.site)
    sha256 = hash_file(source.path)
    origin = {"source": source.name, "revision": source.revision, "sha256": sha256}
    made = SaeConfig(
        d_in=d_in,
        d_sae=d_sae,
        dtype=_dtype(weights, source.path),
        provenance={**origin, "settings": settings},
        **place,
    )
    sae = Sae.of(made, weights, source.path)
    with out_folder(config.out, {"written_by": "cratelm import sae", **origin}) as folder:
        sae.save(folder)
        _write_card(folder, source, made)
    return ImportSaeResult(
        path=config.out,
        model_name=made.model_name,
        site=made.site,
        layer=made.layer,
        inputs=d_in,
        latents=d_sae,
        sha256=sha256,
    )


def _settings_path(config: ImportSaeConfig, source: SourceFile) -> Path:
    if config.config is not None:
        return config.config
    name = f"{source.path.stem}_cfg.json"
    found = source.beside(name)
    if found is None:
        raise InputError(f"{name} is not next to {source.name}: name the settings with --config")
    return found


def _weights(path: Path) -> dict[str, torch.Tensor]:
    held = read_torch_file(path)
    if isinstance(held, Mapping) and isinstance(held.get("model"), Mapping):
        raise InputError(
            f"{path} holds a language model, no autoencoder: `cratelm import authors` reads these"
        )
    if not isinstance(held, Mapping) or "W_enc" not in held:
        raise InputError(f"{path}: weight W_enc is missing: is it a sparse autoencoder?")
    for key, tensor in held.items():
        check_tensor(tensor, str(key), path)
    return dict(held)


def _shape(
    settings: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    settings_path: Path,
    path: Path,
) -> tuple[int, int]:
    """H and S, on which weights and settings agree."""
    if weights["W_enc"].dim() != 2:
        shape = tuple(weights["W_enc"].shape)
        raise InputError(f"{path}: weight W_enc has shape {shape}, [inputs, latents] was expected")
    d_in, d_sae = weights["W_enc"].shape
    expected = {"act_size": d_in, "dict_size": d_sae}
    for key, number in expected.items():
        if settings.get(key, number) != number:
            raise InputError(
                f"{settings_path} has {key} {settings[key]!r}, W_enc of {path} has {number}: the two are not"
                " of the same autoencoder"
            )
    return d_in, d_sae


def _dtype(weights: Mapping[str, torch.Tensor], path: Path) -> str:
    """Of all weights, which stay as they are."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = {tensor.dtype for tensor in weights.values()}
    if len(found) != 1 or not found <= set(names):
        dtypes = ", ".join(sorted(map(str, found)))
        raise InputError(f"{path}: weights are {dtypes}; one of {', '.join(DTYPES)} was expected")
    return names[found.pop()]


def _place(settings: Mapping[str, Any], path: Path, site: str) -> dict[str, Any]:
    """Model, site and layer that the settings name, in our words."""
    for key in ("model_name", "act_name"):
        if not isinstance(settings.get(key), str):
            raise InputError(f"{path} has no {key}: a name was expected")
    match = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", settings["act_name"])
    if match is None:
        raise InputError(
            f"{path} has act_name {settings['act_name']!r}: blocks.LAYER.HOOK was expected"
        )
    layer, hook = int(match[1]), match[2]
    if settings.get("layer", layer) != layer:
        raise InputError(
            f"{path} contradicts itself: layer {settings['layer']}, act_name {match[0]}"
        )
    short = settings.get("site")
    if isinstance(short, str) and short not in hook:
        raise InputError(f"{path} contradicts itself: site {short}, act_name {match[0]}")
    if not site and hook not in _SITES:
        raise InputError(
            f"{path} has act_name {match[0]}: no site is known for it but for"
            f" {', '.join(_SITES)}; name it with --site"
        )
    is_crate = "crate" in settings["model_name"].lower()
    return {
        "model_name": settings["model_name"],
        "layer": layer,
        "site": site or _SITES[hook][is_crate],
        "hook_name": match[0],
    }


def _write_card(folder: Path, source: SourceFile, config: SaeConfig) -> None:
    facts = {
        "inputs": config.d_in,
        "latents": config.d_sae,
        "model": config.model_name,
        "site": config.site,
        "layer, from 0": config.layer,
        "in TransformerLens' words": config.hook_name,
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
        "What it computes": "`z = relu((x - b_dec) W_enc + b_enc)`, `y = z W_dec + b_dec`",
        "How to load it": loading,
        "The file's settings": code_block(config.provenance["settings"]),
        "Licence": "The weights are their authors': their terms hold for them, and the file names"
        " none.",
    }
    summary = (
        f"A sparse autoencoder by the authors of {PAPER}, or in the format of their code, imported by"
        " cratelm; weights and keys are as they were."
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
