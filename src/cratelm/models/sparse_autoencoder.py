"""The sparse autoencoders that are published, as one module: what they compute, whatever tool trained them.

    u = (normalised x) scale                      x: activations [..., H]
    v = u - b_dec                                 or u, where b_dec is not subtracted
    p = v W_enc + b_enc                           pre-activations [..., S]
    z = ReLU(p)                                   relu
        ReLU(p) where p is among the k largest    topk
        ReLU(p) where p > threshold               jumprelu (also BatchTopK, whose threshold is one number)
        ReLU(v (W_enc e^r_mag) + b_mag) where v W_enc + b_gate > 0        gated
    y = ((z W_dec + b_dec) / scale) denormalised

Sources: Bricken et al. 2023; Gao et al. 2024 (arXiv 2406.04093); Rajamanoharan et al. 2024 (arXiv 2407.14435 and
2404.16014); Bussmann et al. 2024 (arXiv 2412.06410). Tests compare with SAELens and with plain formulas.

Everything is computed in float32, also where the weights are stored in 16 bits: rounding a threshold changes which
latents fire.

Shape legend: ... any leading axes (tokens), H inputs, S latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cratelm.errors import InputError

Activation = Literal["relu", "topk", "jumprelu", "gated"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]
_EPSILON = 1e-5
"""added to the standard deviation in `layer_norm`, as SAELens does"""


@dataclass(frozen=True)
class SparseAutoencoderConfig:
    """What an autoencoder computes, and on which tensor of which model it was trained."""

    d_in: int
    """H"""
    d_sae: int
    """S"""
    activation: Activation = "relu"
    k: int = 0
    """number of latents that `topk` keeps at a token; 0 for the others"""
    subtracts_b_dec: bool = True
    """b_dec is subtracted from the activations before they are encoded"""
    normalization: Normalization = "none"
    """of each activation vector: to mean 0 and standard deviation 1, or to norm sqrt(H); undone after decoding"""
    centres: bool = False
    """the mean over the H inputs is subtracted first, and added again: the model of which it was trained wrote
    vectors of mean 0 into its residual stream (TransformerLens' `center_writing_weights`)"""
    scale: float = 1.0
    """factor of the activations, by which reconstructions are divided"""
    decoder_norms: Literal["none", "selection", "latents"] = "none"
    """W_dec's norms multiply the pre-activations before latents are selected (`selection`, SAELens'
    `rescale_acts_by_decoder_norm`) or the latents afterwards (`latents`, dictionary_learning); decoding divides
    by them"""
    hook_name: str = ""
    """tensor that it reads, as its file names it; empty: the file does not say"""
    module_name: str = ""
    """the same as a module of transformers, where the file also has that"""
    site: str = ""
    """the same as cratelm names it, if cratelm wrote the file"""
    layer: int | None = None
    """number of the layer, if the file states it apart from the hook's name"""
    model_name: str = ""
    """name of the model, as the file gives it"""
    model_identity: str | None = None
    """identity of the model, if cratelm trained the autoencoder"""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight."""
        h, s = self.d_in, self.d_sae
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (h, s), "W_dec": (s, h), "b_dec": (h,)}
        of_activation = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
        return shapes | dict.fromkeys(of_activation.get(self.activation, ("b_enc",)), (s,))


class SparseAutoencoder(nn.Module):
    """An autoencoder with fixed weights.

    Where it normalises its input, `decode` undoes the normalisation of the last activations that were encoded, so that
    `encode` has to be called first, on the same tokens.
    """

    W_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    b_gate: torch.Tensor
    b_mag: torch.Tensor
    r_mag: torch.Tensor
    W_mag: torch.Tensor
    """[H, S] W_enc e^r_mag"""
    norms: torch.Tensor
    """[S] of the rows of W_dec"""
    latent_scale: torch.Tensor | None

    def __init__(
        self,
        config: SparseAutoencoderConfig,
        weights: Mapping[str, torch.Tensor],
        latent_scale: torch.Tensor | None = None,
    ):
        """Keep the weights in float32, by the names of `config.shapes`.

        `latent_scale` [S] multiplies latents before they are decoded (SAELens' `finetuning_scaling_factor`).
        """
        super().__init__()
        self.config = config
        for name in config.shapes:
            self.register_buffer(name, weights[name].detach().float().contiguous())
        self.register_buffer("latent_scale", None if latent_scale is None else latent_scale.float())
        if config.decoder_norms != "none":
            self.register_buffer("norms", self.W_dec.norm(dim=1))
        if config.activation == "gated":
            self.register_buffer("W_mag", self.W_enc * self.r_mag.exp())
        self._factor: torch.Tensor | None = None
        self._shift: torch.Tensor | None = None

    def encode(self, x: torch.Tensor, /) -> torch.Tensor:
        """Return the latents [..., S] of activations [..., H], in float32; all are at least 0."""
        c = self.config
        v = self._normalized(x.float())
        v = v * c.scale if c.scale != 1 else v
        v = v - self.b_dec if c.subtracts_b_dec else v
        if c.activation == "gated":
            is_open = (v @ self.W_enc + self.b_gate > 0).to(v.dtype)
            latents = is_open * torch.relu(v @ self.W_mag + self.b_mag)
        else:
            pre = v @ self.W_enc + self.b_enc
            latents = self._selected(pre * self.norms if c.decoder_norms == "selection" else pre)
        return latents * self.norms if c.decoder_norms == "latents" else latents

    def _selected(self, pre: torch.Tensor) -> torch.Tensor:
        """Return the latents [..., S] of pre-activations [..., S]."""
        if self.config.activation == "topk":
            kept = pre.topk(self.config.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
        latents = torch.relu(pre)
        if self.config.activation == "jumprelu":
            latents = latents * (pre > self.threshold).to(pre.dtype)
        return latents

    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        """Return the activations [..., H] that latents [..., S] represent, in float32."""
        c = self.config
        z = latents / self.norms if c.decoder_norms != "none" else latents
        z = z if self.latent_scale is None else z * self.latent_scale
        y = z @ self.W_dec + self.b_dec
        return self._denormalized(y / c.scale if c.scale != 1 else y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction [..., H] of activations [..., H]."""
        return self.decode(self.encode(x))

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        """Return x normalised, and keep what undoes it: a factor and a shift [..., 1] of each vector."""
        c = self.config
        self._factor = self._shift = None
        if c.centres or c.normalization == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            x, self._shift = x - mean, mean.detach()
        if c.normalization == "layer_norm":
            deviation = x.std(-1, keepdim=True)
            x, self._factor = x / (deviation + _EPSILON), deviation.detach()
        elif c.normalization == "constant_norm_rescale":
            factor = c.d_in**0.5 / x.norm(dim=-1, keepdim=True)
            x, self._factor = x * factor, (1 / factor).detach()
        return x

    def _denormalized(self, y: torch.Tensor) -> torch.Tensor:
        c = self.config
        if not c.centres and c.normalization == "none":
            return y
        kept = self._shift if self._shift is not None else self._factor
        if kept is None or kept.shape[:-1] != y.shape[:-1]:
            raise InputError(
                "an autoencoder that normalises its input can decode only latents of the activations that it encoded"
                " last: this measure decodes others, so choose autoencoders without normalisation for it"
            )
        y = y if self._factor is None else y * self._factor
        return y if self._shift is None else y + self._shift
