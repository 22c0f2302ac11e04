"""Corpora within bounds: long documents, decompression bombs, and files that never end, in memory and in time."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cratelm.corpus import formats, parquet
from cratelm.corpus.documents import Document, ReadError, n_bytes_of
from cratelm.corpus.formats import Fields, text_of_file
from cratelm.corpus.sources import open_corpus
from cratelm.errors import InputError
from cratelm.evaluate import text_sets
from cratelm.records import SPLITS
from cratelm.tokens import pieces
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import split_of, tokenize

LINES = [f"document {n} of a few words, ten or twelve of them at most" for n in range(150)]


def write_lines(path: Path, texts: list[str], **fields: Any) -> Path:
    path.write_text("".join(json.dumps({"text": t}, **fields) + "\n" for t in texts))
    return path


def read(path: Path, **limits: Any) -> list[Document | ReadError]:
    return list(open_corpus(str(path), Fields(**limits)))


def errors(path: Path, **limits: Any) -> list[str]:
    return [found.message for found in read(path, **limits) if isinstance(found, ReadError)]


def make(folder: Path, corpus: Path, **fields: Any) -> Any:
    fields = {"vocab_size": 300, "sequence_length": 16, "quiet": True, **fields}
    return tokenize(TokenizeConfig(run=folder / "run", corpus=str(corpus), **fields))


def peak_megabytes(script: str, *arguments: Any) -> float:
    """Return by how much a script raises the peak memory of its process, after the imports, in MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory is read from Linux's /proc")
    lines = [
        "import sys",
        "from pathlib import Path",
        "from cratelm.corpus.formats import Fields",
        "from cratelm.corpus.sources import open_corpus",
        "from cratelm.tokens.tokenize import tokenize, TokenizeConfig",
        "import pyarrow.parquet, zstandard, numpy",
        # not `getrusage`, which would include the peak of the process that starts this one
        "status = Path('/proc/self/status')",
        "peak = lambda: int(status.read_text().split('VmHWM:')[1].split()[0]) / 1000",
        "before = peak()",
        script,
        "print(peak() - before)",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        check=True, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return float(run.stdout.split()[-1])


READ_ALL = """
for found in open_corpus(sys.argv[1], Fields(longest=int(float(sys.argv[2])))):
    print(type(found).__name__, getattr(found, 'message', '')[-60:])
    del found
"""


# The limit of a document


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_document_above_the_limit_is_one_read_error_and_the_others_are_read(
    tmp_path: Path, name: str
) -> None:
    texts = ["before", "é" * 200, "after"]
    path = tmp_path / name
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()
    if name == "a.txt":
        path.write_text(texts[1])
        for other in ("0.txt", "b.txt"):
            (tmp_path / other).write_text("other")
    elif name == "a.parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes(zstandard.compress(lines) if name.endswith("zst") else lines)
    corpus = tmp_path if name == "a.txt" else path
    exact = len(lines.split(b"\n")[1]) if "jsonl" in name else 400
    assert not errors(corpus, longest=exact)
    found = read(corpus, longest=exact - 1)
    assert [isinstance(one, ReadError) for one in found] == [False, True, False]
    assert f"more than {exact - 1:,} bytes, the limit for one document" in str(found[1])
    assert str(path) in str(found[1])


@pytest.mark.parametrize("chunk", [1, 3, 10**6])
def test_lines_are_dropped_while_they_are_read(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    data = b"ab\n\n" + b"x" * 50 + b"\ncd\n" + b"y" * 9
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    assert list(formats._lines(iter(chunks), 9)) == [b"ab", b"", None, b"cd", b"y" * 9]
    assert list(formats._lines(iter(chunks), 8)) == [b"ab", b"", None, b"cd", None]
    assert list(formats._lines(iter([*chunks, b"\n"]), 100)) == data.split(b"\n")


def test_tokenize_stops_at_a_long_document_or_counts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [*LINES, "word " * 1000])
    with pytest.raises(InputError, match=r"c\.jsonl, line 151: more than 2,000 bytes.*skip") as e:
        make(tmp_path, corpus, max_document_megabytes=0.002)
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "run").glob("*"))
    result = make(tmp_path, corpus, max_document_megabytes=0.002, on_error="skip", quiet=False)
    assert (sum(result.documents.values()), result.skipped) == (150, 1)
    assert "skipped: " in capsys.readouterr().err
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--max-document-megabytes is"):
            TokenizeConfig(max_document_megabytes=wrong)


