"""The models that are measured, and the tokenizer of each."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cratelm.errors import InputError
from cratelm.models import load
from cratelm.runs import Run
from cratelm.tokens.shards import MOST_UNUSED_ROWS, TokenStore, check_vocabulary
from cratelm.tokens.tokenizer import display_strings, end_of_text_id, load_tokenizer

NO_LIMIT = 1024
"""sequence length, in tokens, for models that name no longest one"""
LONGEST = 2048
"""longest sequence where none is asked for: the logits of 131,072 tokens, which some models take, are
more than a machine holds"""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model, how it was named, and where it came from."""

    name: str
    source: str | Path
    """folder or Hub id"""
    model: Any
    revision: str | None = None
    """commit of the Hub's repository, where it was asked for"""

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def longest(self) -> int | None:
        """Most tokens that it takes, None where it names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model's tokenizer, for texts: special tokens in a text are plain text to it."""

    tokenizer: Tokenizer
    start: int
    """token before a text: beginning of text where the tokenizer has one, else end of text (GPT-2's
    are the same)"""
    adds_start: bool
    """the tokenizer sets it before every text by itself, as LLaMA's does and GPT-2's does not"""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text [n], without special tokens."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    @cached_property
    def vocabulary(self) -> str:
        """Hash of all tokens and their ids: two of the same give losses of the same tokens."""
        known = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(known.encode()).hexdigest()

    @cached_property
    def display(self) -> list[str]:
        """A string for each token id."""
        return display_strings(self.tokenizer)


def open_model(
    run: Run,
    name: str,
    *,
    from_run: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> LoadedModel:
    """The model that `name` names: one of the run, else a folder or a Hub id OWNER/NAME.

    With `from_run` False a folder or a Hub id of any form. `revision`: commit of the Hub's repository.
    Raises `InputError` where there is none, or the device is not on this machine.
    """
    source = source_of(run, name, from_run=from_run)
    return LoadedModel(name, source, load_on(source, device, dtype, revision), revision)


def load_on(
    source: str | Path, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> Any:
    """A model on a device, in a precision (`float32`, `bfloat16`; `auto`: that of its files)."""
    where = device_of(device)  # told before anything is loaded
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if revision:
        options["revision"] = revision
    model: Any = load(source, **options)
    return model.to(where)


def device_of(wanted: str) -> torch.device:
    """The device called `wanted`; `auto`: an accelerator where there is one, else the CPU.

    Raises `InputError` for one that is not on this machine.
    """
    if wanted == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        # statistics are sums in float64, which MPS does not have
        return torch.device("cpu" if found is None or found.type == "mps" else found.type)
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--device {wanted} cannot be used on this machine ({reason}): type --device auto"
        ) from None
    return device


def source_of(run: Run, name: str, *, from_run: bool = True) -> str | Path:
    """Where `name` lies, told before anything is loaded. Raises `InputError` for a model of the run that
    is not trained."""
    elsewhere = not from_run or "/" in name or Path(name).is_dir()
    if from_run and (not elsewhere or name in run.models()):
        stage = run.stage("model", name)
        stage.require("train")
        return stage.path
    return name


def check_store(subject: LoadedModel, store: TokenStore, run: Run) -> None:
    """Raises `InputError` where the run's tokens are not those of the model."""
    check_vocabulary(store, subject.vocab_size)
    own = Path(subject.source) / "tokenizer.json"
    if own.is_file() and Tokenizer.from_file(str(own)).get_vocab() != store.tokenizer.get_vocab():
        raise InputError(
            f"{own} is another tokenizer than that of the run {run.path}: name a model trained on"
            " these tokens, another --run, or texts with --on, which each model reads in its own way"
        )


def sequence_length(subject: LoadedModel, wanted: int | None) -> int:
    """Tokens of a window. Raises `InputError` where the model does not take so many."""
    most = subject.longest
    if wanted and most and wanted > most:
        raise InputError(
            f"--sequence-length is {wanted}, longer than the {most} positions of {subject.name}"
        )
    return wanted or min(most or NO_LIMIT, LONGEST)


def encoder_of(subject: LoadedModel, run: Run) -> Encoder:
    """The model's own tokenizer: the tokenizer.json in its folder, else what transformers finds for
    it, else the run's. Raises `InputError` where none has the vocabulary of the model."""
    own = Path(subject.source) / "tokenizer.json"
    found = _from_folder(own) if own.is_file() else _from_transformers(subject)
    if found is None and (run.path / "tokens" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(run.path / "tokens" / "tokenizer.json")
        found = Encoder(tokenizer, end_of_text_id(tokenizer), False)
        found = found if _fits(found, subject) else None
    if found is None or not _fits(found, subject):
        raise InputError(
            f"no tokenizer with the vocabulary of {subject.name} ({subject.vocab_size:,} tokens) is"
            f" found: put its tokenizer.json into {subject.source}"
        )
    return found


def _from_folder(path: Path) -> Encoder:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(path)
    known = PreTrainedTokenizerFast.from_pretrained(path.parent)  # reads tokenizer_config.json, too
    return _encoder(known, tokenizer)


def _from_transformers(subject: LoadedModel) -> Encoder | None:
    """None where there is none, or one made up: a GPT-2 without files is given one of a single token."""
    from transformers import AutoTokenizer

    try:
        known = AutoTokenizer.from_pretrained(subject.source, revision=subject.revision or "main")
        tokenizer = Tokenizer.from_str(known.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    found = _encoder(known, tokenizer)
    return found if _fits(found, subject) else None


def _encoder(known: Any, tokenizer: Tokenizer) -> Encoder:
    """From what transformers knows of the tokenizer: its special tokens, and what it adds."""
    named = (known.bos_token_id, known.eos_token_id)
    start = next((t for t in named if t is not None), None)
    start = end_of_text_id(tokenizer) if start is None else start
    return Encoder(tokenizer, start, known("a").input_ids[:1] == [start])


def _fits(encoder: Encoder, subject: LoadedModel) -> bool:
    """Its tokens are rows of the model's embedding, nearly all of them, and it can read a letter."""
    unused = subject.vocab_size - max(encoder.tokenizer.get_vocab().values(), default=-1) - 1
    return 0 <= unused <= MOST_UNUSED_ROWS and len(encoder.encode("a")) > 0
