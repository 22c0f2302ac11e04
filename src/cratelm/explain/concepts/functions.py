"""Predicates that no regular expression expresses, as functions from `TokenTexts` to bool [n].

Each looks at the text up to the end of a token and no further.
"""

import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.concepts.texts import TokenTexts

Bools = NDArray[np.bool_]
FUNCTIONS: dict[str, Callable[[TokenTexts], Bools]] = {}
"""functions by name, with hyphens"""
_INDENT = re.compile(r"[ \t]*")
_TAB = 4
"""columns of a tab"""


def _register(function: Callable[[TokenTexts], Bools]) -> Callable[[TokenTexts], Bools]:
    FUNCTIONS[function.__name__.strip("_").replace("_", "-")] = function
    return function


@_register
def first_in_text(texts: TokenTexts) -> Bools:
    """Return the first token of each text."""
    return texts.offset == 0


@_register
def near_start(texts: TokenTexts) -> Bools:
    """Return the first 8 tokens of each text."""
    return texts.offset < 8


@_register
def continues_word(texts: TokenTexts) -> Bools:
    """Return tokens that go on with a word that began before them."""
    return ~texts.blank & (texts.word_start < texts.start)


@_register
def begins_word(texts: TokenTexts) -> Bools:
    """Return tokens in which a word of letters or digits begins that is not complete by a symbol."""
    is_word = np.array([w[:1].isalnum() or w[:1] == "_" for w in texts.words], bool)
    return is_word & (texts.word_start >= texts.start)


@_register
def begins_line(texts: TokenTexts) -> Bools:
    """Return tokens whose word is the first of its line, by where it begins and what precedes it."""
    blank = [not line.strip() for line in texts.before_word()]
    return ~texts.blank & np.array(blank, bool) & (texts.word_start >= texts.start)


@_register
def second_word_of_line(texts: TokenTexts) -> Bools:
    """Return tokens whose word is the second word or symbol of its line."""
    pairs = zip(texts.before_word(), texts.blank, strict=True)
    return np.array(
        [not b and bool(re.fullmatch(r"\s*(\w+|[^\w\s])\s*", t)) for t, b in pairs], bool
    )


def _column(texts: TokenTexts) -> NDArray[np.int64]:
    """Return the number of characters of the line before the word of each token, [n]."""
    return np.where(texts.blank, -1, texts.word_start - texts.line_start)


@_register
def column_below_8(texts: TokenTexts) -> Bools:
    """Return tokens within the first 8 characters of a line."""
    column = _column(texts)
    return (column >= 0) & (column < 8)


@_register
def column_20_to_39(texts: TokenTexts) -> Bools:
    """Return tokens that begin in columns 20 to 39."""
    column = _column(texts)
    return (column >= 20) & (column < 40)


@_register
def column_40_to_59(texts: TokenTexts) -> Bools:
    """Return tokens that begin in columns 40 to 59."""
    column = _column(texts)
    return (column >= 40) & (column < 60)


@_register
def column_from_60(texts: TokenTexts) -> Bools:
    """Return tokens that begin in column 60 or later."""
    return _column(texts) >= 60


def _indentation(texts: TokenTexts) -> NDArray[np.int64]:
    """Return the width of the indentation of the line of each token, [n]; -1 for white space."""
    found = np.full(len(texts), -1, np.int64)
    lines: dict[int, int] = {}
    for i, (line, blank) in enumerate(zip(texts.line_start.tolist(), texts.blank, strict=True)):
        if not blank:
            if line not in lines:
                indent = _INDENT.match(texts.text, line)
                lines[line] = len(indent.group().expandtabs(_TAB)) if indent else 0
            found[i] = lines[line]
    return found


@_register
def not_indented(texts: TokenTexts) -> Bools:
    """Return tokens in lines without indentation."""
    return _indentation(texts) == 0


@_register
def indented_by_4(texts: TokenTexts) -> Bools:
    """Return tokens in lines indented by 1 to 4 columns."""
    indent = _indentation(texts)
    return (indent > 0) & (indent <= 4)


