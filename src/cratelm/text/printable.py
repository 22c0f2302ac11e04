"""Corpus text made safe to look at: whatever a document holds, a reader sees it and nothing acts on it.

HTML is escaped later, by the template; here characters that do not show are made visible.
"""

import unicodedata

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
_SHOWN_BY_CODE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories: control, format (direction marks, zero width), surrogate, private, unassigned,
line and paragraph separator"""
_RIGHT_TO_LEFT = {"R", "AL", "AN"}


def printable(text: str) -> str:
    """`text` on one line, with characters that do not show, or act on others, as their code points.

    Escape codes of terminals, direction overrides, NUL and halves of surrogate pairs become \\x1b,
    \\u202e and the like, so that the result can be printed, encoded and put into a table.
    """
    if text.isprintable():  # leaves out just the categories below, and spaces other than " "
        return text
    return "".join(_escape(c) for c in text)


def visible(text: str) -> str:
    """`printable`, with ␣ for a space, ⏎ for a line's end and ⇥ for a tab.

    A combining mark at the start gets a dotted circle to stand on, not the character before.
    """
    shown = "".join(_MARKS.get(c) or _escape(c) for c in text)
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def runs_right_to_left(text: str) -> bool:
    """True where a browser would set part of `text` from right to left."""
    return any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in text)


def _escape(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    odd_space = category == "Zs" and character != " "
    if category not in _SHOWN_BY_CODE and not odd_space:
        return character
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
