"""How the sequences of a model begin: with a begin token or without, and which first tokens are left out.

Many models were trained with a token such as `<s>` at the start of every sequence. Attention parks on it (attention
sinks; Xiao et al. 2023, arXiv 2309.17453), and the activations of MLPs there are hundreds of times as large as
elsewhere (massive activations; Sun et al. 2024, arXiv 2402.17762). Without it, the first token of a sequence takes
its place, whatever this token is. So the token is set where the model was trained with it, and neither it nor the
first tokens of a sequence that it does not protect count in statistics and excerpts.

Shape legend: B sequences of n tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.runs import Options, at_least

Int64 = NDArray[np.int64]
AUTO, NONE = "auto", "none"
"""values of `--begin-token` other than an id"""


@dataclass(frozen=True)
class Beginning:
    """How every sequence begins that a model reads."""

    token: int | None = None
    """id of the begin token, which is set before every sequence and counts nowhere; None for none"""
    skip: int = 0
    """number of further tokens at the start of every sequence that the model reads and that count nowhere"""

    @classmethod
    def recorded(cls, results: Mapping[str, Any]) -> "Beginning":
        """Return how the sequences of a harvest began, from the results in its record; plain in older runs."""
        return cls(results.get("begin_token"), results.get("skip_first") or 0)

    @property
    def is_plain(self) -> bool:
        """Return whether nothing is set and nothing left out, as with models trained by cratelm."""
        return self.token is None and not self.skip

    @property
    def extra(self) -> int:
        """Return the number of tokens set before a sequence, 0 or 1."""
        return int(self.token is not None)

    def room(self, length: int) -> int:
        """Return how many tokens of a text fit into a sequence of `length` tokens.

        Raises `InputError` if none of them would count.
        """
        room = length - self.extra
        if room <= self.skip and not self.is_plain:
            begin = " and its begin token" if self.extra else ""
            raise InputError(
                f"a sequence of {length} tokens has no token that counts after the first {self.skip}{begin}: raise"
                " --sequence-length, or lower --skip-first"
            )
        return room

    def is_set(self, ids: Sequence[int] | Int64) -> bool:
        """Return whether a text [n] begins with the begin token already."""
        return self.token is not None and len(ids) > 0 and int(ids[0]) == self.token

    def before(self, ids: Int64) -> Int64:
        """Return a text [n] with the begin token before it, [n + 1], or as it is if that would be a second one."""
        if self.token is None or self.is_set(ids):
            return ids
        return np.concatenate([[self.token], ids]).astype(np.int64)

    def without(self, ids: Int64) -> Int64:
        """Return a text [n] without the begin token that it begins with, if it does."""
        return ids[1:] if self.is_set(ids) else ids

    def left_out(self, ids: Int64) -> NDArray[np.bool_]:
        """Return which tokens of a sequence [n] as the model reads it are left out: the first ones, [n]."""
        return np.arange(len(ids)) < self.skip + int(self.is_set(ids))

    def prefix(self, end_id: int) -> tuple[int, ...]:
        """Return what stands before a piece of text that is read by itself, so that all of the piece counts.

        The begin token, and `end_id`, the end-of-text token, in place of each of the tokens that are left out.
        """
        begin = () if self.token is None else (self.token,)
        return (*begin, *(end_id,) * self.skip)


PLAIN = Beginning()
"""of models trained by cratelm"""


# --- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BeginTokenOption(Options):
    """The option of verbs that run a model on text of their own choice."""

    begin_token: str = field(default=AUTO, metadata={"group": "model"})
    """token set before every sequence: an id, none, or auto: the begin token that the model was trained with, if
    its tokenizer or its configuration adds one; none for models trained by cratelm"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin_token not in (AUTO, NONE) and not re.fullmatch(r"\d{1,9}", self.begin_token):
            raise InputError(
                f"--begin-token is {self.begin_token!r:.40}: it must be auto, none, or the id of a token, such as 0"
            )


@dataclass(frozen=True, kw_only=True)
class BeginningOptions(BeginTokenOption):
    """The options of verbs that measure activations."""

    skip_first: int | None = field(default=None, metadata={"group": "model"})
    """number of tokens at the start of every sequence that count in no statistic and no excerpt, without the begin
    token. Default: 0 for models trained by cratelm; for others 0 after a begin token, else 4"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"skip_first": 0})
