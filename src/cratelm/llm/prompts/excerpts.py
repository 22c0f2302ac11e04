"""Write tokens as a language model sees them in prompts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cratelm.text.display import printable
from cratelm.text.units import units_in

OPEN, CLOSE = "«", "»"
"""around the tokens that a neuron reacts to"""


def excerpt_text(
    token_ids: NDArray, strings: Sequence[str], marked: Sequence[bool] | NDArray = ()
) -> str:
    """Return the tokens of an excerpt as one line, runs of `marked` tokens inside guillemets.

    `token_ids` [n]; `strings` [V] is the text of each token id (`TokenStore.token_strings`); `marked` [n],
    or empty to mark none. Tokens that make a character together are written as that character, which is marked
    if one of them is.
    """
    parts = []
    inside = False
    for unit in units_in(token_ids.tolist(), strings):
        is_marked = bool(np.any(marked[unit.start : unit.stop]))
        if is_marked != inside:
            parts.append(OPEN if is_marked else CLOSE)
        parts.append(printable(unit.text))
        inside = is_marked
    return "".join(parts) + (CLOSE if inside else "")
