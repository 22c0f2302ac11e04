r"""Tokens of a sequence grouped into units of text that can be shown.

A tokenizer that works on bytes cuts characters: 中 is often three tokens of one byte each. Alone each of them is
an escape (`\xe4`); together they are a character. A unit is the shortest run of tokens that begins and ends
between characters, and that no combining mark, skin tone or joined emoji follows. So one token is a unit, unless it
holds a part of a character or something that is drawn on the character before it.

Shape legend: n tokens of a sequence.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_ZERO_WIDTH_JOINER = "\u200d"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_EMOJI = range(0x2190, 0x1FB00)


class Unit(NamedTuple):
    """A run of tokens that is shown as one piece of text."""

    start: int
    """offset of its first token"""
    stop: int
    """offset after its last token"""
    text: str
    r"""bytes that belong to no character are escapes, `\xNN`"""

    @property
    def n_tokens(self) -> int:
        """Return the number of its tokens."""
        return self.stop - self.start


class TokenStrings(list[str]):
    r"""The display string of each token id, [V], in which a part of a character is an escape `\xNN`.

    A list of strings that also groups the tokens of a text into units.
    """

    def __init__(self, tokens: Iterable[bytes]):
        """`tokens` [V] holds the UTF-8 bytes of each token id."""
        self.bytes = list(tokens)
        super().__init__(decoded(token) for token in self.bytes)
        self._joining = frozenset(
            index
            for index, (token, text) in enumerate(zip(self.bytes, self, strict=True))
            if text.encode() != token or (text and (_continues(text) or _joins(text)))
        )
        """ids of tokens that may not be units of their own"""

    @property
    def joining(self) -> frozenset[int]:
        """Return the ids of tokens that may not be units of their own; a sequence without them has a unit per token."""
        return self._joining

    def units(self, ids: Iterable[int]) -> list[Unit]:
        """Return the units of a sequence of token ids [n]; they cover it without gaps."""
        ids = [int(i) for i in ids]
        if self._joining.isdisjoint(ids):
            return [Unit(at, at + 1, self[i]) for at, i in enumerate(ids)]
        return units_of([self.bytes[i] for i in ids])

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of a sequence of token ids."""
        return decoded(b"".join(self.bytes[int(i)] for i in ids))


def units_of(tokens: Sequence[bytes]) -> list[Unit]:
    """Return the units of the tokens [n] of a sequence; they cover it without gaps."""
    inside = _inside_characters(b"".join(tokens))
    units: list[Unit] = []
    start = end = 0
    for at, token in enumerate(tokens):
        end += len(token)
        if end in inside:
            continue
        text = decoded(b"".join(tokens[start : at + 1]))
        if units and _is_drawn_on(units[-1].text, text):
            before = units.pop()
            units.append(Unit(before.start, at + 1, before.text + text))
        else:
            units.append(Unit(start, at + 1, text))
        start = at + 1
    return units


def units_in(ids: Sequence[int], strings: Sequence[str]) -> list[Unit]:
    """Return the units of token ids [n]; one for each token if `strings` [V] is a plain list."""
    if isinstance(strings, TokenStrings):
        return strings.units(ids)
    return [Unit(at, at + 1, strings[int(i)]) for at, i in enumerate(ids)]


def is_whole(token: int, strings: Sequence[str]) -> bool:
    """Return whether a token id holds whole characters only; True if `strings` [V] is a plain list."""
    return not isinstance(strings, TokenStrings) or strings[token].encode() == strings.bytes[token]


def is_text(unit: Unit, ids: Sequence[int], strings: Sequence[str]) -> bool:
    """Return whether a unit of the token ids [n] holds whole characters only."""
    if not isinstance(strings, TokenStrings):
        return True
    of_unit = b"".join(strings.bytes[int(i)] for i in ids[unit.start : unit.stop])
    return unit.text.encode() == of_unit


def text_of(ids: Iterable[int], strings: Sequence[str]) -> str:
    """Return the text of token ids, in which tokens that make a character together are that character."""
    if isinstance(strings, TokenStrings):
        return strings.text(ids)
    return "".join(strings[int(i)] for i in ids)


def aligned_text(ids: Sequence[int], strings: Sequence[str]) -> list[str]:
    """Return a string for each token id, [n], which together are the text.

    Where several tokens make a character, the first of them has it, and the others are empty.
    """
    texts = [strings[int(i)] for i in ids]
    for unit in units_in(ids, strings):
        if unit.n_tokens > 1 and "".join(texts[unit.start : unit.stop]) != unit.text:
            texts[unit.start : unit.stop] = [unit.text] + [""] * (unit.n_tokens - 1)
    return texts


def decoded(token: bytes) -> str:
    r"""Return bytes as text, in which bytes that belong to no character are escapes, `\xNN`."""
    return token.decode("utf-8", "backslashreplace")


def _inside_characters(text: bytes) -> set[int]:
    """Return the offsets that lie within a character of several bytes."""
    inside: set[int] = set()
    if text.isascii():
        return inside
    at = 0
    for character in text.decode("utf-8", "surrogateescape"):
        # a byte that belongs to no character becomes one lone surrogate
        n = 1 if "\udc80" <= character <= "\udcff" else len(character.encode())
        inside.update(range(at + 1, at + n))
        at += n
    return inside


def _is_drawn_on(before: str, text: str) -> bool:
    """Return whether what begins `text` is drawn together with the character at the end of `before`."""
    if not before or not text or before[-1].isspace() or not before[-1].isprintable():
        return before[-1:] == _ZERO_WIDTH_JOINER and ord(text[:1] or "\0") in _EMOJI
    return _continues(text)


def _continues(text: str) -> bool:
    return (
        unicodedata.category(text[0]).startswith("M")
        or ord(text[0]) in _SKIN_TONES
        or text[0] == _ZERO_WIDTH_JOINER
    )


def _joins(text: str) -> bool:
    return text[-1] == _ZERO_WIDTH_JOINER
