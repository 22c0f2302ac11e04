"""Token shards on disk: written as a stream, read by memory map.

```
tokens/
  tokenizer.json                     the `tokenizers` library's format
  meta.json                          vocabulary, type of the tokens, tokens and documents of each split
  SPLIT-00000.bin SPLIT-00001.bin    token ids, little endian, 16 bits if the vocabulary allows it
  SPLIT.starts.npy                   int64 [n_documents + 1], position of each document's first token
  SPLIT.ordinals.npy                 int64 [n_documents], row of the document in documents.parquet
  documents.parquet                  origin of each document
```
The tokens of a document are followed by one end-of-text token, which belongs to the document.
Positions count tokens from the start of the split, across all its files.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cratelm.corpus.documents import Document
from cratelm.errors import InputError
from cratelm.records import SPLITS, Split
from cratelm.runs import write_json
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import FileColumn, TableFile
from cratelm.runs.reading import verified
from cratelm.text.units import TokenStrings, Unit, aligned_text
from cratelm.tokens.tokenizer import display_strings, load_tokenizer, vocabulary_size

FORMAT = 1
TOKENS_PER_FILE = 2**28
"""tokens of a .bin file: 0.5 GiB at 16 bit"""
_DTYPES = ("<u2", "<u4")
PADDING = 64
"""the number of embedding rows is a multiple of this, as GPUs multiply fastest; GPT-2: 50,304"""
MOST_UNUSED_ROWS = 1024
"""most embedding rows beyond the vocabulary that count as padding; phi-2 has 905"""
_ROWS_PER_GROUP = 8192
"""documents held in memory before a row group of documents.parquet is written"""

DOCUMENTS = TableFile(
    "tokens/documents.parquet",
    (
        FileColumn(
            "ordinal",
            pa.int64(),
            "number of the document, over all splits; the other files name documents by it",
        ),
        FileColumn("split", pa.string(), "`train`, `fit` or `held_out`, by the hash of the text"),
        FileColumn(
            "source", pa.string(), "the corpus as the user named it: `builtin`, a path, `hub:ID`"
        ),
        FileColumn(
            "subset",
            pa.string(),
            "part of the corpus, such as `pile_set_name`; empty if not known",
        ),
        FileColumn("name", pa.string(), "file in the corpus, relative to its folder"),
        FileColumn(
            "line",
            pa.int64(),
            "line or row in the file, from 1; 0 if the document is the whole file",
        ),
        FileColumn("start", pa.int64(), "position of its first token in the split, tokens"),
        FileColumn("n_tokens", pa.int64(), "number of tokens, including the end-of-text token"),
        FileColumn("characters", pa.int64(), "number of characters of the text"),
    ),
)


class TokenStore:
    """The finished shards of a run.

    Raises `InputError` if `path` has none, or has files that do not fit together.
    """

    @checked_arguments()
    def __init__(self, path: str | Path):
        self.path = Path(path)
        meta = _read_meta(self.path)
        self.vocab_size: int = meta["vocab_size"]
        """number of token ids that can occur"""
        self.eot_id: int = meta["eot_id"]
        """id of the end-of-text token"""
        self._meta = meta
        self._splits: dict[Split, TokenSplit] = {}

    @property
    def padded_vocab_size(self) -> int:
        """Return the number of embedding rows for a model: the vocabulary, rounded up to a multiple of 64."""
        return -(-self.vocab_size // PADDING) * PADDING

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the shards; it reads special tokens in a text as plain text."""
        return load_tokenizer(verified(self.path / "tokenizer.json"))

    def split(self, name: Split) -> "TokenSplit":
        """Return the tokens of one split. Raises `InputError` if its files are damaged."""
        if name not in SPLITS:
            raise InputError(f"there is no split {name!r}: choose from {', '.join(SPLITS)}")
        if name not in self._splits:
            self._splits[name] = TokenSplit(self.path, name, self._meta)
        return self._splits[name]

    def decode_tokens(self, ids: Sequence[int] | NDArray[np.integer]) -> list[str]:
        r"""Return one display string per token, [n]; incomplete characters appear as bytes, \xNN.

        Raises `InputError` for an id that is not in the vocabulary.
        """
        return [self._display[i] for i in self._check_ids(ids).tolist()]

    def units(self, ids: Sequence[int] | NDArray[np.integer]) -> list[Unit]:
        """Return the tokens [n] of a text as units that can be shown, see `cratelm.text.units`.

        Raises `InputError` for an id that is not in the vocabulary.
        """
        return self._display.units(self._check_ids(ids).tolist())

    def bytes_of(self, ids: Sequence[int] | NDArray[np.integer]) -> list[bytes]:
        """Return the UTF-8 bytes of each token, [n]. Raises `InputError` for an id that is not in the vocabulary."""
        return [self._display.bytes[i] for i in self._check_ids(ids).tolist()]

    def aligned_text(self, ids: Sequence[int] | NDArray[np.integer]) -> list[str]:
        """Return a string for each token, [n], which together are the text.

        Where several tokens make a character, the first of them has it, and the others are empty. Raises
        `InputError` for an id that is not in the vocabulary.
        """
        return aligned_text(self._check_ids(ids).tolist(), self._display)

    def _check_ids(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        array = np.asarray(ids, np.int64)
        if array.size and not 0 <= array.min() <= array.max() < len(self._display):
            outside = array[(array < 0) | (array >= len(self._display))][0]
            raise InputError(
                f"token id {outside} is not in the vocabulary of {self.path} ({len(self._display):,}"
                " tokens): the file that it comes from was made with another tokenizer, or is damaged"
            )
        return array

    @cached_property
    def token_strings(self) -> TokenStrings:
        """Return the display string of every token id that can occur, in order."""
        self._check_ids(np.array([self.vocab_size - 1]))
        return TokenStrings(self._display.bytes[: self.vocab_size])

    @cached_property
    def _display(self) -> TokenStrings:
        return display_strings(self.tokenizer)


class TokenSplit:
    """One split of a store, memory-mapped: reading loads only the pages that are touched.

    Shape legend: T tokens of a sequence, n positions.
    """

    def __init__(self, folder: Path, name: Split, meta: dict[str, Any]):
        self.name = name
        counts = meta["splits"][name]
        self.n_tokens: int = counts["n_tokens"]
        self.n_documents: int = counts["n_documents"]
        self._tokens_per_file: int = meta["tokens_per_file"]
        self._files = self._map_files(folder, np.dtype(meta["dtype"]))
        self.starts = _map_array(folder / f"{name}.starts.npy", self.n_documents + 1)
        """position of each document's first token, then `n_tokens`: int64 [n_documents + 1]"""
        if not _ascends(self.starts, self.n_tokens):
            expected = f"its positions must ascend from 0 to {self.n_tokens:,}"
            raise _damaged(folder / f"{name}.starts.npy", expected)
        self.ordinals = _map_array(folder / f"{name}.ordinals.npy", self.n_documents)
        """row of each document in documents.parquet: int64 [n_documents]"""

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens `start` up to but not including `stop`, int64. Raises IndexError outside the split."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.n_tokens} in split {self.name}")
        tokens = np.empty(stop - start, np.int64)
        position = start
        while position < stop:
            index, offset = divmod(position, self._tokens_per_file)
            piece = self._files[index][offset : offset + stop - position]
            tokens[position - start : position - start + len(piece)] = piece
            position += len(piece)
        return tokens

    def read_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens at `positions` of any shape, int64. Raises IndexError outside the split."""
        if positions.size and not 0 <= positions.min() <= positions.max() < self.n_tokens:
            raise IndexError(f"a token outside the {self.n_tokens} of split {self.name}")
        tokens = np.empty(positions.shape, np.int64)
        indices, offsets = np.divmod(positions, self._tokens_per_file)
        for index in np.unique(indices).tolist():
            inside = indices == index
            tokens[inside] = self._files[index][offsets[inside]]
        return tokens

    def n_sequences(self, length: int) -> int:
        """Return the number of sequences of `length` tokens that have a next token for every position."""
        return max(0, (self.n_tokens - 1) // length)

    def sequence(self, index: int, length: int) -> NDArray[np.int64]:
        """Return sequence `index` and the token after it, int64 [T + 1]."""
        return self.read(index * length, index * length + length + 1)

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ordinals of the documents that the tokens at `positions` [n] belong to, int64 [n]."""
        return self.ordinals[np.searchsorted(self.starts, positions, side="right") - 1]

    def _map_files(self, folder: Path, dtype: np.dtype) -> list[NDArray[np.unsignedinteger]]:
        files = []
        for first in range(0, self.n_tokens, self._tokens_per_file):
            path = verified(folder / f"{self.name}-{len(files):05d}.bin")
            n = min(self._tokens_per_file, self.n_tokens - first)
            if not path.is_file() or path.stat().st_size != n * dtype.itemsize:
                raise _damaged(path, f"it must have {n * dtype.itemsize:,} bytes")
            files.append(np.memmap(path, dtype, "r", shape=(n,)))
        return files


