"""What is measured, as windows of tokens: a split of the run's shards, or texts.

Shape legend: T tokens of a whole window, C documents, V vocabulary.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.evaluate.windows import Window, cut
from cratelm.models.open import Encoder
from cratelm.tokens.shards import TokenSplit

_PIECE = 2**20
"""tokens of a split that are read at a time"""


@dataclass(frozen=True)
class Passage:
    """A text of which all tokens are predicted, or those of its end."""

    text: str
    predicted_from: int = 0
    """first character that is predicted; what precedes it is context alone"""


class Source(Protocol):
    """Tokens to predict. `n_bytes` and `n_words` are known once the windows have been read."""

    @property
    def unit(self) -> str:
        """What its documents are, in the plural."""
        ...

    @property
    def n_tokens(self) -> int | None:
        """Tokens that will be predicted, None where only reading tells."""
        ...

    def windows(self, length: int, stride: int) -> Iterator[Window]: ...

    def n_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of the predicted text of each document [C]."""
        ...

    def n_words(self) -> NDArray[np.int64] | None:
        """Predicted words of each document [C], between white space; None where they are not known."""
        ...


@dataclass(frozen=True, eq=False)
class Shards:
    """The first tokens of a split of the run, as one stream: all but the very first are predicted.

    A sequence may begin with the end of another document, as in training.
    """

    split: TokenSplit
    n_tokens: int
    sizes: NDArray[np.int64]
    """[V] bytes of each token (`cratelm.tokens.tokenizer.token_sizes`)"""
    unit: str = "documents"

    def windows(self, length: int, stride: int) -> Iterator[Window]:
        for start, stop, first in cut(self.n_tokens, length, stride):
            tokens = self.split.read(start, stop + 1)
            yield Window(tokens, first - start, self._documents(first, stop))

    def n_bytes(self) -> NDArray[np.int64]:
        total = np.zeros(self.split.n_documents, np.int64)
        for first in range(0, self.n_tokens, _PIECE):
            stop = min(first + _PIECE, self.n_tokens)
            sizes = self.sizes[self.split.read(first + 1, stop + 1)]
            total += np.bincount(
                self._documents(first, stop), sizes, self.split.n_documents
            ).astype(np.int64)
        return total

    def n_words(self) -> None:
        return None

    def _documents(self, first: int, stop: int) -> NDArray[np.int64]:
        """Document of each of tokens `first` + 1 to `stop`, by its place in the split."""
        positions = np.arange(first + 1, stop + 1)
        return np.searchsorted(self.split.starts, positions, side="right") - 1


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in a model's own tokens, each after the token that a text begins with, and nothing else.

    Before context that is not predicted that token stands only where the tokenizer sets it there
    itself, as in EleutherAI's harness. Memory: one text, and two numbers a document.
    """

    passages: Iterable[Passage]
    encoder: Encoder
    unit: str
    max_tokens: int | None
    _bytes: list[int] = field(default_factory=list)
    _words: list[int] = field(default_factory=list)

    @property
    def n_tokens(self) -> None:
        return None

    def windows(self, length: int, stride: int) -> Iterator[Window]:
        """Raises `InputError` where a predicted end is longer than a window."""
        self._bytes.clear()
        self._words.clear()
        n_tokens = 0
        for passage in self.passages:
            if not (predicted := passage.text[passage.predicted_from :]):
                continue
            if n_tokens >= (self.max_tokens or n_tokens + 1):
                break
            document = len(self._bytes)
            self._bytes.append(len(predicted.encode()))
            self._words.append(len(predicted.split()))
            tokens, known = self._tokens(passage)
            n = len(tokens) - 1
            n_tokens += n - known
            cuts = [_end(n, known, length)] if passage.predicted_from else cut(n, length, stride)
            for start, stop, first in cuts:
                documents = np.full(stop - first, document)
                yield Window(tokens[start : stop + 1], first - start, documents)

    def n_bytes(self) -> NDArray[np.int64]:
        return np.array(self._bytes, np.int64)

    def n_words(self) -> NDArray[np.int64]:
        return np.array(self._words, np.int64)

    def _tokens(self, passage: Passage) -> tuple[NDArray[np.int64], int]:
        """Tokens of a passage, and the number of targets among them that are context alone."""
        context = len(self.encoder.encode(passage.text[: passage.predicted_from]))
        tokens = self.encoder.encode(passage.text)
        if context and not self.encoder.adds_start:
            return tokens, context - 1
        return np.concatenate([[self.encoder.start], tokens]), context


def _end(n: int, known: int, length: int) -> tuple[int, int, int]:
    """One window for the last targets, as `cut` gives them; the first `known` are context alone."""
    if n - known > length:
        raise InputError(
            f"a last word has {n - known} tokens, more than a sequence ({length}): raise"
            " --sequence-length, or take another model"
        )
    return max(0, n - length), n, known


def whole(texts: Iterable[str]) -> Iterator[Passage]:
    """Each text as a document."""
    return map(Passage, texts)


def last_words(texts: Iterable[str]) -> Iterator[Passage]:
    """LAMBADA: the last word, with the space before it, after all that precedes (Paperno et al. 2016;
    cut at the last space as EleutherAI's harness does). Raises `InputError` for a text of one word."""
    for text in texts:
        text = text.rstrip()
        place = text.rfind(" ")
        if place < 1:
            raise InputError(
                f"text {text[:40]!r} is a single word, words before the last were expected"
            )
        yield Passage(text, place)


def articles(texts: Iterable[str]) -> Iterator[Passage]:
    """WikiText's articles: from one heading of the first level, ` = Title = `, to the next.

    Rows are lines, as on the Hub, or whole files.
    """
    lines: list[str] = []
    for line in _lines(texts):
        if _HEADING.fullmatch(line) and any(map(str.strip, lines)):
            yield Passage("".join(f"{kept}\n" for kept in lines))
            lines = []
        lines.append(line)
    if any(map(str.strip, lines)):
        yield Passage("".join(f"{kept}\n" for kept in lines))


_HEADING = re.compile(r" = [^=]+ = ?")


def blocks(texts: Iterable[str], size: int = 50) -> Iterator[Passage]:
    """Lines in groups: the Penn Treebank's sentences run on through articles without a border."""
    lines = (line.strip() for line in _lines(texts))
    while block := list(islice(lines, size)):
        yield Passage("".join(f"{line}\n" for line in block))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from text.removesuffix("\n").split("\n")
