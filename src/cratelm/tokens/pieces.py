r"""Encode long texts in pieces, with the ids that the whole text has.

`Tokenizer.encode` takes about 100 times the size of a text in memory, so a text is cut where it is certain that
no token and no decision of the tokenizer crosses the cut. A cut between x and y is certain if

1. the normalizer treats what follows y without regard to what precedes it, and vice versa: it works on single
   characters, or it is a Unicode normal form and y is ASCII (ASCII characters never compose with what precedes
   them), or it adds a space at the very beginning, which only the first piece gets;
2. the pre-tokenizer ends a word between x and y, and finds the same words in both parts as in the whole. The
   regular expressions below look ahead by one character, at white space alone, and never look behind;
3. or, where nothing separates words (LLaMA 2, Gemma), no merge of the BPE gives a token that contains x and y:
   then no merge can cross the cut;
4. no added token contains x and y.

Which cuts that allows depends on the tokenizer; `_rule` has the table, with the proof beside each entry. All
classes of characters are small on purpose: versions of Unicode do not disagree about them.

A word without a certain cut (a megabyte of the letter x) is encoded piece by piece if its BPE is byte-level and
proper: see `_WordEncoder`. If neither is possible, `PieceEncoder` raises `UncuttableError` for more than
`LONGEST_STRETCH` bytes without a cut. That is its bound of memory: the tokens of `_GROUP` pieces of `_PIECE`
characters, or of one stretch of `LONGEST_STRETCH` bytes, and 4 bytes per token of the text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cratelm.corpus.documents import n_bytes_of
from cratelm.errors import InputError
from cratelm.tokens.tokenizer import byte_level_name, characters_of_bytes, without_limits

LONGEST_STRETCH = 4_000_000
"""bytes of text without a certain cut that are encoded at once"""
_PIECE = 65_536
"""characters of a piece, if there is a cut"""
_TAIL = 1024
"""characters at the end of a piece in which most texts have a cut"""
_GROUP = 16
"""pieces that are encoded at a time, on all cores"""
_WINDOW = 32_768
"""characters of a long word that are encoded at a time"""
_KEPT, _TRIES = 64, 32
"""tokens at the end of a window that the next window repeats, and how many of them are tried as the border"""


class UncuttableError(InputError):
    """A text that cannot be encoded within the bound of memory."""


class PieceEncoder:
    """Encoder of texts of any length. Raises `UncuttableError` for a text that it cannot encode in bounded memory."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the ids of a text without special tokens [n], as `Tokenizer.encode` gives them."""
        if len(text) <= _PIECE:
            return _ids(self.tokenizer, [text])
        parts: list[NDArray[np.uint32]] = []
        for pieces in _groups(self.pieces(text)):
            if self._is_word(pieces[0]):
                assert self._plan.words is not None
                parts.extend(self._plan.words.encode(pieces[0]))
            else:
                parts.append(_ids(self._plan.later if parts else self.tokenizer, pieces))
        return np.concatenate(parts)

    def pieces(self, text: str) -> Iterator[str]:
        """Yield pieces of at most `_PIECE` characters where there are cuts, and longer ones where there are none."""
        start = 0
        while start < len(text):
            stop = self._next_cut(text, start)
            piece = text[start:stop]
            if 4 * len(piece) > LONGEST_STRETCH and not self._is_word(piece):
                n = n_bytes_of(piece)
                if n > LONGEST_STRETCH:
                    raise UncuttableError(self._too_long(n))
            yield piece
            start = stop

    def _next_cut(self, text: str, start: int) -> int:
        """Return the last cut within `_PIECE` characters of `start`, or the first one after that."""
        rule, limit = self._plan.rule, start + _PIECE
        if limit >= len(text) or rule is None:
            return len(text)
        for first in (limit - _TAIL, start + 1):
            cuts = [m.start() for m in rule.cut.finditer(text, max(first, start + 1), limit)]
            if cuts:
                return cuts[-1]
        after = rule.cut.search(text, limit)
        return after.start() if after else len(text)

    def _is_word(self, piece: str) -> bool:
        """Return whether a piece is longer than others, certainly one word, and can be encoded as one."""
        rule = self._plan.rule
        return (
            len(piece) > _PIECE
            and rule is not None
            and rule.word is not None
            and rule.word.fullmatch(piece) is not None
            and self._plan.words is not None
        )

    def _too_long(self, n: int) -> str:
        cut = (
            "an end of a word" if self._plan.rule else "a place where this tokenizer can be stopped"
        )
        return (
            f"{n:,} bytes of text without {cut}, more than the {LONGEST_STRETCH:,} that are encoded at once:"
            " split the document"
        )

    @cached_property
    def _plan(self) -> "_Plan":
        # made when the first long text comes: a large vocabulary takes a second to read
        description = json.loads(self.tokenizer.to_str())
        later = _without_prefix(description)
        return _Plan(
            cut_rule(description, self.tokenizer.encode_special_tokens),
            self.tokenizer
            if later == description
            else without_limits(Tokenizer.from_str(json.dumps(later))),
            _WordEncoder(self.tokenizer.model) if _is_proper(description["model"]) else None,
        )


