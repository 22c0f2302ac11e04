"""Excerpts as HTML: each token shaded by its level 0..10, with its value on hover.

Shape legend: n tokens of an excerpt.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from markupsafe import Markup, escape

from cratelm.text.display import runs_right_to_left, visible

_WHITESPACE = re.compile("[␣⏎⇥]+")


def shaded_html(
    tokens: Sequence[tuple[str, float, int]], peak: int, *, every_value: bool = True
) -> Markup:
    """Return an element for each token: class `l1` to `l10` by its level, `peak` at the offset `peak`.

    `tokens` [n]: text as in the corpus, raw activation, level. Consecutive tokens without a shade share
    one element: with `every_value`, tokens at exactly 0; otherwise, all tokens at level 0, without their
    values.
    """
    elements = [_element(text) for text, _, _ in tokens]
    plain = [
        not (value if every_value else level) and at != peak and elements[at][0] == "span"
        for at, (_, value, level) in enumerate(tokens)
    ]
    parts = []
    for run, offsets in groupby(range(len(tokens)), lambda at: -1 if plain[at] else at):
        if run < 0:
            text = "".join(elements[at][1] for at in offsets)
            parts.append(f'<span title="0">{text}</span>' if every_value else text)
            continue
        (tag, text), (_, value, level) = elements[run], tokens[run]
        classes = [f"l{level}"] * (level > 0) + ["peak"] * (run == peak)
        label = f' class="{" ".join(classes)}"' if classes else ""
        # `or 0`: -0.0 is displayed as 0
        parts.append(f'<{tag}{label} title="{value or 0:.3g}">{text}</{tag}>')
    return Markup("".join(parts))


def faint_marks(text: str) -> Markup:
    """Return `text` escaped, with faint whitespace marks after which a line may break."""
    return Markup(_WHITESPACE.sub(lambda m: f"<i>{m.group()}</i><wbr>", str(escape(text))))


@lru_cache(maxsize=1 << 16)
def _element(text: str) -> tuple[str, str]:
    """Return tag and content of a token; right-to-left text must not reorder its neighbours."""
    return "bdi" if runs_right_to_left(text) else "span", str(faint_marks(visible(text)))
