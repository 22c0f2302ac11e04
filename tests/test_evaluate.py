"""Evaluation: every token once, and each figure against a plain count."""

import json
import math
import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.evaluate import windows
from cratelm.evaluate.config import EvaluateConfig
from cratelm.evaluate.evaluate import EvaluateResult, evaluate
from cratelm.evaluate.measurements import (
    DocumentTotals,
    Measurement,
    difference,
    measurements_table,
)
from cratelm.evaluate.text_sets import Passage, Texts
from cratelm.evaluate.windows import Totals, cut, token_scores
from cratelm.models import build, load
from cratelm.models.open import LoadedModel, encoder_of, open_model, sequence_length
from cratelm.records import Estimate
from cratelm.runs import Run
from cratelm.stats.ratio import perplexity, ratio
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train

T = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenized corpus, some of it of two bytes a character, and two small models."""
    folder = tmp_path_factory.mktemp("evaluate")
    words, draw = ["red", "blue", "größer", "stone", "the", "été", "1", "\n"], random.Random(1)
    corpus = folder / "corpus.jsonl"
    with corpus.open("w") as file:
        for _ in range(150):
            text = " ".join(draw.choices(words, k=draw.randint(5, 40)))
            file.write(json.dumps({"text": text, "meta": {}}) + "\n")
    tokenize(TokenizeConfig(run=folder / "run", corpus=str(corpus), vocab_size=300, quiet=True))
    for name in ("crate-1l", "gpt2-1l"):
        train(
            TrainConfig(
                run=folder / "run",
                model=name,
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


def result_of(run: Path, **fields: Any) -> EvaluateResult:
    return evaluate(EvaluateConfig(run=run, **{"model": "crate-1l", "quiet": True, **fields}))


def measure(run: Path, **fields: Any) -> Measurement:
    (found,) = result_of(run, **fields).measurements
    return found


def plain_scores(run: Path, length: int, name: str = "crate-1l") -> tuple[np.ndarray, np.ndarray]:
    """Loss of each held-out token but the first [N], and how many tokens the model ranked above it [N]."""
    split = TokenStore(run / "tokens").split("held_out")
    model = load(run / "model" / name)
    tokens = torch.tensor(split.read(0, split.n_tokens))
    losses, ranks = [], []
    for start in range(0, len(tokens) - 1, length):
        context = tokens[start : start + length]
        with torch.no_grad():
            logits = model(input_ids=context[None]).logits[0]
        for position in range(min(length, len(tokens) - 1 - start)):
            target = tokens[start + position + 1]
            losses.append(float(F.cross_entropy(logits[position], target)))
            ranks.append(logits[position].argsort(descending=True).tolist().index(int(target)))
    return np.array(losses), np.array(ranks)


def by_document(run: Path, values: np.ndarray) -> list[np.ndarray]:
    """Values of all tokens but the first, cut at the documents' borders."""
    starts = TokenStore(run / "tokens").split("held_out").starts
    return [values[max(start - 1, 0) : stop - 1] for start, stop in pairwise(starts)]