@dataclass(frozen=True)
class _Plan:
    """How the long texts of a tokenizer are encoded."""

    rule: "CutRule | None"
    later: Tokenizer
    """the tokenizer for all pieces but the first: it adds no space at the beginning"""
    words: "_WordEncoder | None"


def _ids(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint32]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, np.uint32) for encoding in encodings])


def _groups(pieces: Iterator[str]) -> Iterator[list[str]]:
    """Yield the pieces in groups; the first piece, and each long one, is a group by itself."""
    yield [next(pieces)]
    group: list[str] = []
    for piece in pieces:
        if group and (len(group) == _GROUP or max(len(group[0]), len(piece)) > _PIECE):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


# --- where a text can be cut -------------------------------------------------------------------------


@dataclass(frozen=True)
class CutRule:
    """Where a tokenizer's texts can be cut."""

    cut: re.Pattern[str]
    """matches the empty string at every certain cut"""
    word: re.Pattern[str] | None = None
    """matches, from cut to cut, text that is certainly a single word of a byte-level BPE"""


# Characters whose class is the same in every version of Unicode: letters \p{L}, digits \p{N}, signs (neither
# of them, nor white space).
_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba"  # Latin
    "\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u05d0-\u05ea\u0621-\u063a"  # Greek, Cyrillic, Hebrew, Arabic
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"  # Japanese, Chinese, Korean
)
_DIGITS = "0-9"
_SIGNS = (  # without '
    r"!-&(-/:-@\[-`{-~\u2010-\u2027\u2190-\u23ff\u2500-\u26ff\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20"
    r"\U0001f300-\U0001f64f"  # emoji
)
_SOLID = r"^\s\u180e"
"""certainly no white space: Python's includes all that the tokenizers' has"""


def _between(*pairs: tuple[str, str]) -> str:
    return "|".join(f"(?<=[{x}])(?=[{y}])" for x, y in pairs)


# GPT-2. Matches are: a contraction such as 'll; a space and letters, digits or signs of one class; white space.
# A match with the non-space x has white space only at its start, so it ends before a white-space y, and before a y
# of another class, except that signs ' and letters may form a contraction: hence ' is no x. The only lookahead,
# \s+(?!\S), sees one character after white space: x is none. In white space before a word, \s+(?!\S) leaves the
# last character to the word or to \s+; the first part alone ends with white space, where it matches all. So the
# cut before that last character is certain, too.
_GPT2 = CutRule(
    re.compile(
        _between(
            (_SOLID, r" \t\r\n"),
            (_LETTERS, f"{_DIGITS}{_SIGNS}'"),
            (_DIGITS, f"{_LETTERS}{_SIGNS}'"),
            (_SIGNS, f"{_LETTERS}{_DIGITS}"),
        )
        + rf"|(?<=[ \t\r\n])(?=[ \t\r\n][{_SOLID}])"
    ),
    re.compile(rf" ?(?:[{_LETTERS}]+|[{_DIGITS}]+|[{_SIGNS}]+)|[ \t\r\n]+"),
)
# GPT-4, LLaMA 3, Qwen 2. Differences: any sign or space may precede letters, so there is no cut between signs
# and letters; signs take line breaks after them, and line breaks the white space before them, so that a cut before
# a line break needs a letter or a digit before it, and no cut is made inside white space; digits come in groups.
_GPT4 = CutRule(
    re.compile(
        _between(
            (_SOLID, r" \t"),
            (f"{_LETTERS}{_DIGITS}", r"\r\n"),
            (_LETTERS, f"{_DIGITS}{_SIGNS}'"),
            (_DIGITS, f"{_LETTERS}{_SIGNS}'"),
            (_SIGNS, _DIGITS),
        )
    ),
    re.compile(rf" ?(?:[{_LETTERS}]+|[{_SIGNS}]+)"),
)
# With a normal form before the pre-tokenizer, x and y must be ASCII; only cuts before a space are worth a proof.
_NORMALIZED = {
    _GPT2: CutRule(re.compile(_between(("!-~", r" \t\r\n")))),
    _GPT4: CutRule(re.compile(_between(("!-~", r" \t"), ("A-Za-z0-9", r"\r\n")))),
}
# BERT: white space always separates words, and is dropped.
_WHITE_SPACE = CutRule(re.compile(r"(?=[ \t\r\n])"))
# SentencePiece with words: every space begins one. x is anything.
_EVERY_SPACE = CutRule(re.compile("(?= )"))
# SentencePiece without words: tokens with a space inside them exist only for runs of spaces.
_SPACE_AFTER_TEXT = CutRule(re.compile("(?<=[^ \u2581])(?= )"))

