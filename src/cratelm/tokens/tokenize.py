"""`cratelm tokenize`: turn documents into token shards.

It takes one pass over the corpus (two if a tokenizer is trained). Memory is bounded, however long the
corpus is and whatever it contains, by two batches of text with their tokens (2 MB each), by the
longest document (at most 13 bytes per byte: `cratelm.corpus.formats`), which is encoded in pieces
(`cratelm.tokens.pieces`), and, if a tokenizer is trained, by the table of distinct words.
"""

import dataclasses
import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from cratelm.corpus.documents import Document, ReadError, n_bytes_of
from cratelm.corpus.formats import Fields
from cratelm.corpus.sources import Corpus, open_corpus
from cratelm.errors import InputError
from cratelm.records import SPLITS, Split
from cratelm.runs import Draft, Run, hash_file
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.pieces import PieceEncoder, UncuttableError
from cratelm.tokens.shards import StoreWriter
from cratelm.tokens.tokenizer import (
    end_of_text_id,
    fetch_gpt2,
    load_tokenizer,
    train_tokenizer,
)

_BATCH_BYTES = 2_000_000
_BATCH_DOCUMENTS = 4096
_LONG = 100_000
"""characters above which a document is encoded in pieces, and its hash taken in parts"""
_MOST_NAMED = 20
"""skipped documents that are printed; the others are only counted"""
_Batch = list[tuple[Split, Document]]
_Ids = Sequence[int] | NDArray[np.uint32] | UncuttableError
"""token ids of a document [n], or why it cannot be encoded"""


@dataclass(frozen=True)
class TokenizeResult:
    """Result of `cratelm tokenize`."""

    path: Path
    """the folder `tokens/`"""
    vocab_size: int
    """number of token ids that can occur; below --vocab-size if the text yields fewer"""
    bytes_per_token: float
    """UTF-8 bytes of text per token, without end-of-text tokens"""
    tokens: dict[Split, int]
    """number of tokens in each split, including end-of-text tokens"""
    documents: dict[Split, int]
    """number of documents in each split"""
    empty: int
    """number of documents without text, which are skipped"""
    skipped: int
    """number of documents (or ends of files) that could not be read and were skipped (`--on-error skip`)"""
    first_skipped: str = ""
    """file, line and reason of the first of them"""


def tokenize(config: TokenizeConfig) -> TokenizeResult:
    """Write `tokens/` of the run and return the result; a finished stage is only read.

    Raises `InputError` for a corpus or a tokenizer that cannot be used; then nothing is written.
    """
    run = Run(config.run)
    stage = run.stage("tokens")
    longest = int(config.max_document_megabytes * 1e6)
    corpus = open_corpus(config.corpus, Fields(config.text_field, config.subset_field, longest))
    inputs = {"corpus": corpus.identity(), **_tokenizer_identity(config)}
    if stage.is_finished(config, inputs, force=config.force):
        result = stage.result(TokenizeResult, path=stage.path)
        _check_length(result, config)
        return result
    with stage.write(config, inputs) as draft:
        result = dataclasses.replace(_write(config, corpus, draft), path=stage.path)
        _check_length(result, config)
        draft.results = {k: v for k, v in dataclasses.asdict(result).items() if k != "path"}
    return result


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


@dataclass
class TokenizeStats:
    """Counts of documents that are not written, updated while the corpus is read; fields of `TokenizeResult`."""

    empty: int = 0
    skipped: int = 0
    first_skipped: str = ""

    def skip(self, error: ReadError, config: TokenizeConfig, *, quiet: bool) -> None:
        """Count a document that cannot be used, and print its location. Raises `InputError` instead if asked to stop."""
        if config.on_error == "stop":
            raise InputError(f"{error.message} (--on-error skip skips such documents)")
        self.skipped += 1
        self.first_skipped = self.first_skipped or error.message
        if not quiet and self.skipped <= _MOST_NAMED:
            tqdm.write(f"skipped: {error.message}", file=sys.stderr)
        if not quiet and self.skipped == _MOST_NAMED:
            tqdm.write("further skipped documents are counted, not named", file=sys.stderr)


def _documents(
    corpus: Corpus, config: TokenizeConfig, stats: TokenizeStats, *, quiet: bool = False
) -> Iterator[tuple[Split, Document]]:
    """Yield the documents that have text with their split; count the others in `stats`."""
    n = 0
    for document in corpus:
        if isinstance(document, ReadError):
            stats.skip(document, config, quiet=quiet or config.quiet)
        elif not document.text:
            stats.empty += 1
        else:
            yield split_of(document.text, config.fit, config.held_out), document
            n += 1
            if n == config.max_documents:
                return
        del document  # not held while the next one is read


def _write(config: TokenizeConfig, corpus: Corpus, draft: Draft) -> TokenizeResult:
    tokenizer = _tokenizer(config, corpus)
    writer = StoreWriter(draft.path, tokenizer, end_of_text_id(tokenizer))
    stats = TokenizeStats()
    n_bytes = 0
    with tqdm(total=corpus.n_documents, unit=" documents", disable=config.quiet) as bar:
        for batch, ids in _encoded(tokenizer, _batches(_documents(corpus, config, stats))):
            n_bytes += _append(writer, batch, ids, config, stats)
            bar.update(len(batch))
            bar.set_postfix_str(f"{sum(map(writer.n_tokens, SPLITS)):,} tokens")
            del batch, ids  # not held while the next documents are read
            if _is_full(writer, config.max_tokens):
                break
    writer.close()
    return _result(config, writer, stats, n_bytes, draft.path)


