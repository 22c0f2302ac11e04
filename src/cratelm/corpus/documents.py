"""What a corpus yields: documents, and errors for documents that cannot be read."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class ReadError:
    """A document that could not be read: never counts as a document."""

    message: str
    """one line: its location, what was found, what was expected"""


def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can encode `text`: not if it has lone surrogates, as JSON can (`"\\ud800"`)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
