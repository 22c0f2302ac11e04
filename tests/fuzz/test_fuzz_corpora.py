"""Folders of hostile files: `tokenize` succeeds or says why in one line, in bounded time, and counts every document.

A few inputs in CI; `CRATELM_FUZZ=10000 pytest tests/fuzz/test_fuzz_corpora.py` tries more.
"""

import gzip
import io
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import budget
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cratelm.corpus.documents import Document, ReadError
from cratelm.corpus.formats import Fields
from cratelm.corpus.sources import open_corpus
from cratelm.errors import InputError
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize
from cratelm.tokens.tokenizer import train_tokenizer

SECONDS = 20


def one_of_these(choices: list[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy whose representation does not contain the choices, some of which are long."""
    return st.integers(0, len(choices) - 1).map(choices.__getitem__)


LONGEST = 5_000


@dataclass(frozen=True)
class HostileFile:
    """A file and what a reader must find in it."""

    suffix: str
    content: bytes = b""
    special: str = ""
    """what it is if it is no file"""
    n_found: int | None = None
    """documents and read errors; None: not known"""
    texts: tuple[str, ...] = field(default=(), repr=False)
    """documents that must be found among them"""


# One line of JSON lines, with the text of its document; None: it is a read error


def line_of(text: str, ascii: bool) -> tuple[bytes, str | None]:
    row = {"text": text, "meta": {"pile_set_name": "P"}}
    line = json.dumps(row, ensure_ascii=ascii).encode()
    return line, text if len(line) <= LONGEST else None


good_text = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30),
    one_of_these(["", " ", "\x00", "\ufeffx", "<|endoftext|>", "a" * 3000, "é " * 1000, "▁", "\r"]),
)
good_line = st.tuples(good_text, st.booleans()).map(lambda pair: line_of(*pair))
bad_line = one_of_these(
    [
        b'{"text": "a"', b"{", b"nul", b"\xff\xfe{", b'{"text": "\xe9"}', b"[" * 5000, b'{"a":' * 3000, b'{"text": 1}',
        b'{"text": null}', b'{"text": ["a"]}', b'{"text": {}}', b"[]", b"3", b'"text"', b"null", b'{"body": "x"}', b"{}",
        b'{"text": "\\ud800"}', b'{"text": "a\x00b"}', b'{"text": ' + b"9" * 5000 + b"}", b'{"text": 1e999999}',
        b'{"text": "a"} {"text": "b"}', b"\x00" * 100, '{"text": "a"}'.encode("utf-16"), b'{"text": "' + b"x" * LONGEST + b'"}',
        b'{"\\n\\u001b[31m": 1}', b'{"text": "a\\', b"\x1b[31m", b'{"text": "\\u12"}', "{“text”: 1}".encode(),
    ]
).map(lambda line: (line, None))  # fmt: skip
odd_line = one_of_these(
    [
        (b'{"text": "last", "text": "wins"}', "wins"), (b'  {"text": "x"}  ', "x"), (b'{"text": "x", "n": NaN}', "x"),
        (b'{"text": "x", "n": ' + b"1" * 4000 + b"}", "x"), (b'{"text": "x", "meta": 3}', "x"),
        (b'{"text": "x", "meta": {"pile_set_name": ["\\ud800"]}}', "x"), (b'{"text": "x"}\r', "x"),
    ]
)  # fmt: skip
lines = st.lists(st.one_of(good_line, bad_line, odd_line), max_size=8)


def as_jsonl(rows: list[tuple[bytes, str | None]], end: bytes = b"\n") -> HostileFile:
    content = b"\n".join(line for line, _ in rows) + end
    texts = tuple(text for _, text in rows if text is not None)
    return HostileFile(".jsonl", content, n_found=len(rows), texts=texts)


def compressed(file: HostileFile, frames: int) -> HostileFile:
    step = len(file.content) // frames + 1
    parts = [file.content[i : i + step] for i in range(0, len(file.content), step)] or [b""]
    data = b"".join(map(zstandard.compress, parts))
    return HostileFile(".jsonl.zst", data, n_found=file.n_found, texts=file.texts)


columns = one_of_these(
    [
        pa.array(["a", "", None, "x" * (LONGEST + 1)]), pa.array(["a", "b"]).dictionary_encode(), pa.array([1.5, float("nan")]),
        pa.array([2**62], pa.int64()).cast(pa.timestamp("us")), pa.array([b"\xff", b"a"]), pa.array([["a"], None]),
        pa.array([None, None]), pa.array([], pa.string()), pa.array(["a", "b"], pa.large_string()), pa.array([{"b": 1}]),
        pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xffa")),
        pa.array(["word"] * 100), pa.array([2**62], pa.int64()).cast(pa.duration("us")), pa.array([2**40], pa.int64()).cast(pa.timestamp("s", "Nowhere/At_all")),
    ]
)  # fmt: skip


def is_readable(value: pa.Scalar) -> bool:
    try:
        return isinstance(value.as_py(), str | None) and len(value.as_py() or "") <= LONGEST
    except (
        ValueError,
        OverflowError,
        KeyError,
    ):  # no UTF-8; a time or zone that Python does not know
        return False


@st.composite
def parquet(draw: st.DrawFn) -> HostileFile:
    text, meta = draw(columns), draw(columns)
    n = min(len(text), len(meta))
    name = draw(st.sampled_from(["text", "text", "body", "te\nxt"]))
    other = draw(st.sampled_from(["meta", "text2", "x" * 300]))
    table = pa.table({name: text[:n], other: meta[:n]})
    is_meta_read = draw(st.booleans())
    if is_meta_read:
        table = pa.table({name: text[:n], "meta": pa.StructArray.from_arrays([meta[:n]], ["pile_set_name"])})  # fmt: skip
    stream = io.BytesIO()
    options = {"compression": draw(st.sampled_from(["none", "zstd", "snappy"]))}
    try:
        pq.write_table(table, stream, data_page_size=100, **options)
    except pa.ArrowException:
        return HostileFile(".parquet")
    try:
        is_string = name == "text" and text.type in (pa.string(), pa.large_string())
        texts = text[:n].to_pylist() if is_string else []
    except UnicodeDecodeError:
        texts = []
    if is_meta_read:  # a read error in either column is one of the row
        texts = [t for t, other in zip(texts, meta, strict=False) if is_readable(other)]
    kept = tuple(t for t in texts if t is not None and len(t) <= LONGEST)
    return HostileFile(
        ".parquet", stream.getvalue(), n_found=n if name == "text" else None, texts=kept
    )


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[HostileFile]) -> HostileFile:
    """A file that is cut short, or in which bytes are changed, or which is continued by garbage."""
    file = draw(files)
    data = file.content
    kind = draw(st.sampled_from(["cut", "flip", "more", "twice"]))
    if kind == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif kind == "more":
        data += draw(st.binary(min_size=1, max_size=20))
    elif kind == "twice":
        data += data
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3)) if kind == "flip" and data else 0):
        changed[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    return HostileFile(file.suffix, bytes(changed))


def is_text(content: bytes) -> bool:
    try:
        return len(content) <= LONGEST and content.decode("utf-8-sig") is not None
    except UnicodeDecodeError:
        return False


jsonl = st.builds(as_jsonl, lines, st.sampled_from([b"\n", b"\n\n \n", b"\n\n"]))
zst = st.builds(compressed, jsonl, st.integers(1, 3))
text_content = st.one_of(
    st.binary(max_size=40),
    good_text.map(str.encode),
    one_of_these(["naïve".encode("latin-1"), "naïve".encode("utf-16"), b"\xef\xbb\xbf", b"x" * (LONGEST + 1)]),
)  # fmt: skip
plain = st.builds(
    lambda suffix, content: HostileFile(
        suffix, content, n_found=1, texts=(content.decode("utf-8-sig"),) if is_text(content) else ()
    ),
    st.sampled_from([".txt", ".md", ".py", ".TXT", ".tex"]),
    text_content,
)
unknown = st.builds(
    lambda suffix, content: HostileFile(suffix, content, n_found=0),
    st.sampled_from([".jsonl.gz", ".csv", "", ".zst", ".json", ".bin"]),
    st.sampled_from([gzip.compress(b'{"text": "x"}'), gzip.compress(b"x" * 1000)[:9], b"\x1f\x8b"]),
)
special = st.builds(
    lambda kind, suffix: HostileFile(suffix, special=kind, n_found=1),
    st.sampled_from(["dangling", "loop", "circle", "pipe", "socket", "zero", "null", "pipe link"]),
    st.sampled_from([".txt", ".jsonl", ".jsonl.zst", ".parquet"]),
)
folder = st.builds(
    lambda suffix: HostileFile(suffix, special="folder", n_found=0), st.just(".jsonl")
)
file = st.one_of(
    jsonl, zst, plain, parquet(), unknown, special, folder, damaged(jsonl), damaged(zst), damaged(parquet()),
    st.builds(HostileFile, st.sampled_from([".parquet", ".jsonl.zst", ".jsonl", ".txt"]), st.binary(max_size=60)),
)  # fmt: skip
names = one_of_these(
    [b"a", b"\xff\xfe", b"a b", b"new\nline", b"\x1b[31m", b"-f", "é".encode(), b"x" * 200]
)


def write(place: Path, hostile: HostileFile, sockets: list[socket.socket]) -> None:
    if not hostile.special:
        place.write_bytes(hostile.content)
    elif hostile.special == "pipe":
        os.mkfifo(place)
    elif hostile.special == "folder":
        place.mkdir()
    elif hostile.special == "socket":
        sockets.append(socket.socket(socket.AF_UNIX))
        before = os.getcwd()
        os.chdir(place.parent)  # a socket's path must be short
        try:
            sockets[-1].bind(b"s")
        finally:
            os.chdir(before)
        (place.parent / "s").rename(place)
    elif hostile.special == "pipe link":
        os.mkfifo(place.parent / ".pipe") if not (place.parent / ".pipe").exists() else None
        place.symlink_to(".pipe")
    else:
        targets = {
            "dangling": "nowhere",
            "loop": place.name,
            "circle": ".",
            "zero": "/dev/zero",
            "null": "/dev/null",
        }
        place.symlink_to(targets[hostile.special])


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        pytest.fail(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


BASE = [f"document {n} of some words" for n in range(150)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    train_tokenizer(BASE, 300).save(str(path))
    return path


def run(folder: Path, corpus: Path, tokenizer: Path, on_error: Any) -> Any:
    """Return the result of the verb, or the message of its error."""
    config = TokenizeConfig(
        run=folder, corpus=str(corpus), tokenizer=str(tokenizer), on_error=on_error, quiet=True,
        sequence_length=2, max_document_megabytes=LONGEST / 1e6,
    )  # fmt: skip
    try:
        with time_limit():
            return tokenize(config)
    except InputError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 2000
        assert not list(folder.glob("*")), "something half-written is left"
        return message


@pytest.mark.timeout(3600)
@budget.settings(100)
@given(
    files=st.lists(st.tuples(names, file), max_size=6),
    with_base=st.sampled_from([True, True, True, False]),
)
@pytest.mark.fault(
    "folders of hostile files as a corpus",
    "documents that were kept, skipped and empty add up to all; one line otherwise",
)
def test_hostile_folders(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Path,
    files: list[tuple[bytes, HostileFile]],
    with_base: bool,
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    corpus, sockets = root / "corpus", []
    corpus.mkdir()
    try:
        for number, (name, hostile) in enumerate(files):
            name = f"{number}".encode() + name + hostile.suffix.encode()
            write(corpus / os.fsdecode(name), hostile, sockets)
        if with_base:
            rows = "".join(json.dumps({"text": text}) + "\n" for text in BASE)
            (corpus / "base.jsonl").write_text(rows)
        check(root, corpus, tokenizer, [hostile for _, hostile in files], with_base)
    finally:
        for one in sockets:
            one.close()
        shutil.rmtree(root)


def check(
    root: Path, corpus: Path, tokenizer: Path, files: list[HostileFile], with_base: bool
) -> None:
    skipping = run(root / "skip", corpus, tokenizer, "skip")
    stopping = run(root / "stop", corpus, tokenizer, "stop")
    if isinstance(skipping, str):
        assert not with_base, skipping
        assert isinstance(stopping, str)
        return
    with time_limit():
        found = list(open_corpus(str(corpus), Fields(longest=LONGEST)))
    documents = [one for one in found if isinstance(one, Document)]
    errors = [one for one in found if isinstance(one, ReadError)]
    assert skipping.skipped == len(errors)
    assert skipping.empty == sum(not one.text for one in documents)
    assert sum(skipping.documents.values()) + skipping.empty + skipping.skipped == len(found)
    if all(file.n_found is not None for file in files):
        assert len(found) == sum(file.n_found or 0 for file in files) + len(BASE) * with_base
    texts = [one.text for one in documents]
    for file in files:
        for text in file.texts:
            texts.remove(text)  # raises if it was lost
    assert isinstance(stopping, str) == bool(errors)
    if errors:
        assert errors[0].message in stopping
        assert "--on-error skip" in stopping
    store = TokenStore(skipping.path)
    for name in ("train", "fit", "held_out"):
        assert store.split(name).n_documents == skipping.documents[name]


def test_the_fuzz_test_sees_what_it_is_for(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that loses a document, and one that lets an error through, are both noticed."""
    from cratelm.corpus import sources

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    file = as_jsonl([(b'{"text": "one"}', "one"), (b'{"text": "two"}', "two")])
    (corpus / "a.jsonl").write_bytes(file.content)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in BASE)
    (corpus / "base.jsonl").write_text(rows)
    check(tmp_path / "right", corpus, tokenizer, [file], True)
    really_read = sources.READERS[".jsonl"]
    monkeypatch.setitem(sources.READERS, ".jsonl", lambda *a: list(really_read(*a))[1:])
    with pytest.raises(AssertionError):
        check(tmp_path / "wrong", corpus, tokenizer, [file], True)
