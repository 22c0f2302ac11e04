"""Excerpts as HTML: each token shaded by its level 0..10, with its value on hover.

Shape legend: n tokens of an excerpt.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from markupsafe import Markup, escape

from cratelm.text.display import runs_right_to_left, visible

_WHITESPACE = re.compile("[␣⏎⇥]+")


def shaded_html(
    tokens: Sequence[tuple[str, float, int] | tuple[str, float, int, str]],
    peak: int,
    *,
    every_value: bool = True,
) -> Markup:
    """Return an element for each token: class `l1` to `l10` by its level, `peak` at the offset `peak`.

    `tokens` [n]: text as in the corpus, raw activation, level, and possibly words about the tokens that a unit of
    text consists of, which are added to the value. Consecutive tokens without a shade share one element: with
    `every_value`, tokens at exactly 0; otherwise, all tokens at level 0, without their values.

    Consecutive tokens of right-to-left text are in one isolated element, in which a browser joins their letters and
    orders them from right to left; so they do not reorder what is around them.
    """
    runs = _right_to_left_runs([token[0] for token in tokens])
    parts: list[str] = []
    plain: list[str] = []  # consecutive tokens without a shade, which share one element
    open_run = 0

    def close_plain() -> None:
        text = "".join(plain)
        parts.append(f'<span title="0">{text}</span>' if text and every_value else text)
        plain.clear()

    for at, token in enumerate(tokens):  # a page has thousands of tokens
        if runs[at] != open_run:
            close_plain()
            parts.append("</bdi>" * bool(open_run) + '<bdi dir="rtl">' * bool(runs[at]))
            open_run = runs[at]
        text, (value, level), words = _content(token[0]), token[1:3], "".join(token[3:])
        if not (value if every_value else level) and at != peak and not words:
            plain.append(text)
            continue
        if plain:
            close_plain()
        classes = f"l{level}" if level > 0 else ""
        if at == peak:
            classes = f"{classes} peak" if classes else "peak"
        label = f' class="{classes}"' if classes else ""
        # `or 0`: -0.0 is displayed as 0
        title = f"{value or 0:.3g} · {escape(words)}" if words else f"{value or 0:.3g}"
        parts.append(f'<span{label} title="{title}">{text}</span>')
    close_plain()
    return Markup("".join(parts) + "</bdi>" * bool(open_run))


def faint_marks(text: str) -> Markup:
    """Return `text` escaped, with faint whitespace marks after which a line may break."""
    return Markup(_WHITESPACE.sub(lambda m: f"<i>{m.group()}</i><wbr>", str(escape(text))))


@lru_cache(maxsize=1 << 16)
def _content(text: str) -> str:
    return str(faint_marks(visible(text)))


@lru_cache(maxsize=1 << 16)
def _direction(text: str) -> str:
    """Return "R" for text of which any part runs from right to left, "L" for other letters, "" for neither."""
    if runs_right_to_left(text):
        return "R"
    return "L" if any(unicodedata.bidirectional(c) == "L" for c in text) else ""


def _right_to_left_runs(texts: Sequence[str]) -> list[int]:
    """Return for each text the number, from 1, of the right-to-left run that it is in, or 0.

    A run begins and ends with right-to-left text, and has no letters that run from left to right between.
    """
    runs = [0] * len(texts)
    n_runs, last = 0, -1  # offset of the last right-to-left text of the run, -1 without one
    for at, direction in enumerate(map(_direction, texts)):
        if direction == "L":
            last = -1
        elif direction == "R":
            n_runs += last < 0
            runs[last if last >= 0 else at : at + 1] = [n_runs] * (
                at + 1 - (last if last >= 0 else at)
            )
            last = at
    return runs
