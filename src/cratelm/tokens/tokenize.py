"""`cratelm tokenize`: turn documents into token shards.

It takes one pass over the corpus (two if a tokenizer is trained). A small corpus is encoded straight into shards. The
files of a larger one are divided into groups; each group becomes a part, written by this process, by worker
processes or by the tasks of a cluster (`cratelm.tokens.parts`), and the parts are merged in order. Both ways give the same
shards. A killed command continues after the parts that are complete.

Memory is bounded, however long the corpus is and whatever it contains: see `cratelm.tokens.encoding`,
once per worker, and `Part.blocks`; if a tokenizer is trained, also by the table of distinct words.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tqdm import tqdm

from cratelm.corpus.documents import ReadError, n_bytes_of
from cratelm.corpus.formats import Fields
from cratelm.corpus.sources import Corpus, FileCorpus, open_corpus
from cratelm.errors import InputError, StorageError
from cratelm.records import SPLITS, Split
from cratelm.runs import Draft, Run, hash_file
from cratelm.runs.atomic import remove_all_but
from cratelm.runs.stage import PLAN
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.encoding import Encoded, Entry, encode_corpus, split_of
from cratelm.tokens.model_tokenizer import ModelTokenizer, model_tokenizer
from cratelm.tokens.parts import (
    MOST_NAMED,
    Block,
    DamagedPartError,
    Part,
    PartError,
    Progress,
    Work,
)
from cratelm.tokens.shards import StoreWriter
from cratelm.tokens.tokenizer import (
    end_of_text_id,
    fetch_gpt2,
    load_tokenizer,
    train_tokenizer,
)
from cratelm.tokens.workers import write_parts

if TYPE_CHECKING:
    from cratelm.tokens.cluster import Executor

GROUP_BYTES = 2**24
"""bytes of files, as they are stored, that make a part; a larger file is a part by itself"""
CHAT_TEMPLATE = "chat_template.jinja"
"""file with the template of chats, in the folder `tokens/` of a corpus that has chats"""
_PARTS = "parts"


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
    chats: int = 0
    """number of documents that are chats, written by the chat template of the tokenizer's model"""


def tokenize(config: TokenizeConfig) -> TokenizeResult:
    """Write `tokens/` of the run and return the result; a finished stage is only read.

    Raises `InputError` for a corpus or a tokenizer that cannot be used; then nothing is written. Raises
    `BudgetReached` when tasks have been submitted to a cluster that have not ended.
    """
    run = Run(config.run)
    stage = run.stage("tokens")
    longest = int(config.max_document_megabytes * 1e6)
    of_model = _model_tokenizer(config)
    chat = of_model.chat if of_model else None
    fields = Fields(config.text_field, config.subset_field, longest, chat)
    corpus = open_corpus(config.corpus, fields)
    inputs = {"corpus": corpus.identity(), **_tokenizer_identity(config, of_model)}
    if stage.is_finished(config, inputs, force=config.force):
        result = stage.result(TokenizeResult, path=stage.path)
        _check_length(result, config)
        return result
    groups, executor = _groups(config, corpus), _executor(config)
    n_parts = max(1, len(groups))
    if config.workers > n_parts and not config.quiet:
        print(
            f"parts of the corpus: {n_parts}, so that {n_parts} of {config.workers} workers are used"
        )
    with stage.write(config, inputs, resume=bool(groups)) as draft, _removed_if_refused(draft):
        if groups:
            work = _begin(config, corpus, draft, groups, inputs)
            shards = _merge(work, corpus, draft, executor)
        else:
            shards = _stream(config, corpus, draft)
        result = dataclasses.replace(shards.result(), path=stage.path)
        _check_length(result, config)
        if chat is not None and result.chats:
            (draft.path / CHAT_TEMPLATE).write_text(chat.template, encoding="utf-8")
        draft.results = {k: v for k, v in dataclasses.asdict(result).items() if k != "path"}
    return result


@dataclass
class TokenizeStats:
    """Counts of documents that are not written, updated while shards are written; fields of `TokenizeResult`."""

    empty: int = 0
    skipped: int = 0
    first_skipped: str = ""
    chats: int = 0

    def skip(self, error: ReadError, config: TokenizeConfig) -> None:
        """Count a document that cannot be used, and print its location. Raises `InputError` instead if asked to stop."""
        _check_skips(error, config)
        self.skipped += 1
        self.first_skipped = self.first_skipped or error.message
        if not config.quiet and self.skipped <= MOST_NAMED:
            tqdm.write(f"skipped: {error.message}", file=sys.stderr)
        if not config.quiet and self.skipped == MOST_NAMED:
            tqdm.write("further skipped documents are counted, not named", file=sys.stderr)


def _check_skips(error: ReadError, config: TokenizeConfig) -> None:
    if config.on_error == "stop":
        raise InputError(f"{error.message} (--on-error skip skips such documents)")


