"""Sources: every format gives the same documents, and everything unreadable is named with its place."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cratelm.corpus import formats
from cratelm.corpus.documents import Document, ReadError
from cratelm.corpus.formats import Fields
from cratelm.corpus.sources import open_corpus
from cratelm.errors import InputError

ROWS = [
    {"text": "first\nline", "meta": {"pile_set_name": "A"}},
    {"text": "zweite 🦀", "meta": {"pile_set_name": "B"}},
    {"text": "third"},
]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, list[Any]], Any]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(jsonl(rows))),
    "rows.parquet": write_parquet,
}


def read(corpus: Path | str, fields: Fields | None = None) -> list[Document | ReadError]:
    return list(open_corpus(str(corpus), fields))


def documents(corpus: Path | str, fields: Fields | None = None) -> list[Document]:
    found = read(corpus, fields)
    assert all(isinstance(d, Document) for d in found), found
    return found  # pyright: ignore[reportReturnType]


def fault(corpus: Path | str, fields: Fields | None = None) -> str:
    (found,) = [f for f in read(corpus, fields) if isinstance(f, ReadError)]
    assert "\n" not in found.message
    return found.message


@pytest.mark.parametrize("name", WRITERS)
def test_rows_keep_text_line_and_subset(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    assert documents(path) == [
        Document("first\nline", str(path), name, 1, "A"),
        Document("zweite 🦀", str(path), name, 2, "B"),
        Document("third", str(path), name, 3, ""),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_fields_can_be_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, [{"content": "x", "lang": "py"}])
    (found,) = documents(path, Fields("content", "lang"))
    assert (found.text, found.subset) == ("x", "py")


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_field_is_a_fault_that_names_the_fields_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, [{"body": "x"}])
    message = fault(path)
    assert str(path) in message
    assert "no field 'text' (fields: body): name the field of the text with --text-field" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b'{"text": "\xff"}', "byte 0xff at 10 is not UTF-8"),
        (b'{"text": 5}', "field 'text' must be a string, not int"),
        (b'{"text": null}', "not NoneType"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (rb'{"text": "\ud800"}', "lone surrogate"),
        (b"[" * 200_000, ""),  # deeper than the parser goes: the reason is Python's
    ],
)
def test_a_bad_line_is_one_fault_with_its_line_and_the_rest_is_read(
    tmp_path: Path, line: bytes, expected: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n\n{"text": "after"}')
    found = read(path)
    assert [d.text for d in found if isinstance(d, Document)] == ["before", "after"]
    assert found[2] == Document("after", str(path), "bad.jsonl", 4, "")  # blank lines are counted
    message = fault(path)
    assert f"{path}, line 2: " in message
    assert expected in message


def test_a_truncated_zst_is_a_fault_after_the_lines_that_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.zst"
    whole = zstandard.compress(jsonl(ROWS))
    path.write_bytes(whole + whole[:-6])
    found = read(path)
    assert [d.text for d in found if isinstance(d, Document)][:3] == [r["text"] for r in ROWS]
    assert "cut short" in fault(path)
    path.write_bytes(whole + b"no frame")
    assert "after line 3" in fault(path)


def test_zst_frames_follow_each_other_and_lines_cross_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "frames.jsonl.zst"
    data = jsonl([{"text": str(n) * 50} for n in range(40)])
    path.write_bytes(zstandard.compress(data[:901]) + zstandard.compress(data[901:]))
    for chunk in (1, 7, 10**6):
        monkeypatch.setattr(formats, "_CHUNK", chunk)
        assert [d.text for d in documents(path)] == [str(n) * 50 for n in range(40)]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert [d.text for d in documents(tmp_path)] == ["hello", "hello"]


def test_a_text_file_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    assert "byte 0xef at 2 is not UTF-8" in fault(path)


def test_a_broken_parquet_file_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    assert str(path) in fault(path)


def test_a_parquet_row_that_is_not_utf8_is_a_fault_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bytes.parquet"
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes())
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"text": column}), path)
    assert [d.text for d in read(path) if isinstance(d, Document)] == ["a", "c"]
    assert f"{path}, row 2: byte 0xff at 0 is not UTF-8" in fault(path)


def make_unreadable(path: Path, kind: str) -> None:
    if kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")


UNREADABLE = {
    "dangling link": r"cannot be read \(No such file or directory\)",
    "link to itself": r"cannot be read \(Too many levels of symbolic links\)",
    "pipe": "it is a pipe, a socket or a device and not a file",
    "device": "it is a pipe, a socket or a device and not a file",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_as_a_file_is_one_fault(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"b{suffix}"
    make_unreadable(path, kind)
    with pytest.raises(InputError, match=UNREADABLE[kind]):
        open_corpus(str(path))
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("last")
    assert [d.text for d in read(tmp_path) if isinstance(d, Document)] == ["first", "last"]
    assert re.fullmatch(f"{re.escape(str(path))}: {UNREADABLE[kind]}", fault(tmp_path))
    broken = open_corpus(str(tmp_path)).identity()
    assert broken == open_corpus(str(tmp_path)).identity()
    path.unlink()
    path.write_bytes(b"")
    assert open_corpus(str(tmp_path)).identity() != broken


@pytest.mark.fault(
    "a link to a folder in a corpus", "a read error that names it; nothing is read twice"
)
def test_a_link_to_a_folder_is_one_fault(tmp_path: Path) -> None:
    """Its files would be missing from the corpus, and nobody would know."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    corpus.mkdir()
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("second")
    (corpus / "a.txt").write_text("first")
    (corpus / "more").symlink_to(elsewhere)
    assert [d.text for d in read(corpus) if isinstance(d, Document)] == ["first"]
    assert fault(corpus).startswith(f"{corpus}/more: a link to a folder is not followed")
    (corpus / "more").unlink()
    (corpus / "more").symlink_to(".")  # a circle
    assert [d.text for d in read(corpus) if isinstance(d, Document)] == ["first"]
    assert "more: a link to a folder" in fault(corpus)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_be_opened_is_one_fault(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops."""
    (tmp_path / "a.txt").write_text("first")
    WRITERS[name](tmp_path / name, ROWS)
    whole = open_corpus(str(tmp_path)).identity()
    really_open = os.open

    def refuse(path: Any, *given: Any, **named: Any) -> Any:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *given, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert open_corpus(str(tmp_path)).identity() != whole
    assert [d.text for d in read(tmp_path) if isinstance(d, Document)] == ["first"]
    assert "cannot be read (Permission denied)" in fault(tmp_path)


def test_a_folder_that_may_not_be_listed_is_one_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    for name in ("a.txt", "closed/b.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    really_scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return really_scan(path)

    whole = open_corpus(str(tmp_path)).identity()
    monkeypatch.setattr(os, "scandir", refuse)
    assert [d.text for d in read(tmp_path) if isinstance(d, Document)] == ["a.txt", "d.txt"]
    assert fault(tmp_path) == (
        f"{tmp_path}/closed: the folder cannot be listed (Permission denied)"
    )
    assert open_corpus(str(tmp_path)).identity() != whole
    assert fault(tmp_path / "closed")


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "a.txt").write_text("inside")
    assert [d.name for d in documents(tmp_path)] == ["x.jsonl/a.txt"]
    assert [d.name for d in documents(tmp_path / "x.jsonl")] == ["a.txt"]


@pytest.mark.parametrize("name", [*WRITERS, "plain.txt"])
def test_names_that_are_not_utf8_are_recorded_readably(tmp_path: Path, name: str) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    folder.mkdir()
    path = folder / (os.fsdecode(b"\xff") + name)
    if name in WRITERS:
        WRITERS[name](tmp_path / name, ROWS)
        (tmp_path / name).rename(path)
    else:
        path.write_text("text")
    (tmp_path / name).write_bytes(b"\xff\n")  # as faults, too
    for corpus in (tmp_path, folder, path):
        open_corpus(str(corpus)).identity()
        found = read(corpus)
        names = {d.name for d in found if isinstance(d, Document)}
        assert names == {
            f"{'' if corpus != tmp_path else chr(92) + 'xe9t' + chr(92) + 'xe9/'}\\xff{name}"
        }
        for one in found:
            text = one.message if isinstance(one, ReadError) else one.source + one.name
            assert text.encode().decode() == text
    assert any(isinstance(one, ReadError) for one in read(tmp_path))


def test_a_folder_is_read_by_name_and_passes_over_what_it_does_not_know(tmp_path: Path) -> None:
    for name, writer in WRITERS.items():
        writer(tmp_path / name, ROWS[:1])
    (tmp_path / "sub").mkdir()
    for name in ("sub/z.md", "a.txt", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    names = [d.name for d in documents(tmp_path)]
    assert names == ["a.txt", "rows.jsonl", "rows.jsonl.zst", "rows.parquet", "sub/z.md"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere.txt", "does not exist"),
        ("data.csv", "ends in '.csv'"),
        ("nosuffix", "ends in 'no suffix'"),
        ("folder", "holds no file that ends in"),
        ("hub:", "is not of the form hub:ID"),
    ],
)
def test_a_corpus_that_cannot_be_is_an_input_error(
    tmp_path: Path, name: str, expected: str
) -> None:
    for made in ("data.csv", "nosuffix"):
        (tmp_path / made).write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=expected):
        open_corpus(name if name == "hub:" else str(tmp_path / name))


def test_the_builtin_corpus_is_the_standard_library_without_tests() -> None:
    corpus = open_corpus("builtin")
    found = list(corpus)
    assert corpus.n_documents == len(found)
    assert not [f for f in found if isinstance(f, ReadError)]
    by_name = {d.name: d for d in found if isinstance(d, Document)}
    assert list(by_name) == sorted(by_name)
    assert by_name["asyncio/events.py"].subset == "asyncio"
    assert by_name["argparse.py"].subset == "argparse"
    assert "class ArgumentParser" in by_name["argparse.py"].text
    parts = {part for name in by_name for part in Path(name).parts}
    assert parts.isdisjoint({"site-packages", "test", "tests", "idle_test"})
    assert sum(len(d.text) for d in by_name.values()) > 8_000_000


def made(header: str, rows: int, statements: int) -> str:
    """Return a file of statements, comments, blank lines and the rows of a table."""
    table = [f"    0x{i:02x}: 0x{i:04x},\t#  a comment: x = 1" for i in range(rows)]
    code = [f"value_{i} = run({i})" for i in range(statements)]
    return "\n".join([header, *code, "", "# a comment", *table, ""])


@pytest.mark.parametrize(
    ("text", "generated"),
    [
        (made("", 50, 50), True),
        (made("", 49, 50), False),
        (made("", 20, 1), True),
        (made("", 19, 1), False),  # too short to be a table
        (made("# AutoGenerated by a tool", 0, 5), True),
        (made('"""Words (automatically-generated)."""', 0, 5), True),
        (made("x = 1\n" * 12 + "# autogenerated", 0, 5), False),  # not in the header
        (made("# the response is generated", 0, 5), False),
        ("    '\\u0402'   #  0x80 -> CYRILLIC\n" * 30, True),
        ('names = [\n    "a \\" b", None, -1.5,\n' * 30, True),
        ('    "unfinished, 1\n' * 30, False),
        ("    f(1, 'a')\n" * 30, False),
        ("    {\n    },\n" * 30, False),  # brackets without a value
        ("", False),
    ],
)
def test_generated_files_and_tables_are_recognised(text: str, generated: bool) -> None:
    from cratelm.corpus.generated import is_generated

    assert is_generated(text) is generated


def test_the_builtin_corpus_leaves_out_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cratelm.corpus import sources

    (tmp_path / "code.py").write_text(made("", 0, 30))
    (tmp_path / "broken.py").write_bytes(b"\xff")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    before = open_corpus("builtin").identity()
    (tmp_path / "table.py").write_text(made("", 30, 0))
    corpus = open_corpus("builtin")
    assert corpus.identity() == before
    assert corpus.n_documents == 2
    assert [type(found) for found in corpus] == [ReadError, Document]
    monkeypatch.setattr(sources, "is_generated", lambda _: False)
    assert open_corpus("builtin").n_documents == 3
    assert open_corpus("builtin").identity() != before


def test_what_the_builtin_corpus_leaves_out_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code pages of one byte a character, and few other files; every other file stays."""
    from cratelm.corpus import sources

    found = {d.name: len(d.text) for d in documents("builtin")}
    monkeypatch.setattr(sources, "is_generated", lambda _: False)
    everything = {d.name: len(d.text) for d in documents("builtin")}
    out = everything.keys() - found.keys()
    pages = {n for n in out if re.match(r"encodings/(cp|mac_|iso8859|koi8)", n)}
    multibyte = {"encodings/cp932.py", "encodings/cp949.py", "encodings/cp950.py"}
    assert multibyte <= found.keys()
    assert len(pages) > 50
    assert {"html/entities.py", "pydoc_data/topics.py", "keyword.py", "token.py"} <= out
    assert len(out - pages) < 30
    assert {"argparse.py", "opcode.py", "mimetypes.py", "encodings/utf_8.py"} <= found.keys()
    assert 0.1 < sum(everything[name] for name in out) / sum(everything.values()) < 0.3


def test_python_files_are_read_in_the_encoding_that_they_declare(tmp_path: Path) -> None:
    from cratelm.corpus.sources import CorpusFile, read_python

    path = tmp_path / "latin.py"
    path.write_bytes("# -*- coding: latin-1 -*-\r\nnaïve = 1\r\n".encode("latin-1"))
    (found,) = read_python(CorpusFile(path, "builtin", "latin.py"), Fields())
    assert isinstance(found, Document)
    assert found.text.endswith("\nnaïve = 1\n")


def test_identity_notices_content_names_and_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cratelm.corpus import sources

    path = tmp_path / "a.txt"
    seen = set()
    for text in ("one", "two"):
        path.write_text(text)
        assert open_corpus(str(tmp_path)).identity() == open_corpus(str(tmp_path)).identity()
        seen.add(open_corpus(str(tmp_path)).identity())
    path.rename(tmp_path / "b.txt")
    seen.add(open_corpus(str(tmp_path)).identity())
    monkeypatch.setattr(sources, "_WHOLE", 100)
    monkeypatch.setattr(sources, "_SAMPLE", 10)
    for last in (b"x", b"y"):
        (tmp_path / "b.txt").write_bytes(b"." * 5000 + last)
        seen.add(open_corpus(str(tmp_path)).identity())
    assert len(seen) == 5


def test_hub_corpora_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a local folder as it reads the Hub."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(ROWS[:2]))
    name = f"hub:{folder}"
    assert documents(name) == [
        Document("first\nline", name, "", 1, "A"),
        Document("zweite 🦀", name, "", 2, "B"),
    ]
    with pytest.raises(InputError, match="cannot be read after row 0"):
        read(f"hub:{tmp_path}/nothing")


def test_hub_corpora_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install '\.\[hub\]'"):
        read("hub:some/dataset")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"))))
def test_any_text_comes_back_from_compressed_lines(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "any.jsonl.zst"
    path.write_bytes(zstandard.compress(jsonl([{"text": t} for t in texts])))
    assert [d.text for d in documents(path)] == texts
