"""Texts of imported records: a vocabulary of their token strings, and one document a text.

A document is one sequence of tokens. Its split is decided by its text, so that the same text is
never both explained from and scored on, whichever neurons show it.
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

Used = Literal["fit", "held_out"]
USED: tuple[Used, ...] = ("fit", "held_out")


@dataclass(frozen=True, eq=False)
class Listed:
    """An activation record and where it stands in its neuron's file."""

    record: ActivationRecord
    kind: ExcerptKind
    bin: int
    """which quantile, -1 for other kinds"""
    rank: int
    """place in its list"""

    @property
    def wish(self) -> Used:
        """Even ranks explain and odd ones are scored on, as the paper does with the top ten."""
        return USED[self.rank % 2]


@dataclass(frozen=True)
class Place:
    """Where a document lies in the shards."""

    split: Used
    ordinal: int
    start: int
    """position in the split of its first token"""


@dataclass
class Texts:
    """What the records show, gathered in one pass. About 0.4 kB a different text."""

    vocabulary: dict[str, int] = field(default_factory=lambda: {END_OF_TEXT: 0})
    splits: dict[bytes, Used] = field(default_factory=dict)
    """split of each text, by its hash"""
    places: dict[bytes, Place] = field(default_factory=dict)
    """of each document written, by the hash of its tokens"""
    n_moved: int = 0
    """activation records whose text had been given the other split"""

    def add(self, record: OpenAIRecord) -> None:
        """Learns the token strings; a text gets the split that it is first met in."""
        for listed in listed_records(record):
            for token in listed.record.tokens:
                self.vocabulary.setdefault(storable(token), len(self.vocabulary))
            given = self.splits.setdefault(_hash_text(listed.record), listed.wish)
            self.n_moved += given != listed.wish

    def split_of(self, record: ActivationRecord) -> Used:
        return self.splits[_hash_text(record)]

    def place_of(self, record: ActivationRecord) -> Place:
        return self.places[_hash_tokens(record)]

    def ids(self, record: ActivationRecord) -> list[int]:
        return [self.vocabulary[storable(token)] for token in record.tokens]

    def write(self, writer: StoreWriter, record: OpenAIRecord) -> None:
        """Writes the documents of a neuron that are not written yet."""
        for listed in listed_records(record):
            key = _hash_tokens(listed.record)
            if key in self.places:
                continue
            split = self.split_of(listed.record)
            text = "".join(map(storable, listed.record.tokens))
            name = f"layer {record.layer}, neuron {record.index}, {listed.kind} {listed.rank}"
            self.places[key] = Place(split, writer.n_documents, writer.n_tokens(split))
            document = Document(text, "activation records", name, 0, "")
            writer.append(split, self.ids(listed.record), document)

    def n_documents(self, split: Used) -> int:
        return sum(place.split == split for place in self.places.values())

    def writer(self, folder: Path) -> StoreWriter:
        tokenizer = _tokenizer(self.vocabulary)
        return StoreWriter(folder, tokenizer, end_of_text_id(tokenizer))


def listed_records(record: OpenAIRecord) -> Iterator[Listed]:
    """All activation records of a neuron that hold tokens."""
    kinds: list[tuple[ExcerptKind, int, Sequence[ActivationRecord]]] = [
        ("top", -1, record.top),
        ("random", -1, record.random),
        *(("openai_bin", bin_, rows) for bin_, rows in enumerate(record.by_quantile or ())),
    ]
    for kind, bin_, rows in kinds:
        for rank, one in enumerate(rows):
            if one.tokens:
                yield Listed(one, kind, bin_, rank)


def splits_of(record: OpenAIRecord, texts: Texts) -> set[Used]:
    """The splits in which a neuron has an excerpt."""
    return {texts.split_of(listed.record) for listed in listed_records(record)}


def storable(token: str) -> str:
    r"""The token as UTF-8 can hold it: half of a surrogate pair becomes its escape, such as `\ud83d`."""
    return token.encode("utf-8", "backslashreplace").decode("utf-8")


def _tokenizer(vocabulary: Iterable[str]) -> Tokenizer:
    """Whole strings as tokens, in the byte-level alphabet: so each string is shown again as it is."""
    names = map(byte_level_name, vocabulary)
    return Tokenizer(WordLevel({name: number for number, name in enumerate(names)}))


def _hash_text(record: ActivationRecord) -> bytes:
    text = "".join(map(storable, record.tokens))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _hash_tokens(record: ActivationRecord) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for token in record.tokens:
        data = storable(token).encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()
