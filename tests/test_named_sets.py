"""Named sets: from local files, from a stand-in for the Hub, in any model's own tokens."""

import builtins
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F

from cratelm.errors import InputError
from cratelm.evaluate import text_sets as sets
from cratelm.evaluate.config import EvaluateConfig
from cratelm.evaluate.evaluate import EvaluateResult, evaluate
from cratelm.evaluate.measurements import Measurement
from cratelm.evaluate.text_sets import named_set
from cratelm.models import build, load
from cratelm.tokens.tokenizer import hf_tokenizer, token_sizes, train_tokenizer

T = 32
TEXTS = [
    "The white box shows what the black box hides.",
    "Größer als der Stein, été comme hiver.\n\nTwo   lines.",
    "x",
    "A longer text that runs on and on, so that it does not fit into a single window of the model "
    * 3,
]


def model_folder(folder: Path, vocab_size: int, seed: int = 0) -> Path:
    """A small GPT-2 twin with a tokenizer of its own, as `cratelm train` leaves it."""
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size)
    size = max(tokenizer.get_vocab().values()) + 1
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
    build(
        "crate-1l", vocab_size=size, max_position_embeddings=T, seed=seed, **shape
    ).save_pretrained(folder)
    hf_tokenizer(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), 280)


def jsonl(path: Path, texts: list[str], field: str = "text", **more: Any) -> Path:
    path.write_text("".join(json.dumps({field: text, **more}) + "\n" for text in texts))
    return path


def result_of(path: Path | None, *on: str, **fields: Any) -> EvaluateResult:
    """Without a run: none is needed."""
    given = {"path": path and str(path), "on": on, "quiet": True, **fields}
    return evaluate(EvaluateConfig(run=Path("/nowhere/runs"), **given))


def measure(path: Path, on: str, **fields: Any) -> Measurement:
    (found,) = result_of(path, on, **fields).measurements
    return found


def plain_losses(path: Path, text: str, *, start: bool = True) -> list[float]:
    """Loss of each token of a text, in sequences of T that do not overlap."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model = load(path)
    ids = [0] * start + tokenizer.encode(text).ids
    losses: list[float] = []
    for first in range(0, len(ids) - 1, T):
        piece = torch.tensor(ids[first : first + T + 1])
        with torch.no_grad():
            logits = model(input_ids=piece[None, :-1]).logits[0]
        losses += F.cross_entropy(logits, piece[1:], reduction="none").tolist()
    return losses


def test_every_token_of_every_text_counts_once(folder: Path, tmp_path: Path) -> None:
    found = measure(folder, f"mine={jsonl(tmp_path / 'a.jsonl', [*TEXTS, ''])}", batch_size=3)
    losses = [plain_losses(folder, text) for text in TEXTS]
    assert len(losses[3]) > 2 * T  # else nothing is cut
    nats, tokens = sum(map(sum, losses)), sum(map(len, losses))
    assert (found.on, found.documents, found.tokens) == ("mine", 4, tokens)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.words == sum(len(text.split()) for text in TEXTS)
    assert found.loss.value == pytest.approx(nats / tokens, rel=1e-5)
    assert found.bits_per_byte is not None
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)
    assert found.word_perplexity is not None
    assert found.word_perplexity.value == pytest.approx(math.exp(nats / found.words), rel=1e-4)
    assert found.last_word is None
    sums, words = [sum(part) for part in losses], [len(text.split()) for text in TEXTS]
    mean = sum(sums) / sum(words)
    squares = sum((x - mean * y) ** 2 for x, y in zip(sums, words, strict=True))
    error = math.sqrt(4 / 3 * squares) / sum(words) * math.exp(mean)
    assert found.word_perplexity.error == pytest.approx(error, rel=1e-3)


def last_word_scores(path: Path, text: str) -> tuple[float, bool]:
    """Nats of the last word, and whether a greedy reader would have written it."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    n = len(tokenizer.encode(text[: text.rindex(" ")]).ids)
    piece = torch.tensor(ids[max(0, len(ids) - 1 - T) :])
    with torch.no_grad():
        logits = load(path)(input_ids=piece[None, :-1]).logits[0, n - len(ids) :]
    targets = torch.tensor(ids[n:])
    greedy = bool((logits.argmax(-1) == targets).all())
    return float(F.cross_entropy(logits, targets, reduction="sum")), greedy


