"""Readers of one file: plain text, JSON lines (plain or zstd, the Pile's format) and Parquet.

Each yields `Document`s and, where something cannot be read, a `ReadError` with file and line; the
caller decides whether that stops the run or is counted. Memory: one document and a read buffer
of 128 KiB (Parquet: 64 rows and the column chunk that they are in).
"""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from cratelm.corpus.documents import Document, ReadError, is_encodable

Found = Iterator[Document | ReadError]

_CHUNK = 1 << 17
_LARGEST_WINDOW = 2**31
"""bytes; the Pile's files were compressed with --long=31, more than the library takes by default"""


@dataclass(frozen=True)
class Fields:
    """Where in a row of JSON or Parquet the text and the subset are."""

    text: str = "text"
    subset: str = "meta.pile_set_name"
    """a dot leads into a nested object"""


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus."""

    path: Path
    source: str
    """the corpus as the user named it"""
    name: str
    """path relative to the corpus, as `readable` writes it"""
    subset: str = ""
    fault: str = ""
    """why it cannot be read, where that was seen before it was opened: a folder without permission"""


def readable(path: Path | str) -> str:
    r"""The path as valid UTF-8: a byte that is not UTF-8 is written \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def why_unreadable(path: Path) -> str:
    """Return why `path` cannot be read as a file, without opening it; empty where nothing is known."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return _reason(error)
    if stat.S_ISREG(mode):
        return ""
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    return f"{kind} was found, a file was expected"


def read_text(file: CorpusFile, fields: Fields) -> Found:
    """Yield the whole file as one document."""
    try:
        text = file.path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield ReadError(f"{readable(file.path)}: {_reason(error)}")
    else:
        yield Document(text, file.source, file.name, 0, file.subset)


def read_jsonl(file: CorpusFile, fields: Fields) -> Found:
    """Yield a document per line, each a JSON object."""
    yield from _json_documents(_lines(file.path), file, fields)


def read_jsonl_zst(file: CorpusFile, fields: Fields) -> Found:
    """Yield a document per line of a file compressed with zstd; a file cut short is a read error."""
    yield from _json_documents(_zst_lines(file.path), file, fields)


def read_parquet(file: CorpusFile, fields: Fields) -> Found:
    """Yield a document per row of a Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        # opened by Python: pyarrow does not open a path that is not UTF-8
        with file.path.open("rb") as stream, pq.ParquetFile(stream) as table:
            wanted = {fields.text, fields.subset.split(".")[0]}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            if fields.text not in columns:
                yield ReadError(
                    f"{readable(file.path)}: {_missing(fields.text, table.schema_arrow.names)}"
                )
                return
            for batch in table.iter_batches(batch_size=64, columns=columns):
                for values in _rows(batch):
                    row += 1
                    if isinstance(values, UnicodeDecodeError):
                        yield ReadError(f"{readable(file.path)}, row {row}: {_reason(values)}")
                    else:
                        yield row_document(values, fields, file, row, "row")
    except (OSError, pa.ArrowException) as error:
        yield ReadError(f"{readable(file.path)}, row {row + 1}: {_reason(error)}")


def row_document(
    row: Mapping[str, Any], fields: Fields, file: CorpusFile, number: int, unit: str
) -> Document | ReadError:
    """Return the document in a row of JSON or of a table."""
    place = f"{readable(file.path)}, {unit} {number}"
    if not isinstance(row, Mapping):
        return ReadError(f"{place}: {type(row).__name__} found, a JSON object was expected")
    if fields.text not in row:
        return ReadError(f"{place}: {_missing(fields.text, list(row))}")
    text = row[fields.text]
    if not isinstance(text, str):
        return ReadError(
            f"{place}: field {fields.text!r} holds {type(text).__name__}, a string was expected"
        )
    if not is_encodable(text):
        return ReadError(f"{place}: a lone surrogate found, valid Unicode was expected")
    return Document(text, file.source, file.name, number, _subset(row, fields.subset))


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows of an Arrow batch; in the place of one whose text is not UTF-8, the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _lines(path: Path) -> Iterator[bytes]:
    """Opens the file when the first line is asked for, so that the reader's `try` sees the error."""
    with path.open("rb") as stream:
        yield from stream


def _json_documents(lines: Iterator[bytes], file: CorpusFile, fields: Fields) -> Found:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                row = json.loads(line.decode(encoding))
            except (ValueError, RecursionError) as error:
                yield ReadError(f"{readable(file.path)}, line {number}: {_reason(error)}")
            else:
                yield row_document(row, fields, file, number, "line")
    except (OSError, EOFError, zstandard.ZstdError) as error:
        yield ReadError(f"{readable(file.path)}, after line {number}: {_reason(error)}")


def _zst_lines(path: Path) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in _zst_chunks(path):
        head, *tail = chunk.split(b"\n")
        rest.append(head)
        if tail:
            yield b"".join(rest) + b"\n"
            yield from (line + b"\n" for line in tail[:-1])
            rest = [tail[-1]]
    if last := b"".join(rest):
        yield last


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """Yield decompressed pieces. Raises EOFError for a file cut short.

    The library's stream reader takes that for the end of the file, hence frame by frame.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame, begun = decompressor.decompressobj(), False
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            while piece:
                begun = True
                yield frame.decompress(piece)
                if not frame.eof:
                    break
                piece = frame.unused_data
                frame, begun = decompressor.decompressobj(), False
    if begun:
        raise EOFError("the file is cut short inside a zstd frame")


def _subset(row: Mapping[str, Any], path: str) -> str:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) and is_encodable(value) else ""


def _missing(field: str, found: list[str]) -> str:
    names = ", ".join(found[:6]) or "none"
    return f"no field {field!r} (fields found: {names}), name it with --text-field"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at {error.start} found, UTF-8 was expected"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON ({error.msg} at column {error.colno}), one object a line was expected"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return (str(error).splitlines() or [type(error).__name__])[0]


Reader = Callable[[CorpusFile, Fields], Found]
