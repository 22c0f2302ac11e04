"""Reader of Parquet files, whose memory has a bound that does not depend on the file.

A page is the smallest part of a Parquet file that can be decompressed, and a page of a few kilobytes can
expand to 2 GiB. Its header states the size, but `pyarrow` does not expose it; hence the headers are read
here (Apache Parquet, `parquet.thrift`, in Thrift's compact protocol). A value is never larger than the page
that it comes from, so the size of the largest page says how many rows may be read at a time.

Memory: a page of each column read, of at most `Fields.longest` bytes and 64 MiB each, and 128 MiB of rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.corpus.chat import MESSAGES
from cratelm.corpus.documents import Document, ReadError, too_long
from cratelm.corpus.formats import (
    CorpusFile,
    Fields,
    Found,
    missing_field,
    open_file,
    readable,
    reason_of,
    row_document,
)

_BUFFER = 2**17
_MOST_ROWS = 64
_BATCH_BYTES = 2**27
_PAGE_ALLOWANCE = 2**26
"""bytes of a page next to its longest value: writers begin a new page after 1 MiB unless told otherwise"""
_FIRST_BYTES, _MOST_HEADER_BYTES = 2**10, 2**24
"""bytes read for a page header, at first and at most; it can contain statistics, such as a longest text"""
ERRORS = (OSError, ValueError, TypeError, KeyError, OverflowError, ImportError, pa.ArrowException)
"""raised by pyarrow for damaged files, and for values that Python has no equivalent of"""


def read_parquet(file: CorpusFile, fields: Fields) -> Found:
    """Yield a document per row of a Parquet table; without the field of the text, from its `messages`."""
    row = 0
    try:
        # opened by Python: pyarrow does not open a path that is not UTF-8
        with open_file(file.path) as stream, pq.ParquetFile(stream, buffer_size=_BUFFER) as table:
            names = table.schema_arrow.names
            if fields.text not in names and MESSAGES in names:
                fields = replace(fields, text=MESSAGES)
            if fields.text not in names:
                yield ReadError(f"{readable(file.path)}: {missing_field(fields.text, names)}")
                return
            columns = _columns(table.schema_arrow, fields)
            for group in range(table.num_row_groups):
                first, row = row, row + table.metadata.row_group(group).num_rows
                if row == first:
                    continue  # without rows there may be no pages
                page = _largest_page(stream, table.metadata.row_group(group), columns)
                if page > fields.longest + _PAGE_ALLOWANCE:
                    yield ReadError(
                        f"{readable(file.path)}, rows {first + 1} to {row}: a page of {page:,} bytes:"
                        f" {too_long(fields.longest)}"
                    )
                    continue
                n_rows = min(_MOST_ROWS, max(1, _BATCH_BYTES // max(page, 1)))
                batches = table.iter_batches(n_rows, row_groups=[group], columns=columns)
                row = first
                for batch in batches:
                    for index in range(batch.num_rows):
                        row += 1
                        yield _document(batch, index, fields, file, row)
    except (*ERRORS, RecursionError, IndexError) as error:
        yield ReadError(f"{readable(file.path)}, row {row + 1}: {reason_of(error)}")


def _columns(schema: pa.Schema, fields: Fields) -> list[str]:
    """Return the columns to read: the text, chats, and, if it is a string, the subset alone of its object."""
    read = [fields.text]
    if MESSAGES in schema.names and pa.types.is_list(schema.field(MESSAGES).type):
        read.append(MESSAGES)
    kind: Any = pa.struct(list(schema))
    for key in fields.subset.split("."):
        index = kind.get_field_index(key) if pa.types.is_struct(kind) else -1
        if index < 0:
            return list(dict.fromkeys(read))
        kind = kind.field(index).type
    return list(dict.fromkeys([*read, *([fields.subset] if _is_text(kind) else [])]))


def _document(
    batch: pa.RecordBatch, index: int, fields: Fields, file: CorpusFile, number: int
) -> Document | ReadError:
    location = f"{readable(file.path)}, row {number}"
    row: dict[str, Any] = {}
    try:
        for field, column in zip(batch.schema, batch.columns, strict=True):
            is_chat = field.name == MESSAGES and pa.types.is_list(field.type)
            if field.name == fields.text and not (
                is_chat or _is_text(field.type) or pa.types.is_null(field.type)
            ):
                return ReadError(
                    f"{location}: field {fields.text!r} must be a string, not {field.type}"
                )
            value = column[index]
            if _n_bytes(value) > fields.longest:
                return ReadError(f"{location}: {too_long(fields.longest)}")
            row[field.name] = value.as_py()
    except ERRORS as error:
        return ReadError(f"{location}: {reason_of(error)}")
    return row_document(row, fields, file, number, "row")


def _is_text(kind: Any) -> bool:
    """Return whether an Arrow type is a string, perhaps with a dictionary, or an extension of a string."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _n_bytes(value: Any) -> int:
    """Return the length of a string or binary value; 0 for values of other types."""
    while isinstance(value, pa.DictionaryScalar | pa.ExtensionScalar):
        value = value.value
    buffer = value.as_buffer() if hasattr(value, "as_buffer") else None
    return 0 if buffer is None else buffer.size


