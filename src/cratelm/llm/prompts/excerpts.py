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

    `token_ids` [n]; `strings` [V] is the text of each token id (`TokenStore.token_strings`); `marked` [n],
    or empty to mark none.
    """
    parts = []
    inside = False
    for i, token in enumerate(token_ids):
        is_marked = bool(len(marked)) and bool(marked[i])
        if is_marked != inside:
            parts.append(OPEN if is_marked else CLOSE)
        parts.append(printable(strings[int(token)]))
        inside = is_marked
    return "".join(parts) + (CLOSE if inside else "")
