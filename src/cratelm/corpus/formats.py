"""Readers of one file: plain text and JSON lines (plain or zstd, the Pile's format); `parquet` has the third.

Each yields `Document`s and, for what cannot be read, a `ReadError` with file and line; the
caller decides whether that stops the run or is counted. Memory, with n = `Fields.longest` bytes, whatever
the file contains: a read buffer, and 9n for the line in the worst case (Python stores every character of a
text in 4 bytes if one of them needs it; typically 3n). A zstd file adds at most 32 MiB for the output of
1 KiB of input, and the window that it was compressed with (8 MiB; with `--long=31`, as the Pile's, 2 GiB).
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from cratelm.corpus.chat import MESSAGES, ChatError, ChatTemplate, why_no_chat
from cratelm.corpus.documents import (
    LONGEST_DOCUMENT,
    Document,
    ReadError,
    is_encodable,
    n_bytes_of,
    too_long,
)
from cratelm.errors import InputError

Found = Iterator[Document | ReadError]

_CHUNK = 1 << 17
_LARGEST_WINDOW = 2**31
"""bytes; the Pile's files were compressed with --long=31, more than the library accepts by default"""
_ZST_STEP = 2**10
"""compressed bytes at a time: zstd expands 4 bytes to at most 128 KiB, so these to at most 32 MiB"""
_SHORT_LINE = 2**20
"""bytes; the JSON values of a shorter line take at most some 30 MB"""
_MOST_JSON = 10_000_000
"""bytes of a JSON line outside of its strings, plus its strings: Python takes up to 30 bytes for each"""
# the closing quote is optional, so that the time is linear if it is missing
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


@dataclass(frozen=True)
class Fields:
    """Fields of a JSON or Parquet row that hold the text and the subset, and the limit for a document."""

    text: str = "text"
    subset: str = "meta.pile_set_name"
    """a dot selects a field of a nested object"""
    longest: int = LONGEST_DOCUMENT
    """bytes of a text file, of a JSON line (decompressed), or of a Parquet cell, above which it is a read error"""
    chat: ChatTemplate | None = None
    """what writes rows with `messages` instead of a text; None: they are read errors"""


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
        return _why_no_file(path.stat().st_mode)
    except (OSError, ValueError) as error:
        return reason_of(error)


