"""Requests to a language model and their outcomes: four kinds of requests, answers, failures.

Every request is a frozen value: a hash of its content and of the backend's identity is the key under
which the ledger stores its answer. A failure has a type of its own; it is never a text or a number.

Shapes: n slots of a prompt, O options at each, E width of an embedding.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant"]
CHAT_IDENTITY = "decoding"
"""entry of a backend's identity that enters the keys of chats only: the decoding method does not change
log-probabilities or embeddings"""
NO_RANK = 65_535
"""rank of an option that is not among the tokens whose rank is known"""


@dataclass(frozen=True)
class Chat:
    """A conversation to be continued by the assistant."""

    messages: tuple[tuple[Role, str], ...]
    max_tokens: int = 60
    temperature: float = 0.0
    """0: the most likely token each time"""
    seed: int = 0
    """sampling seed, for backends that have one"""
    stop: str = ""
    """a text after which nothing more is needed: a backend may stop there but need not"""


@dataclass(frozen=True)
class LogprobQuery:
    """A text with slots, and a request for the probability of each option at each slot.

    The text is `preamble + context + body`. It is split in three so that a backend can compute the
    preamble once for all requests of a kind, and the context once for all requests that share it.
    """

    preamble: str
    """instructions and examples: the same for all neurons"""
    context: str
    """the part that all requests on one explanation share"""
    body: str
    slots: tuple[int, ...]
    """[n] increasing offsets in `body`, in characters (code points): an option is considered just before
    that character. The text after a slot does not affect it, since models read left to right"""
    options: tuple[str, ...]
    """[O] texts that could follow at a slot, such as "0" ... "9"; each a single token of the model"""
    full: bool = False
    """also return the fraction of all probability that falls on the options, and their ranks among all
    tokens"""

    @property
    def text(self) -> str:
        """Return the whole text."""
        return self.preamble + self.context + self.body

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the slots as offsets in `text`, [n]."""
        start = len(self.preamble) + len(self.context)
        return tuple(start + slot for slot in self.slots)


@dataclass(frozen=True)
class JsonQuery:
    """A conversation to be answered by JSON `{"values": [...]}`: `n` integers from `low` to `high`.

    For servers that report no log-probabilities.
    """

    messages: tuple[tuple[Role, str], ...]
    n: int
    low: int
    high: int
    seed: int = 0


@dataclass(frozen=True)
class Embed:
    """A text to be embedded as a vector."""

    text: str


Request = Chat | LogprobQuery | JsonQuery | Embed


@dataclass(frozen=True, eq=False)
class OptionLogprobs:
    """Answer to a `LogprobQuery`."""

    log_probs: NDArray[np.float32]
    """[n, O] natural logarithm of each option's probability among the options (each row's
    probabilities add up to 1); -inf if the server does not report it"""
    mass: NDArray[np.float32] | None = None
    """[n] fraction of all probability that falls on the options, 0..1; None if `full` is False"""
    ranks: NDArray[np.uint16] | None = None
    """[n, O] rank of each option among all tokens, 0 the most likely, `NO_RANK` if unknown; None if `full`
    is False"""


Value = str | OptionLogprobs | tuple[int, ...] | NDArray[np.float32]
"""of a `Chat`, a `LogprobQuery`, a `JsonQuery`, an `Embed` ([E])"""


@dataclass(frozen=True, eq=False)
class Answer:
    """The value returned for a request, and its cost."""

    value: Value
    prompt_tokens: int
    completion_tokens: int
    seconds: float = 0.0


class FailureKind(StrEnum):
    """Why a request has no answer."""

    CONNECTION = "connection"
    """no connection, or a broken one"""
    DEADLINE = "deadline"
    """no complete answer within the deadline"""
    STATUS = "status"
    """an HTTP status other than 200, after retries: 429, 500 ..."""
    EMPTY = "empty"
    REFUSED = "refused"
    MALFORMED = "malformed"
    """not in the requested form: no JSON, truncated, the wrong number of values, or values out of range"""
    CUT = "cut"
    """the cap on tokens was reached before there was an answer: the model was still thinking"""
    UNREADABLE = "unreadable"
    """log-probabilities that cannot be located: no token begins at a slot, or no option is reported there"""


