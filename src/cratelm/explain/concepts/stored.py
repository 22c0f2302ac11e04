"""The library that explanations were made with, stored next to them, so that later versions read them alike."""

from collections.abc import Sequence
from pathlib import Path

from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.library import Library, builtin_library
from cratelm.runs.reading import verified

FILE = "concepts.json"
"""in the folder of explanations"""


def write_library(folder: Path, library: Library) -> None:
    """Write the library into a folder of explanations."""
    (folder / FILE).write_text(library.as_json(), encoding="utf-8")


def read_library(folder: Path) -> Library:
    """Return the library in a folder of explanations; the built-in one if it has none.

    Raises `InputError` if the file is damaged, or names a function that no installed package declares.
    """
    path = verified(folder / FILE)
    if not path.is_file():
        return builtin_library()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return Library.from_json(text, str(path))


def concept_reader(folder: Path, strings: Sequence[str]) -> ConceptReader:
    """Return what evaluates the formulas in a folder of explanations; `strings` [V] are the texts of tokens."""
    return ConceptReader(read_library(folder), strings)
