"""A tiny gated LLaMA with a run of its own, whose neurons fire both ways, for tests."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize

OPTIONS: dict[str, Any] = {
    "top": 8,
    "random": 8,
    "per_bin": 4,
    "context": 8,
    "sequence_length": 32,
    "pilot_tokens": 512,
    "batch_tokens": 256,
    "device": "cpu",
    "begin_token": "none",
    "skip_first": 0,
    "quiet": True,
}
WIDTH, LAYERS = 6, 2
ONLY_NEGATIVE, DEAD = 3, 4
"""neurons of layer 0 that only go below 0, and that are 0 everywhere"""


def gated_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    """A LLaMA with 6 gated neurons a layer; in layer 0 one of them never goes above 0, and one is always 0."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
            layer.post_attention_layernorm.weight.fill_(1)
        mlp: Any = model.model.layers[0].mlp
        # silu(gate) is above 0 where the gate is: a constant gate, and an input-dependent projection shifted below 0
        mlp.gate_proj.weight[ONLY_NEGATIVE] = 0
        mlp.gate_proj.bias[ONLY_NEGATIVE] = 1
        mlp.up_proj.bias[ONLY_NEGATIVE] = -8
        mlp.up_proj.weight[DEAD] = 0
        mlp.up_proj.bias[DEAD] = 0
    return model


def tokenized(folder: Path) -> Path:
    """A run with tokens of random words."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "river", "import"]
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(120):
            text = " ".join(draw.choices(words, k=draw.randint(10, 40)))
            file.write(json.dumps({"text": text}) + "\n")
    run = folder / "run"
    corpus: dict[str, Any] = {"corpus": str(folder / "corpus.jsonl"), "vocab_size": 280}
    tokenize(
        TokenizeConfig(run=run, fit=0.3, held_out=0.3, quiet=True, sequence_length=32, **corpus)
    )
    return run


def run_of_llama(folder: Path, **options: Any) -> tuple[Path, Path]:
    """A run with the harvest of such a model, and the folder of the model."""
    run = tokenized(folder)
    path = folder / "llama"
    gated_llama(300).save_pretrained(path)
    # the tokenizer of the run, so that text can be shown and steered
    TokenStore(run / "tokens").tokenizer.save(str(path / "tokenizer.json"))
    harvest(HarvestConfig(run=run, model=str(path), **{**OPTIONS, **options}))
    return run, path
