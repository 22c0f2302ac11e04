"""Tokens made safe to look at: what does not show, or acts on its neighbours, becomes its code."""

import unicodedata

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "\\r"}
_BY_CODE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
"""Unicode categories of what is not seen: control, format, surrogate, private, unassigned, spaces"""


def visible(text: str) -> str:
    """`text` on one line: ␣ for a space, ⏎ for a line's end, ⇥ for a tab, codes for what is not seen.

    A combining mark at the start gets a dotted circle to stand on, not the character before.
    """
    shown = "".join(_MARKS.get(c) or _code(c) for c in text)
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def laid_out(text: str) -> str:
    """`visible`, but spaces, tabs and line ends as they are, a line's end marked as well."""
    parts = [c if c in " \t" else "⏎\n" if c == "\n" else visible(c) for c in text]
    return "".join(parts)


def _code(character: str) -> str:
    if unicodedata.category(character) not in _BY_CODE:
        return character
    return character.encode("unicode_escape").decode()
