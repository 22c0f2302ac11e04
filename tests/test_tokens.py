"""Shards: what goes in comes out, borders and splits hold, and every mistake is told in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import copied, reseal
from tokenizers import Tokenizer, models

from cratelm.corpus.documents import Document
from cratelm.errors import InputError
from cratelm.records import SPLITS
from cratelm.runs import Run
from cratelm.tokens import tokenize as verb
from cratelm.tokens import tokenizer as tokenizers_room
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.encoding import split_of
from cratelm.tokens.shards import StoreWriter, TokenStore, check_vocabulary
from cratelm.tokens.tokenize import TokenizeResult, tokenize
from cratelm.tokens.tokenizer import (
    END_OF_TEXT,
    characters_of_bytes,
    from_tiktoken,
    hf_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SHARED = Path(os.environ.get("CRATELM_SHARED", Path(__file__).parents[2] / "shared"))
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "naïve",
    "🦀",
    "crabs",
]


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there: set CRATELM_SHARED to the folder of shared material")
    return path


def sentences(n: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(5, 40))) for _ in range(n)]


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def make(folder: Path, corpus: Path | str, **fields: Any) -> TokenizeResult:
    fields = {"vocab_size": 300, "sequence_length": 16, "quiet": True, **fields}
    return tokenize(TokenizeConfig(run=folder / "run", corpus=str(corpus), **fields))


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(sentences(50), 300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", sentences(200))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> TokenStore:
    return TokenStore(make(tmp_path_factory.mktemp("store"), corpus).path)


def texts_of(store: TokenStore, split: Any) -> list[str]:
    """Texts of a split, decoded from the shards; checks the end-of-text token of each."""
    part = store.split(split)
    texts = []
    for start, stop in zip(part.starts[:-1], part.starts[1:], strict=True):
        ids = part.read(int(start), int(stop))
        assert ids[-1] == store.eot_id
        texts.append(store.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return texts


# Shards


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=8),
    tokens_per_file=st.integers(1, 40),
)
def test_any_text_comes_back_across_the_borders_of_files(
    tmp_path: Path, small_tokenizer: Tokenizer, texts: list[str], tokens_per_file: int
) -> None:
    folder = tmp_path / "tokens"
    for old in folder.glob("*"):
        old.unlink()
    writer = StoreWriter(folder, small_tokenizer, 0, tokens_per_file=tokens_per_file)
    for text in texts:
        ids = small_tokenizer.encode(text).ids
        assert 0 not in ids  # the end-of-text token is never made by a text
        writer.append("fit", ids, Document(text, "s", "n", 1, ""))
    writer.close()
    store = TokenStore(folder)
    split = store.split("fit")
    assert texts_of(store, "fit") == texts
    assert split.n_tokens == sum(len(small_tokenizer.encode(t).ids) + 1 for t in texts)
    assert len(list(folder.glob("fit-*.bin"))) == -(-split.n_tokens // tokens_per_file)
    assert store.split("train").n_tokens == 0
    assert store.split("train").n_sequences(4) == 0


def counted(folder: Path, n: int, tokenizer: Tokenizer, tokens_per_file: int = 7) -> TokenStore:
    """A store whose train split holds documents of 4 tokens: 1 2 3 EOT 4 5 6 EOT ..."""
    writer = StoreWriter(folder, tokenizer, 0, tokens_per_file=tokens_per_file)
    for i in range(n):
        writer.append("fit", [9], Document("x", "s", "n", 1, ""))
        writer.append("train", [3 * i + 1, 3 * i + 2, 3 * i + 3], Document("abc", "s", "n", i, "B"))
    writer.close()
    return TokenStore(folder)


def test_positions_sequences_and_documents(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    store = counted(tmp_path / "tokens", 5, small_tokenizer)
    split = store.split("train")
    assert (split.n_tokens, split.n_documents) == (20, 5)
    assert split.starts.tolist() == [0, 4, 8, 12, 16, 20]
    assert split.ordinals.tolist() == [1, 3, 5, 7, 9]
    whole = [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0, 10, 11, 12, 0, 13, 14, 15, 0]
    assert split.read(0, 20).tolist() == whole
    assert split.read(5, 16).tolist() == whole[5:16]
    assert split.read(3, 3).tolist() == []
    assert split.read(0, 20).dtype == np.int64
    at = np.array([[19, 0, 6], [7, 7, 13]])  # in several files
    assert split.read_at(at).tolist() == [[whole[i] for i in row] for row in at.tolist()]
    for outside in (-1, split.n_tokens):
        with pytest.raises(IndexError, match="outside"):
            split.read_at(np.array([0, outside]))
    assert [split.n_sequences(t) for t in (1, 4, 5, 19, 20)] == [19, 4, 3, 1, 0]
    assert split.sequence(1, 5).tolist() == whole[5:11]
    assert split.documents_at(np.array([0, 3, 4, 19])).tolist() == [1, 1, 3, 9]
    for start, stop in ((-1, 3), (0, 21), (4, 3)):
        with pytest.raises(IndexError):
            split.read(start, stop)


def test_documents_table_says_where_each_document_lies(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cratelm.tokens.shards._ROWS_PER_GROUP", 4)
    counted(tmp_path / "tokens", 5, small_tokenizer)
    rows = pq.read_table(tmp_path / "tokens" / "documents.parquet").to_pylist()
    assert [r["ordinal"] for r in rows] == list(range(10))
    assert rows[5] == {
        "ordinal": 5,
        "split": "train",
        "source": "s",
        "subset": "B",
        "name": "n",
        "line": 2,
        "start": 8,
        "n_tokens": 4,
        "characters": 3,
    }


@pytest.mark.parametrize(
    ("vocab", "size", "padded"), [(2**16, 2, 65536), (2**16 + 1, 4, 65600), (50257, 2, 50304)]
)
def test_tokens_take_16_bits_while_they_fit(
    tmp_path: Path, vocab: int, size: int, padded: int
) -> None:
    words = {END_OF_TEXT: 0, **{f"w{i}": i for i in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END_OF_TEXT))
    writer = StoreWriter(tmp_path / "tokens", tokenizer, 0)
    writer.append("train", [vocab - 1, 1], Document("x", "s", "n", 1, ""))
    writer.close()
    store = TokenStore(tmp_path / "tokens")
    assert store.split("train").read(0, 3).tolist() == [vocab - 1, 1, 0]
    assert (tmp_path / "tokens" / "train-00000.bin").stat().st_size == 3 * size
    assert (store.vocab_size, store.padded_vocab_size) == (vocab, padded)


@pytest.mark.parametrize("damage", ["train-00000.bin", "train.starts.npy", "train.ordinals.npy"])
def test_damaged_shards_are_told(tmp_path: Path, small_tokenizer: Tokenizer, damage: str) -> None:
    folder = tmp_path / "tokens"
    counted(folder, 5, small_tokenizer, tokens_per_file=100)
    path = folder / damage
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{damage} is missing or damaged.*--force"):
            TokenStore(folder).split("train")
    if damage.endswith(".npy"):
        np.save(path, np.arange(3))  # readable, and of another corpus
    else:
        path.unlink()
    with pytest.raises(InputError, match=rf"{damage} is missing or damaged"):
        TokenStore(folder).split("train")


def test_a_store_that_is_not_there_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cratelm tokenize --run"):
        TokenStore(tmp_path / "tokens")
    (tmp_path / "meta.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="it must describe shards of format 1"):
        TokenStore(tmp_path)


def test_a_model_of_another_vocabulary_is_refused(store: TokenStore) -> None:
    for fits in (store.vocab_size, store.padded_vocab_size, store.vocab_size + 1024):
        check_vocabulary(store, fits)
    for wrong in (store.vocab_size - 1, store.vocab_size + 1025):
        with pytest.raises(InputError, match=r"vocabulary of .*--tokenizer PATH"):
            check_vocabulary(store, wrong)


# The verb


def test_splits_are_disjoint_and_hold_every_document(store: TokenStore, corpus: Path) -> None:
    parts = {name: texts_of(store, name) for name in SPLITS}
    texts = [json.loads(line)["text"] for line in corpus.open()]
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    assert len({text for part in parts.values() for text in part}) == sum(
        len(set(part)) for part in parts.values()
    )
    ordinals = np.concatenate([store.split(name).ordinals for name in SPLITS])
    assert sorted(ordinals.tolist()) == list(range(len(texts)))
    rows = pq.read_table(store.path / "documents.parquet").to_pylist()
    for name in SPLITS:
        split = store.split(name)
        for text, ordinal in zip(parts[name], split.ordinals, strict=True):
            row = rows[ordinal]
            assert (row["split"], texts[row["line"] - 1], row["characters"]) == (
                name,
                text,
                len(text),
            )


def test_duplicates_share_a_split_and_fractions_hold(tmp_path: Path) -> None:
    texts = sentences(100) * 3
    result = make(tmp_path, write_corpus(tmp_path / "c.jsonl", texts), fit=0.2, held_out=0.3)
    store = TokenStore(result.path)
    parts = {name: texts_of(store, name) for name in SPLITS}
    for name in SPLITS:
        assert all(parts[name].count(text) == 3 for text in parts[name])
    splits = [split_of(str(i), 0.2, 0.3) for i in range(20_000)]
    for name, fraction in (("train", 0.5), ("fit", 0.2), ("held_out", 0.3)):
        assert splits.count(name) / 20_000 == pytest.approx(fraction, abs=0.015)


def test_results_are_counted(tmp_path: Path) -> None:
    texts = ["", *sentences(150), ""]
    result = make(tmp_path, write_corpus(tmp_path / "c.jsonl", texts))
    store = TokenStore(result.path)
    assert (result.empty, result.skipped) == (2, 0)
    assert sum(result.documents.values()) == 150
    assert result.tokens == {name: store.split(name).n_tokens for name in SPLITS}
    n = sum(result.tokens.values()) - 150
    assert result.bytes_per_token == pytest.approx(sum(len(t.encode()) for t in texts) / n)
    done = Run(tmp_path / "run").stage("tokens").require("tokenize")
    assert done.results["tokens"] == result.tokens
    assert done.results["vocab_size"] == result.vocab_size == store.vocab_size


def test_a_text_cannot_inject_a_special_token(tmp_path: Path) -> None:
    texts = [f"{s} {END_OF_TEXT} {s}" for s in sentences(150)]
    store = TokenStore(make(tmp_path, write_corpus(tmp_path / "c.jsonl", texts)).path)
    n = 0
    for name in SPLITS:
        split = store.split(name)
        assert (split.read(0, split.n_tokens) == store.eot_id).sum() == split.n_documents
        n += len([t for t in texts_of(store, name) if t in texts])
    assert n == 150


def test_the_tokenizer_sees_only_the_train_split_and_a_bounded_sample(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts: Any, vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(verb, "train_tokenizer", spy)
    train = [t for t in sentences(200) if split_of(t, 0.05, 0.05) == "train"]
    make(tmp_path, corpus)
    assert seen == train
    seen.clear()
    make(tmp_path, corpus, sample_megabytes=0.001, force=True)
    assert seen == train[: len(seen)]
    sizes = [len(t.encode()) for t in seen]
    assert sum(sizes[:-1]) < 1000 <= sum(sizes)


def test_the_same_command_gives_the_same_files_in_any_process(tmp_path: Path, corpus: Path) -> None:
    def files(name: str) -> dict[str, bytes]:
        folder = tmp_path / name / "run" / "tokens"
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "completed.json"}

    make(tmp_path / "a", corpus, vocab_size=400)
    script = (
        "from cratelm.tokens.config import *; from cratelm.tokens.tokenize import tokenize;"
        f"tokenize(TokenizeConfig(run=Path({str(tmp_path / 'b' / 'run')!r}),"
        f"corpus={str(corpus)!r}, vocab_size=400, sequence_length=16))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)
    assert files("a") == files("b")
    assert len(files("a")) == 3 + 6 + 3


def test_batches_do_not_show(
    tmp_path: Path, corpus: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cratelm.tokens.encoding._BATCH_BYTES", 300)
    path = make(tmp_path, corpus).path
    for name in ("train-00000.bin", "fit-00000.bin", "documents.parquet"):
        assert (path / name).read_bytes() == (store.path / name).read_bytes()


def test_limits_stop_at_a_whole_document(tmp_path: Path, corpus: Path) -> None:
    result = make(tmp_path / "a", corpus, max_documents=120)
    assert sum(result.documents.values()) == 120
    whole = make(tmp_path / "b", corpus)
    result = make(
        tmp_path / "c", corpus, max_tokens=5000, tokenizer=str(whole.path / "tokenizer.json")
    )
    last = pq.read_table(result.path / "documents.parquet").column("n_tokens")[-1].as_py()
    assert sum(result.tokens.values()) - last < 5000 <= sum(result.tokens.values())


def test_finished_tokens_are_skipped_and_a_changed_corpus_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", sentences(150))
    first = make(tmp_path, corpus)
    stamp = (first.path / "completed.json").stat().st_mtime_ns
    assert make(tmp_path, corpus) == first
    assert "tokens is finished, skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="the fit split has"):  # asked for longer sequences since
        make(tmp_path, corpus, sequence_length=100_000)
    write_corpus(corpus, sentences(151))
    with pytest.raises(InputError, match=r"input corpus that has changed since.*--force"):
        make(tmp_path, corpus)
    assert (first.path / "completed.json").stat().st_mtime_ns == stamp
    assert sum(make(tmp_path, corpus, force=True).documents.values()) == 151


# Bad input


def bad_corpus(folder: Path, kind: str) -> Path:
    good = "".join(json.dumps({"text": t}) + "\n" for t in sentences(150)).encode()
    path = folder / ("c.jsonl.zst" if kind == "truncated" else "c.jsonl")
    content = {
        "broken": good + b'{"text": \n',
        "field": good + b'{"body": "x"}\n',
        "utf8": good + b'{"text": "\xff"}\n',
        "truncated": zstandard.compress(good) + zstandard.compress(good)[:-9],
    }
    path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("broken", r"c\.jsonl, line 151: invalid JSON"),
        ("field", r"c\.jsonl, line 151: no field 'text'"),
        ("utf8", r"c\.jsonl, line 151: byte 0xff"),
        ("truncated", r"c\.jsonl\.zst, after line \d+: the file is cut short"),
    ],
)
def test_bad_documents_stop_or_are_counted(tmp_path: Path, kind: str, expected: str) -> None:
    corpus = bad_corpus(tmp_path, kind)
    with pytest.raises(InputError, match=expected) as caught:
        make(tmp_path, corpus)
    assert "--on-error skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("*"))  # nothing half-written
    result = make(tmp_path, corpus, on_error="skip")
    assert result.skipped == 1
    assert re.search(expected, result.first_skipped)
    assert sum(result.documents.values()) >= 150
    done = Run(tmp_path / "run").stage("tokens").require("tokenize")
    assert done.results["skipped"] == 1


def test_a_folder_with_a_tokenizer_is_told_by_the_path_of_its_file(tmp_path: Path) -> None:
    train_tokenizer(sentences(50), 300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"is a folder: type --tokenizer .*/tokenizer\.json$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", ["train", "file"])
def test_files_that_cannot_be_opened_stop_or_are_counted(tmp_path: Path, tokenizer: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").symlink_to("nowhere")
    os.mkfifo(corpus / "b.jsonl")
    (corpus / os.fsdecode(b"c\xff.txt")).write_bytes(b"\xff")
    write_corpus(corpus / os.fsdecode(b"d\xff.jsonl"), sentences(150))
    fields: dict[str, Any] = {}
    if tokenizer == "file":
        train_tokenizer(sentences(50), 300).save(str(tmp_path / "tokenizer.json"))
        fields["tokenizer"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read .*--on-error skip") as caught:
        make(tmp_path, corpus, **fields)
    assert "\n" not in str(caught.value)
    result = make(tmp_path, corpus, on_error="skip", **fields)
    assert (result.skipped, sum(result.documents.values())) == (3, 150)
    names = pq.read_table(result.path / "documents.parquet").column("name").to_pylist()
    assert set(names) == {r"d\xff.jsonl"}
    assert make(tmp_path, corpus, on_error="skip", **fields) == result  # finished, and read back


@pytest.mark.parametrize(
    ("texts", "fields", "expected"),
    [
        ([], {}, "has no text"),
        (["", ""], {}, r"has no text \(2 empty documents"),
        (
            ["a b c"],
            {},
            r"the train split has 6 tokens in 1 documents, but at least 17 tokens are needed",
        ),
        (sentences(150), {"sequence_length": 5000}, "or a lower --sequence-length"),
        (sentences(150), {"tokenizer": "nowhere.json"}, "nowhere.json is not a file"),
    ],
)
def test_a_corpus_or_tokenizer_that_will_not_do_writes_nothing(
    tmp_path: Path, texts: list[str], fields: dict[str, Any], expected: str
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", texts)
    with pytest.raises(InputError, match=expected) as caught:
        make(tmp_path, corpus, **fields)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"vocab_size": 256}, "--vocab-size must be at least 257, not 256"),
        ({"fit": 0.0}, "--fit is 0.0"),
        ({"held_out": 1.2}, "--held-out is 1.2"),
        ({"fit": 0.5, "held_out": 0.5}, "nothing to train on"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"max_documents": -1}, "--max-documents is -1"),
        ({"on_error": "ignore"}, "choose from stop, skip"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        TokenizeConfig(**fields)


def test_the_smallest_vocabulary_is_bytes_and_the_end(tmp_path: Path, corpus: Path) -> None:
    result = make(tmp_path, corpus, vocab_size=257)
    assert (result.vocab_size, result.bytes_per_token) == (257, 1.0)


# Tokenizers


def test_tokenizer_files_that_will_not_do(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        make(tmp_path, corpus, tokenizer=str(path))
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    with pytest.raises(InputError, match="none of the tokens"):
        make(tmp_path, corpus, tokenizer=str(path))


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "t.json"
    cutting = Tokenizer.from_str(small_tokenizer.to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    cutting.save(str(path))
    text = " ".join(WORDS)
    assert load_tokenizer(path).encode(text).ids == small_tokenizer.encode(text).ids


def test_tokens_show_whole_characters_or_bytes(store: TokenStore) -> None:
    tokenizer = train_tokenizer(["ï", "ï"], 300)
    strings = tokenizers_room.display_strings(tokenizer)
    shown = [strings[i] for i in tokenizer.encode("ï\n\t世").ids]
    assert shown == ["ï", "\n", "\t", r"\xe4", r"\xb8", r"\x96"]
    assert store.decode_tokens(np.array([store.eot_id])) == [END_OF_TEXT]


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\\")))
@settings(max_examples=100, deadline=None)
def test_display_strings_join_to_the_text(small_tokenizer: Tokenizer, text: str) -> None:
    shown = tokenizers_room.display_strings(small_tokenizer)
    joined = "".join(shown[i] for i in small_tokenizer.encode(text).ids)
    assert re.sub(r"(\\x[0-9a-f]{2})+", _bytes_shown, joined) == text


def _bytes_shown(match: re.Match[str]) -> str:
    return bytes.fromhex(match.group().replace("\\x", "")).decode()


def test_sentencepiece_tokens_show_spaces_and_bytes() -> None:
    words = {"</s>": 0, "▁the": 1, "<0xE4>": 2}  # LLaMA's way
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.add_special_tokens(["</s>"])
    assert tokenizers_room.display_strings(tokenizer) == ["</s>", " the", r"\xe4"]
    assert tokenizers_room.end_of_text_id(tokenizer) == 0


def test_the_hugging_face_tokenizer_gives_the_same_ids(tmp_path: Path, store: TokenStore) -> None:
    from transformers import AutoTokenizer

    hf_tokenizer(store.tokenizer).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the naïve fox  jumps 🦀\n"
    assert loaded(text).input_ids == store.tokenizer.encode(text).ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token, loaded.eos_token_id) == (END_OF_TEXT, store.eot_id)
    assert store.tokenizer.encode_special_tokens  # wrapping left the store's own as it was


def test_gpt2_out_of_reach_says_what_to_type(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _fetch_nothing() -> Tokenizer:
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizers_room, "_fetch_tiktoken", _fetch_nothing)
    monkeypatch.setattr(tokenizers_room, "_fetch_hub", _fetch_nothing)
    with pytest.raises(InputError, match=r"cannot be fetched .*ConnectionError.*--tokenizer PATH"):
        make(tmp_path, corpus, tokenizer="gpt2")


def test_bytes_are_spelled_as_by_transformers():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert characters_of_bytes() == bytes_to_unicode()


def test_a_tiktoken_encoding_is_converted_without_a_change(small_tokenizer: Tokenizer) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    vocabulary = {t: i - 1 for t, i in small_tokenizer.get_vocab().items() if t != END_OF_TEXT}
    encoding = tiktoken.Encoding(
        "small",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks={bytes(byte_of[c] for c in t): i for t, i in vocabulary.items()},
        special_tokens={END_OF_TEXT: len(vocabulary)},  # the last id, as GPT-2's is
    )
    converted = from_tiktoken(encoding)
    assert converted.token_to_id(END_OF_TEXT) == len(vocabulary)
    for text in (*sentences(20), "don't  stop\n\n  x"):
        ids = [i - 1 for i in small_tokenizer.encode(text).ids]
        assert converted.encode(text).ids == ids == encoding.encode(text)


# Real text


@pytest.mark.parametrize(("name", "padded"), [("gpt2.json", 50304), ("bpe4k.json", 4096)])
def test_shared_tokenizers_on_the_shared_corpus(tmp_path: Path, name: str, padded: int) -> None:
    result = make(
        tmp_path,
        shared("corpus/val.jsonl.zst"),
        tokenizer=str(shared(f"tokenizers/{name}")),
        max_documents=150,
    )
    store = TokenStore(result.path)
    assert store.padded_vocab_size == padded
    assert 2.5 < result.bytes_per_token < 5
    subsets = pq.read_table(result.path / "documents.parquet").column("subset").to_pylist()
    assert "Github" in subsets


def test_a_line_of_a_megabyte_is_one_document(tmp_path: Path) -> None:
    long = "é" * 500_000 + " x" * 100_000
    corpus = write_corpus(tmp_path / "c.jsonl", [*sentences(150), long])
    result = make(tmp_path, corpus)
    store = TokenStore(result.path)
    assert any(long in texts_of(store, name) for name in SPLITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "<f4"),
        ("dtype", None),
        ("eot_id", -1),
        ("vocab_size", 10**9),
        ("vocab_size", True),
        ("tokens_per_file", 0),
        ("splits", {"fit": None}),
        ("splits", None),
    ],
)
@pytest.mark.fault(
    "`meta.json` of the tokens has wrong values, with a fitting hash", "one line names the file"
)
def test_a_description_of_shards_that_cannot_be_is_refused(tmp_path, name, value):
    run = copied(tmp_path)
    path = run / "tokens" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    reseal(run / "tokens")
    with pytest.raises(InputError, match=r"meta\.json is missing or damaged .*format 1"):
        TokenStore(run / "tokens")


@pytest.mark.parametrize(("place", "position"), [(0, 1), (1, 10**6), (2, 0), (-1, 2)])
@pytest.mark.fault(
    "positions of documents do not ascend to the end of the split", "one line names the file"
)
def test_positions_of_documents_that_cannot_be_are_refused(tmp_path, place, position):
    run = copied(tmp_path)
    path = run / "tokens" / "fit.starts.npy"
    starts = np.load(path)
    starts[place] = position
    np.save(path, starts)
    reseal(run / "tokens")
    with pytest.raises(InputError, match=r"fit\.starts\.npy is missing or damaged \(its positions"):
        TokenStore(run / "tokens").split("fit")
