"""Excerpts as pieces of text with a level 0..10 each, for a page that shades them.

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
    """Return an excerpt as pieces: `tokens` [n] as text, `activations` [n] raw, `maximum` is level 10."""
    values = np.asarray(activations, dtype=np.float64)
    level_of = levels(values, maximum)
    shaded: list[Piece] = []
    for number, (token, level) in enumerate(zip(tokens, level_of, strict=True)):
        piece = Piece(
            visible(token),
            int(level),
            number == peak,
            float(values[number]),
            runs_right_to_left(token),
        )
        if shaded and _plain(shaded[-1]) and _plain(piece):
            piece = Piece(shaded.pop().text + piece.text, 0, False, 0.0, False)
        shaded.append(piece)
    return tuple(shaded)


def faint_marks(text: str) -> Markup:
    """Return `text` escaped, its marks of white space faint and with a possible line break after them."""
    return Markup(_WHITESPACE.sub(lambda m: f"<i>{m.group()}</i><wbr>", str(escape(text))))


def _plain(piece: Piece) -> bool:
    return piece.level == 0 and not piece.peak and not piece.isolate
