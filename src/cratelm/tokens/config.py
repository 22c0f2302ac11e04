"""Options of `cratelm tokenize`. Imports nothing heavy, so that `--help` is quick."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cratelm.corpus.documents import LONGEST_DOCUMENT
from cratelm.errors import InputError
from cratelm.runs import Options, at_least, check_memory, not_in_identity
from cratelm.runs.model_options import model_option

LEAST_VOCABULARY = 257
"""256 bytes and the end-of-text token"""
_BYTES_PER_ENTRY = 480
"""bytes of an entry of a full vocabulary, measured: 72 in the trainer, which allocates them before it starts,
226 in the tokenizer, and 193 in the dictionary of its tokens"""

_BYTES_PER_WORKER = 80_000_000
"""bytes of a worker process before it reads anything, measured: Python and its libraries"""


def check_vocabulary_size(config: Any) -> None:
    """Raise `InputError` if `vocab_size` of a configuration is too small for all bytes, or too large for memory."""
    at_least(config, {"vocab_size": LEAST_VOCABULARY}, "256 bytes and the end-of-text token")
    needed = _BYTES_PER_ENTRY * config.vocab_size
    check_memory(config, {"vocab_size": needed}, "a vocabulary of that size")


@dataclass(frozen=True)
class TokenizeConfig(Options):
    """Turn a corpus into token shards with document boundaries, split by the hash of each document."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory, in which `tokens/` is written"""
    corpus: str = "builtin"
    """`builtin` (the Python standard library's sources, about 10 MB), a file (.txt .text .md .rst
    .tex .py: one document; .jsonl .jsonl.zst .parquet: one per row), a folder of such files, or
    `hub:ID[:CONFIGURATION][@REVISION]` (the train split, streamed; needs the extra `hub`)"""
    text_field: str = "text"
    """field of a row that holds the text. A row without it that has `messages` (a list of role and content) is a chat"""
    subset_field: str = "meta.pile_set_name"
    """field of a row that names its part of the corpus, stored with the document; a dot selects a
    nested field; rows may lack it"""
    tokenizer: str = "train"
    """`train` (byte-level BPE, trained on documents of the train split only), `gpt2` (fetched through
    tiktoken, else from the Hub), the path of a tokenizer.json, or a model's folder or Hub id (OWNER/NAME), whose
    chat template then also writes rows with `messages`"""
    revision: str | None = model_option(None, identity=False, in_commands=True)
    """for a tokenizer of the Hub: branch, tag or commit; the commit is recorded. Default: the newest"""
    vocab_size: int = 4096
    """size of a trained vocabulary, including `<|endoftext|>`; other tokenizers have their own size"""
    sample_megabytes: float = 64.0
    """megabytes (10^6 bytes) of text, from the start of the train split, to train a tokenizer on"""
    fit: float = 0.05
    """fraction of the documents from which neurons are explained"""
    held_out: float = 0.05
    """fraction of the documents on which explanations are scored and the loss is measured; all other
    documents train the model"""
    max_documents: int | None = None
    """stop after this many documents. Default: all"""
    max_tokens: int | None = None
    """stop after the document that reaches this many tokens. Default: all"""
    sequence_length: int = not_in_identity(128)
    """length in tokens; every split must have at least one sequence of this length plus one token"""
    max_document_megabytes: float = field(
        default=LONGEST_DOCUMENT / 1e6, metadata={"group": "limits"}
    )
    """megabytes (10^6 bytes) of the longest document, as it is stored: a text file, a decompressed JSON line, a
    Parquet cell. A longer document counts as one that cannot be read (--on-error). Memory grows with
    it: up to 13 times its size, next to about 1 GB"""
    on_error: Literal["stop", "skip"] = "stop"
    """what to do with a document that cannot be read: stop with its file and line, or skip and count it"""
    workers: int = not_in_identity(1)
    """processes that encode the files of the corpus on this machine, with as many threads each as leave one for
    every core. The shards are the same for any number"""
    executor: Path | None = not_in_identity(None)
    """TOML file that names an executor of datatrove (`local`, `slurm` or `ray`) and its options: the files are encoded
    by its tasks (needs the extra `cluster`)"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vocabulary_size(self)
        at_least(self, {"workers": 1})
        check_memory(self, {"workers": _BYTES_PER_WORKER * self.workers}, "the worker processes")
        if self.workers > 1 and self.executor is not None:
            raise InputError(
                "--workers and --executor cannot be combined: the file of the executor has the number of its workers"
            )
        for name in ("fit", "held_out"):
            if not 0 < getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} is {getattr(self, name)}: it must be a fraction, above 0 and below 1"
                )

        if self.fit + self.held_out >= 1:
            raise InputError(
                f"--fit {self.fit} and --held-out {self.held_out} leave nothing to train on:"
                " their sum must be below 1"
            )
        if not 0 < self.max_document_megabytes < math.inf:
            raise InputError(
                f"--max-document-megabytes is {self.max_document_megabytes}: it must be a number above 0"
            )
        for name in ("max_documents", "max_tokens", "sample_megabytes", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {value}: it must be above 0")

    def reaches_limit(self, n_tokens: int, n_documents: int) -> bool:
        """Return whether so many tokens and documents reach `max_tokens` or `max_documents`."""
        return (self.max_tokens is not None and n_tokens >= self.max_tokens) or (
            self.max_documents is not None and n_documents >= self.max_documents
        )
