"""The baseline: transformers' own GPT-2 with ReLU and without biases, the twin of a CRATE model.

That class has biases, so they are set to 0 and frozen: every tool that reads GPT-2 reads the twin,
and the computation is that of a GPT-2 without biases (arXiv 2410.16443, section 4). With `activation` the same
model has another activation in its MLP: ReLU and GELU are GPT-2's own, SoLU and TopK are in `gpt2_activation.py`.
"""

from typing import Any, Literal

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cratelm.models.gpt2_activation import Gpt2ActivationConfig, Gpt2ActivationForCausalLM, Solu


def gpt2_config(
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
    dropout: float = 0.0,
    zero_biases: bool = True,
    activation: Literal["relu", "gelu", "solu", "topk"] = "relu",
    topk_fraction: float = 1 / 16,
    expansion: int = 4,
    **others: Any,
) -> GPT2Config:
    """Return a GPT-2 configuration from CRATE's field names; `others` are fields of `GPT2Config`.

    `topk_fraction` is the fraction of the neurons that TopK keeps, and `expansion` is H / D. Raises `ValueError`
    for an unknown activation.
    """
    if activation not in ("relu", "gelu", "solu", "topk"):
        raise ValueError(f"activation is {activation!r}, but it must be relu, gelu, solu or topk")
    if activation in ("solu", "topk"):
        others = {"activation": activation, "topk_fraction": topk_fraction, **others}
    if expansion != 4:
        others = {"n_inner": expansion * hidden_size, **others}
    config = Gpt2ActivationConfig if "activation" in others else GPT2Config
    return config(
        n_embd=hidden_size,
        n_layer=num_hidden_layers,
        n_head=num_attention_heads,
        vocab_size=vocab_size,
        n_positions=max_position_embeddings,
        **{
            "activation_function": "gelu" if activation == "gelu" else "relu",
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "bos_token_id": None,
            "eos_token_id": None,
            "zero_biases": zero_biases,
            **others,
        },
    )


def freeze_biases(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Set every bias, including LayerNorm's, to 0, exclude it from training, and return the model.

    The LN inside of SoLU is part of the activation, and keeps its bias.
    """
    solu = {id(p) for m in model.modules() if isinstance(m, Solu) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and id(parameter) not in solu:
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return model


def build_gpt2(config: GPT2Config) -> GPT2LMHeadModel:
    """Return a GPT-2 with fresh weights; without biases if the configuration has `zero_biases`."""
    if isinstance(config, Gpt2ActivationConfig):
        return as_twin(Gpt2ActivationForCausalLM(config))
    return as_twin(GPT2LMHeadModel(config))


def as_twin(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Return a GPT-2, built or loaded, with frozen biases if its configuration has `zero_biases`."""
    model.loss_type = "ForCausalLM"  # transformers cannot infer it from the class name, and warns
    return freeze_biases(model) if getattr(model.config, "zero_biases", False) else model
