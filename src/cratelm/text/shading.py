"""Excerpts as HTML: each token shaded by its level 0..10, with its value on hover.

Shape legend: n tokens of an excerpt.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

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
    plain = [
        not (value if every_value else level) and at != peak and not "".join(words)
        for at, (_, value, level, *words) in enumerate(tokens)
    ]
    parts: list[str] = []
    open_run = 0
    for (run, _), offsets in groupby(
        range(len(tokens)), lambda at: (runs[at], -1 if plain[at] else at)
    ):
        if run != open_run:
            parts.append("</bdi>" * bool(open_run) + '<bdi dir="rtl">' * bool(run))
            open_run = run
        group = list(offsets)
        text = "".join(_content(tokens[at][0]) for at in group)
        if plain[group[0]]:
            parts.append(f'<span title="0">{text}</span>' if every_value else text)
            continue
        _, value, level, *words = tokens[group[0]]
        classes = [f"l{level}"] * (level > 0) + ["peak"] * (group[0] == peak)
        label = f' class="{" ".join(classes)}"' if classes else ""
        # `or 0`: -0.0 is displayed as 0
        title = " · ".join([f"{value or 0:.3g}", *filter(None, words)])
        parts.append(f'<span{label} title="{escape(title)}">{text}</span>')
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
