"""Files of predicates that a user writes, and the examples that show what a predicate means."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptFeatures
from cratelm.explain.concepts.library import (
    Library,
    Predicate,
    builtin_library,
    distinct,
    parse_predicates,
)

_PIECES = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]| ?_+|\s+")


def load_library(paths: Sequence[str | Path] = ()) -> Library:
    """Return the predicates of the package and of the user's files, whose examples are checked.

    Raises `InputError` with the file, the predicate and what is wrong if a file is faulty.
    """
    predicates = list(builtin_library().predicates)
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--concepts {path} cannot be read: {error}") from None
        from_file = parse_predicates(text, str(path))
        predicates += from_file
        distinct(predicates, str(path))
        for predicate in from_file:
            check_example(predicate, str(path))
    return Library(tuple(predicates)) if paths else builtin_library()


def example_tokens(example: str) -> tuple[list[str], NDArray[np.bool_]]:
    """Return the tokens of an example, and which of them are between « and », [n].

    Tokens are divided at every ¦ and mark if there is a ¦, and else into words, numbers, symbols and white space as well.
    """
    tokens, marked, inside = [], [], False
    for part in re.split("([«»¦])", example):
        if part in ("«", "»"):
            inside = part == "«"
        elif part and part != "¦":
            pieces = [part] if "¦" in example else _PIECES.findall(part)
            tokens += pieces
            marked += [inside] * len(pieces)
    return tokens, np.array(marked, bool)


def check_example(predicate: Predicate, file: str) -> None:
    """Raise `InputError` if the predicate does not hold at exactly the marked tokens of its example."""
    if not predicate.example:
        return
    tokens, marked = example_tokens(predicate.example)
    library = Library((predicate,))
    strings = list(dict.fromkeys(tokens))
    ids = np.array([strings.index(t) for t in tokens])
    holds = ConceptFeatures.of([ids], library, strings).column(predicate.name)
    if not np.array_equal(holds, marked):
        texts = [t for t, h in zip(tokens, holds, strict=True) if h]
        raise InputError(
            f"{file}, predicate {predicate.name}: holds at {texts} of its example, not at the tokens between « and »"
        )
