"""A run with a small LLaMA whose tokenizer adds a begin token or not, and what the model reads in each verb."""

import inspect
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize

END, BEGIN, CAT = 0, 1, " cat"
T = 32
"""tokens per sequence"""
WORDS = ["the", "cat", "sat", "on", "a", "mat", "river", "stone", "and", "ran", "blue", "red"]


def texts(n: int = 160) -> list[str]:
    draw = random.Random(3)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 45))) for _ in range(n)]


def tokenizer_file(folder: Path) -> Path:
    """A byte-level BPE with the special tokens <|endoftext|> (0) and <s> (1), which adds neither."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tokens(folder: Path) -> Path:
    """A run with tokens alone."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()), encoding="utf-8")
    run = folder / "run"
    tokenize(TokenizeConfig(run=run, corpus=str(corpus), tokenizer=str(tokenizer_file(folder)), sequence_length=16, fit=0.4, held_out=0.4, quiet=True))  # fmt: skip
    return run


def model_folder(folder: Path, run: Path, *, adds_begin: bool, **settings: Any) -> Path:
    """A folder with a LLaMA of 2 layers with random weights, and the tokenizer of the run."""
    vocabulary = TokenStore(run / "tokens").vocab_size
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, bos_token_id=BEGIN, eos_token_id=END, initializer_range=0.5, **{**sizes, **settings})  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(run / "tokens" / "tokenizer.json"))
    if adds_begin:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)])  # type: ignore[assignment]  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


@contextmanager
def read_by_models() -> Iterator[list[np.ndarray]]:
    """The token ids [B, n] of every pass of a LLaMA while open, without the probes of sites and heads.

    Those are the same 6 tokens in all rows, or tokens 0 to 5; tokens that follow in a cache, or are treated by themselves, are [B, 1].
    """
    seen: list[np.ndarray] = []
    forward = LlamaModel.forward

    def watched(self: Any, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if input_ids is not None and input_ids.shape[1] > 1:
            ids = input_ids.detach().cpu().numpy()
            of_head = ids.shape[1] == 6 and (ids == ids[0]).all()
            of_site = ids.size == 6 and (ids.ravel() == np.arange(6)).all()
            if not (of_head or of_site):
                seen.append(ids)
        return forward(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        patch.setattr(LlamaModel, "forward", watched)
        yield seen


@contextmanager
def planted(
    neuron: int, cat: int, at_first: float = 3000.0, on_cat: float = 50.0
) -> Iterator[None]:
    """Every LLaMA loaded while open has a neuron of layer 0 that fires hugely at position 0, and on ` cat`."""
    import cratelm.models.open as opened

    load = opened.load

    def with_neuron(*args: Any, **kwargs: Any) -> Any:
        model: Any = load(*args, **kwargs)
        ids: list[torch.Tensor] = []

        def remember(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            ids[:] = [named["input_ids"] if "input_ids" in named else arguments[0]]

        def fire(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            changed = arguments[0].clone()
            changed[..., neuron] = 0.01 * changed[..., neuron].abs()
            changed[..., neuron] += on_cat * (ids[0] == cat)
            changed[:, 0, neuron] = at_first
            return (changed, *arguments[1:])

        model.model.register_forward_pre_hook(remember, with_kwargs=True)
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(fire)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "load", with_neuron)
        yield