def check_vocabulary(store: TokenStore, model_vocab_size: int) -> None:
    """Raise `InputError` if a model with so many embedding rows cannot be meant for these tokens.

    Too few rows cannot represent all ids; more than 1,024 unused rows are not padding but another
    vocabulary.
    """
    unused = model_vocab_size - store.vocab_size
    if not 0 <= unused <= MOST_UNUSED_ROWS:
        raise InputError(
            f"the model has a vocabulary of {model_vocab_size:,}, but the tokens in {store.path} have"
            f" {store.vocab_size:,}: tokenize with the model's own tokenizer (--tokenizer PATH), or"
            " name a model that was trained on these tokens"
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which token ids below `vocab_size` are stored."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class StoreWriter:
    """Writer of a store, by single documents or by blocks of them; `close` makes it readable.

    Memory: the rows of 8,192 documents (not their text), however long the corpus is.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        eot_id: int,
        *,
        tokens_per_file: int = TOKENS_PER_FILE,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.eot_id = folder, eot_id
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = token_dtype(self.vocab_size)
        self.tokens_per_file = tokens_per_file
        self.n_documents = 0
        self._splits = {name: _SplitWriter(folder, name, tokens_per_file) for name in SPLITS}
        self._table = pq.ParquetWriter(folder / "documents.parquet", DOCUMENTS.schema)
        self._rows: list[tuple[Any, ...]] = []
        self._blocks = DOCUMENTS.schema.empty_table()
        """rows of the documents that were appended in blocks"""
        tokenizer.save(str(folder / "tokenizer.json"))

    def append(
        self, split: Split, ids: Sequence[int] | NDArray[np.integer], document: Document
    ) -> None:
        """Append a document's token ids [n], followed by the end-of-text token."""
        tokens = np.empty(len(ids) + 1, self.dtype)
        tokens[:-1] = ids
        tokens[-1] = self.eot_id
        start = self._splits[split].append(tokens, self.n_documents)
        self._rows.append(
            (
                self.n_documents,
                split,
                document.source,
                document.subset,
                document.name,
                document.line,
                start,
                len(tokens),
                len(document.text),
            )
        )
        self.n_documents += 1
        if len(self._rows) == _ROWS_PER_GROUP:
            self._write_rows()

    def append_block(self, documents: pa.Table, tokens: NDArray[np.unsignedinteger]) -> None:
        """Append documents [n], and their tokens, one document after another, with end-of-text tokens.

        `documents` has the columns of documents.parquet except `ordinal` and `start`, and as `split` the index of
        the split in `SPLITS`. The files are those that `append` writes for the same documents.
        """
        assert not self._rows, "a store is written by documents or by blocks"
        n = documents.num_rows
        split, n_tokens = (documents[name].to_numpy() for name in ("split", "n_tokens"))
        ordinals = np.arange(self.n_documents, self.n_documents + n)
        starts = np.empty(n, np.int64)
        split_of_token = np.repeat(split.astype(np.int8), n_tokens)
        for index, name in enumerate(SPLITS):
            chosen = split == index
            starts[chosen] = self._splits[name].append_block(
                tokens if chosen.all() else tokens[split_of_token == index],
                n_tokens[chosen],
                ordinals[chosen],
            )
        names = pa.array(SPLITS).take(pa.array(split))
        columns = {"ordinal": pa.array(ordinals), "split": names, "start": pa.array(starts)}
        arrays = [
            columns[name] if name in columns else documents[name] for name in DOCUMENTS.schema.names
        ]
        self._write_blocks(pa.Table.from_arrays(arrays, schema=DOCUMENTS.schema))
        self.n_documents += n

    def n_tokens(self, split: Split) -> int:
        """Return the number of tokens written to `split` so far, including end-of-text tokens."""
        return self._splits[split].n_tokens

    def n_split_documents(self, split: Split) -> int:
        """Return the number of documents written to `split` so far."""
        return self._splits[split].n_documents

    def close(self) -> None:
        """Finish all files; `meta.json` is written last."""
        self._write_rows()
        if self._blocks.num_rows:
            self._table.write_table(self._blocks)
        self._table.close()
        for split in self._splits.values():
            split.close()
        write_json(
            self.folder / "meta.json",
            {
                "format": FORMAT,
                "vocab_size": self.vocab_size,
                "eot_id": self.eot_id,
                "dtype": self.dtype.str,
                "tokens_per_file": self.tokens_per_file,
                "splits": {
                    name: {"n_tokens": s.n_tokens, "n_documents": s.n_documents}
                    for name, s in self._splits.items()
                },
            },
        )

    def _write_rows(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, DOCUMENTS.schema, strict=True)]
            self._table.write_table(pa.Table.from_arrays(arrays, schema=DOCUMENTS.schema))
            self._rows.clear()

    def _write_blocks(self, rows: pa.Table) -> None:
        """Write the full row groups, and hold the rows that follow."""
        waiting = pa.concat_tables([self._blocks, rows]).combine_chunks()
        while waiting.num_rows >= _ROWS_PER_GROUP:
            self._table.write_table(waiting.slice(0, _ROWS_PER_GROUP))
            waiting = waiting.slice(_ROWS_PER_GROUP)
        self._blocks = waiting