def plain_error(run: Path, values: np.ndarray, weights: np.ndarray) -> float:
    """Standard error of sum(values) / sum(weights) over documents, by its formula."""
    x = [part.sum() for part in by_document(run, values)]
    y = [part.sum() for part in by_document(run, weights)]
    mean, n = sum(x) / sum(y), len(x)
    squares = sum((a - mean * b) ** 2 for a, b in zip(x, y, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(y)


def text_bytes(run: Path) -> np.ndarray:
    """Bytes of each held-out token but the first; the end of a document has none."""
    store = TokenStore(run / "tokens")
    split = store.split("held_out")
    ids = split.read(1, split.n_tokens)
    names = [store.tokenizer.id_to_token(int(i)) for i in ids]
    return np.array([0 if i == store.eot_id else len(n) for i, n in zip(ids, names, strict=True)])


def test_every_token_counts_once_and_the_figures_are_those_of_a_plain_count(run: Path) -> None:
    result = measure(run, batch_size=3)
    losses, ranks = plain_scores(run, T)
    split = TokenStore(run / "tokens").split("held_out")
    assert (split.n_tokens - 1) % T  # else the short last sequence is not tested
    assert result.tokens == len(losses) == split.n_tokens - 1
    assert result.sequence_length == result.stride == T
    assert result.loss.value == pytest.approx(losses.mean(), rel=1e-5)
    assert result.perplexity.value == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert result.top_1.value == pytest.approx((ranks < 1).mean())
    assert result.top_5.value == pytest.approx((ranks < 5).mean())
    assert 0 < result.top_1.value < result.top_5.value < 1


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
    assert result.bytes == n_bytes
    bits = result.loss.value * result.tokens / math.log(2)
    assert result.bits_per_byte is not None
    assert result.bits_per_byte.value == pytest.approx(bits / n_bytes, rel=1e-6)


def test_every_figure_has_a_standard_error_over_documents(run: Path) -> None:
    losses, ranks = plain_scores(run, T)
    ones = np.ones(len(losses))
    result = measure(run)
    assert result.documents == len(by_document(run, losses))
    loss_error = plain_error(run, losses, ones)
    assert result.loss.error == pytest.approx(loss_error, rel=1e-4)
    assert result.perplexity.error == pytest.approx(math.exp(losses.mean()) * loss_error, rel=1e-4)
    assert result.top_1.error == pytest.approx(plain_error(run, ranks < 1, ones), rel=1e-6)
    assert result.top_5.error == pytest.approx(plain_error(run, ranks < 5, ones), rel=1e-6)
    assert result.bits_per_byte is not None
    expected = plain_error(run, losses / math.log(2), text_bytes(run))
    assert result.bits_per_byte.error == pytest.approx(expected, rel=1e-4)


def test_the_error_is_the_spread_of_the_figure_over_samples_of_documents() -> None:
    """The formulas against a bootstrap, which knows none of them; documents of unlike length."""
    draw = np.random.default_rng(0)
    y = draw.integers(5, 60, 400).astype(float)
    x = y * draw.normal(3.0, 0.5, 400)
    loss = ratio(x, y)
    rows = draw.integers(0, 400, (4000, 400))
    samples = x[rows].sum(1) / y[rows].sum(1)
    assert loss.error == pytest.approx(samples.std(), rel=0.05)
    assert perplexity(loss).error == pytest.approx(np.exp(samples).std(), rel=0.05)


def test_equal_logits_are_ranked_by_their_id() -> None:
    """A model that holds all tokens for equally likely is right once in V times, not always."""
    scores = token_scores(torch.zeros(8, 8), torch.arange(8))
    assert scores.ranks.tolist() == list(range(8))
    assert scores.losses.tolist() == pytest.approx([math.log(8)] * 8)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 40, 41])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 7, 8])
def test_windows_count_every_token_once_and_keep_the_context(n: int, stride: int) -> None:
    length, counted = 8, []
    for start, stop, first in cut(n, length, stride):
        assert 0 < stop - start <= length
        for target in range(first + 1, stop + 1):
            context = target - start
            assert context >= min(target, length - stride + 1)
            counted.append(target)
    assert counted == list(range(1, n + 1))


def test_passes_over_texts_do_not_disturb_each_other(run: Path) -> None:
    encoder = encoder_of(open_model(Run(run), "crate-1l"), Run(run))
    texts = Texts([Passage("stone and river"), Passage("ä")], encoder, "documents", None)
    first, second = texts.windows(4, 4), texts.windows(4, 4)
    assert first.n_bytes().tolist() == []
    assert len(list(first)) > 1
    assert (first.n_bytes().tolist(), first.n_words().tolist()) == ([15, 2], [3, 1])
    assert second.n_bytes().tolist() == []
    next(iter(second))
    assert second.n_bytes().tolist() == [15]
    assert first.n_bytes().tolist() == [15, 2]


@pytest.mark.parametrize("max_tokens", [None, 3 * T, 3 * T + 1, 4 * T - 1, T - 1])
def test_a_stride_of_the_sequence_length_is_no_stride(run: Path, max_tokens: int | None) -> None:
    plain = measure(run, max_tokens=max_tokens)
    assert measure(run, max_tokens=max_tokens, stride=T) == plain
    assert measure(run, max_tokens=max_tokens, stride=5).tokens == plain.tokens


def test_a_stride_of_1_gives_every_token_all_the_context(run: Path) -> None:
    n = 3 * T + 5
    tokens = torch.tensor(TokenStore(run / "tokens").split("held_out").read(0, n + 1))
    model = load(run / "model/crate-1l")
    losses, hits = [], []
    for target in range(1, n + 1):
        with torch.no_grad():
            logits = model(input_ids=tokens[None, max(0, target - T) : target]).logits[0, -1]
        losses.append(float(F.cross_entropy(logits, tokens[target])))
        hits.append(int(logits.argmax()) == int(tokens[target]))
    result = measure(run, max_tokens=n, stride=1, batch_size=7)
    assert (result.tokens, result.stride) == (n, 1)
    assert result.loss.value == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.top_1.value == pytest.approx(np.mean(hits))
    assert result.loss.value != pytest.approx(measure(run, max_tokens=n).loss.value, rel=1e-3)


