"""Sets that models are measured on: a split of the run, or a named set of texts, as windows of tokens.

A named set comes from the Hub through `datasets`, or from a local file:

| name | on the Hub | a document is |
|---|---|---|
| lambada | EleutherAI/lambada_openai, test | a passage, of which the last word is predicted |
| lambada_raw | cimec/lambada, test | likewise, in the authors' tokenised text |
| wikitext2, wikitext103 | Salesforce/wikitext, raw, test | an article |
| ptb | ptb-text-only/ptb_text_only, test | 50 sentences |
| openwebtext | Skylion007/openwebtext, train | a web page |
| pile, pile:SUBSET | monology/pile-uncopyrighted, test | a document of the Pile |

Shape legend: T tokens of a whole window, C documents, V vocabulary.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cratelm.corpus.documents import LONGEST_DOCUMENT, Document, ReadError
from cratelm.corpus.formats import CorpusFile, Fields, row_document
from cratelm.corpus.hub import HUB_ERRORS, first_line
from cratelm.corpus.sources import HUB, open_corpus
from cratelm.errors import InputError, missing_extra
from cratelm.evaluate.windows import Window, cut
from cratelm.models.open import Encoder
from cratelm.records import SPLITS
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.tokens.shards import TokenSplit

STREAMED_DOCUMENTS = 1000
"""number of documents of a streamed set if no limit is given"""


_PIECE = 2**20
"""number of tokens of a split that are read at a time"""


# --- documents as sources of windows ---------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A text of which all tokens are predicted, or only those of its end."""

    text: str
    predicted_from: int = 0
    """offset of the first character that is predicted; what precedes it is only context"""


