"""Tiny random models of the families that are named in the documentation, by name."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, POSITIONS = 32, 4, 2, 48, 320, 64
_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}
_GROUPED: dict[str, Any] = {**_USUAL, "num_key_value_heads": 2, "pad_token_id": 0}
_WITH_HEAD: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}  # fmt: skip
_EXPERTS: dict[str, Any] = {**_WITH_HEAD, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _gemma3() -> Any:
    """The composite configuration of Gemma 3, whose text settings lie in `text_config`."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 28, "patch_size": 14}  # fmt: skip
    return t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**_WITH_HEAD, sliding_window=16).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=VOCABULARY - 1,
    )


def deepseek(layers: int = 4) -> Any:
    """One dense layer, then layers of experts."""
    usual: dict[str, Any] = {**_USUAL, "num_hidden_layers": layers}
    return t.DeepseekV2Config(
        **usual,
        num_key_value_heads=HEADS,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )


DENSE: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: t.GPT2Config(**_GPT, n_inner=INNER),
    "gpt-neox": lambda: t.GPTNeoXConfig(**_USUAL),
    "gptj": lambda: t.GPTJConfig(**_GPT, n_inner=INNER, rotary_dim=4),
    "llama": lambda: t.LlamaConfig(**_GROUPED),
    "mistral": lambda: t.MistralConfig(**_GROUPED, sliding_window=16),
    "qwen2": lambda: t.Qwen2Config(**_GROUPED),
    "qwen3": lambda: t.Qwen3Config(**_WITH_HEAD),
    "gemma2": lambda: t.Gemma2Config(**_WITH_HEAD, sliding_window=16),
    "gemma3-text": lambda: t.Gemma3TextConfig(**_WITH_HEAD, sliding_window=16),
    "gemma3": _gemma3,
    "olmo2": lambda: t.Olmo2Config(**_GROUPED),
    "phi": lambda: t.PhiConfig(**_USUAL),
    "opt": lambda: t.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=INNER,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=WIDTH,
    ),
    "falcon": lambda: t.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_hidden_size=INNER,
    ),
    "bloom": lambda: t.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS
    ),
    "mpt": lambda: t.MptConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=POSITIONS
    ),
}
"""families with one MLP per layer"""
EXPERTS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: t.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**_EXPERTS, num_experts=4),
    "gpt-oss": lambda: t.GptOssConfig(
        **_WITH_HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
}
"""families whose layers have only experts"""


def tiny(config: Any, **options: Any) -> Any:
    """A model of a configuration with random weights, in evaluation mode; biases are not 0 either."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    return model
