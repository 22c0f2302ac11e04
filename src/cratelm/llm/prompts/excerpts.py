"""Write tokens as a language model sees them in prompts."""

from collections.abc import Sequence

from numpy.typing import NDArray

from cratelm.text.display import printable

OPEN, CLOSE = "«", "»"
"""around the tokens that a neuron reacts to"""


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
        parts.append(printable(strings[int(token)]))
        inside = now
    return "".join(parts) + (CLOSE if inside else "")
