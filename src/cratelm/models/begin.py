"""Which begin token a model was trained with, and which first tokens of a sequence its statistics leave out.

The rule of `--begin-token auto` and of the default of `--skip-first`, in one place for all verbs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.models.open import Encoder, LoadedModel, encoder_of
from cratelm.runs import RECORD, Run
from cratelm.text.display import visible
from cratelm.tokens.beginning import AUTO, NONE, PLAIN, Beginning

UNPROTECTED = 4
"""first tokens left out of a model of others that is run without a begin token: attention sinks are among the first
three tokens of SmolLM2's sequences, and at no later position (docs/pretrained.md)"""
_CARD = "cratelm.json"
"""file in the folders that cratelm exports and imports"""


@dataclass(frozen=True)
class ChosenBeginning:
    """How the sequences of a model begin, and why."""

    beginning: Beginning
    reason: str
    """why this begin token, or none, in words"""
    token: str
    """the begin token as text; empty for none"""

    def in_words(self, *, with_skip: bool = True) -> str:
        """Return the choice on one line, with or without the first tokens that are left out."""
        begin = self.beginning
        how = (
            f"begin with {self.token} (id {begin.token})" if begin.extra else "have no begin token"
        )
        line = f"sequences {how}: {self.reason} (--begin-token)"
        if not with_skip:
            return line
        counted = f"the first {begin.skip}" if begin.skip else "none"
        further = "further " if begin.extra else ""
        return f"{line}; of their {further}tokens {counted} are left out (--skip-first)"


PLAIN_BEGINNING = ChosenBeginning(PLAIN, "cratelm trains models without one", "")
"""of models that cratelm trained"""


def choose_beginning(
    loaded: LoadedModel, run: Run, begin_token: str = AUTO, skip_first: int | None = None
) -> ChosenBeginning:
    """Return how the sequences of a model begin, from the values of the two options.

    With `auto`, models that cratelm trained have no begin token; others have the one that their tokenizer adds to a
    text, or that their configuration says is added. Raises `InputError` for an id that the model does not have.
    """
    own = is_own(loaded)
    encoder = None
    if begin_token == NONE:
        token, reason = None, "as the option says"
    elif begin_token == AUTO and own:
        token, reason = None, "cratelm trains models without one"
    else:
        encoder, problem = _encoder(loaded, run)
        if begin_token == AUTO:
            token, reason = _trained_with(loaded, encoder, problem)
        else:
            token, reason = int(begin_token), "as the option says"
    if token is not None and token >= loaded.vocab_size:
        raise InputError(
            f"--begin-token is {token}, but {loaded.name} has the tokens 0 to {loaded.vocab_size - 1}:"
            " give the id of one of them"
        )
    default = 0 if own or token is not None else UNPROTECTED
    beginning = Beginning(token, default if skip_first is None else skip_first)
    return ChosenBeginning(beginning, reason, "" if token is None else _text(token, encoder))


def announce(chosen: ChosenBeginning, loaded: LoadedModel, *, with_skip: bool = True) -> None:
    """Print how the sequences of a model begin on stderr, unless cratelm trained it: those have no begin token."""
    if not is_own(loaded) or chosen.beginning != PLAIN:
        words = chosen.in_words(with_skip=with_skip)
        print(f"{Path(loaded.name).name}: {words}", file=sys.stderr, flush=True)


def announced(
    loaded: LoadedModel,
    run: Run,
    begin_token: str,
    skip_first: int | None = None,
    *,
    with_skip: bool = False,
) -> Beginning:
    """Return what `choose_beginning` chooses, which is printed."""
    chosen = choose_beginning(loaded, run, begin_token, skip_first)
    announce(chosen, loaded, with_skip=with_skip)
    return chosen.beginning


def opening(encoder: Encoder, beginning: Beginning) -> int:
    """Return the id of the token that stands before a text that is read by itself.

    The begin token; without one the end-of-text token, after which documents begin in the tokens of a run.
    """
    return encoder.end if beginning.token is None else beginning.token


def is_own(loaded: LoadedModel) -> bool:
    """Return whether cratelm trained a model: one of a run, one that cratelm exported, or a CRATE."""
    of_run = any((Path(loaded.source) / name).is_file() for name in (RECORD, _CARD))
    return of_run or loaded.model.config.get_text_config().model_type == "crate"


def _encoder(loaded: LoadedModel, run: Run) -> tuple[Encoder | None, str]:
    """Return the model's tokenizer, or None and why there is none."""
    try:
        return encoder_of(loaded, run), ""
    except InputError as error:
        return None, str(error)


def _trained_with(
    loaded: LoadedModel, encoder: Encoder | None, problem: str
) -> tuple[int | None, str]:
    """Return the begin token that a model of others was trained with, or None, and the reason.

    `problem` says why there is no `encoder`.
    """
    if encoder is not None and encoder.adds_start:
        return encoder.start, "its tokenizer adds it to every text"
    config = loaded.model.config.get_text_config()
    says = next((name for name in _SAYS if getattr(config, name, None) is True), None)
    token = getattr(config, "bos_token_id", None)
    if says and isinstance(token, int) and 0 <= token < loaded.vocab_size:
        return token, f"its config.json says {says}"
    token = None if encoder is None else _said_by_tokenizer(loaded, encoder)
    if token is not None:  # transformers 5 adds none for it, version 4 did
        return token, "its tokenizer_config.json says add_bos_token"
    if encoder is None:
        return None, f"its tokenizer is unknown ({problem})"
    return None, "its tokenizer adds none"


def _said_by_tokenizer(loaded: LoadedModel, encoder: Encoder) -> int | None:
    """Return the begin token of a model whose tokenizer_config.json says that it is added; None for others."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        settings = get_tokenizer_config(loaded.source, revision=loaded.revision)
    except (OSError, ValueError):  # of the Hub's library, or JSON that is damaged
        return None
    named = settings.get("bos_token") if settings.get("add_bos_token") is True else None
    named = named.get("content") if isinstance(named, dict) else named
    return encoder.tokenizer.token_to_id(named) if isinstance(named, str) else None


_SAYS = ("add_bos_token", "prepend_bos")
"""entries of configurations that say that a begin token is set"""


def _text(token: int, encoder: Encoder | None) -> str:
    display = encoder.display if encoder is not None else []
    return visible(display[token]) if token < len(display) else f"[{token}]"