def test_of_lambada_the_last_word_is_predicted_whole(folder: Path, tmp_path: Path) -> None:
    texts = [
        "the white box shows what",
        "a longer text that hides",
        "the box été",
        TEXTS[3].strip(),
    ]
    texts += [right_ending(folder), right_ending(folder) + "Q"]  # of the second only the beginning
    found = measure(folder, f"lambada={jsonl(tmp_path / 'l.jsonl', texts)}")
    scores = [last_word_scores(folder, text) for text in texts]
    nats = np.array([s[0] for s in scores])
    assert [s[1] for s in scores] == [False] * 4 + [True, False]
    assert (found.documents, found.words, found.unit) == (6, 6, "passages")
    assert found.bytes == sum(len(text.split()[-1].encode()) + 1 for text in texts)
    assert found.last_word is not None
    assert found.last_word.value == pytest.approx(1 / 6)
    assert found.last_word.error == pytest.approx(math.sqrt(1 / 6 * 5 / 6 / 5))
    assert found.word_perplexity is not None
    assert found.word_perplexity.value == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert found.tokens > found.words  # a word of several tokens is among them
    assert found.top_1.value * found.tokens == pytest.approx(2)


def right_ending(path: Path) -> str:
    """A text whose last word, of one token, is the model's likeliest."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model = load(path)
    for word in sorted(
        t[1:] for t in tokenizer.get_vocab() if t.startswith("Ġ") and t[1:].isalpha()
    ):
        ids = tokenizer.encode(f"so {word}").ids  # an untrained model likes to say it again
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if tokenizer.id_to_token(best) == f"Ġ{word}":
            return f"so {word} {word}"
    raise AssertionError("no word is likeliest after itself: choose another seed")


def test_wikitext_is_read_by_articles_from_rows_and_from_a_file(
    folder: Path, tmp_path: Path
) -> None:
    lines = ["", " = One = ", "", " First text . ", " = = Part = = ", " More . ", "", " = Two = ", "", " Second . "]  # fmt: skip
    rows = jsonl(tmp_path / "rows.jsonl", [f"{line}\n" if line else "" for line in lines])
    whole = tmp_path / "wiki.test.txt"
    whole.write_text("".join(f"{line}\n" for line in lines))
    expected = ["".join(f"{line}\n" for line in part) for part in (lines[:7], lines[7:])]
    for path in (rows, whole):
        assert [p.text for p in named_set(f"wikitext2={path}").passages()] == expected
        found = measure(folder, f"wikitext103={path}")
        assert (found.documents, found.unit, found.words) == (2, "articles", 18)


def test_the_treebank_is_read_by_blocks_of_sentences(folder: Path, tmp_path: Path) -> None:
    lines = [f"sentence {i} of it" for i in range(120)]
    rows = jsonl(tmp_path / "ptb.jsonl", lines, field="sentence")
    plain = tmp_path / "ptb.test.txt"
    plain.write_text("".join(f" {line} \n" for line in lines))
    blocks = [p.text for p in named_set(f"ptb={rows}").passages()]
    assert [block.count("\n") for block in blocks] == [50, 50, 20]
    assert "".join(blocks) == "".join(f"{line}\n" for line in lines)
    assert [p.text for p in named_set(f"ptb={plain}").passages()] == blocks
    assert measure(folder, f"ptb={rows}").unit == "blocks of 50 sentences"


def test_the_pile_is_read_by_subset(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pile.jsonl"
    rows = [("def f(): pass", "Github"), ("Some prose.", "Pile-CC"), ("import os", "Github")]
    path.write_text(
        "".join(json.dumps({"text": t, "meta": {"pile_set_name": s}}) + "\n" for t, s in rows)
    )
    assert measure(folder, f"pile={path}").documents == 3
    found = measure(folder, f"pile:Github={path}")
    assert (found.on, found.documents, found.bytes) == ("pile:Github", 2, 22)
    with pytest.raises(InputError, match="no text of subset 'GitHub'"):
        measure(folder, f"pile:GitHub={path}")


def test_parquet_folders_and_another_field_can_be_read(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"content": TEXTS[:2]}), data / "a.parquet")
    pq.write_table(pa.table({"content": TEXTS[2:]}), data / "b.parquet")
    found = measure(folder, f"mine={data}", text_field="content")
    assert found == measure(folder, f"mine={jsonl(tmp_path / 'a.jsonl', TEXTS)}")
    with pytest.raises(InputError, match=r"no field 'text'.*--text-field"):
        measure(folder, f"mine={data}")


def test_documents_and_tokens_can_be_limited(folder: Path, tmp_path: Path) -> None:
    given = f"mine={jsonl(tmp_path / 'a.jsonl', TEXTS)}"
    assert measure(folder, given, max_documents=2).bytes == sum(len(t.encode()) for t in TEXTS[:2])
    first = len(plain_losses(folder, TEXTS[0]))
    assert measure(folder, given, max_tokens=first).documents == 1
    assert measure(folder, given, max_tokens=first + 1).documents == 2


def test_models_of_different_tokenizers_are_compared_by_byte(folder: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", 270)
    given = f"mine={jsonl(tmp_path / 'a.jsonl', TEXTS)}"
    result = result_of(None, given, models=(str(folder), str(other)))
    a, b = result.measurements
    assert a.tokens != b.tokens
    assert a.bytes == b.bytes
    (pair,) = result.differences
    assert (pair.loss, pair.top_1, pair.documents) == (None, None, 4)
    assert a.bits_per_byte is not None
    assert b.bits_per_byte is not None
    assert pair.bits_per_byte is not None
    difference = a.bits_per_byte.value - b.bits_per_byte.value
    assert pair.bits_per_byte.value == pytest.approx(difference)
    assert f"  {folder}: {a.tokens:,} tokens" in str(result)
    twin = model_folder(tmp_path / "twin", 280, seed=1)
    (pair,) = result_of(None, given, models=(str(folder), str(twin))).differences
    assert pair.loss is not None
    same = result_of(None, given, models=(str(folder), str(other)), max_tokens=30)
    assert not same.differences or same.differences[0].documents < 4


@pytest.mark.parametrize("family", ["crate", "gpt2"])
def test_a_model_without_a_tokenizer_reads_with_that_of_the_run(
    folder: Path, tmp_path: Path, family: str
) -> None:
    """transformers makes up a tokenizer of a single token for a GPT-2 that has none."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
    size = load(folder).config.vocab_size
    bare = tmp_path / "bare"
    build(f"{family}-1l", vocab_size=size, max_position_embeddings=T, **shape).save_pretrained(bare)
    given = f"mine={jsonl(tmp_path / 'a.jsonl', TEXTS)}"
    with pytest.raises(InputError, match="no tokenizer with the vocabulary of"):
        measure(bare, given)
    tokens = tmp_path / "run" / "tokens"
    tokens.mkdir(parents=True)
    (tokens / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = EvaluateConfig(run=tmp_path / "run", path=str(bare), on=(given,), quiet=True)
    (found,) = evaluate(config).measurements
    (bare / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert found == measure(bare, given)
    small = train_tokenizer(TEXTS, 260)  # more tokens than the model has rows for are not its own
    other = tmp_path / "small"
    build(f"{family}-1l", vocab_size=258, max_position_embeddings=T, **shape).save_pretrained(other)
    small.save(str(other / "tokenizer.json"))
    with pytest.raises(InputError, match="no tokenizer with the vocabulary of"):
        measure(other, given)


def test_a_text_that_names_a_special_token_is_text(folder: Path, tmp_path: Path) -> None:
    found = measure(folder, f"mine={jsonl(tmp_path / 'a.jsonl', ['<|endoftext|>'])}")
    assert found.tokens > 5


class Hub:
    """Stands for `datasets`: gives rows, remembers what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: Callable[[], Any]):
        import datasets

        self.asked: dict[str, Any] = {}

        def load_dataset(**given: Any) -> Any:
            self.asked = given
            return rows()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize(
    ("name", "hub", "streaming"),
    [
        ("lambada", "EleutherAI/lambada_openai", False),
        ("lambada_raw", "cimec/lambada", False),
        ("wikitext2", "Salesforce/wikitext", False),
        ("wikitext103", "Salesforce/wikitext", False),
        ("ptb", "ptb-text-only/ptb_text_only", False),
        ("openwebtext", "Skylion007/openwebtext", True),
        ("pile:Github", "monology/pile-uncopyrighted", True),
    ],
)
def test_a_name_is_loaded_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, hub: str, streaming: bool
) -> None:
    row = {"text": "a white box", "sentence": "a white box", "meta": {"pile_set_name": "Github"}}
    found = Hub(monkeypatch, lambda: [row] * 3)
    assert measure(folder, name).documents == (
        1 if name in ("wikitext2", "wikitext103", "ptb") else 3
    )
    assert (found.asked["path"], found.asked["streaming"]) == (hub, streaming)
    assert found.asked["split"] == ("train" if name == "openwebtext" else "test")


def test_a_streamed_set_ends_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def rows() -> Any:
        nonlocal read
        while True:
            read += 1
            assert read < 5000, "the stream is read without an end"
            yield {"text": "a white box"}

    Hub(monkeypatch, rows)
    assert len(list(named_set("openwebtext", max_documents=5).passages())) == read == 5
    read = 0
    assert len(list(named_set("openwebtext").passages())) == read == sets.STREAMED_DOCUMENTS


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fails() -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    Hub(monkeypatch, fails)
    with pytest.raises(InputError, match=r"Couldn't reach the Hub\).*--on lambada=PATH") as caught:
        measure(folder, "lambada")
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(InputError, match=r"pip install '\.\[hub\]'"):
        measure(folder, "wikitext2")


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("wikitext", "did you mean wikitext2"),
        ("mine=/nowhere", "/nowhere does not exist"),
        ("held_out=/tmp", "held_out is a split of the run"),
        ("lambada:Github", "not known"),
        ("held_out", "cratelm tokenize"),
    ],
)
def test_a_set_that_is_not_there_says_what_to_type(folder: Path, on: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure(folder, on)


def test_what_cannot_be_measured_is_told(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match="line 2"):
        measure(folder, f"mine={broken}")
    with pytest.raises(InputError, match="has no token to predict"):
        measure(folder, f"mine={jsonl(tmp_path / 'empty.jsonl', ['', ''])}")
    with pytest.raises(InputError, match="a single word"):
        measure(folder, f"lambada={jsonl(tmp_path / 'word.jsonl', ['word'])}")
    long = jsonl(tmp_path / "long.jsonl", ["a " + "ß" * 100])
    with pytest.raises(InputError, match="a last word has"):
        measure(folder, f"lambada={long}")


def test_bytes_of_tokens_in_the_way_of_sentencepiece() -> None:
    names = ["<s>", "▁the", "é", "<0xC3>", "▁", "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore
    assert token_sizes(tokenizer, 0).tolist() == [0, 4, 2, 1, 1, 2]
    plain = Tokenizer(models.BPE(vocab={"<e>": 0, "Ġthe": 1, "Ã": 2}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore
    plain.decoder = decoders.ByteLevel()  # pyright: ignore
    assert token_sizes(plain, 0).tolist() == [0, 4, 1]
