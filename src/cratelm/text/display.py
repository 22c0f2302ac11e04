"""Corpus text made safe to display: every character is visible, and none has an effect.

Terminal escape codes, direction overrides, zero-width characters, NUL and lone surrogates become
`\\x1b`, `\\u202e` and the like, so that the result can be printed, encoded, put into a table or into a
prompt. HTML is escaped later, by the template.

    printable        one line; spaces are kept                  prompts, tables, names
    visible          one line; white space as ␣ ⏎ ⇥             tokens on a page or in a terminal
    visible_folded   the same, long runs as ␣×12                phrases of explanations
    laid_out         line breaks are kept and marked ⏎          a whole text on a page
"""

import re
import unicodedata

from cratelm.errors import in_one_line

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
"""Unicode's bidirectional classes of right-to-left characters"""


def printable(text: str) -> str:
    """Return `text` on one line, with characters that are invisible or act on others as their codes."""
    return in_one_line(text)


def visible(text: str) -> str:
    """Return `text` on one line with ␣ for a space, ⏎ for a line break and ⇥ for a tab.

    A combining mark at the start is placed on a dotted circle, not on whatever precedes the text.
    """
    marked = "".join(_MARKS.get(c) or in_one_line(c) for c in text)
    return f"◌{marked}" if marked and unicodedata.category(marked[0]).startswith("M") else marked


def visible_folded(text: str) -> str:
    """Return `text` as `visible` does, but with long runs of a mark as `␣×12`, and without the circle.

    A run is long if it has more than three marks.
    """
    marked = "".join(_MARKS.get(c) or in_one_line(c) for c in text)
    return re.sub(r"([␣⏎⇥])\1{3,}", lambda m: f"{m[1]}×{len(m[0])}", marked)


def laid_out(text: str) -> str:
    """Return `text` with spaces, tabs and line breaks kept, each line break also marked ⏎.

    A combining mark at the start is placed on a dotted circle, as by `visible`.
    """
    lines = "".join(c if c in " \t" else "⏎\n" if c == "\n" else in_one_line(c) for c in text)
    return f"◌{lines}" if lines and unicodedata.category(lines[0]).startswith("M") else lines


def runs_right_to_left(text: str) -> bool:
    """Return whether a browser would display any part of `text` from right to left."""
    return any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in text)
