"""Open a model by its name: find its folder or Hub id, identity, device, precision and tokenizer.

All verbs follow one rule. A name without a slash is a model of the run if the run has a model of this
name, or if there is no folder of this name. Otherwise it is a folder if there is one, else a Hub id, also written
OWNER/NAME@REVISION. `mini:NAME` is a model that comes with cratelm. `cratelm.runs.model_options` has the options. Code that comes with a model runs only with
`--trust-remote-code`.
Records name a model by its identity: that of the stage that trained it, a hash of the files of a folder,
or the Hub's repository with the commit.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cratelm.errors import InputError, one_line
from cratelm.models.sizes import code_of, hub_commit, load
from cratelm.runs import Completion, Run, hash_file, hash_json
from cratelm.runs.devices import device_of
from cratelm.runs.minis import is_mini, mini_folder
from cratelm.runs.model_options import SourceOptions
from cratelm.runs.reading import verified
from cratelm.text.units import TokenStrings
from cratelm.tokens.pieces import PieceEncoder
from cratelm.tokens.shards import MOST_UNUSED_ROWS, TokenStore, check_vocabulary
from cratelm.tokens.tokenizer import display_strings, end_of_text_id, load_tokenizer, without_limits

HUB = "hub:"
"""prefix of the identity of a Hub model, hub:NAME@COMMIT"""
_COMMIT = re.compile("[0-9a-f]{40}")
NO_LIMIT = 1024
"""sequence length, in tokens, for models that state no maximum"""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""fields of configurations with the number of positions; the last two are MPT's and BLOOM's"""
LONGEST = 2048
"""longest default sequence, in tokens: the logits of 131,072 tokens, which some models accept, exceed the
memory of most machines"""


# --- location of a model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """Location of a model, before anything is loaded."""

    name: str
    """as the user named it"""
    location: str | Path
    """folder or Hub id"""
    record: Completion | None = None
    """record of the stage that trained it; None for a model from outside the run"""
    revision: str | None = None
    """branch, tag or commit of the Hub's repository; None for the newest commit, and for folders"""
    trust_remote_code: bool = False
    """whether code that comes with the model may run"""

    @property
    def identity(self) -> str:
        """Return a string that changes when the model does, or code that comes with it.

        Reads all files of a folder outside the run.
        """
        if self.record is not None:
            return self.record.identity
        if isinstance(self.location, Path):
            return folder_identity(self.location)
        revision = self.pinned().revision
        code = code_of(self.location, revision)
        elsewhere = code is not None and code.source != self.location
        of_code = f"+{code.source}@{code.revision}" if code and elsewhere else ""
        return f"{HUB}{self.location}{of_code}@{revision}"

    def pinned(self) -> "ModelSource":
        """Return the source with a Hub model's current commit, so that the model loaded is the one named."""
        if isinstance(self.location, Path) or _COMMIT.fullmatch(self.revision or ""):
            return self
        return replace(self, revision=hub_commit(self.location, self.revision))

    def load(self, device: str = "auto", dtype: str = "auto") -> "LoadedModel":
        """Return the model on a device and in a precision.

        `auto` stands for an accelerator if there is one, and for the precision of the files. Raises
        `InputError` for a device that this machine does not have, or a model that cannot be loaded.
        """
        torch_device = device_of(device)  # may raise, so before anything is loaded
        options: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        if self.revision:
            options["revision"] = self.revision
        if self.trust_remote_code:
            options["trust_remote_code"] = True
        model: Any = load(self.location, **options)
        return LoadedModel(self.name, self.location, model.to(torch_device), self.revision)


def find_model(
    run: Run,
    name: str,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - it is frozen
    *,
    from_run: bool = True,
) -> ModelSource:
    """Return the location of the model called `name`; with `from_run` False, of a folder or Hub id.

    Raises `InputError` for a model of the run that is not trained, and for a revision of a model that is not on the
    Hub.
    """
    source = _located(run, name, options, from_run)
    if options.revision is not None and isinstance(source.location, Path):
        raise InputError(
            f"--revision is {options.revision}, but {name} is in {source.location}, and only models of the Hub have"
            " revisions: omit --revision"
        )
    return source