# --- page headers ----------------------------------------------------------------------------------


def _largest_page(stream: BinaryIO, group: Any, columns: list[str]) -> int:
    """Return the bytes of the largest decompressed page of some columns of a row group.

    Raises `ValueError` for a header that cannot be read.
    """
    largest = 0
    for index in range(group.num_columns):
        chunk = group.column(index)
        path = chunk.path_in_schema
        if any(path == name or path.startswith(f"{name}.") for name in columns):
            largest = max(largest, *_page_sizes(stream, chunk), 0)
    return largest


def _page_sizes(stream: BinaryIO, chunk: Any) -> Iterator[int]:
    """Yield the decompressed size in bytes of each page of a column chunk."""
    position = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        position = min(position, chunk.dictionary_page_offset)
    stop = position + chunk.total_compressed_size
    while position < stop:
        decompressed, compressed, header = _page_header(stream, position)
        yield decompressed
        position += header + compressed


def _page_header(stream: BinaryIO, position: int) -> tuple[int, int, int]:
    """Return the decompressed and the compressed size of the page at `position`, and its header's length."""
    n = _FIRST_BYTES
    while True:
        stream.seek(position)
        data = stream.read(n)
        try:
            header = _Compact(data)
            sizes = header.read_struct()
            if min(sizes[2], sizes[3]) < 0:
                break
            return sizes[2], sizes[3], header.position
        except KeyError:
            break
        except IndexError:  # the header is longer
            if len(data) < n or n >= _MOST_HEADER_BYTES:
                break
            n *= 16
    raise ValueError(f"the page header at byte {position} is damaged")


class _Compact:
    """Reader of Thrift's compact protocol, as far as sizes need it. Raises IndexError at the end."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def read_struct(self) -> dict[int, int]:
        """Return the integers of a structure by field number; skip its other fields."""
        values: dict[int, int] = {}
        field = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            field = field + step if step else self._integer()
            if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
                values[field] = self._integer()
            elif kind not in (1, 2):  # true and false have no further bytes
                self._skip(kind)
        return values

    def _skip(self, kind: int) -> None:
        if kind in (1, 2, 3):  # in a list, a boolean is a byte
            self._byte()
        elif kind in (4, 5, 6):
            self._varint()
        elif kind == 7:
            self._advance(8)
        elif kind == 8:
            self._advance(self._varint())
        elif kind in (9, 10):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._skip(head & 15)
        elif kind == 12:
            self.read_struct()
        else:
            raise ValueError(f"type {kind} is not used in page headers")

    def _advance(self, n: int) -> None:
        self.position += n
        if self.position > len(self.data):
            raise IndexError(n)

    def _byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