def test_a_forward_pass_is_cut_where_its_logits_are_too_many(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(run)
    sizes: list[int] = []
    forward = windows.next_logits

    def watched(model: Any, tokens: torch.Tensor, last: int) -> torch.Tensor:
        logits = forward(model, tokens, last)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(windows, "next_logits", watched)
    most = 2 * T * load(run / "model/crate-1l").config.vocab_size
    monkeypatch.setattr(windows, "MOST_LOGITS", most)
    assert measure(run).loss.value == pytest.approx(whole.loss.value, rel=1e-6)
    assert max(sizes) == most
    sizes.clear()
    measure(run, stride=1, max_tokens=4 * T)
    assert min(sizes) < T * load(run / "model/crate-1l").config.vocab_size  # only what is asked for


def test_a_model_is_asked_only_for_the_logits_that_count() -> None:
    class Model:
        kept = 0

        def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            self.kept = logits_to_keep
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3)[:, -logits_to_keep:])

        def __call__(self, **given: Any) -> Any:
            return self.forward(**given)

    class Deaf(Model):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:  # type: ignore[override]
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3))

    model, tokens = Model(), torch.zeros(2, 9, dtype=torch.long)
    assert windows.next_logits(model, tokens, 4).shape == (2, 4, 3)
    assert model.kept == 4
    assert windows.next_logits(Deaf(), tokens, 4).shape == (2, 4, 3)


def test_max_tokens_takes_the_first_ones(run: Path) -> None:
    losses, ranks = plain_scores(run, T)
    n = 2 * T + 5
    result = measure(run, max_tokens=n)
    assert result.tokens == n
    assert result.loss.value == pytest.approx(losses[:n].mean(), rel=1e-5)
    assert result.top_1.value == pytest.approx((ranks < 1)[:n].mean())


def test_a_single_document_has_no_standard_error(run: Path) -> None:
    result = measure(run, max_tokens=1)
    assert (result.documents, result.loss.error, result.perplexity.error) == (1, None, None)
    assert "±" not in str(result_of(run, max_tokens=1))


def test_the_length_of_sequences_and_the_split_can_be_chosen(run: Path) -> None:
    losses, _ = plain_scores(run, 8)
    assert measure(run, sequence_length=8).loss.value == pytest.approx(losses.mean(), rel=1e-5)
    store = TokenStore(run / "tokens")
    assert measure(run, split="fit").tokens == store.split("fit").n_tokens - 1
    assert [m.on for m in result_of(run, on=("fit", "held_out")).measurements] == [
        "fit",
        "held_out",
    ]


def test_a_folder_can_be_measured_and_the_figures_written(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "model/crate-1l", copy)
    result = measure(run, model="none", path=str(copy), output=tmp_path / "figures.json")
    assert result.loss == measure(run).loss
    (written,) = json.loads((tmp_path / "figures.json").read_text())["measurements"]
    assert written["loss"] == {"value": result.loss.value, "error": result.loss.error}
    assert written["model"] == str(copy)


def test_models_are_compared_document_by_document(run: Path) -> None:
    result = result_of(run, models=("crate-1l", "gpt2-1l"))
    (pair,) = result.differences
    (a, ranks_a), (b, ranks_b) = plain_scores(run, T), plain_scores(run, T, "gpt2-1l")
    ones = np.ones(len(a))
    assert (pair.model, pair.less, pair.documents) == (
        "crate-1l",
        "gpt2-1l",
        len(by_document(run, a)),
    )
    assert pair.loss is not None
    assert pair.top_5 is not None
    assert pair.loss.value == pytest.approx((a - b).mean(), abs=1e-6)
    assert pair.loss.error == pytest.approx(plain_error(run, a - b, ones), rel=1e-3)
    hits = (ranks_a < 5).astype(float) - (ranks_b < 5)
    assert pair.top_5.value == pytest.approx(hits.mean())
    assert pair.top_5.error == pytest.approx(plain_error(run, hits, ones), rel=1e-6)
    first, second = result.measurements
    assert pair.loss.value == pytest.approx(first.loss.value - second.loss.value)
    assert first.loss.error is not None
    assert pair.loss.error < first.loss.error  # what is hard for both has gone