@dataclass(frozen=True)
class Failure:
    """A request without an answer. It is counted but never scored, and `--retry-failed` repeats it."""

    kind: FailureKind
    reason: str
    """one line, without secrets"""
    prompt_tokens: int = 0
    """charged even though the request failed; 0 if the server does not report them"""
    completion_tokens: int = 0
    seconds: float = 0.0


Outcome = Answer | Failure


class Backend(Protocol):
    """A language model that answers requests."""

    @property
    def name(self) -> str:
        """Return a short name for tables and folders: letters, digits, `-`, `_`, `.`."""
        ...

    @property
    def address(self) -> str:
        """Return host and path of the server, without secrets; empty for a model in this process."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """Return everything that determines the answers (weights, precision, server), and no secret.

        It enters every key of the ledger.
        """
        ...

    @property
    def supports_logprobs(self) -> bool:
        """Return True if the backend answers `LogprobQuery`; otherwise `JsonQuery` is used."""
        ...

    @property
    def reason(self) -> str:
        """Return why the backend does not answer `LogprobQuery`, in words; empty if it does."""
        ...

    @property
    def way(self) -> str:
        """Return how a server reports log-probabilities; empty for a local model, or if it does not."""
        ...

    @property
    def reads_by_slot(self) -> bool:
        """Return True if a `LogprobQuery` takes a call for each of its slots, with the text up to it."""
        ...

    @property
    def window(self) -> int:
        """Return how many requests to pass at a time so that the backend stays busy."""
        ...

    @property
    def parallel(self) -> int:
        """Return how many calls the backend has in flight at a time."""
        ...

    @property
    def thinking_tokens(self) -> int:
        """Return how many tokens a model may think before an answer, in addition to those of the answer."""
        ...

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        """Yield outcomes with the index of their request, as they arrive, in groups to be stored together.

        Closing the generator early cancels the calls in flight.

        A problem with a single request is a `Failure` and is never raised. Raises `InputError` if no
        request can succeed (wrong key, no such model, no server).
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text; an estimate if the tokenizer is not available."""
        ...

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        """Return how many tokens each option takes after `slot_before`; empty if that is unknown."""
        ...


_KINDS = {Chat: "Chat", LogprobQuery: "Read", JsonQuery: "Fill", Embed: "Embed"}
"""Names written into every key and row of a ledger. "Read" and "Fill" are the names that version 0.1.0
gave these requests: other names would make all stored answers unreachable."""


def kind_of(request: Request) -> str:
    """Return the name of a request's kind in keys and in the ledger."""
    return _KINDS[type(request)]


def key(request: Request, identity: dict[str, str]) -> str:
    """Return the sha256 of a request and of the backend's identity.

    It is the same for equal requests in every process and version. A `LogprobQuery` is keyed by its
    text, slots, options and `full`; how the text is split does not matter.
    """
    content: dict[str, Any] = {f.name: getattr(request, f.name) for f in fields(request)}
    if isinstance(request, LogprobQuery):
        for part in ("preamble", "context", "body", "slots"):
            del content[part]
        content |= {"text": request.text, "offsets": request.offsets}
    if not isinstance(request, Chat):
        identity = {name: value for name, value in identity.items() if name != CHAT_IDENTITY}
    whole = {"kind": kind_of(request), "backend": identity, **content}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def prompt_tokens(request: Request, backend: Backend) -> int:
    """Return the tokens that a server would count as the prompt's, by the backend's own count."""
    if isinstance(request, Chat | JsonQuery):
        # about 4 tokens a message mark who speaks
        return sum(backend.count_tokens(text) + 4 for _, text in request.messages)
    if isinstance(request, LogprobQuery) and backend.reads_by_slot:
        return sum(backend.count_tokens(request.text[:offset]) for offset in request.offsets)
    return backend.count_tokens(request.text)


def completion_tokens(request: Request, thinking_tokens: int = 0, *, by_slot: bool = False) -> int:
    """Return the largest number of tokens that the answer can take, and the thoughts before it.

    `by_slot`: a `LogprobQuery` takes a call for each slot.
    """
    if isinstance(request, Chat):
        return request.max_tokens + thinking_tokens
    if isinstance(request, JsonQuery):
        # of JSON: a number and its punctuation per value, and the frame
        return 16 + 4 * request.n + thinking_tokens
    if isinstance(request, LogprobQuery):
        return len(request.slots) if by_slot else 1
    return 0