_GPT4_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS: dict[str, CutRule] = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": _GPT2,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": _GPT2,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": _GPT2,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _GPT4_TAIL: _GPT4,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _GPT4_TAIL: _GPT4,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s": _GPT4,
}
"""rule of each regular expression that is known to be used: GPT-2's as in `tokenizers` and in tiktoken, then
LLaMA 3's, Qwen 2's and tiktoken's of GPT-4"""
_NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}


def cut_rule(description: dict[str, Any], encodes_special: bool = True) -> CutRule | None:
    """Return where the texts of a tokenizer can be cut; None if it is not certain anywhere.

    `description` is the content of its tokenizer.json; `encodes_special`: special tokens are read as plain text.
    """
    normalizers = _flat(description["normalizer"], "normalizers")
    words = _flat(description["pre_tokenizer"], "pretokenizers")
    rule = _rule(normalizers, words, description["model"])
    added = description["added_tokens"]
    matched = [token for token in added if not (token["special"] and encodes_special)]
    has_prefix = _without_prefix(description) != description
    if rule is None or not matched:
        return CutRule(rule.cut) if rule and has_prefix else rule
    if has_prefix:  # every part between added tokens gets one
        return None
    rule = _NORMALIZED.get(rule, rule)  # its cuts depend on x and y alone
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in matched):
        return None
    # special tokens, too: they hide other tokens that begin inside them
    return None if any(rule.cut.search(token["content"], 1) for token in added) else rule


def _rule(
    normalizers: list[dict[str, Any]], words: list[dict[str, Any]], model: dict[str, Any]
) -> CutRule | None:
    kinds = [word["type"] for word in words]
    is_plain = all(n["type"] in _NORMAL_FORMS for n in normalizers)
    expression = _expression(words)
    if expression in _EXPRESSIONS and is_plain:
        rule = _EXPRESSIONS[expression]
        return _NORMALIZED[rule] if normalizers else rule
    if kinds in (["BertPreTokenizer"], ["Whitespace"], ["WhitespaceSplit"]) and is_plain:
        return _WHITE_SPACE
    if kinds == ["Metaspace"] and words[0].get("split", True) and is_plain:
        return _EVERY_SPACE if words[0]["replacement"] == "\u2581" else None
    if _is_sentence_piece(normalizers, words) and _spaces_begin_tokens(model):
        return _SPACE_AFTER_TEXT
    return None


def _expression(words: list[dict[str, Any]]) -> str:
    """Return the regular expression of a byte-level pre-tokenizer; empty if it is something else."""
    if not words or words[-1]["type"] != "ByteLevel":
        return ""
    if len(words) == 1 and words[0].get("use_regex", True):
        return next(iter(_EXPRESSIONS))
    split = words[0]
    is_split = len(words) == 2 and split["type"] == "Split" and not words[1].get("use_regex", True)
    if is_split and split["behavior"] == "Isolated" and not split["invert"]:
        return split["pattern"].get("Regex", "")
    return ""