class _SplitWriter:
    """Writer of the token files and document boundaries of one split."""

    def __init__(self, folder: Path, name: Split, tokens_per_file: int):
        self.folder, self.name, self.tokens_per_file = folder, name, tokens_per_file
        self.n_tokens = self.n_documents = 0
        self._file: IO[bytes] | None = None
        self._starts = _ArrayFile(folder / f"{name}.starts.npy")
        self._ordinals = _ArrayFile(folder / f"{name}.ordinals.npy")

    def append(self, tokens: NDArray[np.unsignedinteger], ordinal: int) -> int:
        """Append a document and return the position of its first token."""
        start = self.n_tokens
        self._starts.append(start)
        self._ordinals.append(ordinal)
        self._write(tokens)
        self.n_documents += 1
        return start

    def append_block(
        self,
        tokens: NDArray[np.unsignedinteger],
        n_tokens: NDArray[np.int64],
        ordinals: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Append documents [n], whose tokens follow one another; return the position of each one's first token [n]."""
        starts = self.n_tokens + np.cumsum(n_tokens) - n_tokens
        self._starts.extend(starts)
        self._ordinals.extend(ordinals)
        self._write(tokens)
        self.n_documents += len(starts)
        return starts

    def _write(self, tokens: NDArray[np.unsignedinteger]) -> None:
        while len(tokens):
            if self.n_tokens % self.tokens_per_file == 0:
                self._next_file()
            capacity = self.tokens_per_file - self.n_tokens % self.tokens_per_file
            assert self._file is not None
            self._file.write(tokens[:capacity].data)
            self.n_tokens += min(capacity, len(tokens))
            tokens = tokens[capacity:]

    def close(self) -> None:
        """Finish all files."""
        self._starts.append(self.n_tokens)
        self._starts.close()
        self._ordinals.close()
        if self._file:
            self._file.close()

    def _next_file(self) -> None:
        if self._file:
            self._file.close()
        index = self.n_tokens // self.tokens_per_file
        self._file = (self.folder / f"{self.name}-{index:05d}.bin").open("wb")


class _ArrayFile:
    """An int64 .npy file that grows.

    NumPy pads the header so that the first axis can grow. So the header is written twice: first with
    length 0, to reserve its space, and with the final length at the end.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._n = 0
        self._header()

    def append(self, value: int) -> None:
        """Append a number."""
        self._file.write(value.to_bytes(8, "little"))
        self._n += 1

    def extend(self, values: NDArray[np.int64]) -> None:
        """Append numbers [n]."""
        self._file.write(values.astype("<i8").tobytes())
        self._n += len(values)

    def close(self) -> None:
        """Write the final header and close the file."""
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        shape = {"descr": "<i8", "fortran_order": False, "shape": (self._n,)}
        np.lib.format.write_array_header_1_0(self._file, shape)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = verified(folder / "meta.json")
    if not path.is_file():
        raise InputError(
            f"{folder} has no token shards: type `cratelm tokenize --run {folder.parent}` first"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if _is_meta(meta):
            return meta
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _damaged(path, f"it must describe shards of format {FORMAT}")


def _is_meta(meta: Any) -> bool:
    """Return whether a value describes shards. Raises KeyError or TypeError for one that lacks a part."""
    splits = [meta["splits"][name] for name in SPLITS]
    sizes = [split[count] for split in splits for count in ("n_tokens", "n_documents")]
    numbers = [meta["vocab_size"], meta["eot_id"], meta["tokens_per_file"], *sizes]
    return (
        meta["format"] == FORMAT
        and meta["dtype"] in _DTYPES
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and meta["eot_id"] < meta["vocab_size"] <= 2 ** (8 * np.dtype(meta["dtype"]).itemsize)
        and meta["tokens_per_file"] > 0
    )


def _map_array(path: Path, n: int) -> NDArray[np.int64]:
    if n == 0:
        return np.empty(0, np.int64)
    try:
        array = np.load(verified(path), mmap_mode="r")
    except InputError:
        raise
    except (OSError, ValueError, EOFError, TokenError):  # NumPy reads the header as Python
        raise _damaged(path, f"it must be an array of {n:,} numbers") from None
    if array.shape != (n,) or array.dtype != np.int64:
        raise _damaged(path, f"it must have {n:,} numbers of 64 bits")
    return np.asarray(array)


def _ascends(starts: NDArray[np.int64], last: int) -> bool:
    """Return whether positions ascend from 0 to `last`; it reads 64 MB at a time."""
    if starts[0] != 0 or starts[-1] != last:
        return False
    step = 2**23
    return all(
        np.all(np.diff(starts[first : first + step + 1]) > 0)
        for first in range(0, len(starts) - 1, step)
    )


def _damaged(path: Path, expected: str) -> InputError:
    return InputError(
        f"{path} is missing or damaged ({expected}): type"
        f" `cratelm tokenize --run {path.parent.parent} --force` to write the shards again"
    )