@_register
def indented_by_8(texts: TokenTexts) -> Bools:
    """Return tokens in lines indented by 5 to 8 columns."""
    indent = _indentation(texts)
    return (indent > 4) & (indent <= 8)


@_register
def indented_deeply(texts: TokenTexts) -> Bools:
    """Return tokens in lines indented by more than 8 columns."""
    return _indentation(texts) > 8


def _inside(texts: TokenTexts, bracket: str) -> Bools:
    return np.array([top == bracket for top in texts.brackets[0]], bool)


@_register
def in_round_brackets(texts: TokenTexts) -> Bools:
    """Return tokens inside round brackets."""
    return _inside(texts, "(")


@_register
def in_square_brackets(texts: TokenTexts) -> Bools:
    """Return tokens inside square brackets."""
    return _inside(texts, "[")


@_register
def in_curly_brackets(texts: TokenTexts) -> Bools:
    """Return tokens inside curly brackets."""
    return _inside(texts, "{")


@_register
def in_nested_brackets(texts: TokenTexts) -> Bools:
    """Return tokens inside two brackets or more."""
    return texts.brackets[1] >= 2


def _opener_follows(texts: TokenTexts, kind: str) -> Bools:
    """Return tokens inside round brackets that follow a name (`kind` is `call`) or a name after `def`."""
    tops, _, places = texts.brackets
    known: dict[int, bool] = {}
    found = np.zeros(len(texts), bool)
    rows = zip(tops, places.tolist(), texts.text_start.tolist(), strict=True)
    for i, (top, place, start) in enumerate(rows):
        if top == "(":
            if place not in known:
                before = texts.text[max(start, place - 80) : place]
                defined = re.search(r"\b(?:def|class)\s+\w+\Z", before) is not None
                called = re.search(r"\w\Z", before) is not None and not defined
                known[place] = called if kind == "call" else defined
            found[i] = known[place]
    return found


@_register
def in_call(texts: TokenTexts) -> Bools:
    """Return tokens inside the brackets of a call, between the name's bracket and its end."""
    return _opener_follows(texts, "call")


@_register
def in_signature(texts: TokenTexts) -> Bools:
    """Return tokens inside the brackets after the name of a function or class that is defined."""
    return _opener_follows(texts, "signature")


@_register
def argument(texts: TokenTexts) -> Bools:
    """Return the first word of an argument: after the bracket or a comma of a call."""
    ahead = np.array([p in ("(", ",") for p in texts.previous()], bool)
    word = np.array([w[:1].isidentifier() for w in texts.words], bool)
    return _opener_follows(texts, "call") & ahead & word


@_register
def parameter(texts: TokenTexts) -> Bools:
    """Return the name of a parameter: after the bracket, a comma or an asterisk of a signature."""
    ahead = np.array([p in ("(", ",", "*") for p in texts.previous()], bool)
    word = np.array([w[:1].isidentifier() for w in texts.words], bool)
    return _opener_follows(texts, "signature") & ahead & word


def _in_quotes(texts: TokenTexts, pattern: str) -> Bools:
    """Return tokens whose word follows an odd number of quotes in its line."""
    quote = re.compile(pattern)
    return (
        np.array([len(quote.findall(line)) % 2 == 1 for line in texts.before_word()], bool)
        & ~texts.blank
    )


@_register
def in_double_quotes(texts: TokenTexts) -> Bools:
    """Return tokens after an odd number of double quotes in their line."""
    return _in_quotes(texts, r'"')


@_register
def in_single_quotes(texts: TokenTexts) -> Bools:
    """Return tokens after an odd number of single quotes in their line, apostrophes in words not counted."""
    return _in_quotes(texts, r"(?<!\w)'|'(?!\w)")


@_register
def in_backquotes(texts: TokenTexts) -> Bools:
    """Return tokens after an odd number of backquotes in their line."""
    return _in_quotes(texts, r"`+")


def _pairs(texts: TokenTexts) -> NDArray[np.int64]:
    """Return a number for each token and the one before it, [n]; -1 for the first of a text."""
    before = np.concatenate([[0], texts.ids[:-1]])
    return np.where(texts.offset > 0, before * (int(texts.ids.max(initial=0)) + 1) + texts.ids, -1)


