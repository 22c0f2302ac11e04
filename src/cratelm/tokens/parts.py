"""Parts: the tokens of a few files of a corpus, written by any process, and merged into shards in order.

```
parts/
  tokenizer.json             the tokenizer of all parts
  00000/ 00001/ ...          a folder for each group of files, in the order of the corpus
    tokens.bin               token ids of all documents in their order, end-of-text tokens included
    documents.parquet        a row for each document, see `_COLUMNS`
    part.json                what was not written, and a hash of each file
```
A part depends on its files, the options and the tokenizer alone, so that it does not matter which process writes it,
or when. Limits of the whole corpus (`--max-documents`, `--max-tokens`) and `--on-error stop` are applied when the
parts are merged; a part ends where nothing after it could be used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cratelm.corpus.documents import Document, ReadError, n_bytes_of
from cratelm.corpus.formats import readable
from cratelm.corpus.sources import FileCorpus
from cratelm.errors import InputError, StorageError
from cratelm.records import SPLITS
from cratelm.runs import atomic_folder, atomic_path, config_dict, hash_file, hash_json, write_json
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.encoding import Encoded, Entry, encode_corpus
from cratelm.tokens.shards import token_dtype
from cratelm.tokens.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

FORMAT = 2
MOST_NAMED = 20
"""failures whose messages are stored and printed; the others are only counted"""
_TOKENS, _DOCUMENTS, _RECORD, _TOKENIZER = (
    "tokens.bin",
    "documents.parquet",
    "part.json",
    "tokenizer.json",
)
_ROWS_PER_GROUP = 8192
_BLOCK_TOKENS = 2**24
"""tokens that are merged at a time, unless a document has more"""
_COLUMNS = pa.schema(
    {
        "split": pa.int8(),  # index in SPLITS; -1 for a document that could not be encoded
        "source": pa.string(),
        "subset": pa.string(),
        "name": pa.string(),
        "line": pa.int64(),
        "n_tokens": pa.int64(),  # with the end-of-text token; 0 if it could not be encoded
        "characters": pa.int64(),
        "bytes": pa.int64(),  # of the text in UTF-8
        "empty_before": pa.int64(),  # documents without text between the row before and this one
        "failed_before": pa.int64(),  # documents that could not be read, likewise
        "is_chat": pa.bool_(),
    }
)
Announce = Callable[[str], None]
"""takes the path of a file before it is opened"""
Progress = Callable[[int], object]
"""takes a number of entries that were encoded since the last call"""


class PartError(InputError):
    """A part that cannot be written now. The others stay, so that the same command can continue."""


class DamagedPartError(Exception):
    """A part whose files are not those that were written."""


@dataclass(frozen=True)
class Block:
    """Some documents of a part, in order."""

    rows: pa.Table
    """columns as in `_COLUMNS` [n]"""
    tokens: NDArray[np.unsignedinteger]
    """their tokens, one document after another"""


@dataclass(frozen=True)
class Part:
    """A part whose files were compared with their hashes."""

    path: Path
    dtype: np.dtype
    n_rows: int
    empty_after: int
    """documents without text after the last row"""
    failed_after: int
    """documents that could not be read after the last row"""
    failures: tuple[tuple[int, str], ...]
    """the first failures: the row that they precede, or are, and the message"""

    def blocks(self) -> Iterator[Block]:
        """Yield all documents with their tokens.

        Memory: 8,192 documents, 2^24 tokens or those of one document.
        """
        with (self.path / _TOKENS).open("rb") as stream:
            table = pq.ParquetFile(self.path / _DOCUMENTS)
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group)
                ends = np.cumsum(rows["n_tokens"].to_numpy())
                start = read = 0
                while start < len(ends):
                    limit = read + _BLOCK_TOKENS
                    stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
                    n = int(ends[stop - 1]) - read
                    tokens = np.fromfile(stream, self.dtype, n)
                    yield Block(rows.slice(start, stop - start), tokens)
                    start, read = stop, read + n


@dataclass(frozen=True)
class Work:
    """What a process needs to know to write parts."""

    folder: Path
    """the folder `parts/`"""
    groups: tuple[FileCorpus, ...]
    """the files of each part"""
    config: TokenizeConfig
    inputs: dict[str, str]
    """identities of the corpus and of a tokenizer file"""
    tokenizer_sha256: str

    @classmethod
    def begin(
        cls,
        folder: Path,
        groups: list[FileCorpus],
        config: TokenizeConfig,
        inputs: dict[str, str],
        make_tokenizer: Callable[[], Tokenizer],
    ) -> "Work":
        """Return the work in a folder; the tokenizer is made only if no earlier attempt has written it."""
        folder = folder.absolute()
        path = folder / _TOKENIZER
        if not path.is_file():
            tokenizer = make_tokenizer()
            end_of_text_id(tokenizer)  # raises
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                tokenizer.save(str(temporary))
        return cls(folder, tuple(groups), config, inputs, hash_file(path))

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of all parts. Raises `InputError` if its file has changed."""
        path = self.folder / _TOKENIZER
        if hash_file(path) != self.tokenizer_sha256:
            raise PartError(
                f"{path} is not what was written: remove it and type the same command again"
            )
        return _loaded(path, self.tokenizer_sha256)

    @cached_property
    def _dtype(self) -> np.dtype:
        return token_dtype(vocabulary_size(self.tokenizer))

    @cached_property
    def _key(self) -> str:
        return hash_json(
            {
                "format": FORMAT,
                "config": config_dict(self.config),
                "inputs": self.inputs,
                "tokenizer": self.tokenizer_sha256,
            }
        )

    def path(self, index: int) -> Path:
        """Return the folder of a part."""
        return self.folder / f"{index:05d}"

    def key_of(self, index: int) -> str:
        """Return a hash of everything that decides the content of a part."""
        return hash_json([self._key, *(file.name for file in self.groups[index].files)])

    def unwritten(self) -> list[int]:
        """Return the indexes of the parts that are not written."""
        return [i for i in range(len(self.groups)) if not self.is_written(i)]

    def is_written(self, index: int) -> bool:
        """Return whether a part has a record; its files are compared with it by `read`."""
        return _record(self.path(index)).get("key") == self.key_of(index)

    def write(self, index: int, progress: Progress, announce: Announce = lambda _: None) -> None:
        """Write a part, which appears when it is complete.

        Raises `PartError` if another process is writing it, and `StorageError` for a fault of the disk.
        """
        try:
            self._write(index, progress, announce)
        except StorageError:
            raise
        except InputError as error:
            raise PartError(str(error)) from None

    def _write(self, index: int, progress: Progress, announce: Announce) -> None:
        with atomic_folder(self.path(index)) as draft:
            writer = _PartWriter(draft, self.config, end_of_text_id(self.tokenizer), self._dtype)
            corpus = _announced(self.groups[index], announce)
            for batch in encode_corpus(corpus, self.tokenizer, self.config):
                writer.append_all(batch)
                progress(len(batch))
                del batch  # not held while the next documents are read
                if writer.is_full:
                    break
            writer.close(self.key_of(index))

    def read(self, index: int) -> Part:
        """Return a part. Raises `DamagedPartError` if its files are not those that were written."""
        path = self.path(index)
        record = _record(path)
        if record.get("key") != self.key_of(index):
            raise DamagedPartError(f"{path} is not written")
        for name, sha256 in record["sha256"].items():
            if not (path / name).is_file() or hash_file(path / name) != sha256:
                raise DamagedPartError(f"{path / name} is not what was written")
        fields = {f.name: record[f.name] for f in dataclasses.fields(Part) if f.name in record}
        failures = tuple((row, message) for row, message in record["failures"])
        return Part(**{**fields, "path": path, "dtype": self._dtype, "failures": failures})