def _is_sentence_piece(normalizers: list[dict[str, Any]], words: list[dict[str, Any]]) -> bool:
    """Return whether spaces become U+2581 and nothing separates words: LLaMA 2, Mistral, Gemma."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    if [word["type"] for word in words] == ["Metaspace"]:
        return not normalizers and words[0]["replacement"] == "\u2581"
    never = not words or (
        [word["type"] for word in words] == ["Split"] and words[0]["pattern"] == {"String": " "}
    )  # no space is left to split at
    return never and normalizers in ([replace], [prepend, replace])


def _spaces_begin_tokens(model: dict[str, Any]) -> bool:
    """Return whether no merge of a BPE gives a token with U+2581 after another character."""
    if model["type"] != "BPE" or "\u2581" not in model["vocab"] or _is_unusual(model):
        return False
    merged = ("".join(_pair(merge)) for merge in model["merges"])
    return not any(re.search("[^\u2581]\u2581", token) for token in merged)


def _without_prefix(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the same tokenizer, which adds nothing at the beginning of a text."""
    normalizers = _flat(description["normalizer"], "normalizers")
    kept = [n for n in normalizers if n["type"] != "Prepend"]
    words = []
    for word in _flat(description["pre_tokenizer"], "pretokenizers"):
        if word["type"] == "Metaspace" and word.get("prepend_scheme") != "never":
            word = {**word, "prepend_scheme": "never"}
        if word["type"] == "ByteLevel" and word["add_prefix_space"]:
            word = {**word, "add_prefix_space": False}
        words.append(word)
    if kept == normalizers and words == _flat(description["pre_tokenizer"], "pretokenizers"):
        return description
    return {
        **description,
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words} if words else None,
    }


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, whether it is a sequence of them or one."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _flat(inner, key)]
    return [part]


# --- words without a cut -----------------------------------------------------------------------------


class _WordEncoder:
    """Encoder of one word of any length, by a byte-level BPE that is proper (`_is_proper`).

    It rests on two properties of such a BPE. Neighbouring tokens of an encoding are the encoding of their text.
    And if a is the encoding of a text A, and b of B, then a + b is the encoding of A + B unless a merge crosses the
    border, and whether one does depends only on the last token of a and the first of b: what merges inside a token
    does not depend on its surroundings, and merges come in the order of their rank, then from left to right. So
    each border is checked by the encoding of the two tokens beside it.
    """

    def __init__(self, model: Any):
        self.model = model

    def encode(self, word: str) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of the parts of a word. Raises `UncuttableError` if no border passes the check."""
        last: list[Any] = []  # the token before `tokens`, if there is one
        tokens = self.model.tokenize(byte_level_name(word[:_WINDOW]))
        for start in range(_WINDOW, len(word), _WINDOW):
            more = byte_level_name(word[start : start + _WINDOW])
            border, following = self._continue(last, tokens, more)
            yield np.array([token.id for token in tokens[:border]], np.uint32)
            last, tokens = (last + tokens[:border])[-1:], following
        yield np.array([token.id for token in tokens], np.uint32)

    def _continue(self, last: list[Any], tokens: list[Any], more: str) -> tuple[int, list[Any]]:
        """Return how many tokens stay as they are before `more` is appended, and the tokens after them."""
        first = max(1, len(tokens) - _KEPT)
        for border in (*range(first, min(first + _TRIES, len(tokens))), 0):
            text = "".join(token.value for token in tokens[border:]) + more
            if len(text) > LONGEST_STRETCH:
                break
            following = self.model.tokenize(text)
            before = (last + tokens[:border])[-1:]
            if not before or self._holds(before[0], following[0]):
                return border, following
        raise UncuttableError("a word that cannot be encoded in parts: split the document")

    def _holds(self, left: Any, right: Any) -> bool:
        """Return whether no merge crosses the border of two tokens."""
        together = self.model.tokenize(left.value + right.value)
        return [token.id for token in together] == [left.id, right.id]


def _is_proper(model: dict[str, Any]) -> bool:
    """Return whether a model is a byte-level BPE each of whose tokens is made by earlier merges than it is used in.

    Then merges happen in the order of their rank: a merge never makes one of a lower rank possible.
    """
    if model["type"] != "BPE" or _is_unusual(model):
        return False
    if not model["vocab"].keys() >= set(characters_of_bytes().values()):
        return False
    made: dict[str, int] = {}
    used: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = _pair(merge)
        made[left + right] = rank
        used.setdefault(left, rank)
        used.setdefault(right, rank)
    return all(rank < used.get(token, len(model["merges"])) for token, rank in made.items())


def _pair(merge: list[str] | str) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _is_unusual(model: dict[str, Any]) -> bool:
    """Return whether a BPE has options that change how it merges."""
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return any(model.get(option) for option in options)
