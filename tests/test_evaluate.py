"""Evaluation: every token once, and each figure against a plain count."""

import json
import math
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.evaluate.config import EvaluateConfig
from cratelm.evaluate.loss import EvaluateResult, evaluate
from cratelm.models import build, load
from cratelm.runs import Run
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

T = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenized corpus, some of it of two bytes a character, and a small model."""
    folder = tmp_path_factory.mktemp("evaluate")
    words, draw = ["red", "blue", "größer", "stone", "the", "été", "1", "\n"], random.Random(1)
    corpus = folder / "corpus.jsonl"
    with corpus.open("w") as file:
        for _ in range(150):
            text = " ".join(draw.choices(words, k=draw.randint(5, 40)))
            file.write(json.dumps({"text": text, "meta": {}}) + "\n")
    tokenize(TokenizeConfig(run=folder / "run", corpus=str(corpus), vocab_size=300, quiet=True))
    train(
        TrainConfig(
            run=folder / "run",
            model="crate-1l",
            steps=5,
            batch_size=4,
            sequence_length=T,
            validation_sequences=4,
            model_overrides=("hidden_size=32", "num_attention_heads=2"),
            tensorboard=False,
            quiet=True,
        )
    )
    return folder / "run"


def measure(run: Path, **fields: Any) -> EvaluateResult:
    return evaluate(EvaluateConfig(run=run, **{"model": "crate-1l", "quiet": True, **fields}))


def plain_losses(run: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and hit of each held-out token but the first, one sequence and one token at a time."""
    split = TokenStore(run / "tokens").split("held_out")
    model = load(run / "model/crate-1l")
    tokens = torch.tensor(split.read(0, split.n_tokens))
    losses, hits = [], []
    for start in range(0, len(tokens) - 1, length):
        context = tokens[start : start + length]
        with torch.no_grad():
            logits = model(input_ids=context[None]).logits[0]
        for position in range(min(length, len(tokens) - 1 - start)):
            target = tokens[start + position + 1]
            losses.append(float(F.cross_entropy(logits[position], target)))
            hits.append(int(logits[position].argmax()) == int(target))
    return np.array(losses), np.array(hits)


def test_every_token_counts_once_and_the_figures_are_those_of_a_plain_count(run: Path) -> None:
    result = measure(run, batch_size=3)
    losses, hits = plain_losses(run, T)
    split = TokenStore(run / "tokens").split("held_out")
    assert (split.n_tokens - 1) % T  # else the short last sequence is not tested
    assert result.tokens == len(losses) == split.n_tokens - 1
    assert result.sequence_length == T
    assert result.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert result.accuracy == pytest.approx(hits.mean())


def test_bits_per_byte_counts_the_bytes_of_the_text(run: Path) -> None:
    store = TokenStore(run / "tokens")
    split = store.split("held_out")
    n_bytes = 0
    for start, stop in pairwise(split.starts):
        text = store.tokenizer.decode(list(split.read(start, stop)), skip_special_tokens=True)
        n_bytes += len(text.encode())
    first = store.tokenizer.decode([int(split.read(0, 1)[0])])  # is not predicted
    n_bytes -= len(first.encode())
    result = measure(run)
    bits = result.loss * result.tokens / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / n_bytes, rel=1e-6)


def test_the_standard_error_is_that_of_a_mean_over_documents(run: Path) -> None:
    losses, _ = plain_losses(run, T)
    starts = TokenStore(run / "tokens").split("held_out").starts
    documents = [  # token 0 has no loss, so that loss i belongs to token i + 1
        losses[max(start - 1, 0) : stop - 1] for start, stop in pairwise(starts)
    ]
    mean, n = losses.mean(), len(documents)
    squares = sum((part.sum() - mean * len(part)) ** 2 for part in documents)
    expected = math.sqrt(n / (n - 1) * squares) / len(losses)
    result = measure(run)
    assert result.documents == n
    assert result.standard_error == pytest.approx(expected, rel=1e-4)


def test_max_tokens_takes_the_first_ones(run: Path) -> None:
    losses, hits = plain_losses(run, T)
    n = 2 * T + 5
    result = measure(run, max_tokens=n)
    assert result.tokens == n
    assert result.loss == pytest.approx(losses[:n].mean(), rel=1e-5)
    assert result.accuracy == pytest.approx(hits[:n].mean())


def test_a_single_document_has_no_standard_error(run: Path) -> None:
    result = measure(run, max_tokens=1)
    assert (result.documents, result.standard_error) == (1, None)
    assert "standard error" not in str(result)


def test_the_length_of_sequences_and_the_split_can_be_chosen(run: Path) -> None:
    losses, _ = plain_losses(run, 8)
    assert measure(run, sequence_length=8).loss == pytest.approx(losses.mean(), rel=1e-5)
    store = TokenStore(run / "tokens")
    assert measure(run, split="fit").tokens == store.split("fit").n_tokens - 1


def test_a_folder_can_be_measured_and_the_figures_written(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "model/crate-1l", copy)
    result = measure(run, model="none", path=str(copy), output=tmp_path / "figures.json")
    assert result.loss == measure(run).loss
    assert json.loads((tmp_path / "figures.json").read_text())["loss"] == result.loss


def test_the_table_names_what_was_measured(run: Path) -> None:
    result = measure(run)
    shown = str(result)
    assert f"{result.loss:.4f} nats a token (standard error {result.standard_error:.4f})" in shown
    assert f"{result.tokens:,} in {result.documents:,} documents" in shown
    assert f"{result.bits_per_byte:.4f}" in shown
    assert f"{result.accuracy:.2%}" in shown


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "gpt2-9l"}, "cratelm train .*--model gpt2-9l"),
        ({"path": "/nowhere/at/all"}, "no model can be loaded"),
        ({"sequence_length": T + 1}, "--sequence-length"),
        ({"batch_size": 0}, "--batch-size"),
        ({"split": "test"}, "--split"),
    ],
)
def test_mistakes_say_what_to_type(run: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure(run, **fields)


def test_a_model_of_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    small = build(
        "gpt2-1l", vocab_size=128, max_position_embeddings=T, hidden_size=32, num_attention_heads=2
    )
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="vocabulary of 128"):
        measure(run, path=str(tmp_path / "small"))
    copy = tmp_path / "renamed"
    shutil.copytree(run / "model/crate-1l", copy)
    text = (copy / "tokenizer.json").read_text()
    swapped = text.replace('"<|endoftext|>"', '"<|other|>"')
    assert swapped != text
    (copy / "tokenizer.json").write_text(swapped)
    with pytest.raises(InputError, match="another tokenizer"):
        measure(run, path=str(copy))


def test_a_run_without_tokens_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cratelm tokenize"):
        evaluate(EvaluateConfig(run=Run(tmp_path).path))
