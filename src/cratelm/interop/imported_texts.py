"""Texts of imported records: a vocabulary of their token strings, and one document per text.

A document is one sequence of tokens. Its split depends only on its text, so that no text is both explained from
and scored on, even if it occurs in the records of several neurons.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cratelm.corpus.documents import Document
from cratelm.interop.openai_records import ActivationRecord, OpenAIRecord
from cratelm.records import ExcerptKind
from cratelm.tokens.shards import StoreWriter
from cratelm.tokens.tokenizer import END_OF_TEXT, byte_level_name, end_of_text_id

ImportSplit = Literal["fit", "held_out"]
IMPORT_SPLITS: tuple[ImportSplit, ...] = ("fit", "held_out")


@dataclass(frozen=True, eq=False)
class ListedRecord:
    """An activation record and its position in its neuron's file."""

    record: ActivationRecord
    kind: ExcerptKind
    bin: int
    """number of the quantile; -1 for other kinds"""
    rank: int
    """position in its list"""

    @property
    def preferred_split(self) -> ImportSplit:
        """Return the split by rank: even ranks explain, odd ranks are scored on, as in the paper's top ten."""
        return IMPORT_SPLITS[self.rank % 2]


@dataclass(frozen=True)
class DocumentPosition:
    """Position of a document in the shards."""

    split: ImportSplit
    ordinal: int
    start: int
    """position of its first token in the split"""


@dataclass
class ImportedTexts:
    """Vocabulary and texts of all records, collected in one pass. Takes about 0.4 kB per distinct text."""

    vocabulary: dict[str, int] = field(default_factory=lambda: {END_OF_TEXT: 0})
    splits: dict[bytes, ImportSplit] = field(default_factory=dict)
    """split of each text, by its hash"""
    places: dict[bytes, DocumentPosition] = field(default_factory=dict)
    """position of each written document, by the hash of its tokens"""
    n_moved: int = 0
    """number of activation records whose text was already assigned to the other split"""

    def add(self, record: OpenAIRecord) -> None:
        """Add a neuron's token strings to the vocabulary, and assign each new text to a split."""
        for listed in listed_records(record):
            for token in listed.record.tokens:
                self.vocabulary.setdefault(storable(token), len(self.vocabulary))
            split = self.splits.setdefault(_hash_text(listed.record), listed.preferred_split)
            self.n_moved += split != listed.preferred_split

    def split_of(self, record: ActivationRecord) -> ImportSplit:
        """Return the split of a record's text."""
        return self.splits[_hash_text(record)]

    def position_of(self, record: ActivationRecord) -> DocumentPosition:
        """Return the position of a record's document."""
        return self.places[_hash_tokens(record)]

    def ids(self, record: ActivationRecord) -> list[int]:
        """Return the token ids of a record."""
        return [self.vocabulary[storable(token)] for token in record.tokens]

    def write(self, writer: StoreWriter, record: OpenAIRecord) -> None:
        """Write those documents of a neuron that are not written yet."""
        for listed in listed_records(record):
            key = _hash_tokens(listed.record)
            if key in self.places:
                continue
            split = self.split_of(listed.record)
            text = "".join(map(storable, listed.record.tokens))
            name = f"layer {record.layer}, neuron {record.index}, {listed.kind} {listed.rank}"
            self.places[key] = DocumentPosition(split, writer.n_documents, writer.n_tokens(split))
            document = Document(text, "activation records", name, 0, "")
            writer.append(split, self.ids(listed.record), document)

    def n_documents(self, split: ImportSplit) -> int:
        """Return the number of documents of a split that were written."""
        return sum(place.split == split for place in self.places.values())

    def writer(self, folder: Path) -> StoreWriter:
        """Return a writer of the documents, with a tokenizer of all token strings."""
        tokenizer = _tokenizer(self.vocabulary)
        return StoreWriter(folder, tokenizer, end_of_text_id(tokenizer))


def listed_records(record: OpenAIRecord) -> Iterator[ListedRecord]:
    """Yield all activation records of a neuron that contain tokens."""
    kinds: list[tuple[ExcerptKind, int, Sequence[ActivationRecord]]] = [
        ("top", -1, record.top),
        ("random", -1, record.random),
        *(("openai_bin", bin_, rows) for bin_, rows in enumerate(record.by_quantile or ())),
    ]
    for kind, bin_, rows in kinds:
        for rank, row in enumerate(rows):
            if row.tokens:
                yield ListedRecord(row, kind, bin_, rank)


def splits_of(record: OpenAIRecord, texts: ImportedTexts) -> set[ImportSplit]:
    """Return the splits in which a neuron has an excerpt."""
    return {texts.split_of(listed.record) for listed in listed_records(record)}


def storable(token: str) -> str:
    r"""Return a token that UTF-8 can encode: a lone surrogate becomes its escape, such as `\ud83d`."""
    return token.encode("utf-8", "backslashreplace").decode("utf-8")


def _tokenizer(vocabulary: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of whole strings, in the byte-level alphabet, so that each is decoded unchanged."""
    names = map(byte_level_name, vocabulary)
    return Tokenizer(WordLevel({name: number for number, name in enumerate(names)}))


def _hash_text(record: ActivationRecord) -> bytes:
    text = "".join(map(storable, record.tokens))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _hash_tokens(record: ActivationRecord) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for token in record.tokens:
        data = storable(token).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
