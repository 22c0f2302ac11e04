"""Documents of a corpus with their splits and token ids, in order.

Memory: two batches of text with their tokens (2 MB each), and the longest document (at most 13 bytes per byte:
`cratelm.corpus.formats`), which is encoded in pieces (`cratelm.tokens.pieces`).
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cratelm.corpus.documents import Document, ReadError, n_bytes_of
from cratelm.records import Split
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.pieces import PieceEncoder, UncuttableError
from cratelm.tokens.tokenizer import without_limits

_BATCH_BYTES = 2_000_000
_BATCH_ENTRIES = 4096
_LONG = 100_000
"""characters above which a document is encoded in pieces, and its hash taken in parts"""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document with its tokens."""

    document: Document
    split: Split
    ids: Sequence[int] | NDArray[np.uint32]
    """token ids, without the end-of-text token [n]"""


@dataclass(frozen=True, slots=True)
class Failed:
    """A document that cannot be used."""

    error: ReadError
    document: Document | None
    """the document, if it could be read, but not encoded: it counts towards `--max-documents`"""


Entry = Encoded | Failed | None
"""an entry of a corpus; None: a document without text"""
_Read = tuple[Split, Document] | ReadError | None
_Ids = Sequence[int] | NDArray[np.uint32] | UncuttableError


def split_of(text: str, fit: float, held_out: float) -> Split:
    """Return the split of a document by the hash of its text, so that duplicates share a split.

    `fit` and `held_out` are the fractions of the splits. The split of a document does not depend on other
    documents: adding documents to a corpus moves none. A change of this function moves documents of all
    existing corpora, and their runs cannot be converted.
    """
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(text), _LONG):
        digest.update(text[start : start + _LONG].encode())
    fraction = int.from_bytes(digest.digest(), "big") / 2**64
    if fraction < held_out:
        return "held_out"
    return "fit" if fraction < held_out + fit else "train"


def encode_corpus(
    corpus: Iterable[Document | ReadError], tokenizer: Tokenizer, config: TokenizeConfig
) -> Iterator[list[Entry]]:
    """Yield the entries of a corpus in batches, up to `max_documents` with text.

    The next batch is read while one is encoded, on all cores. A long document is a batch by itself, and the
    next one is read when the caller has used it: `del` the batch.
    """
    encoder = _Encoder(tokenizer)
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[list[_Read], Future[list[_Ids]]]] = deque()

        def ready() -> list[Entry]:
            batch, ids = waiting.popleft()
            return _entries(batch, ids.result())

        for batch in _batches(_read(corpus, config)):
            waiting.append((batch, pool.submit(_encode, encoder, _documents(batch))))
            most_waiting = 0 if _is_long(batch) else 1
            del batch
            while len(waiting) > most_waiting:
                yield ready()
        while waiting:
            yield ready()


def _read(corpus: Iterable[Document | ReadError], config: TokenizeConfig) -> Iterator[_Read]:
    n = 0
    for document in corpus:
        if isinstance(document, ReadError):
            yield document
        elif not document.text:
            yield None
        else:
            yield split_of(document.text, config.fit, config.held_out), document
            n += 1
            if n == config.max_documents:
                return
        del document  # not held while the next one is read


def _batches(entries: Iterable[_Read]) -> Iterator[list[_Read]]:
    """Yield the entries in batches; a long document is a batch by itself."""
    batch: list[_Read] = []
    n_bytes = 0
    for entry in entries:
        is_long = _is_long([entry])
        if batch and (is_long or n_bytes >= _BATCH_BYTES or len(batch) == _BATCH_ENTRIES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(entry)
        n_bytes += sum(n_bytes_of(document.text) for document in _documents([entry]))
        del entry
        if is_long:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _documents(batch: list[_Read]) -> list[Document]:
    return [entry[1] for entry in batch if isinstance(entry, tuple)]


def _is_long(batch: list[_Read]) -> bool:
    return isinstance(batch[0], tuple) and len(batch[0][1].text) > _LONG


class _Encoder:
    """A tokenizer for texts, in which special tokens are plain text, and for chats, in which they are tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.text = PieceEncoder(tokenizer)

    @cached_property
    def chat(self) -> Tokenizer:
        """Return the tokenizer as `apply_chat_template` uses it."""
        tokenizer = without_limits(Tokenizer.from_str(self.text.tokenizer.to_str()))
        tokenizer.encode_special_tokens = False
        return tokenizer


def _encode(encoder: _Encoder, documents: list[Document]) -> list[_Ids]:
    """Return the token ids of documents, or why they cannot be encoded."""
    ids: list[_Ids] = [()] * len(documents)
    chats = [i for i, document in enumerate(documents) if document.is_chat]
    texts = [i for i, document in enumerate(documents) if not document.is_chat]
    if len(documents) == 1 and texts and len(documents[0].text) > _LONG:
        try:
            return [encoder.text.encode(documents[0].text)]
        except UncuttableError as error:
            return [error]
    for chosen, is_chat in ((texts, False), (chats, True)):
        if chosen:
            tokenizer = encoder.chat if is_chat else encoder.text.tokenizer
            # a begin token is in the text of a chat if its template wants one: none is added
            encodings = tokenizer.encode_batch_fast(
                [documents[i].text for i in chosen], add_special_tokens=False
            )
            for i, encoding in zip(chosen, encodings, strict=True):
                ids[i] = encoding.ids
    return ids


def _entries(batch: list[_Read], encoded: list[_Ids]) -> list[Entry]:
    entries: list[Entry] = []
    encoded.reverse()
    for read in batch:
        if isinstance(read, tuple):
            (split, document), ids = read, encoded.pop()
            if isinstance(ids, UncuttableError):
                entries.append(Failed(ReadError(f"{document.location}: {ids}"), document))
            else:
                entries.append(Encoded(document, split, ids))
        else:
            entries.append(None if read is None else Failed(read, None))
    return entries