def _located(run: Run, name: str, options: SourceOptions, from_run: bool) -> ModelSource:
    if is_mini(name):
        return ModelSource(name, mini_folder(name))
    folder, trusted = Path(name), options.trust_remote_code
    may_be_of_run = from_run and "/" not in name and not name.startswith(".")
    if may_be_of_run:
        stage = run.stage("model", name)
        if stage.completion() is not None or not folder.is_dir():
            return ModelSource(name, stage.path, stage.require("train"))
    if folder.is_dir():
        return ModelSource(name, folder, trust_remote_code=trusted)
    repository, _, revision = name.partition("@")
    if revision and options.revision:
        raise InputError(f"{name} and --revision {options.revision}: give one revision")
    revision = revision or options.revision
    return ModelSource(name, repository, revision=revision, trust_remote_code=trusted)


def folder_identity(folder: Path) -> str:
    """Return a sha256 over the configuration and weight files of a model's folder, and the code that it needs."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".bin")]
    hashes = {p.name: hash_file(p) for p in files}
    code = code_of(folder) if (folder / "config.json").is_file() else None
    return hash_json(hashes | ({"code": code.identity} if code else {}))


def revision_of(identity: str) -> str | None:
    """Return the commit in the identity of a Hub model; None for others, and in runs of version 0.1.0."""
    is_pinned = identity.startswith(HUB) and "@" in identity
    return (identity.rpartition("@")[2] or None) if is_pinned else None


# --- the model, loaded -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A loaded model, with the name that the user gave it and its source."""

    name: str
    source: str | Path
    """folder or Hub id"""
    model: Any
    revision: str | None = None
    """commit of the Hub's repository, if it was pinned"""

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of its embedding."""
        return self.model.config.get_text_config().vocab_size

    @property
    def longest(self) -> int | None:
        """Return the longest sequence that it accepts, in tokens; None if it states no maximum."""
        config = self.model.config.get_text_config()
        found = (getattr(config, name, None) for name in _POSITIONS)
        return next((n for n in found if type(n) is int and n > 0), None)


def open_model(
    run: Run,
    name: str,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - it is frozen
    *,
    from_run: bool = True,
) -> LoadedModel:
    """Return the model called `name`, as `find_model` finds it and `ModelSource.load` loads it."""
    source = find_model(run, name, options, from_run=from_run).pinned()
    return source.load(options.device_wanted, options.dtype_wanted)


def check_store(subject: LoadedModel, store: TokenStore, run: Run) -> None:
    """Raise `InputError` if the run's tokens are not those of the model."""
    check_vocabulary(store, subject.vocab_size)
    path = Path(subject.source) / "tokenizer.json"
    if path.is_file() and load_tokenizer(path).get_vocab() != store.tokenizer.get_vocab():
        raise InputError(
            f"{path} differs from the tokenizer of the run {run.path}: name a model trained on these"
            " tokens, another --run, or texts with --on, which each model reads in its own tokens"
        )


def sequence_length(subject: LoadedModel, wanted: int | None) -> int:
    """Return a sequence length in tokens: `wanted`, else the model's maximum, but at most `LONGEST`.

    Raises `InputError` if `wanted` is above the model's maximum.
    """
    most = subject.longest
    if wanted and most and wanted > most:
        raise InputError(
            f"--sequence-length is {wanted}, longer than the {most} positions of {subject.name}:"
            " lower --sequence-length"
        )
    return wanted or min(most or NO_LIMIT, LONGEST)