class _Shards:
    """Shards while they are written, up to the limits of the configuration, and what is counted.

    Nothing that follows the last document within the limits is counted, or stops the command.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: TokenizeConfig):
        self.config, self.stats = config, TokenizeStats()
        self.writer = StoreWriter(folder, tokenizer, end_of_text_id(tokenizer))
        self._n_bytes = self._n_read = 0
        """UTF-8 bytes of the documents written, and number of documents with text that were read"""

    @property
    def is_full(self) -> bool:
        """Return whether a limit is reached."""
        return self.config.reaches_limit(self.n_tokens, self._n_read)

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens in all splits."""
        return sum(map(self.writer.n_tokens, SPLITS))

    def append_all(self, batch: list[Entry]) -> None:
        """Append entries of the corpus, up to the limits."""
        for entry in batch:
            if self.is_full:
                return
            self._append(entry)

    def _append(self, entry: Entry) -> None:
        if entry is None:
            self.stats.empty += 1
        elif isinstance(entry, Encoded):
            self.writer.append(entry.split, entry.ids, entry.document)
            self._n_bytes += n_bytes_of(entry.document.text)
            self._n_read += 1
            self.stats.chats += entry.document.is_chat
        else:
            self.stats.skip(entry.error, self.config)
            self._n_read += entry.document is not None

    def append_part(self, part: Part) -> None:
        """Append the entries of a part, as `append_all` does."""
        n_rows = n_failed = 0
        for block in part.blocks():
            n_within = self._append_block(block)
            rows = block.rows.slice(0, n_within)
            n_rows += n_within
            n_failed += _sum(rows, "failed_before") + _count(rows, "split", -1)
            if self.is_full:
                break
        if not self.is_full:
            self.stats.empty += part.empty_after
            n_failed += part.failed_after
        n_named = 0
        for row, message in part.failures:
            if row < n_rows or not self.is_full:
                self.stats.skip(ReadError(message), self.config)
                n_named += 1
        self.stats.skipped += n_failed - n_named

    def _append_block(self, block: Block) -> int:
        """Append the documents of a block that are within the limits, and return their number."""
        n_tokens = block.rows["n_tokens"].to_numpy()
        n = len(n_tokens)
        if self.config.max_documents is not None:
            n = min(n, self.config.max_documents - self._n_read)
        if self.config.max_tokens is not None:
            ends = self.n_tokens + np.cumsum(n_tokens)
            n = min(n, int(np.searchsorted(ends, self.config.max_tokens)) + 1)
        rows = block.rows.slice(0, n)
        written = rows.filter(pa.array(rows["split"].to_numpy() >= 0))
        self.writer.append_block(written, block.tokens[: _sum(rows, "n_tokens")])
        self.stats.empty += _sum(rows, "empty_before")
        self.stats.chats += _count(written, "is_chat", True)
        self._n_bytes += _sum(written, "bytes")
        self._n_read += n
        return n

    def result(self) -> TokenizeResult:
        """Finish the shards and return what they hold. Raises `InputError` if they hold no document."""
        self.writer.close()
        stats, writer = self.stats, self.writer
        if writer.n_documents == 0:
            raise InputError(
                f"corpus {self.config.corpus} has no text ({stats.empty} empty documents,"
                f" {stats.skipped} skipped): name another with --corpus"
            )
        return TokenizeResult(
            path=writer.folder,
            vocab_size=writer.vocab_size,
            bytes_per_token=self._n_bytes / (self.n_tokens - writer.n_documents),
            tokens={name: writer.n_tokens(name) for name in SPLITS},
            documents={name: writer.n_split_documents(name) for name in SPLITS},
            **dataclasses.asdict(stats),
        )


def _sum(rows: pa.Table, column: str) -> int:
    return int(rows[column].to_numpy().sum())


def _count(rows: pa.Table, column: str, value: int | bool) -> int:
    return int((rows[column].to_numpy() == value).sum())


def _stream(config: TokenizeConfig, corpus: Corpus, draft: Draft) -> _Shards:
    """Return the shards of a corpus, encoded from its start to its end."""
    tokenizer = _tokenizer(config, corpus)
    shards = _Shards(draft.path, tokenizer, config)
    with tqdm(total=corpus.n_documents, unit=" documents", disable=config.quiet) as bar:
        for batch in encode_corpus(corpus, tokenizer, config):
            shards.append_all(batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"{shards.n_tokens:,} tokens")
            del batch  # not held while the next documents are read
            if shards.is_full:
                break
    return shards


# ---- parts ------------------------------------------------------------------------------------------