def counts(vocabulary: str, n_bytes: int) -> DocumentTotals:
    tokens = np.array([4.0, 6.0])
    totals = Totals(tokens, loss=tokens * 2, top_1=tokens / 2, top_5=tokens)
    return DocumentTotals(totals, np.array([9, n_bytes]), None, None, vocabulary)


def test_only_what_predicts_the_same_is_compared() -> None:
    names = {"model": "a", "less": "b", "on": "set"}
    whole = difference(counts("x", 9), counts("x", 9), **names)
    assert whole is not None
    assert whole.loss == Estimate(0.0, 0.0)
    by_byte = difference(counts("x", 9), counts("y", 9), **names)  # as many tokens, but others
    assert by_byte is not None
    assert (by_byte.loss, by_byte.top_1, by_byte.top_5) == (None, None, None)
    assert by_byte.bits_per_byte == Estimate(0.0, 0.0)
    assert difference(counts("x", 9), counts("x", 8), **names) is None  # other texts


def test_a_perplexity_that_is_long_is_written_short(run: Path) -> None:
    found = replace(measure(run), perplexity=Estimate(1.234e9, 5.6e8))
    assert "1.23e+09 ± 5.6e+08" in measurements_table([found])
    assert "1,234.50 ± 2.00" in measurements_table(
        [replace(found, perplexity=Estimate(1234.5, 2.0))]
    )


def test_a_model_less_itself_is_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model/crate-1l", tmp_path / "copy")
    (pair,) = result_of(run, models=("crate-1l", str(tmp_path / "copy"))).differences
    assert pair.loss == pair.bits_per_byte == pair.top_1 == Estimate(0.0, 0.0)


def test_the_table_shows_every_figure_with_its_error(run: Path) -> None:
    result = result_of(run, models=("crate-1l", "gpt2-1l"))
    shown = str(result)
    (pair,) = result.differences
    for m in result.measurements:
        assert f"{m.loss.value:.4f} ± {m.loss.error:.4f}" in shown
        assert f"{m.top_5.value:.2%}" in shown
    assert pair.loss is not None
    assert f"{pair.loss.value:+.4f} ± {pair.loss.error:.4f}" in shown
    assert f"{result.measurements[0].tokens:,} tokens" in shown
    assert "held_out: crate-1l - gpt2-1l" in shown


def test_weights_that_are_no_numbers_are_told(run: Path, tmp_path: Path) -> None:
    model = load(run / "model/crate-1l")
    with torch.no_grad():
        model.base_model.embed_positions.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(InputError, match=r"loss of .*bad on held_out is nan"):
        measure(run, path=str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "gpt2-9l"}, "cratelm train .*--model gpt2-9l"),
        ({"models": ("crate-1l", "gpt2-9l")}, "cratelm train .*--model gpt2-9l"),
        ({"path": "/nowhere/at/all"}, "no model can be loaded"),
        ({"sequence_length": T + 1}, "--sequence-length"),
        ({"stride": T + 1}, "--stride is 17, more than the 16"),
        ({"batch_size": 0}, "--batch-size"),
        ({"split": "test"}, "--split"),
        ({"models": ("crate-1l", "crate-1l")}, "--models has the same name twice"),
        ({"on": ("mine=a.jsonl", "mine=b.jsonl")}, "--on has the same name twice"),
        ({"models": ("crate-1l",), "path": "x"}, "--path and --models"),
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
    (copy / "completed.json").unlink()  # a folder from elsewhere
    with pytest.raises(InputError, match="differs from the tokenizer of the run"):
        measure(run, path=str(copy))


@pytest.mark.parametrize(
    ("most", "wanted", "expected"),
    [(16, None, 16), (16, 8, 8), (131072, None, 2048), (131072, 4096, 4096), (None, None, 1024)],
)
def test_the_length_is_what_the_model_takes(
    most: int | None, wanted: int | None, expected: int
) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=most))
    subject = LoadedModel("m", "m", SimpleNamespace(config=config))
    assert sequence_length(subject, wanted) == expected


def test_a_run_without_tokens_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cratelm tokenize"):
        evaluate(EvaluateConfig(run=Run(tmp_path).path))


def test_a_wrong_name_is_told_before_another_model_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cratelm.evaluate.evaluate._measure", lambda *_: pytest.fail("was measured")
    )
    with pytest.raises(InputError, match="gpt2-9l is missing or not finished"):
        result_of(run, models=("crate-1l", "gpt2-9l"))