@pytest.mark.fault("a JSON line of millions of values", "refused before they are made")
def test_a_json_line_of_many_values_is_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_SHORT_LINE", 10)
    monkeypatch.setattr(formats, "_MOST_JSON", 100)
    path = tmp_path / "c.jsonl"
    rows = [
        {"text": '[[],{"a":[1,\\"2\\"]}]' * 100},  # in a string they are no values
        {"text": "x", "more": [[]] * 100},
        {"text": "x", "more": [""] * 100},
        {"text": 'quoted "text" \\'},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "' + '\\"' * 10**5)
    found = read(path)
    assert [isinstance(one, ReadError) for one in found] == [False, True, True, False, True]
    assert "line 2: more than 100 JSON values" in str(found[1])
    assert "invalid JSON" in str(found[4])


# Memory


@pytest.mark.fault("a document of tens of megabytes", "the memory stays bounded")
def test_a_long_document_takes_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    """5 MB in one line took 1.2 GB, 60 MB took 7.4 GB."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghij"), 6)) for _ in range(2000)]
    text = " ".join(draw.choice(words, 700_000))
    corpus = write_lines(tmp_path / "c.jsonl", [*LINES, text])
    script = "tokenize(TokenizeConfig(run=Path(sys.argv[2]), corpus=sys.argv[1], vocab_size=1000, quiet=True))"
    assert peak_megabytes(script, corpus, tmp_path / "run") < 350
    store = TokenStore(tmp_path / "run" / "tokens")
    split = store.split(split_of(text, 0.05, 0.05))
    longest = int(np.argmax(np.diff(split.starts)))
    ids = split.read(int(split.starts[longest]), int(split.starts[longest + 1]) - 1)
    assert store.tokenizer.decode(ids.tolist()) == text


@pytest.mark.fault("a zstd file that expands without end", "a read error; the memory stays bounded")
def test_a_zstd_bomb_takes_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    piece = b"x" * 2**20
    with path.open("wb") as stream, zstandard.ZstdCompressor().stream_writer(stream) as writer:
        for _ in range(1000):
            writer.write(piece)
        writer.write(b'\n{"text": "after"}\n')
    assert path.stat().st_size < 200_000
    assert peak_megabytes(READ_ALL, path, 1e6) < 120
    found = read(path, longest=10**6)
    assert [type(one).__name__ for one in found] == ["ReadError", "Document"]


@pytest.mark.parametrize(("n_rows", "megabytes", "longest"), [(1, 200, 1e6), (40, 20, 25e6)])
@pytest.mark.fault(
    "a Parquet page that expands to gigabytes", "a read error; the memory stays bounded"
)
def test_a_parquet_bomb_takes_a_bounded_amount_of_memory(
    tmp_path: Path, n_rows: int, megabytes: int, longest: float
) -> None:
    path = tmp_path / "bomb.parquet"
    write = (
        "text = 'x' * (int(sys.argv[2]) * 10**6)\n"
        "table = pyarrow.table({'text': pyarrow.array([text]).dictionary_encode().take([0] * int(sys.argv[3]))})\n"
        "pyarrow.parquet.write_table(table, sys.argv[1], compression='zstd')"
    )
    peak_megabytes(write, path, megabytes, n_rows)
    assert path.stat().st_size < 200_000
    assert peak_megabytes(READ_ALL, path, longest) < 200
    if n_rows == 1:
        (message,) = errors(path, longest=10**6)
        assert "rows 1 to 1: a page of 200," in message


def test_page_headers_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for version, codec, dictionary in [("1.0", "zstd", True), ("2.0", "none", False), ("2.0", "snappy", True)]:  # fmt: skip
        table = pa.table({"text": [str(n) * (n % 50) for n in range(5000)], "meta": [{"a": "b"}] * 5000})  # fmt: skip
        pq.write_table(
            table, path, compression=codec, use_dictionary=dictionary, data_page_version=version,
            data_page_size=2000, row_group_size=3000, write_statistics=True, write_page_checksum=True,
        )  # fmt: skip
        metadata = pq.read_metadata(path)
        for g in range(2):
            with path.open("rb") as stream:
                chunk = metadata.row_group(g).column(0)
                sizes = list(parquet._page_sizes(stream, chunk))
            assert len(sizes) >= 2
            headers = chunk.total_uncompressed_size - sum(sizes)
            assert 0 < headers < 500 * len(sizes)  # what is not in a page is in its header
        assert [d.text for d in read(path) if isinstance(d, Document)] == table["text"].to_pylist()


def test_a_damaged_page_header_is_one_read_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    data = bytearray(path.read_bytes())
    data[4:10] = b"\xff" * 6
    path.write_bytes(bytes(data))
    (message,) = errors(path)
    assert "t.parquet, row" in message


# Parquet values


@pytest.mark.parametrize("kind", ["text", "subset", "beside"])
@pytest.mark.fault(
    "timestamps in Parquet that Python cannot hold",
    "the row is a read error, or the column is not read",
)
def test_timestamps_that_python_cannot_hold_are_read_errors_or_not_read(
    tmp_path: Path, kind: str
) -> None:
    far = pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us"))
    columns: dict[str, Any] = {"text": ["a", "b"]}
    if kind == "text":
        columns = {"text": far}
    elif kind == "subset":
        columns["meta"] = pa.StructArray.from_arrays([far], ["pile_set_name"])
    else:
        columns["meta"] = pa.StructArray.from_arrays([far, pa.array(["A", "B"])], ["t", "pile_set_name"])  # fmt: skip
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    found = read(path)
    if kind == "text":
        assert "row 1: field 'text' must be a string, not timestamp[us]" in str(found[0])
        assert [type(one) for one in found] == [ReadError, ReadError]
    else:
        subsets = ["", ""] if kind == "subset" else ["A", "B"]
        assert [(d.text, d.subset) for d in found if isinstance(d, Document)] == list(zip("ab", subsets, strict=True))  # fmt: skip


def test_all_kinds_of_strings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    strings = pa.array(["a", None, "c"])
    for column in (strings, strings.cast(pa.large_string()), strings.dictionary_encode(), strings.cast(pa.string_view())):  # fmt: skip
        pq.write_table(pa.table({"text": column, "meta": [{"pile_set_name": "P"}] * 3}), path)
        found = read(path)
        assert [(d.text, d.subset) for d in found if isinstance(d, Document)] == [("a", "P"), ("c", "P")]  # fmt: skip
        assert "row 2: field 'text' must be a string, not NoneType" in str(found[1])
    for column in (pa.array([1, 2]), pa.array([b"a", b"b"]), pa.array([["a"], []])):
        pq.write_table(pa.table({"text": column}), path)
        assert all("must be a string" in message for message in errors(path))
        assert len(read(path)) == 2


# Files that are none


@pytest.mark.timeout(30)
@pytest.mark.fault(
    "a pipe, a socket, a device, or a link to one, in a corpus",
    "it is never waited for: a read error",
)
def test_nothing_that_may_wait_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "device", "socket", "."):
            with pytest.raises(OSError, match=r"not a file|No such device"):
                formats.open_file(tmp_path / name)
            with pytest.raises(InputError, match="--text-file"):
                text_of_file(tmp_path / name)


@pytest.mark.timeout(30)
@pytest.mark.fault("a file is replaced by a pipe while the corpus is read", "a read error")
def test_a_path_that_becomes_a_pipe_after_it_was_checked_is_a_read_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cratelm.corpus import sources

    os.mkfifo(tmp_path / "a.jsonl")
    monkeypatch.setattr(sources, "why_unreadable", lambda path: "")
    (message,) = errors(tmp_path)
    assert "it is a pipe, a socket or a device and not a file" in message


def test_folders_may_be_nested_more_deeply_than_calls(tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("a.txt").write_text("deep")
    finally:
        os.chdir(before)
    (found,) = read(tmp_path)
    assert isinstance(found, Document)
    assert found.text == "deep"
    os.system(f"rm -rf {tmp_path}/d")


def test_messages_are_one_line_whatever_files_and_fields_are_called(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[31m.txt").write_bytes(b"\xff")
    (tmp_path / "b.jsonl").write_text('{"x\\ny\\ud800": 1}\n')
    messages = errors(tmp_path)
    assert len(messages) == 2
    assert all(message.isprintable() for message in messages)


# Encoding


def test_a_text_that_cannot_be_cut_stops_or_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"])  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(tmp_path / "t.json"))
    monkeypatch.setattr(pieces, "LONGEST_STRETCH", 150_000)
    corpus = write_lines(tmp_path / "c.jsonl", [*LINES, "word " * 40_000, "", "end"])
    fields = {"tokenizer": str(tmp_path / "t.json")}
    with pytest.raises(InputError, match=r"c\.jsonl, line 151: 200,000 bytes of text.*skip"):
        make(tmp_path, corpus, **fields)
    assert not list((tmp_path / "run").glob("*"))
    result = make(tmp_path, corpus, on_error="skip", **fields)
    assert (sum(result.documents.values()), result.skipped, result.empty) == (151, 1, 1)
    assert "line 151" in result.first_skipped


def test_long_documents_have_the_tokens_split_and_bytes_of_whole_ones(tmp_path: Path) -> None:
    long = "".join(f"{n} naïve 🦀 words\n" for n in range(20_000))
    corpus = write_lines(tmp_path / "c.jsonl", [*LINES, long, *LINES, long * 2, "x" * 250_000])
    result = make(tmp_path, corpus)
    store = TokenStore(result.path)
    n_bytes = n_tokens = 0
    ordinal = {}
    for name in SPLITS:
        split = store.split(name)
        ordinal |= {int(o): (split, i) for i, o in enumerate(split.ordinals)}
    for number, line in enumerate(corpus.open()):
        text = json.loads(line)["text"]
        split, i = ordinal[number]
        ids = split.read(int(split.starts[i]), int(split.starts[i + 1]))[:-1]
        assert ids.tolist() == store.tokenizer.encode(text).ids
        assert split.name == split_of(text, 0.05, 0.05)
        n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + len(ids)
    assert result.bytes_per_token == pytest.approx(n_bytes / n_tokens, abs=0)
    assert n_bytes_of(long) == len(long.encode())


# Named sets


def test_an_article_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sets, "LONGEST_DOCUMENT", 10_000)
    articles = text_sets.articles
    texts = [" = One = \n", *["a line\n"] * 50, " = Two = \n", *["a line\n"] * 50]
    assert len(list(articles(texts))) == 2
    with pytest.raises(InputError, match="articles begin with a line"):
        list(articles(["a line\n"] * 200))
    assert list(text_sets._lines(["a\n\nb", "c\n", "", "\n"])) == ["a", "", "b", "c", "", ""]