# --- its tokenizer --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model's tokenizer, for texts; it reads special tokens in a text as plain text."""

    tokenizer: Tokenizer
    start: int
    """id of the token before a text: beginning of text if the tokenizer has one, else end of text (in
    GPT-2 they are the same)"""
    adds_start: bool
    """True if the tokenizer itself adds it before every text, as LLaMA's does and GPT-2's does not"""
    end: int
    """id of the end-of-text token, which `cratelm tokenize` writes between documents"""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text [n], without special tokens.

        Raises `InputError` for a long text that cannot be encoded in pieces (`cratelm.tokens.pieces`).
        """
        return self._pieces.encode(text).astype(np.int64)

    @cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self.tokenizer)

    @cached_property
    def vocabulary(self) -> str:
        """Return a hash of all tokens and their ids: models with equal hashes predict the same tokens."""
        tokens = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(tokens.encode()).hexdigest()

    @cached_property
    def display(self) -> TokenStrings:
        """Return a display string for each token id."""
        return display_strings(self.tokenizer)


def encoder_of(subject: LoadedModel, run: Run) -> Encoder:
    """Return the model's own tokenizer.

    This is the tokenizer.json in its folder, else what transformers finds for it, else the run's.
    Raises `InputError` if none has the vocabulary of the model, and for a slow tokenizer, which does not say where in
    a text its tokens are.
    """
    path = Path(subject.source) / "tokenizer.json"
    encoder = _from_folder(path) if path.is_file() else _from_transformers(subject)
    if encoder is None and (run.path / "tokens" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(verified(run.path / "tokens" / "tokenizer.json"))
        end = end_of_text_id(tokenizer)
        encoder = Encoder(tokenizer, end, False, end)
    if encoder is None or not _fits(encoder, subject):
        raise InputError(
            f"there is no tokenizer with the vocabulary of {subject.name} ({subject.vocab_size:,}"
            f" tokens): put its tokenizer.json into {subject.source}"
        )
    return encoder


def _from_folder(path: Path) -> Encoder:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(path)
    try:  # reads tokenizer_config.json, too
        wrapped = PreTrainedTokenizerFast.from_pretrained(path.parent)
    except Exception as error:  # of the file's content
        raise InputError(
            f"{path.parent} has tokenizer files that transformers cannot read ({one_line(error)}): copy"
            " tokenizer_config.json and special_tokens_map.json again, or remove them"
        ) from None
    return _encoder(wrapped, tokenizer)


def _from_transformers(subject: LoadedModel) -> Encoder | None:
    """Return the tokenizer that transformers finds, or None if there is none.

    For a GPT-2 without tokenizer files transformers makes one up, with a single token: this is None, too.
    """
    from transformers import AutoTokenizer

    try:
        wrapped = AutoTokenizer.from_pretrained(subject.source, revision=subject.revision or "main")
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return None
    if not getattr(wrapped, "is_fast", True):
        raise InputError(
            f"the tokenizer of {subject.name} ({type(wrapped).__name__}) is a slow one, which does not say where its"
            f" tokens are in a text: a tokenizer.json is needed; convert it, and put the file into {subject.source}"
        )
    try:
        tokenizer = without_limits(Tokenizer.from_str(wrapped.backend_tokenizer.to_str()))
    except (ValueError, AttributeError):
        return None
    encoder = _encoder(wrapped, tokenizer)
    return encoder if _fits(encoder, subject) else None


def _encoder(wrapped: Any, tokenizer: Tokenizer) -> Encoder:
    """Return an encoder with the special tokens that transformers reports for a tokenizer.

    The token that the tokenizer adds before a text decides, whichever its files call the begin token.
    """
    added = _added_before(wrapped)
    special = (added, wrapped.bos_token_id, wrapped.eos_token_id)
    start = next((t for t in special if t is not None), None)
    start = end_of_text_id(tokenizer) if start is None else start
    try:
        end = end_of_text_id(tokenizer)
    except InputError:
        end = start if wrapped.eos_token_id is None else wrapped.eos_token_id
    return Encoder(tokenizer, start, added is not None, end)


def _added_before(wrapped: Any) -> int | None:
    """Return the id of the token that a tokenizer adds before every text; None if it adds none."""
    plain = wrapped("a", add_special_tokens=False).input_ids
    ids = wrapped("a").input_ids
    return ids[0] if len(ids) > len(plain) and ids[: len(plain)] != plain else None


def _fits(encoder: Encoder, subject: LoadedModel) -> bool:
    """Return whether its tokens fill nearly all rows of the model's embedding, and it can encode a letter."""
    unused = subject.vocab_size - max(encoder.tokenizer.get_vocab().values(), default=-1) - 1
    return 0 <= unused <= MOST_UNUSED_ROWS and len(encoder.encode("a")) > 0
