"""Text of a corpus made safe to look at: a reader sees all of it, and nothing in it acts.

Escape codes of terminals, direction overrides, zero-width characters, NUL and halves of surrogate
pairs become `\\x1b`, `\\u202e` and the like, so that the result can be printed, encoded, put into a
table or into a prompt. HTML is escaped later, by the template.

    printable        one line; spaces stay                      prompts, tables, names
    visible          one line; white space as ␣ ⏎ ⇥             tokens on a page or in a terminal
    visible_folded   the same, long runs as ␣×12                phrases of explanations
    laid_out         lines stay lines, their ends marked ⏎      a whole text on a page
"""

import re
import unicodedata

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
"""Unicode's classes of characters that are set from right to left"""


def printable(text: str) -> str:
    """Return `text` on one line, characters that do not show, or act on others, as their codes."""
    if text.isprintable():  # nearly all tokens: the loop below takes 10 times as long
        return text
    return "".join(map(_escape, text))


def visible(text: str) -> str:
    """Return `text` on one line with ␣ for a space, ⏎ for a line's end and ⇥ for a tab.

    A combining mark at the start gets a dotted circle to stand on, not the character before it.
    """
    shown = "".join(_MARKS.get(c) or _escape(c) for c in text)
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def visible_folded(text: str) -> str:
    """Return `text` as `visible` does, runs of more than three marks as `␣×12`, without the circle."""
    shown = "".join(_MARKS.get(c) or _escape(c) for c in text)
    return re.sub(r"([␣⏎⇥])\1{3,}", lambda m: f"{m[1]}×{len(m[0])}", shown)


def laid_out(text: str) -> str:
    """Return `text` with spaces, tabs and line ends as they are, each line's end marked ⏎ as well."""
    return "".join(c if c in " \t" else "⏎\n" if c == "\n" else visible(c) for c in text)


def runs_right_to_left(text: str) -> bool:
    """Return whether a browser would set a part of `text` from right to left."""
    return any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in text)


def _escape(character: str) -> str:
    # Not printable are exactly the categories Cc, Cf, Cs, Co, Cn, Zl, Zp and every space but " ".
    return character if character.isprintable() else character.encode("unicode_escape").decode()
