"""Groups of neurons, for the colours and labels of maps and for a choice of neurons that differ.

In a model that the explainer `concepts` explained, a neuron belongs to the family of the first concept of its sentence;
in any other model, to the class of the token that it fires on most.
"""

import keyword
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from cratelm.text.display import visible

CONCEPTS = "concepts"
"""explainer whose sentences name what a neuron responds to"""
_TERM = re.compile(r"(?:`[^`]*`(?:, (?=`)| or (?=`))?)+|(?:(?! and |, | but )[^`;:.])+")
"""first concept of a sentence: names in backticks joined by commas and `or`, or words up to the next concept"""
_HEAD = re.compile(
    r" (?:of|with|without|other|that|up|in|on|at|after|before|except|inside|outside|between|from|to|than)\b"
)
"""end of the noun of a concept and of the words before it"""
_PARTS = frozenset({"parts", "pieces", "runs", "ends", "beginnings", "continuations"})
"""nouns that say nothing without what they are of"""
_LONGEST = 32
"""characters of a label"""
_PYTHON = frozenset(keyword.kwlist)
_CLASSES: tuple[tuple[str, str], ...] = (
    ("line breaks and spaces", r"\s+"),
    ("numbers", r"\s*(?:0[xX][\da-fA-F]*|[\d.,_]*\d[\d.,_]*)\s*"),
    ("brackets", r"[^\w\n]*[()\[\]{}][^\w]*"),
    ("quotes", r"""\s*[rbuf]?["'`]+[^\w]*"""),
    ("operators and punctuation", r"[\W_]+"),
    ("capitalised words", r"[\W_]*[A-Z]\w*"),
    ("beginnings of words", r"\s+\w+"),
    ("words and parts of words", r"[\W_]*\w+\W*"),
)
"""name of a class of tokens and the pattern of its members; the first that matches the whole token applies"""
_KEYWORDS, OTHER_TOKENS = "Python keywords", "other tokens"
TOKEN_CLASSES = (*(name for name, _ in reversed(_CLASSES)), _KEYWORDS)
"""all classes but `OTHER_TOKENS`, in the order of their colours"""


class NeuronGroup(NamedTuple):
    """What a neuron shares with others; both are empty if nothing is known."""

    family: str
    """a kind of concept or of token, such as `numbers`: a colour"""
    shares: str
    """what the neuron responds to, in few characters, such as `self`: a label"""


NO_GROUP = NeuronGroup("", "")


def neuron_groups(sentences: Sequence[str], tokens: Sequence[str]) -> list[NeuronGroup]:
    """Return the groups of the neurons of a model, [n].

    `sentences` [n] are their explanations by `CONCEPTS`, and `tokens` [n] the token that each fires on most, as in the
    corpus; both are empty where there is none. If any neuron has a sentence, families are those of concepts, and neurons
    without a sentence have none: `opening brackets` and `brackets of calls` are both of the family `brackets`.
    """
    concepts = [_first_concept(sentence) for sentence in sentences]
    if not any(concepts):
        return [_of_token(token) for token in tokens]
    nouns = [_noun(concept) for concept in concepts]
    heads: dict[str, list[str]] = {}
    for noun in filter(None, nouns):
        heads[noun[-1]] = _common_end(heads.get(noun[-1], noun), noun)
    return [
        NeuronGroup(" ".join(heads[noun[-1]]), _shortened(concept))
        if noun
        else NeuronGroup("", _of_token(token).shares)
        for concept, noun, token in zip(concepts, nouns, tokens, strict=True)
    ]


@lru_cache(maxsize=1 << 16)
def _of_token(token: str) -> NeuronGroup:
    if not token:
        return NO_GROUP
    return NeuronGroup(token_class(token), visible(token.strip(" ") or token))


def _first_concept(sentence: str) -> str:
    """Return the first concept of a sentence: `digits` of `digits and dots, but not in comments: `1`; 50% of ...`."""
    match = _TERM.match(sentence)
    return match.group().strip() if match else ""


def _noun(concept: str) -> list[str]:
    """Return the noun of a concept with the words before it; a place or names in backticks as one word; [] if empty.

    `opening`, `square`, `brackets` for `opening square brackets of calls`.
    """
    if concept.startswith(("`", "tokens ")):
        return [re.split(r" (?:other than|except) ", concept)[0]]
    words = _HEAD.split(concept, maxsplit=1)[0].split()
    return [concept] if words and words[-1] in _PARTS else words


def _common_end(a: list[str], b: list[str]) -> list[str]:
    """Return the words that two nouns have in common at their ends."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return a[len(a) - n :]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1].rstrip() + "…"


def token_class(token: str) -> str:
    r"""Return the class of a token as in the corpus: `numbers` for `12`, `line breaks and spaces` for `\n`."""
    if token.strip() in _PYTHON:
        return _KEYWORDS
    return next((name for name, form in _CLASSES if re.fullmatch(form, token)), OTHER_TOKENS)