class Windows(Protocol):
    """One pass over tokens to predict. Sizes of documents are those of the windows read so far."""

    def __iter__(self) -> Iterator[Window]: ...

    def n_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of the predicted text of each document [C]."""
        ...

    def n_words(self) -> NDArray[np.int64] | None:
        """Return the predicted words of each document [C], between white space; None if unknown."""
        ...


class TextSource(Protocol):
    """Tokens to predict, which can be read any number of times."""

    @property
    def unit(self) -> str:
        """Return what its documents are, in the plural."""
        ...

    @property
    def n_tokens(self) -> int | None:
        """Return how many tokens will be predicted; None if that is unknown before reading."""
        ...

    def windows(self, length: int, stride: int) -> Windows:
        """Return windows of at most `length` tokens, each `stride` tokens after the previous one."""
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
    beginning: Beginning = PLAIN
    """its begin token is set before every window"""

    def windows(self, length: int, stride: int) -> "ShardWindows":
        """Return windows over the stream, whatever documents they span."""
        return ShardWindows(self, length, stride)

    def n_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of the predicted text of each document [C]."""
        total = np.zeros(self.split.n_documents, np.int64)
        for first in range(0, self.n_tokens, _PIECE):
            stop = min(first + _PIECE, self.n_tokens)
            sizes = self.sizes[self.split.read(first + 1, stop + 1)]
            total += np.bincount(
                self.documents_of(first, stop), sizes, self.split.n_documents
            ).astype(np.int64)
        return total

    def documents_of(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the document of each of tokens `first` + 1 to `stop`, by its number in the split."""
        positions = np.arange(first + 1, stop + 1)
        return np.searchsorted(self.split.starts, positions, side="right") - 1


@dataclass(frozen=True, eq=False)
class ShardWindows:
    """Windows over shards; the sizes of their documents are known before they are read."""

    shards: Shards
    length: int
    stride: int

    def __iter__(self) -> Iterator[Window]:
        split = self.shards.split
        for start, stop, first in cut(self.shards.n_tokens, self.length, self.stride):
            window = Window(
                split.read(start, stop + 1), first - start, self.shards.documents_of(first, stop)
            )
            yield begun(window, self.shards.beginning)

    def n_bytes(self) -> NDArray[np.int64]:
        """Return the bytes of the predicted tokens of each document [C]."""
        return self.shards.n_bytes()

    def n_words(self) -> None:
        """Return None: words of a split are not counted."""
        return


def begun(window: Window, beginning: Beginning) -> Window:
    """Return a window with the begin token before its tokens, unless it begins with it; the targets stay the same."""
    tokens = beginning.before(window.tokens)
    return window._replace(tokens=tokens, first=window.first + len(tokens) - len(window.tokens))


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in a model's own tokens, each by itself after the token that begins a text.

    The begin token stands before every window. Without one, a text follows the tokenizer's token for beginnings, but
    context that is not predicted does so only if the tokenizer itself adds it, as in EleutherAI's harness. Memory: one
    text, and two numbers per document of each pass.
    """

    passages: Iterable[Passage]
    encoder: Encoder
    unit: str
    max_tokens: int | None
    beginning: Beginning = PLAIN
    has_start: bool = True
    """whether a text without a begin token follows the tokenizer's token for beginnings; else its end-of-text token"""

    @property
    def n_tokens(self) -> None:
        """Return None: texts are tokenized while they are read."""
        return None

    def windows(self, length: int, stride: int) -> "TextWindows":
        """Return one pass over the windows of each text."""
        return TextWindows(self, length, stride)

    def tokens_of(self, passage: Passage) -> tuple[NDArray[np.int64], int]:
        """Return the tokens of a passage, and how many targets among them are only context."""
        context = len(self.encoder.encode(passage.text[: passage.predicted_from]))
        tokens = self.encoder.encode(passage.text)
        if self.beginning.token is not None:
            before = self.beginning.before(tokens)
            return before, max(0, context - 1 + len(before) - len(tokens))
        if context and not (self.has_start and self.encoder.adds_start):
            return tokens, context - 1
        start = self.encoder.start if self.has_start else self.encoder.end
        return np.concatenate([[start], tokens]), context


class TextWindows:
    """One pass over texts, with the sizes of the documents read so far.

    Raises `InputError` if a predicted end is longer than a window.
    """

    def __init__(self, texts: Texts, length: int, stride: int):
        self._bytes: list[int] = []
        self._words: list[int] = []
        self._windows = self._read(texts, length, stride)

    def __iter__(self) -> Iterator[Window]:
        return self._windows

    def n_bytes(self) -> NDArray[np.int64]:
        """Return the bytes of the texts read so far [C]."""
        return np.array(self._bytes, np.int64)

    def n_words(self) -> NDArray[np.int64]:
        """Return the words of the texts read so far [C]."""
        return np.array(self._words, np.int64)

    def _read(self, texts: Texts, length: int, stride: int) -> Iterator[Window]:
        n_tokens = 0
        for passage in texts.passages:
            if not (predicted := passage.text[passage.predicted_from :]):
                continue
            if n_tokens >= (texts.max_tokens or n_tokens + 1):
                break
            document = len(self._bytes)
            self._bytes.append(len(predicted.encode()))
            self._words.append(len(predicted.split()))
            tokens, context = texts.tokens_of(passage)
            n = len(tokens) - 1
            n_tokens += n - context
            cuts = [_end(n, context, length)] if passage.predicted_from else cut(n, length, stride)
            for start, stop, first in cuts:
                documents = np.full(stop - first, document)
                window = Window(tokens[start : stop + 1], first - start, documents)
                yield begun(window, texts.beginning)


def _end(n: int, context: int, length: int) -> tuple[int, int, int]:
    """Return one window for the last targets, as `cut` does; the first `context` are only context."""
    if n - context > length:
        raise InputError(
            f"a last word has {n - context} tokens, more than a sequence ({length}): raise"
            " --sequence-length, or use another model"
        )
    return max(0, n - length), n, context


# --- texts cut into passages -----------------------------------------------------------------------


def whole(texts: Iterable[str]) -> Iterator[Passage]:
    """Yield each text as a document."""
    return map(Passage, texts)


def last_words(texts: Iterable[str]) -> Iterator[Passage]:
    """Yield LAMBADA's passages, whose last word is predicted with the space before it.

    Paperno et al. 2016; cut at the last space, as EleutherAI's harness does. Raises `InputError` for a
    text of one word.
    """
    for text in texts:
        text = text.rstrip()
        space = text.rfind(" ")
        if space < 1:
            raise InputError(
                f"text {text[:40]!r} is a single word, but there must be words before the last"
            )
        yield Passage(text, space)


def articles(texts: Iterable[str]) -> Iterator[Passage]:
    """Yield WikiText's articles: from one first-level heading, ` = Title = `, to the next.

    Rows are lines, as on the Hub, or whole files. Raises `InputError` for an article of more than
    `LONGEST_DOCUMENT` bytes.
    """
    lines: list[str] = []
    size = 0
    for line in _lines(texts):
        if _HEADING.fullmatch(line) and any(map(str.strip, lines)):
            yield Passage("".join(f"{line}\n" for line in lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line) + _LINE_BYTES
        if size > LONGEST_DOCUMENT:
            raise InputError(
                f"an article of {len(lines):,} lines, too long to hold: WikiText's articles begin with a line"
                " ` = Title = `. Name another file, or read it as documents under another name, --on mine=PATH"
            )
    if any(map(str.strip, lines)):
        yield Passage("".join(f"{line}\n" for line in lines))


_LINE_BYTES = 64
"""bytes that Python takes for a line, next to its characters"""
_HEADING = re.compile(r" = [^=]+ = ?")


def blocks(texts: Iterable[str], size: int = 50) -> Iterator[Passage]:
    """Yield lines in groups: the Penn Treebank does not mark where its articles begin."""
    lines = (line.strip() for line in _lines(texts))
    while block := list(islice(lines, size)):
        yield Passage("".join(f"{line}\n" for line in block))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = text.removesuffix("\n")
        start = 0  # line by line: a list of all lines takes up to 60 times the size of the text
        while (end := text.find("\n", start)) >= 0:
            yield text[start:end]
            start = end + 1
        yield text[start:]


# --- named sets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Content of a named set, and its location on the Hub."""

    hub: dict[str, Any] = field(default_factory=dict)
    """arguments of `datasets.load_dataset`"""
    unit: str = "documents"
    passages: Callable[[Iterable[str]], Iterator[Passage]] = whole
    field: str = "text"
    streamed: bool = False
    """read row by row, because it is large"""
    last_word: bool = False
    """only the last word is predicted"""


def _wikitext(configuration: str) -> Kind:
    hub = {"path": "Salesforce/wikitext", "name": configuration, "split": "test"}
    return Kind(hub, "articles", articles)


KINDS: dict[str, Kind] = {
    "lambada": Kind(
        {"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"},
        "passages",
        last_words,
        last_word=True,
    ),
    "lambada_raw": Kind(
        {"path": "cimec/lambada", "split": "test"}, "passages", last_words, last_word=True
    ),
    "wikitext2": _wikitext("wikitext-2-raw-v1"),
    "wikitext103": _wikitext("wikitext-103-raw-v1"),
    # the set's own branch is a script, which `datasets` no longer reads; the Hub's copy is Parquet
    "ptb": Kind(
        {
            "path": "ptb-text-only/ptb_text_only",
            "revision": "refs/convert/parquet",
            "data_files": {"test": "penn_treebank/test/*.parquet"},
            "split": "test",
        },
        "blocks of 50 sentences",
        blocks,
        "sentence",
    ),
    "openwebtext": Kind({"path": "Skylion007/openwebtext", "split": "train"}, streamed=True),
    "pile": Kind(
        {
            "path": "monology/pile-uncopyrighted",
            "data_files": {"test": "test.jsonl.zst"},
            "split": "test",
        },
        streamed=True,
    ),
}


@dataclass(frozen=True)
class NamedSet:
    """A set of texts: `NAME` from the Hub, `NAME=PATH` from a file; for the Pile also `pile:SUBSET`.

    It can be read any number of times and gives the same passages in the same order. Reading raises
    `InputError` for a text that cannot be read, and if the Hub cannot be reached.
    """

    name: str
    path: str
    """empty: from the Hub"""
    kind: Kind
    subset: str
    """part of the Pile; empty for all"""
    max_documents: int | None
    text_field: str | None

    def passages(self) -> Iterator[Passage]:
        """Yield all passages; only the first `max_documents` if there is a limit."""
        most = self.max_documents
        if most is None and self.kind.streamed and not self.path:
            most = STREAMED_DOCUMENTS
        return islice(self.kind.passages(self._texts()), most)

    def _texts(self) -> Iterator[str]:
        any_text = False
        for document in self._documents():
            if isinstance(document, ReadError):
                raise InputError(document.message)
            if not self.subset or document.subset == self.subset:
                any_text = True
                yield document.text
        if not any_text:
            part = f" of subset {self.subset!r} (meta.pile_set_name)" if self.subset else ""
            raise InputError(f"{self.name} has no text{part}: name another set with --on")

    def _documents(self) -> Iterator[Document | ReadError]:
        fields = Fields(text=self.text_field or self.kind.field)
        if self.path:
            return iter(open_corpus(self.path, fields))
        return _hub_documents(self.name, self.kind)


def named_set(
    given: str, max_documents: int | None = None, text_field: str | None = None
) -> NamedSet:
    """Return the set that `given`, a value of `--on`, names.

    Raises `InputError` for an unknown name without a path, and for a path that does not exist.
    """
    name, _, path = given.partition("=")
    base, _, subset = name.partition(":")
    if name in SPLITS and path:
        raise InputError(f"{given}: {name} is a split of the run: give the file another name")
    if path and not path.startswith(HUB) and not os.path.exists(os.path.expanduser(path)):
        raise InputError(f"{path} does not exist: name a file or a folder, --on {name}=PATH")
    if (subset and base != "pile") or (base not in KINDS and not path):
        choices = [*SPLITS, *KINDS, "pile:SUBSET"]
        near = difflib.get_close_matches(base, choices, n=1)
        hint = f" did you mean {near[0]}?" if near else ""
        raise InputError(
            f"--on {given} is not known:{hint} choose from {', '.join(choices)}, or NAME=PATH"
        )
    return NamedSet(name, path, KINDS.get(base, Kind()), subset, max_documents, text_field)


def _hub_documents(name: str, kind: Kind) -> Iterator[Document | ReadError]:
    file = CorpusFile(Path(kind.hub["path"]), kind.hub["path"], "")
    fields = Fields(text=kind.field)
    try:
        for number, row in enumerate(_load(name, kind), 1):
            yield row_document(row, fields, file, number, "row")
    except HUB_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name} cannot be read from the Hub ({first_line(error)}): check the network, or name a local copy,"
            f" --on {name}=PATH"
        ) from None


def _load(name: str, kind: Kind) -> Any:
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        otherwise = f", or name a local copy, --on {name}=PATH"
        raise missing_extra("hub", name, "datasets", otherwise) from None
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # without a network it prints twelve lines about retries
    try:
        return load_dataset(**kind.hub, streaming=kind.streamed)
    finally:
        logging.set_verbosity(before)
