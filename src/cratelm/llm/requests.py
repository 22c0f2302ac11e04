"""What is asked of a language model, and what comes back: four kinds of requests, answers, failures.

Every request is a frozen value: its content, together with the identity of the backend, is the key
under which the ledger keeps its answer. A failure is a value of its own, never a text or a number.

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
"""entry of a backend's identity that is part of the keys of chats alone: how texts are written decides
nothing about what is read or embedded"""
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
    """of the sampling, where the backend has one"""
    stop: str = ""
    """a text after which nothing is needed: a backend may stop there, and need not"""


@dataclass(frozen=True)
class LogprobQuery:
    """A text whose log-probabilities are read at places in it: how likely would each option stand there?

    The text is `preamble + context + body`. It is cut in three because backends that can, compute
    the preamble once for all requests of a kind and the context once for all that share it.
    """

    preamble: str
    """instructions and examples: the same for all neurons"""
    context: str
    """what the requests on one explanation share"""
    body: str
    slots: tuple[int, ...]
    """[n] offsets in `body`, in characters (code points), increasing: the character before which an
    option is considered. The text that follows a slot is not seen there: models read left to right"""
    options: tuple[str, ...]
    """[O] texts that could stand at a slot, such as "0" ... "9"; each a single token of the model"""
    full: bool = False
    """also say what share of all probability the options take, and their rank among all tokens"""

    @property
    def text(self) -> str:
        return self.preamble + self.context + self.body

    @property
    def offsets(self) -> tuple[int, ...]:
        """[n] the slots as offsets in `text`."""
        start = len(self.preamble) + len(self.context)
        return tuple(start + slot for slot in self.slots)


@dataclass(frozen=True)
class JsonQuery:
    """A conversation to be answered by JSON `{"values": [...]}`: `n` integers from `low` to `high`.

    For servers that give no log-probabilities.
    """

    messages: tuple[tuple[Role, str], ...]
    n: int
    low: int
    high: int
    seed: int = 0


@dataclass(frozen=True)
class Embed:
    """A text to be turned into a vector."""

    text: str


Request = Chat | LogprobQuery | JsonQuery | Embed


@dataclass(frozen=True, eq=False)
class OptionLogprobs:
    """Answer to a `LogprobQuery`."""

    log_probs: NDArray[np.float32]
    """[n, O] natural logarithm of each option's probability among the options (each row's
    probabilities add up to 1); -inf where a server does not tell"""
    mass: NDArray[np.float32] | None = None
    """[n] share of all probability that falls on the options, 0..1; None where it was not asked for"""
    ranks: NDArray[np.uint16] | None = None
    """[n, O] place of each option among all tokens, 0 the most likely, `NO_RANK` where unknown; None
    where it was not asked for"""


Value = str | OptionLogprobs | tuple[int, ...] | NDArray[np.float32]
"""of a `Chat`, a `LogprobQuery`, a `JsonQuery`, an `Embed` ([E])"""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a request gave, and what it took."""

    value: Value
    prompt_tokens: int
    completion_tokens: int
    seconds: float = 0.0


class FailureKind(StrEnum):
    """Why a request has no answer."""

    CONNECTION = "connection"
    """no connection, or it broke"""
    DEADLINE = "deadline"
    """no complete answer within the deadline"""
    STATUS = "status"
    """an HTTP status other than 200, after retries: 429, 500 ..."""
    EMPTY = "empty"
    REFUSED = "refused"
    MALFORMED = "malformed"
    """not what was asked for: no JSON, truncated, not the number of values, out of range"""
    UNREADABLE = "unreadable"
    """log-probabilities that cannot be placed: no token begins at a slot, or no option is among those told"""


@dataclass(frozen=True)
class Failure:
    """A request that has no answer. Never scored; counted; retried when asked."""

    kind: FailureKind
    reason: str
    """one line, without secrets"""
    prompt_tokens: int = 0
    """paid for all the same, where the server said so"""
    completion_tokens: int = 0
    seconds: float = 0.0


Outcome = Answer | Failure


class Backend(Protocol):
    """A language model that answers requests."""

    @property
    def name(self) -> str:
        """short, for tables and folders: letters, digits, `-`, `_`, `.`"""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """All that decides what it answers (weights, precision, server), and no secret: part of every key."""
        ...

    @property
    def reads(self) -> bool:
        """True where it answers `LogprobQuery`; else `JsonQuery` is used in its place."""
        ...

    @property
    def reason(self) -> str:
        """Why it does not answer `LogprobQuery`, in words; empty where it does."""
        ...

    @property
    def window(self) -> int:
        """How many requests it likes to be given at a time, to be busy."""
        ...

    @property
    def parallel(self) -> int:
        """How many calls it has in flight at a time."""
        ...

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        """Outcomes by the requests' index as they come, in groups that are to be kept together.

        Closing the generator early ends what is in flight.

        Raises nothing for what concerns one request: that is a `Failure`. Raises `InputError` where
        no request can succeed (wrong key, no such model, no server).
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, exactly or, where the tokenizer is not here, about."""
        ...

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        """How many tokens each option takes where it follows `slot_before`; empty where it cannot be known."""
        ...


def key(request: Request, identity: dict[str, str]) -> str:
    """sha256 of what is asked and of whom: equal for equal requests, in every process and version.

    A `LogprobQuery` is keyed by its text, slots, options and `full`; how the text is cut does not count.
    """
    content: dict[str, Any] = {f.name: getattr(request, f.name) for f in fields(request)}
    if isinstance(request, LogprobQuery):
        for part in ("preamble", "context", "body", "slots"):
            del content[part]
        content |= {"text": request.text, "offsets": request.offsets}
    if not isinstance(request, Chat):
        identity = {name: value for name, value in identity.items() if name != CHAT_IDENTITY}
    whole = {"kind": type(request).__name__, "backend": identity, **content}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
