"""Readers of one file: plain text, JSON lines (plain or zstd, the Pile's format) and Parquet.

Each yields `Document`s and, for what cannot be read, a `ReadError` with file and line; the
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
"""bytes; the Pile's files were compressed with --long=31, more than the library accepts by default"""


@dataclass(frozen=True)
class Fields:
    """Fields of a JSON or Parquet row that hold the text and the subset."""

    text: str = "text"
    subset: str = "meta.pile_set_name"
    """a dot selects a field of a nested object"""


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus."""

    path: Path
    source: str
    """the corpus as the user named it"""
    name: str
    """path relative to the corpus, as `readable` returns it"""
    subset: str = ""
    fault: str = ""
    """why it cannot be read, if that is known before it is opened, as for a folder without permission"""


def readable(path: Path | str) -> str:
    r"""Return the path as valid UTF-8; a byte that is not UTF-8 is written \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def why_unreadable(path: Path) -> str:
    """Return why `path` cannot be read as a file, without opening it; empty if no reason is known."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return _reason(error)
    if stat.S_ISREG(mode):
        return ""
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    return f"it is {kind} and not a file"


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
    """Yield a document per line of a file compressed with zstd; a truncated file gives a read error."""
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
    """Return the document in a row of JSON or of a table; `unit` and `number` locate it in messages."""
    location = f"{readable(file.path)}, {unit} {number}"
    if not isinstance(row, Mapping):
        return ReadError(f"{location}: expected a JSON object, found {type(row).__name__}")
    if fields.text not in row:
        return ReadError(f"{location}: {_missing(fields.text, list(row))}")
    text = row[fields.text]
    if not isinstance(text, str):
        return ReadError(
            f"{location}: field {fields.text!r} must be a string, not {type(text).__name__}"
        )
    if not is_encodable(text):
        return ReadError(f"{location}: expected valid Unicode, found a lone surrogate")
    return Document(text, file.source, file.name, number, _subset(row, fields.subset))


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield the rows of an Arrow batch; the error instead of a row whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines; the file is opened for the first one, so that the reader's `try` sees the error."""
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
    unfinished: list[bytes] = []
    for chunk in _zst_chunks(path):
        head, *tail = chunk.split(b"\n")
        unfinished.append(head)
        if tail:
            yield b"".join(unfinished) + b"\n"
            yield from (line + b"\n" for line in tail[:-1])
            unfinished = [tail[-1]]
    if last := b"".join(unfinished):
        yield last


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """Yield decompressed pieces. Raises `EOFError` for a truncated file.

    The library's stream reader treats a truncated file as a complete one; hence frame by frame.
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


def _missing(field: str, fields: list[str]) -> str:
    first = ", ".join(fields[:6]) or "none"
    return f"no field {field!r} (fields: {first}): name the field of the text with --text-field"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON, expected an object per line ({error.msg} at column {error.colno})"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return (str(error).splitlines() or [type(error).__name__])[0]


Reader = Callable[[CorpusFile, Fields], Found]
