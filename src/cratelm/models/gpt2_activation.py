"""GPT-2 with SoLU or TopK in its MLP: sparse neurons without a derivation, complete in this file.

    SoLU    a = LN(x * softmax(x)), LN over the H neurons with weight and bias
            (Elhage et al., "Softmax Linear Units", Transformer Circuits Thread 2022)
    TopK    a = the k largest of ReLU(x), the others 0; the gradient goes through the kept ones
            (Makhzani & Frey, arXiv 1312.5663; Gao et al., arXiv 2406.04093)

All else is transformers' own GPT-2, and fresh weights are those of a GPT-2 of the same seed. ReLU and GELU need no
class of their own (`gpt2.py`). It imports only torch and transformers, so that it can be saved with a model.

Shape legend: B batch, T position, H neurons of a layer.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model


class Gpt2ActivationConfig(GPT2Config):
    """Configuration of a GPT-2, with the activation of its MLP.

    Raises `ValueError` for an activation other than these two, or a fraction outside of 0 to 1.
    """

    model_type = "gpt2_activation"

    activation: Literal["solu", "topk"] = "solu"
    topk_fraction: float = 1 / 16
    """k / H, for `topk`; k is rounded, and at least 1"""
    zero_biases: bool = False
    """True: no biases, as in the twin of a CRATE model; the LN in SoLU keeps its bias"""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.activation not in ("solu", "topk"):
            raise ValueError(f"activation is {self.activation!r}, but it must be solu or topk")
        if not 0 < self.topk_fraction <= 1:
            raise ValueError(f"topk_fraction {self.topk_fraction} must be above 0 and at most 1")

    @property
    def num_neurons(self) -> int:
        """Return H, the number of neurons per layer."""
        return self.n_inner or 4 * self.n_embd


class Solu(nn.Module):
    """LN(x * softmax(x)) over the last dimension [..., H]."""

    def __init__(self, n_neurons: int, eps: float):
        super().__init__()
        self.solu = nn.Identity()
        """site: x * softmax(x) [B, T, H], before the norm"""
        self.norm = nn.LayerNorm(n_neurons, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [..., H] of x [..., H]."""
        return self.norm(self.solu(x * F.softmax(x, dim=-1)))


class TopK(nn.Module):
    """The k largest of ReLU(x) in the last dimension [..., H], and 0 in the place of the others."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def extra_repr(self) -> str:
        """Return k."""
        return f"k={self.k}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [..., H] of x [..., H], at most k of which are above 0."""
        largest, places = F.relu(x).topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(x).scatter(-1, places, largest)


def _set_activation(model: GPT2Model, config: Gpt2ActivationConfig) -> None:
    for block in model.h:
        mlp: Any = block.mlp
        if config.activation == "solu":
            mlp.act = Solu(config.num_neurons, config.layer_norm_epsilon)
        else:
            mlp.act = TopK(max(1, round(config.topk_fraction * config.num_neurons)))


class Gpt2ActivationModel(GPT2Model):
    """GPT-2 without a head: token ids [B, T] -> hidden states [B, T, D]."""

    config_class = Gpt2ActivationConfig

    def __init__(self, config: Gpt2ActivationConfig):
        super().__init__(config)
        _set_activation(self, config)


class Gpt2ActivationForCausalLM(GPT2LMHeadModel):
    """GPT-2 with its head: token ids [B, T] -> logits [B, T, V]."""

    config_class = Gpt2ActivationConfig

    def __init__(self, config: Gpt2ActivationConfig):
        super().__init__(config)
        _set_activation(self.transformer, config)
