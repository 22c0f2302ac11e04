"""Excerpts as runs of text with a level 0..10 each, for a page that shades them.

Shape legend: n tokens of an excerpt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from cratelm.records import levels
from cratelm.text.display import runs_right_to_left, visible

_WHITESPACE = re.compile("[␣⏎⇥]+")


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of several in a row that are at level 0."""

    text: str
    """visible: nothing in it acts on a page or a terminal"""
    level: int
    """0..10 of the largest activation shown (`cratelm.records.levels`)"""
    peak: bool
    """the token that the excerpt was chosen for"""
    activation: float
    """raw activation; 0 where several tokens are joined"""
    isolate: bool
    """holds text that runs from right to left, which must not reorder its neighbours"""


def pieces(
    tokens: Sequence[str], activations: ArrayLike, maximum: float, peak: int
) -> tuple[Piece, ...]:
    """Pieces of an excerpt: `tokens` [n] as text, `activations` [n] raw, `maximum` the raw value of level 10."""
    values = np.asarray(activations, dtype=np.float64)
    shown = levels(values, maximum)
    found: list[Piece] = []
    for place, (token, level) in enumerate(zip(tokens, shown, strict=True)):
        piece = Piece(
            visible(token),
            int(level),
            place == peak,
            float(values[place]),
            runs_right_to_left(token),
        )
        if found and _plain(found[-1]) and _plain(piece):
            piece = Piece(found.pop().text + piece.text, 0, False, 0.0, False)
        found.append(piece)
    return tuple(found)


def faint_marks(text: str) -> Markup:
    """Escaped `text`, whose marks of whitespace are set faint and let a line break after them."""
    return Markup(_WHITESPACE.sub(lambda m: f"<i>{m.group()}</i><wbr>", str(escape(text))))


def _plain(piece: Piece) -> bool:
    return piece.level == 0 and not piece.peak and not piece.isolate
