"""Write tokens as a language model sees them in prompts."""

from collections.abc import Sequence

from numpy.typing import NDArray

OPEN, CLOSE = "«", "»"
"""around the tokens that a neuron reacts to"""
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escaped(text: str) -> str:
    """Return `text` on one line: characters that do not print are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _NAMED.get(c) or _code(c) for c in text)


def excerpt_text(
    token_ids: NDArray, strings: Sequence[str], marked: Sequence[bool] | NDArray = ()
) -> str:
    """Return the tokens of an excerpt as one line, runs of `marked` tokens inside guillemets.

    `strings` [V] shows each token (`TokenStore.decode_tokens`); `marked` [n] or empty for none.
    """
    parts = []
    inside = False
    for place, token in enumerate(token_ids):
        now = bool(len(marked)) and bool(marked[place])
        if now != inside:
            parts.append(OPEN if now else CLOSE)
        parts.append(escaped(strings[int(token)]))
        inside = now
    return "".join(parts) + (CLOSE if inside else "")


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
