"""The claim of a sentence that explains a neuron."""

import re

_CLAIM = re.compile(r"(?:[^`;.]|\.(?! |\Z)|`[^`]*(?:`|\Z))*")
"""everything up to a semicolon, or a full stop before a space or the end; text in backticks is skipped as a whole"""


def claim(text: str) -> str:
    """Return the claim of a sentence: what precedes its first semicolon or full stop outside of backticks."""
    found = _CLAIM.match(text)
    return found.group() if found else text
