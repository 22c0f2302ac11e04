"""Tokens of texts as characters, words and lines, for predicates; all is as the text up to the token shows it.

A token is a piece of text that need not end where a word does. It is judged by its last character other than white
space:

    word      the run of letters, digits and underscores up to that character, or the character itself if it is a symbol
    previous  the word or symbol before that word, which may be in the same token
    type      the lexical type of the lexeme at that character (`lexing`)

So `.get` has the word `get`, the previous word `.`, and is an attribute. A token of white space alone has no word.

Shape legend: n tokens of all texts.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.concepts.lexing import CausalLexer

Int64 = NDArray[np.int64]
_UNIT = re.compile(r"\w+|[^\w\s]")
_SEPARATOR = "\x1e"
"""between texts; no symbol of a text is taken for it, since each text has its own bounds"""
_BRACKETS = {")": "(", "]": "[", "}": "{"}
_BRACKET_EVENTS = re.compile(r"[()\[\]{}\x1e]|\n[ \t]*(?=\n)")
_LEXER = CausalLexer()


class TokenTexts:
    """The tokens of several texts, each a run of tokens of one document."""

    def __init__(self, token_lists: Sequence[NDArray], token_strings: Sequence[str]):
        """`token_lists` has the token ids of each text; `token_strings` [V] is the text of each id."""
        lengths = np.array([len(ids) for ids in token_lists], np.int64)
        self.ids: Int64 = np.concatenate([np.zeros(0, np.int64), *token_lists]).astype(np.int64)
        """[n] token ids"""
        self.tokens: list[str] = [str(token_strings[i]) for i in self.ids.tolist()]
        """n texts of tokens"""
        self.first: Int64 = np.repeat(np.cumsum(lengths) - lengths, lengths)
        """[n] number of the first token of the token's text"""
        parts: list[str] = []
        bounds = np.cumsum([0, *lengths]).tolist()
        for low, high in pairwise(bounds):
            parts += [*self.tokens[low:high], _SEPARATOR]
        self.text = "".join(parts)
        """all texts one after another, with a separator after each"""
        sizes = np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))
        text_number = np.repeat(np.arange(len(lengths)), lengths)
        self.end: Int64 = np.cumsum(sizes) + text_number
        """[n] where each token ends in `text`"""
        self.start: Int64 = self.end - sizes
        """[n] where it begins"""
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def offset(self) -> Int64:
        """Return the number of tokens of the text before each token, [n]."""
        return np.arange(len(self)) - self.first

    @cached_property
    def text_start(self) -> Int64:
        """Return where the text of each token begins in `text`, [n]."""
        return self.start[self.first] if len(self) else self.first

    @cached_property
    def stripped_end(self) -> Int64:
        """Return one past the last character of each token other than white space [n]; its start if it has none."""
        kept = np.fromiter((len(t.rstrip()) for t in self.tokens), np.int64, len(self))
        return self.start + kept

    @cached_property
    def blank(self) -> NDArray[np.bool_]:
        """Return which tokens are white space alone, [n]."""
        return self.stripped_end == self.start

    @cached_property
    def _units(self) -> tuple[Int64, Int64]:
        """Return where the words and symbols of `text` begin and end."""
        spans = [m.span() for m in _UNIT.finditer(self.text)]
        array = np.array(spans, np.int64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    @cached_property
    def _unit(self) -> Int64:
        """Return the number of the word or symbol of each token [n]; of the one before it if it is white space."""
        return np.searchsorted(self._units[0], self.stripped_end, side="left") - 1

    @cached_property
    def word_start(self) -> Int64:
        """Return where the word of each token begins, [n]; where the token ends if it is white space."""
        if not len(self._units[0]):
            return self.end
        return np.where(self.blank, self.end, self._units[0][self._unit])

    @cached_property
    def words(self) -> list[str]:
        """Return the word of each token up to the token's end, or its last symbol; empty for white space."""
        pairs = zip(self.word_start.tolist(), self.stripped_end.tolist(), strict=True)
        return [self.text[a:b] if a < b else "" for a, b in pairs]

    def previous(self, back: int = 1) -> list[str]:
        """Return the word or symbol that many before the word of each token; empty where there is none."""
        unit = self._unit - back + self.blank
        starts, ends = self._units
        exists = unit >= 0
        if not len(starts):
            return [""] * len(self)
        unit = np.maximum(unit, 0)
        low, high = starts[unit], ends[unit]
        exists &= low >= self.text_start
        low = np.where(exists, low, 0)
        high = np.where(exists, high, 0)
        return [self.text[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)]

    @cached_property
    def line_start(self) -> Int64:
        """Return where the line begins that the word of each token is in, [n]."""
        breaks = np.array([m.end() for m in re.finditer(rf"[\n{_SEPARATOR}]", self.text)], np.int64)
        at = np.searchsorted(breaks, np.maximum(self.stripped_end - 1, self.start), side="right")
        before = np.concatenate([[0], breaks])[at]
        return np.maximum(before, self.text_start)

    @cached_property
    def first_words(self) -> list[str]:
        """Return the first word or symbol of the line of each token, up to the token's end."""
        starts, ends = self._units
        unit = np.minimum(np.searchsorted(starts, self.line_start), max(len(starts) - 1, 0))
        if not len(starts):
            return [""] * len(self)
        low, high = starts[unit], np.minimum(ends[unit], self.stripped_end)
        pairs = zip(low.tolist(), high.tolist(), strict=True)
        return [self.text[a:b] if a < b else "" for a, b in pairs]

    @cached_property
    def types(self) -> list[str]:
        """Return the lexical type of each token, as dotted names of pygments."""
        found: list[str] = []
        first = 0
        for length in self._lengths.tolist():
            if length:
                low, high = int(self.start[first]), int(self.end[first + length - 1])
                ends = (self.end[first : first + length] - low).tolist()
                found += _LEXER.types(self.text[low:high], ends)
            first += length
        return found

    @cached_property
    def brackets(self) -> tuple[list[str], Int64, Int64]:
        """Return the innermost open bracket at the word of each token (empty without one), depth and place of it.

        Brackets are closed by their own kind, and all by an empty line. An opening bracket is outside of its pair, a
        closing one inside.
        """
        events: list[tuple[int, str, int, int]] = [(-1, "", 0, 0)]
        stack: list[tuple[str, int]] = []
        for m in _BRACKET_EVENTS.finditer(self.text):
            symbol = m.group()
            if symbol in "([{":
                stack.append((symbol, m.start()))
            elif symbol in _BRACKETS:
                if stack and stack[-1][0] == _BRACKETS[symbol]:
                    stack.pop()
            else:
                stack.clear()
            top, place = stack[-1] if stack else ("", 0)
            # an empty line begins at the second of two line breaks, which is not part of the match
            at = m.start() if len(symbol) == 1 and symbol != "\n" else m.end()
            events.append((at, top, len(stack), place))
        ends = np.where(self.blank, self.end, self.word_start)
        which = np.searchsorted(np.array([e[0] for e in events]), ends, side="left") - 1
        tops = [e[1] for e in events]
        depth, place = (np.array([e[i] for e in events], np.int64)[which] for i in (2, 3))
        return [tops[i] for i in which.tolist()], depth, place

    def lines(self) -> list[str]:
        """Return the line of each token up to the token's end."""
        pairs = zip(self.line_start.tolist(), self.end.tolist(), strict=True)
        return [self.text[a:b] for a, b in pairs]

    def before_word(self) -> list[str]:
        """Return the line of each token up to where its word begins."""
        pairs = zip(self.line_start.tolist(), self.word_start.tolist(), strict=True)
        return [self.text[a:b] for a, b in pairs]
