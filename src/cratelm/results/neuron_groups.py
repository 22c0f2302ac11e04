"""Groups of neurons, for the colours and labels of maps and for a choice of neurons that differ.

A neuron that the explainer `concepts` explained belongs to the group of its concept; any other neuron belongs to the
class of the token that it fires on most.
"""

import keyword
import re
from collections.abc import Sequence
from typing import NamedTuple

from cratelm.text.display import visible

CONCEPTS = "concepts"
"""explainer whose sentences name what a neuron responds to"""
_CLAIM = re.compile(r"(?:`[^`]*`|[^`;:.])*")
"""beginning of a sentence, up to the first `;`, `:` or `.` that is not inside backticks"""
_TERM = re.compile(r" (?:and|or|but)(?: not)? |, ")
"""separator of the terms of a claim"""
_LONGEST = 40
"""characters of a claim on a map"""
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


def neuron_group(sentence: str, tokens: Sequence[str]) -> NeuronGroup:
    """Return the group of a neuron.

    `sentence` is its explanation by `CONCEPTS`, empty if there is none; `tokens` are those that it fires on most, as
    in the corpus, the first one counts. The claim is the beginning of the sentence, up to a colon, semicolon or full
    stop; the family is the first term of the claim.
    """
    if sentence:
        match = _CLAIM.match(sentence)
        claim = match.group().strip() if match else ""
        if claim:
            shares = claim if len(claim) <= _LONGEST else claim[: _LONGEST - 1].rstrip() + "…"
            return NeuronGroup(_TERM.split(claim, maxsplit=1)[0], shares)
    if not tokens:
        return NO_GROUP
    token = tokens[0]
    bare = token.strip(" ") or token
    return NeuronGroup(token_class(token), visible(bare))


def token_class(token: str) -> str:
    r"""Return the class of a token as in the corpus: `numbers` for `12`, `line breaks and spaces` for `\n`."""
    if token.strip() in _PYTHON:
        return _KEYWORDS
    return next((name for name, form in _CLASSES if re.fullmatch(form, token)), OTHER_TOKENS)