def open_file(path: Path) -> BinaryIO:
    """Return a file, opened for reading; raises `OSError` at once for a pipe, a socket or a device.

    To open a pipe would wait for somebody to write into it, and some devices and files of /proc never end
    or have nothing to read yet. Here and not only in `why_unreadable`, because a path may change in between.
    """
    # the usual `open` puts a file descriptor into blocking mode
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if why := _why_no_file(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(why)
    return os.fdopen(descriptor, "rb")


def text_of_file(path: Path, longest: int = 10_000_000) -> str:
    """Return the text of a UTF-8 file, with `\\n` for line breaks.

    Raises `InputError` if it cannot be read, or has more than `longest` bytes.
    """
    try:
        text = _content(path, longest, f"it has more than {longest:,} bytes").decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{readable(path)}: {reason_of(error)}. Name another UTF-8 file with --text-file"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(file: CorpusFile, fields: Fields) -> Found:
    """Yield the whole file as one document."""
    try:
        text = _content(file.path, fields.longest, too_long(fields.longest)).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield ReadError(f"{readable(file.path)}: {reason_of(error)}")
    else:
        yield Document(text, file.source, file.name, 0, file.subset)


def read_jsonl(file: CorpusFile, fields: Fields) -> Found:
    """Yield a document per line, each a JSON object."""
    yield from _json_documents(_chunks(file.path), file, fields)


def read_jsonl_zst(file: CorpusFile, fields: Fields) -> Found:
    """Yield a document per line of a file compressed with zstd; a truncated file gives a read error."""
    yield from _json_documents(_zst_chunks(file.path), file, fields)


def row_document(
    row: Mapping[str, Any], fields: Fields, file: CorpusFile, number: int, unit: str
) -> Document | ReadError:
    """Return the document in a row of JSON or of a table; `unit` and `number` locate it in messages."""
    location = f"{readable(file.path)}, {unit} {number}"
    if not isinstance(row, Mapping):
        return ReadError(f"{location}: expected a JSON object, found {type(row).__name__}")
    has_text = fields.text != MESSAGES and row.get(fields.text) is not None
    if not has_text and (MESSAGES in row if fields.text not in row else row.get(MESSAGES)):
        return _chat_document(row, fields, file, number, location)
    if fields.text not in row:
        return ReadError(f"{location}: {missing_field(fields.text, list(row))}")
    text = row[fields.text]
    if not isinstance(text, str):
        return ReadError(
            f"{location}: field {fields.text!r} must be a string, not {type(text).__name__}"
        )
    return _document(text, row, fields, file, number, location)


def _chat_document(
    row: Mapping[str, Any], fields: Fields, file: CorpusFile, number: int, location: str
) -> Document | ReadError:
    """Return the document of a row with `messages`, as the chat template writes them."""
    if why := why_no_chat(row[MESSAGES]):
        return ReadError(f"{location}: field {MESSAGES!r} {why}")
    if fields.chat is None:
        return ReadError(
            f"{location}: it is a chat, but the tokenizer has no default chat template: name the folder or Hub id of a model"
            " that has one with --tokenizer"
        )
    try:
        text = fields.chat.text_of(row[MESSAGES])
    except ChatError as error:
        return ReadError(f"{location}: {error}")
    document = _document(text, row, fields, file, number, location)
    return replace(document, is_chat=True) if isinstance(document, Document) else document


def _document(
    text: str,
    row: Mapping[str, Any],
    fields: Fields,
    file: CorpusFile,
    number: int,
    location: str,
) -> Document | ReadError:
    if not is_encodable(text):
        return ReadError(f"{location}: expected valid Unicode, found a lone surrogate")
    if 4 * len(text) > fields.longest and n_bytes_of(text) > fields.longest:
        return ReadError(f"{location}: {too_long(fields.longest)}")
    return Document(text, file.source, file.name, number, _subset(row, fields.subset))


def _json_documents(chunks: Iterator[bytes], file: CorpusFile, fields: Fields) -> Found:
    number = 0
    try:
        for line in _lines(chunks, fields.longest):  # `enumerate` would hold a line for too long
            number += 1
            if line is None:
                yield ReadError(f"{readable(file.path)}, line {number}: {too_long(fields.longest)}")
            elif line and not line.isspace():
                yield _json_document(line, file, fields, number)
            del line  # not held while the next one is read
    except (OSError, EOFError, zstandard.ZstdError) as error:
        yield ReadError(f"{readable(file.path)}, after line {number}: {reason_of(error)}")


def _json_document(
    line: bytes, file: CorpusFile, fields: Fields, number: int
) -> Document | ReadError:
    if len(line) > _SHORT_LINE:
        outside, n_strings = _JSON_STRING.subn(b"", line)
        if len(outside) + n_strings > _MOST_JSON:
            return ReadError(
                f"{readable(file.path)}, line {number}: more than {_MOST_JSON:,} JSON values and signs"
                " next to the text: write the text alone into the line"
            )
        del outside
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return ReadError(f"{readable(file.path)}, line {number}: {reason_of(error)}")
    return row_document(row, fields, file, number, "line")


def _content(path: Path, longest: int, message: str) -> bytearray:
    """Return the content of a file. Raises `OSError`, with `message` above `longest` bytes."""
    content = bytearray()
    for chunk in _chunks(path):
        content += chunk
        if len(content) > longest:
            raise OSError(message)
    return content


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield pieces; the file is opened for the first one, so that the reader's `try` sees the error."""
    with open_file(path) as stream:
        while piece := stream.read(_CHUNK):
            yield piece
        if piece is None:  # a file of /proc
            raise OSError("it has nothing to read yet")


def _lines(chunks: Iterator[bytes], longest: int) -> Iterator[bytes | None]:
    r"""Yield lines without their `\n`; None for a line of more than `longest` bytes, which is not held."""
    begun: list[bytes] = []
    size = 0
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            size += end - start
            line = None if size > longest else b"".join([*begun, chunk[start:end]])
            begun, size, start = [], 0, end + 1  # before the line is used: only one copy is held
            yield line
            del line
        size += len(chunk) - start
        if size > longest:
            begun = []
        elif start < len(chunk):
            begun.append(chunk[start:])
    if size > longest:
        yield None
    elif size:
        yield b"".join(begun)


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """Yield decompressed pieces. Raises `EOFError` for a truncated file.

    The library's stream reader treats a truncated file as a complete one; hence frame by frame. A frame's
    decompressor returns all output of its input at once; hence little input at a time.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame, begun = decompressor.decompressobj(), False
    for chunk in _chunks(path):
        for start in range(0, len(chunk), _ZST_STEP):
            piece = chunk[start : start + _ZST_STEP]
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


def missing_field(field: str, fields: list[str]) -> str:
    """Return the message for rows without the field of the text; `fields` are those that they have."""
    first = ", ".join(fields[:6]) or "none"
    return f"no field {field!r} (fields: {first}): name the field of the text with --text-field"


def _why_no_file(mode: int) -> str:
    if stat.S_ISREG(mode):
        return ""
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    return f"it is {kind} and not a file"


def reason_of(error: Exception) -> str:
    """Return an error's message on one line, in words where Python's are not clear."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON, expected an object per line ({error.msg} at column {error.colno})"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return (str(error).splitlines() or [type(error).__name__])[0]


Reader = Callable[[CorpusFile, Fields], Found]