def _seen(keys: NDArray[np.int64], first: NDArray[np.int64], within: int) -> Bools:
    """Return which keys [n] occurred before within as many tokens of the same text; keys below 0 never did."""
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), bool)
    same = (keys[order][1:] == keys[order][:-1]) & (keys[order][1:] >= 0)
    same &= first[order][1:] == first[order][:-1]
    same &= order[1:] - order[:-1] <= within
    again[order[1:][same]] = True
    return again


@_register
def seen_before(texts: TokenTexts) -> Bools:
    """Return tokens that occur in the 64 tokens before, and are more than a symbol or white space."""
    return _seen(texts.ids, texts.first, 64) & _has_letters(texts)


@_register
def seen_just_before(texts: TokenTexts) -> Bools:
    """Return tokens that occur in the 8 tokens before."""
    return _seen(texts.ids, texts.first, 8)


@_register
def repeats_previous(texts: TokenTexts) -> Bools:
    """Return tokens that are the same as the token before."""
    return _seen(texts.ids, texts.first, 1)


@_register
def bigram_seen_before(texts: TokenTexts) -> Bools:
    """Return tokens that occurred after the same token in the 128 tokens before."""
    return _seen(_pairs(texts), texts.first, 128)


@_register
def new_word(texts: TokenTexts) -> Bools:
    """Return tokens with letters that do not occur in the 256 tokens before."""
    return ~_seen(texts.ids, texts.first, 256) & _has_letters(texts)


def _has_letters(texts: TokenTexts) -> Bools:
    return np.array([any(map(str.isalpha, t)) for t in texts.tokens], bool)


@_register
def after_induction(texts: TokenTexts) -> Bools:
    """Return tokens after a pair of tokens that occurred before, in which the next token can be copied."""
    seen = _seen(_pairs(texts), texts.first, 128)
    return np.concatenate([[False], seen[:-1]])[: len(texts)] & (texts.offset > 0)


@_register
def repeats_line_start(texts: TokenTexts) -> Bools:
    """Return tokens up to which the line is the same as the beginning of the line before, with a letter in it."""
    found = np.zeros(len(texts), bool)
    before: dict[int, tuple[int, int]] = {}
    starts = sorted({*texts.line_start.tolist()})
    for low, high in pairwise(starts):
        before[high] = (low, high)
    bounds = zip(
        texts.line_start.tolist(),
        texts.stripped_end.tolist(),
        texts.text_start.tolist(),
        strict=True,
    )
    for i, (line, end, text) in enumerate(bounds):
        low, high = before.get(line, (-1, -1))
        if low >= text and end > line and low + end - line <= high:
            part = texts.text[line:end]
            found[i] = part == texts.text[low : low + end - line] and any(map(str.isalpha, part))
    return found


@_register
def after_empty_line(texts: TokenTexts) -> Bools:
    """Return tokens in a line that follows an empty one."""
    known: dict[int, bool] = {}
    for line in set(texts.line_start.tolist()):
        known[line] = re.search(r"\n[ \t]*\n\Z", texts.text[max(0, line - 80) : line]) is not None
    follows = np.array([known[line] for line in texts.line_start.tolist()], bool)
    return follows & ~texts.blank & (texts.line_start > texts.text_start)


@_register
def begins_sentence(texts: TokenTexts) -> Bools:
    """Return words with a capital after the end of a sentence."""
    ends = np.array([p in (".", "!", "?") for p in texts.previous()], bool)
    capital = np.array([w[:1].isupper() for w in texts.words], bool)
    spaced = texts.word_start > 0
    characters = np.array(
        [texts.text[max(0, i - 1)].isspace() for i in texts.word_start.tolist()], bool
    )
    return ends & capital & spaced & characters & (texts.word_start >= texts.start)


@_register
def long_word(texts: TokenTexts) -> Bools:
    """Return tokens that take a word beyond 10 characters."""
    return texts.stripped_end - texts.word_start > 10


@_register
def word_of_one_character(texts: TokenTexts) -> Bools:
    """Return tokens that end a word of letters after one character, as far as the text shows."""
    return np.array([len(w) == 1 and w.isalpha() for w in texts.words], bool)
