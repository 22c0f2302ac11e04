"""The standard sparse autoencoder as a module and as files. Needs no optional package.

`cratelm import sae` writes these files from checkpoints of the paper's authors. Autoencoders of all architectures
are trained and measured with SAELens, which reads the same files.

A folder has `cfg.json` and `sae_weights.safetensors` in SAELens' format (version 6), so that
`sae_lens.SAE.load_from_disk` can read it; fields that the format lacks are under `metadata`.

Shape legend: ... any leading axes (tokens), H inputs (neurons of the site), S latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from cratelm.errors import InputError, one_line
from cratelm.runs import write_json
from cratelm.runs.pretrained import json_object
from cratelm.runs.reading import verified

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"
"""version of SAELens whose configuration format is written; older versions expect other keys"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIXED = {
    "architecture": "standard",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
"""settings in SAELens' keys that describe what an SAE of this class computes"""


@dataclass(frozen=True)
class SaeConfig:
    """Shape of an SAE, and the activations that it reads."""

    d_in: int
    """H"""
    d_sae: int
    """S"""
    model_name: str
    """name of the model whose activations it reads"""
    site: str
    """site of these activations, as `cratelm.site_of` names it"""
    layer: int
    """from 0"""
    hook_name: str = ""
    """name of the site and layer in TransformerLens, such as `blocks.0.mlp.hook_post`"""
    dtype: str = "float32"
    """precision of the weights: float32, bfloat16 or float16"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """origin of the SAE, as JSON values"""

    def __post_init__(self) -> None:
        for name, least in (("d_in", 1), ("d_sae", 1), ("layer", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(
                    f"{name} is {value!r}: it must be a whole number of at least {least}"
                )
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")


class Sae(nn.Module):
    """The standard sparse autoencoder, with ReLU latents that an l1 penalty makes sparse in training.

        z = ReLU((x - b_dec) W_enc + b_enc)        latents  [..., S]
        y = z W_dec + b_dec                        reconstruction  [..., H]

    Source: Bricken et al. 2023, "Towards Monosemanticity", with `b_dec` subtracted from the input
    (arXiv 2410.16443, public code). Weights are 0 until they are loaded.
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
        """[S, H]: row i is the direction that latent i writes"""
        self.b_dec = nn.Parameter(torch.zeros(h, dtype=dtype))
        """[H]"""

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Return the pre-activations [..., S] of activations [..., H], in the precision of the weights."""
        return (x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        """Return the latents [..., S], which are at least 0, for pre-activations [..., S]."""
        return F.relu(pre)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the latents [..., S] of activations [..., H]."""
        return self.activate(self.pre_activations(x))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the activations [..., H] that latents [..., S] represent."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction [..., H] of activations [..., H]."""
        return self.decode(self.encode(x))

    def save(self, folder: str | Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors` into an existing folder."""
        folder, c = Path(folder), self.config
        fields = ("model_name", "hook_name", "site", "layer", "provenance")
        metadata = {name: getattr(c, name) for name in fields}
        metadata["sae_lens_version"] = metadata["sae_lens_training_version"] = FORMAT_VERSION
        shape = {"d_in": c.d_in, "d_sae": c.d_sae, "dtype": c.dtype, "device": "cpu"}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        write_json(folder / CONFIG, {**shape, **_FIXED, "metadata": metadata})

    @classmethod
    def load(cls, folder: str | Path) -> "Sae":
        """Return the SAE in a folder that `save` wrote.

        Raises `InputError` for files that are absent or damaged, for an unsupported SAE (another
        architecture, normalised inputs), and for weights that do not match the configuration.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG)
        try:
            weights = load_file(verified(folder / WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{folder / WEIGHTS} cannot be read as safetensors ({one_line(error, 120)}): write the"
                " folder again"
            ) from None
        return cls.of(config, weights, folder / WEIGHTS)

    @classmethod
    def of(cls, config: SaeConfig, weights: Mapping[str, torch.Tensor], path: Path) -> "Sae":
        """Return an SAE with these weights.

        Raises `InputError` with `path` and the key for weights that do not match the configuration.
        """
        with torch.device("meta"):  # shapes without memory
            shapes = {key: tuple(value.shape) for key, value in cls(config).state_dict().items()}
        for key, shape in shapes.items():
            if key not in weights:
                names = ", ".join(weights) or "none"
                raise InputError(f"{path}: weight {key} is missing; the file has {names}")
            if tuple(weights[key].shape) != shape:
                raise InputError(
                    f"{path}: weight {key} has shape {tuple(weights[key].shape)}, but"
                    f" {shape} is needed"
                )
        surplus = sorted(weights.keys() - shapes.keys())
        if surplus:
            raise InputError(
                f"{path}: weight {surplus[0]} does not belong to a standard autoencoder"
            )
        sae = cls(config)
        sae.load_state_dict(dict(weights))
        return sae.eval()


def _read_config(path: Path) -> SaeConfig:
    content = json_object(verified(path), "the configuration of an autoencoder")
    for key, expected in _FIXED.items():
        if content.get(key) != expected:
            raise InputError(
                f"{path} has {key} {content.get(key)!r}, but only {expected!r} is supported"
            )
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    for key, where in (("d_in", ""), ("d_sae", ""), ("site", "metadata"), ("layer", "metadata")):
        if key not in (metadata if where else content):
            under = f" under {where}" if where else ""
            raise InputError(f"{path} has no {key}{under}: it must be a file written by cratelm")
    try:
        return SaeConfig(
            d_in=content["d_in"],
            d_sae=content["d_sae"],
            model_name=str(metadata.get("model_name", "")),
            site=metadata["site"],
            layer=metadata["layer"],
            hook_name=str(metadata.get("hook_name", "")),
            dtype=content.get("dtype", "float32"),
            provenance=metadata.get("provenance", {}),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
