"""What a corpus yields: documents, and errors for documents that cannot be read."""

import re
from dataclasses import dataclass

from cratelm.text.display import printable

LONGEST_DOCUMENT = 100_000_000
"""bytes of a document, as it is stored, above which it is not read: the default"""
_SLICE = 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A text and its origin."""

    text: str
    """can be encoded as UTF-8: has no lone surrogates"""
    source: str
    """the corpus as the user named it: `builtin`, a path, or `hub:ID`"""
    name: str
    """the file in the corpus, relative to its folder; empty for the Hub"""
    line: int
    """line of the file, or row of the table, from 1; 0 if the document is the whole file"""
    subset: str
    """part of the corpus, such as the Pile's `pile_set_name`; empty if it is not known"""
    is_chat: bool = False
    """whether a chat template wrote the text, in which special tokens are tokens and not plain text"""

    @property
    def location(self) -> str:
        """Return the file and the line of the document, as messages name them."""
        is_file = not self.name or self.source.endswith(f"/{self.name}") or self.source == self.name
        path = self.source if is_file else f"{self.source.rstrip('/')}/{self.name}"
        return f"{path}, line {self.line}" if self.line else path


@dataclass(frozen=True)
class ReadError:
    """A document that could not be read: never counts as a document."""

    message: str
    """one line: its location, what was found, what was expected"""

    def __post_init__(self) -> None:
        # names of files and of fields can have line breaks and terminal escape codes
        object.__setattr__(self, "message", printable(self.message))


def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can encode `text`: not if it has lone surrogates, as JSON can (`"\\ud800"`)."""
    return text.isascii() or _SURROGATE.search(text) is None


def n_bytes_of(text: str) -> int:
    """Return the length of `text` in UTF-8, in bytes, without a copy of the whole text."""
    if text.isascii():
        return len(text)
    return sum(len(text[i : i + _SLICE].encode()) for i in range(0, len(text), _SLICE))


def too_long(limit: int) -> str:
    """Return the reason why a document of more than `limit` bytes is not read."""
    return (
        f"more than {limit:,} bytes, the limit for one document: split it, or raise the limit"
        " (cratelm tokenize --max-document-megabytes)"
    )