def _encoded(
    tokenizer: Tokenizer, batches: Iterable[_Batch]
) -> Iterator[tuple[_Batch, list[_Ids]]]:
    """Yield batches with their tokens; the next batch is encoded, on all cores, while one is written.

    A long document is a batch by itself, and the next one is read when it is written.
    """
    encoder = PieceEncoder(tokenizer)

    def encode(batch: _Batch) -> list[_Ids]:
        texts = [document.text for _, document in batch]
        if len(texts) == 1 and len(texts[0]) > _LONG:
            try:
                return [encoder.encode(texts[0])]
            except UncuttableError as error:
                return [error]
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[_Batch, Future[list[_Ids]]]] = deque()

        def ready() -> tuple[_Batch, list[_Ids]]:
            batch, ids = waiting.popleft()
            return batch, ids.result()

        for batch in batches:
            waiting.append((batch, pool.submit(encode, batch)))
            most_waiting = 0 if len(batch[0][1].text) > _LONG else 1
            del batch
            while len(waiting) > most_waiting:
                yield ready()
        while waiting:
            yield ready()


def _append(
    writer: StoreWriter,
    batch: _Batch,
    encoded: list[_Ids],
    config: TokenizeConfig,
    stats: TokenizeStats,
) -> int:
    """Write a batch up to `max_tokens` of the whole store; return the bytes of text written."""
    n_bytes = 0
    for (split, document), ids in zip(batch, encoded, strict=True):
        if _is_full(writer, config.max_tokens):
            break
        if isinstance(ids, UncuttableError):
            stats.skip(ReadError(f"{document.location}: {ids}"), config, quiet=config.quiet)
            continue
        writer.append(split, ids, document)
        n_bytes += n_bytes_of(document.text)
    return n_bytes


def _is_full(writer: StoreWriter, max_tokens: int | None) -> bool:
    return max_tokens is not None and sum(map(writer.n_tokens, SPLITS)) >= max_tokens


def _batches(documents: Iterable[tuple[Split, Document]]) -> Iterator[_Batch]:
    """Yield the documents in batches; a long one is a batch by itself."""
    batch: _Batch = []
    n_bytes = 0
    for split, document in documents:
        n = len(document.text)
        if batch and (n > _LONG or n_bytes >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS):
            yield batch
            batch, n_bytes = [], 0
        batch.append((split, document))
        n_bytes += n_bytes_of(document.text)
        del document
        if n > _LONG:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _result(
    config: TokenizeConfig, writer: StoreWriter, stats: TokenizeStats, n_bytes: int, path: Path
) -> TokenizeResult:
    if writer.n_documents == 0:
        raise InputError(
            f"corpus {config.corpus} has no text ({stats.empty} empty documents,"
            f" {stats.skipped} skipped): name another with --corpus"
        )
    tokens: dict[Split, int] = {name: writer.n_tokens(name) for name in SPLITS}
    return TokenizeResult(
        path=path,
        vocab_size=writer.vocab_size,
        bytes_per_token=n_bytes / (sum(tokens.values()) - writer.n_documents),
        tokens=tokens,
        documents={name: writer.n_split_documents(name) for name in SPLITS},
        **dataclasses.asdict(stats),
    )


def _check_length(result: TokenizeResult, config: TokenizeConfig) -> None:
    for split, n in result.tokens.items():
        if n <= config.sequence_length:
            raise InputError(
                f"the {split} split has {n:,} tokens in {result.documents[split]:,} documents, but"
                f" at least {config.sequence_length + 1:,} tokens are needed: give more text, a larger"
                " fraction (--fit, --held-out), or a lower --sequence-length"
            )


def _tokenizer(config: TokenizeConfig, corpus: Corpus) -> Tokenizer:
    if config.tokenizer == "train":
        if not config.quiet:
            print(f"training a tokenizer of {config.vocab_size:,} tokens")
        return train_tokenizer(_sample(config, corpus), config.vocab_size)
    if config.tokenizer == "gpt2":
        return fetch_gpt2()
    return load_tokenizer(Path(config.tokenizer).expanduser())


def _sample(config: TokenizeConfig, corpus: Corpus) -> Iterator[str]:
    """Yield texts of the train split, up to the first that reaches `sample_megabytes`."""
    n_bytes = 0
    for split, document in _documents(corpus, config, TokenizeStats(), quiet=True):
        if split == "train":
            yield document.text
            n_bytes += n_bytes_of(document.text)
            if n_bytes >= config.sample_megabytes * 1e6:
                return


def _tokenizer_identity(config: TokenizeConfig) -> dict[str, str]:
    """Return the hash of a tokenizer file; the other choices are in the configuration."""
    if config.tokenizer in ("train", "gpt2"):
        return {}
    path = Path(config.tokenizer).expanduser()
    return {"tokenizer": hash_file(path) if path.is_file() else ""}  # loading it raises
