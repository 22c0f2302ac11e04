"""Sparse autoencoders: latents of the activations of one site, in one layer of a model.

Shape legend: ... any leading axes (tokens), H inputs (neurons of the site), S latents.

A folder holds `cfg.json` and `sae_weights.safetensors` in SAELens' format (version 6), so that
`sae_lens.SAE.load_from_disk` reads it; what that has no field for stands under `metadata`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.runs import write_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"
"""of SAELens, whose configuration file is written; older readers want other keys"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIXED = {
    "architecture": "standard",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
"""what an SAE of this class computes, in SAELens' words"""


@dataclass(frozen=True)
class SaeConfig:
    """Shape of an SAE, and which activations it is of."""

    d_in: int
    """H"""
    d_sae: int
    """S"""
    model_name: str
    """of the model whose activations it reads"""
    site: str
    """where in a layer these are, as `cratelm.site_of` names it"""
    layer: int
    """from 0"""
    hook_name: str = ""
    """the same place in TransformerLens' words, such as `blocks.0.mlp.hook_post`"""
    dtype: str = "float32"
    """of the weights: float32, bfloat16 or float16"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """where it comes from, JSON values"""

    def __post_init__(self) -> None:
        for name, least in (("d_in", 1), ("d_sae", 1), ("layer", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(
                    f"{name} is {value!r}, a whole number from {least} on was expected"
                )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}, one of {', '.join(DTYPES)} was expected")


class Sae(nn.Module):
    """The standard sparse autoencoder: ReLU latents, made sparse in training by an l1 penalty.

        z = ReLU((x - b_dec) W_enc + b_enc)        latents  [..., S]
        y = z W_dec + b_dec                        reconstruction  [..., H]

    Source: Bricken et al. 2023, "Towards Monosemanticity", with `b_dec` taken off the input
    (arXiv 2410.16443, public code). Weights start at 0: they are loaded.
    """

    def __init__(self, config: SaeConfig):
        super().__init__()
        self.config = config
        h, s, dtype = config.d_in, config.d_sae, DTYPES[config.dtype]
        self.W_enc = nn.Parameter(torch.zeros(h, s, dtype=dtype))
        """[H, S]"""
        self.b_enc = nn.Parameter(torch.zeros(s, dtype=dtype))
        """[S]"""
        self.W_dec = nn.Parameter(torch.zeros(s, h, dtype=dtype))
        """[S, H]: row i is what latent i writes"""
        self.b_dec = nn.Parameter(torch.zeros(h, dtype=dtype))
        """[H]"""

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., S], in the precision of the weights."""
        return (x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        """Which latents are on, and how much: [..., S] -> [..., S], at least 0."""
        return F.relu(pre)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [..., S] of activations [..., H]."""
        return self.activate(self.pre_activations(x))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Activations [..., H] that latents [..., S] stand for."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., H] of activations [..., H]."""
        return self.decode(self.encode(x))

    def save(self, folder: Path) -> None:
        """Writes `cfg.json` and `sae_weights.safetensors` into a folder that is there."""
        c = self.config
        told = ("model_name", "hook_name", "site", "layer", "provenance")
        metadata = {name: getattr(c, name) for name in told}
        metadata["sae_lens_version"] = metadata["sae_lens_training_version"] = FORMAT_VERSION
        shape = {"d_in": c.d_in, "d_sae": c.d_sae, "dtype": c.dtype, "device": "cpu"}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        write_json(folder / CONFIG, {**shape, **_FIXED, "metadata": metadata})

    @classmethod
    def load(cls, folder: str | Path) -> "Sae":
        """An SAE from a folder that `save` wrote.

        Raises `InputError` for files that are absent or damaged, for one that computes otherwise
        (another architecture, normalised inputs), and for weights that the configuration denies.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG)
        try:
            weights = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            told = " ".join(str(error).split())[:120]
            raise InputError(
                f"{folder / WEIGHTS} cannot be read as safetensors ({told}): write the folder anew"
            ) from None
        return cls.of(config, weights, folder / WEIGHTS)

    @classmethod
    def of(cls, config: SaeConfig, weights: Mapping[str, torch.Tensor], path: Path) -> "Sae":
        """An SAE with these weights. Raises `InputError` that names the key, and `path`."""
        with torch.device("meta"):  # shapes without memory
            shapes = {key: tuple(own.shape) for key, own in cls(config).state_dict().items()}
        for key, shape in shapes.items():
            if key not in weights:
                found = ", ".join(weights) or "none"
                raise InputError(f"{path}: weight {key} is missing, found {found}")
            if tuple(weights[key].shape) != shape:
                raise InputError(
                    f"{path}: weight {key} has shape {tuple(weights[key].shape)},"
                    f" {shape} was expected"
                )
        surplus = sorted(weights.keys() - shapes.keys())
        if surplus:
            raise InputError(f"{path}: weight {surplus[0]} has no place in a standard autoencoder")
        sae = cls(config)
        sae.load_state_dict(dict(weights))
        return sae.eval()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `InputError` for a file that is absent or holds something else."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: a configuration in JSON was expected")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, a JSON object was expected")
    return found


def _read_config(path: Path) -> SaeConfig:
    found = read_json(path)
    for key, expected in _FIXED.items():
        if found.get(key) != expected:
            raise InputError(
                f"{path} has {key} {found.get(key)!r}, {expected!r} alone is supported"
            )
    metadata = found.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    for key, place in (("d_in", found), ("d_sae", found), ("site", metadata), ("layer", metadata)):
        if key not in place:
            where = " under metadata" if place is metadata else ""
            raise InputError(f"{path} has no {key}{where}: was it written by cratelm?")
    try:
        return SaeConfig(
            d_in=found["d_in"],
            d_sae=found["d_sae"],
            model_name=str(metadata.get("model_name", "")),
            site=metadata["site"],
            layer=metadata["layer"],
            hook_name=str(metadata.get("hook_name", "")),
            dtype=found.get("dtype", "float32"),
            provenance=metadata.get("provenance", {}),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
