"""The tokenizer of a model's folder or Hub id, with its chat template, for `cratelm tokenize --tokenizer`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cratelm.corpus.chat import ChatTemplate
from cratelm.errors import InputError, one_line
from cratelm.runs import hash_file, hash_json
from cratelm.runs.minis import is_mini, mini_folder
from cratelm.tokens.tokenizer import load_tokenizer

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+?(?:@(?P<revision>[\w./-]+))?")
_FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class ModelTokenizer:
    """A model's tokenizer."""

    tokenizer: Tokenizer
    identity: str
    """a sha256 over the tokenizer and the chat template of a folder; hub:NAME@COMMIT for the Hub"""
    chat: ChatTemplate | None
    """None if the model has no chat template"""


def model_tokenizer(name: str, revision: str | None = None) -> ModelTokenizer | None:
    """Return the tokenizer of the model in a folder or on the Hub; None if `name` is neither.

    On the Hub, the commit may also be given as OWNER/NAME@REVISION; without one it is the newest. Raises
    `InputError` if the model has no tokenizer.json, or for a revision of anything that is not on the Hub.
    """
    folder = mini_folder(name) if is_mini(name) else Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        _refuse_revision(name, revision)
        return _of_folder(folder)
    match = _HUB_ID.fullmatch(name)
    if match is None or os.path.exists(folder) or name.endswith(".json"):
        _refuse_revision(name, revision)
        return None
    if match["revision"] and revision:
        raise InputError(f"--tokenizer {name} and --revision {revision}: give one revision")
    return _of_hub(name.partition("@")[0], match["revision"] or revision)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(
            f"--revision is {revision}, but --tokenizer {name} is not on the Hub: omit --revision"
        )


def _of_folder(folder: Path) -> ModelTokenizer:
    path = folder / _FILE
    if not path.is_file():
        raise InputError(_without_file(folder))
    tokenizer, chat = load_tokenizer(path), _chat_template(folder)
    hashes = {_FILE: hash_file(path), "chat_template": chat.identity if chat else ""}
    return ModelTokenizer(tokenizer, hash_json(hashes), chat)


def _of_hub(name: str, revision: str | None) -> ModelTokenizer:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, _FILE, revision=revision)
    except Exception as error:  # of the Hub's library and of the network
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise InputError(_without_file(name)) from None
        raise InputError(
            f"no tokenizer can be read from {name} ({one_line(error)}): name a folder, a tokenizer.json or a Hub id"
            " with --tokenizer"
        ) from None
    assert path is not None, "cached_file raises if there is none"
    parts = Path(path).parts  # the cache keeps a file in `.../snapshots/COMMIT/`
    commit = parts[parts.index("snapshots") + 1]
    chat = _chat_template(name, revision=commit)
    return ModelTokenizer(load_tokenizer(path), f"hub:{name}@{commit}", chat)


def _without_file(source: str | Path) -> str:
    return (
        f"{source} has no {_FILE}, which is needed: only it gives the place of each token in the text. Where"
        f" transformers can convert it, type `python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{source}')"
        ".save_pretrained('FOLDER')\"` and name FOLDER with --tokenizer"
    )


def _chat_template(source: str | Path, **options: Any) -> ChatTemplate | None:
    """Return the chat template that transformers takes for a tokenizer; None if it has none, or none by default."""
    from transformers import PreTrainedTokenizerFast

    try:
        wrapped: Any = PreTrainedTokenizerFast.from_pretrained(source, **options)
    except Exception as error:  # of the files' content
        raise InputError(
            f"{source} has tokenizer files that transformers cannot read ({one_line(error)}): copy"
            " tokenizer_config.json and special_tokens_map.json again, or remove them"
        ) from None
    named = (
        wrapped.chat_template
    )  # several by name, of which transformers takes the one called default
    if not named or (isinstance(named, dict) and "default" not in named):
        return None
    tokens = tuple((k, v) for k, v in wrapped.special_tokens_map.items() if isinstance(v, str))
    return ChatTemplate(wrapped.get_chat_template(), tokens)
