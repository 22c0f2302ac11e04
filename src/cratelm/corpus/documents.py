"""What a corpus yields: documents, and places where a document could not be read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    text: str
    """can be encoded as UTF-8: holds no lone surrogates"""
    source: str
    """the corpus as it was named: `builtin`, a path, or `hub:ID`"""
    name: str
    """the file in the corpus, relative to its folder; empty for the Hub"""
    line: int
    """line of the file, or row of the table, from 1; 0 where the document is the whole file"""
    subset: str
    """part of the corpus, such as the Pile's `pile_set_name`; empty where it is not known"""


@dataclass(frozen=True)
class ReadError:
    """A place where a document should be and could not be read: never taken for a document."""

    message: str
    """one line: where, what was found, what was expected"""


def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can hold `text`: not lone surrogates, which JSON can write (`"\\ud800"`)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