def _groups(config: TokenizeConfig, corpus: Corpus) -> list[FileCorpus]:
    """Return the files of each part, which depend on the corpus alone; none if it is encoded as a stream."""
    if isinstance(corpus, FileCorpus):
        groups = corpus.groups(GROUP_BYTES)
        return groups if len(groups) > 1 or config.executor else []
    if config.workers > 1 or config.executor:
        option = "--executor" if config.executor else "--workers"
        raise InputError(
            f"{option}: corpus {config.corpus} is read as one stream: leave {option} out, or download its"
            " files and name their folder with --corpus"
        )
    return []


def _executor(config: TokenizeConfig) -> "Executor | None":
    if config.executor is None:
        return None
    from cratelm.tokens.cluster import read_executor

    return read_executor(config.executor)


def _begin(
    config: TokenizeConfig,
    corpus: Corpus,
    draft: Draft,
    groups: list[FileCorpus],
    inputs: dict[str, str],
) -> Work:
    """Return the work of a draft, in which earlier attempts may have written parts."""
    draft.scratch.add(_PARTS)
    remove_all_but(draft.path, {PLAN, _PARTS})
    folder = draft.path / _PARTS
    return Work.begin(folder, groups, config, inputs, lambda: _tokenizer(config, corpus))


def _merge(work: Work, corpus: Corpus, draft: Draft, executor: "Executor | None") -> _Shards:
    """Return the shards of a corpus, merged from its parts; those that are not written are written first."""
    config, unwritten = work.config, work.unwritten()
    if len(unwritten) < len(work.groups):
        written = len(work.groups) - len(unwritten)
        print(f"{written} of {len(work.groups)} parts are already there", flush=True)
    if executor and unwritten:
        from cratelm.tokens.cluster import run_tasks

        run_tasks(work, unwritten, executor)
    shards = _Shards(draft.path, work.tokenizer, config)
    with (
        tqdm(total=corpus.n_documents, unit=" documents", disable=config.quiet) as bar,
        contextlib.closing(_parts(work, bar.update)) as parts,
    ):
        for part in parts:
            shards.append_part(part)
            bar.set_postfix_str(f"{shards.n_tokens:,} tokens")
            if shards.is_full:
                break
    return shards


def _parts(work: Work, progress: Progress) -> Generator[Part, None, None]:
    """Yield all parts in order, each when it is written and its files have been compared with their hashes."""
    unwritten = work.unwritten()
    if work.config.workers > 1:
        written = write_parts(work, unwritten, work.config.workers, progress)
    else:
        written = _write_here(work, unwritten, progress)
    missing = set(unwritten)
    with contextlib.closing(written):
        for index in range(len(work.groups)):
            while index in missing:
                missing.remove(next(written))
            try:
                part = work.read(index)
            except DamagedPartError as error:
                print(f"{error}: it is written again", file=sys.stderr, flush=True)
                work.write(index, progress)
                part = work.read(index)
            yield part


def _write_here(work: Work, indexes: list[int], progress: Progress) -> Generator[int, None, None]:
    for index in indexes:
        work.write(index, progress)
        yield index


@contextlib.contextmanager
def _removed_if_refused(draft: Draft) -> Iterator[None]:
    """Remove a draft that no later command can continue, because the user has to change something first."""
    try:
        yield
    except InputError as error:
        if not isinstance(error, StorageError | PartError):
            shutil.rmtree(draft.path, ignore_errors=True)
        raise


# -----------------------------------------------------------------------------------------------------


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
    of_model = _model_tokenizer(config)
    return of_model.tokenizer if of_model else load_tokenizer(os.path.expanduser(config.tokenizer))


def _model_tokenizer(config: TokenizeConfig) -> ModelTokenizer | None:
    """Return the tokenizer of the folder or Hub id that the configuration names; None if it names neither."""
    named = config.tokenizer not in ("train", "gpt2") or config.revision is not None
    return model_tokenizer(config.tokenizer, config.revision) if named else None


def _sample(config: TokenizeConfig, corpus: Corpus) -> Iterator[str]:
    """Yield texts of the train split, up to the first that reaches `sample_megabytes`."""
    n = n_bytes = 0
    for document in corpus:
        if isinstance(document, ReadError):
            _check_skips(document, config)
        elif document.text:
            if split_of(document.text, config.fit, config.held_out) == "train":
                yield document.text
                n_bytes += n_bytes_of(document.text)
            n += 1
            if n_bytes >= config.sample_megabytes * 1e6 or n == config.max_documents:
                return
        del document  # not held while the next one is read


def _tokenizer_identity(config: TokenizeConfig, of_model: ModelTokenizer | None) -> dict[str, str]:
    """Return the identity of a model's tokenizer or file; the other choices are in the configuration."""
    if of_model is not None:
        return {"tokenizer": of_model.identity}
    if config.tokenizer in ("train", "gpt2"):
        return {}
    path = os.path.expanduser(config.tokenizer)
    return {"tokenizer": hash_file(path) if os.path.isfile(path) else ""}  # loading it raises