class _PartWriter:
    """Writer of a part. Memory: the rows of 8,192 documents."""

    def __init__(self, folder: Path, config: TokenizeConfig, eot_id: int, dtype: np.dtype):
        self.folder, self.config, self.eot_id, self.dtype = folder, config, eot_id, dtype
        self.n_rows = self.n_tokens = self.n_failed = 0
        self._empty = self._unreadable = 0
        self._failures: list[tuple[int, str]] = []
        self._tokens, self._digest = (folder / _TOKENS).open("wb"), hashlib.sha256()
        self._table = pq.ParquetWriter(folder / _DOCUMENTS, _COLUMNS)
        self._rows: list[tuple[Any, ...]] = []

    @property
    def is_full(self) -> bool:
        """Return whether nothing that follows in this part can be used."""
        if self.config.on_error == "stop" and self.n_failed > 0:
            return True
        return self.config.reaches_limit(self.n_tokens, self.n_rows)

    def append_all(self, batch: list[Entry]) -> None:
        """Append entries of the corpus, until nothing more can be used."""
        for entry in batch:
            if self.is_full:
                return
            self._append(entry)

    def _append(self, entry: Entry) -> None:
        if entry is None:
            self._empty += 1
        elif isinstance(entry, Encoded):
            tokens = np.empty(len(entry.ids) + 1, self.dtype)
            tokens[:-1] = entry.ids
            tokens[-1] = self.eot_id
            self._tokens.write(tokens.data)
            self._digest.update(tokens.data)
            self._append_row(entry.document, SPLITS.index(entry.split), len(tokens))
        else:
            self.n_failed += 1
            if len(self._failures) < MOST_NAMED:
                self._failures.append((self.n_rows, entry.error.message))
            if entry.document is None:
                self._unreadable += 1
            else:
                self._append_row(entry.document, -1, 0)

    def close(self, key: str) -> None:
        """Finish all files; the record is written last."""
        self._write_rows()
        self._table.close()
        self._tokens.close()
        record = {
            "format": FORMAT,
            "key": key,
            "n_rows": self.n_rows,
            "empty_after": self._empty,
            "failed_after": self._unreadable,
            "failures": self._failures,
            "sha256": {
                _TOKENS: self._digest.hexdigest(),
                _DOCUMENTS: hash_file(self.folder / _DOCUMENTS),
            },
        }
        write_json(self.folder / _RECORD, {**record, "checksum": _checksum(record)})

    def _append_row(self, document: Document, split: int, n_tokens: int) -> None:
        text = document.text
        origin = (document.source, document.subset, document.name, document.line)
        sizes = (n_tokens, len(text), n_bytes_of(text))
        self._rows.append((split, *origin, *sizes, self._empty, self._unreadable, document.is_chat))
        self._empty = self._unreadable = 0
        self.n_rows += 1
        self.n_tokens += n_tokens
        if len(self._rows) == _ROWS_PER_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)]
            self._table.write_table(pa.Table.from_arrays(arrays, schema=_COLUMNS))
            self._rows.clear()


def _announced(group: FileCorpus, announce: Announce) -> Iterator[Document | ReadError]:
    for file in group.files:
        announce(readable(file.path))
        yield from dataclasses.replace(group, files=(file,))


def _record(path: Path) -> dict[str, Any]:
    """Return the record of a part; empty if there is none that can be read."""
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        checksum = record.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return {}
    return record if checksum == _checksum(record) else {}


def _checksum(record: dict[str, Any]) -> str:
    return hash_json(record)


@lru_cache(maxsize=1)
def _loaded(path: Path, sha256: str) -> Tokenizer:
    return load_tokenizer(path)
