"""A language model made up for tests: it answers by rule, counts what it is asked, and can fail or be killed.

Its rule: a token is worth the top level where the explanation holds it between backquotes, else 0; so
an explanation that names the right token simulates the neuron well. It explains a neuron by the
token that is marked most often.
"""

import re
from collections import Counter
from collections.abc import Generator, Sequence

import numpy as np

from cratelm.llm.requests import (
    Answer,
    Chat,
    Embed,
    Failure,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    OptionLogprobs,
    Outcome,
    Request,
    key,
)


class FakeModel:
    """A `Backend` in this process."""

    name = "fake"
    window = 256
    way = ""
    reads_by_slot = False
    parallel = 1
    thinking_tokens = 0
    reason = ""
    address = ""

    def __init__(
        self,
        *,
        supports_logprobs: bool = True,
        fails: float = 0.0,
        dies_after: int = -1,
        ten: int = 2,
    ):
        """`fails`: share of requests that fail, by their content; `dies_after`: requests answered
        before it is killed, -1 for never; `ten`: tokens that "10" takes."""
        self.supports_logprobs, self.fails, self.dies_after, self.ten = (
            supports_logprobs,
            fails,
            dies_after,
            ten,
        )
        self.identity = {"backend": "fake"}
        self.asked: Counter[str] = Counter()

    def answer(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Outcome]]]:
        for index, request in enumerate(requests):
            if self.dies_after == sum(self.asked.values()):
                raise KeyboardInterrupt
            content = key(request, self.identity)
            self.asked[content] += 1
            if int(content[:8], 16) / 16**8 < self.fails:
                yield [(index, Failure(FailureKind.STATUS, "status 500", 1, 0))]
            else:
                yield [(index, Answer(self._value(request), 10, 1, 0.01))]

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def tokens_at_slot(self, options: Sequence[str], slot_before: str) -> list[int]:
        return [self.ten if option == "10" else 1 for option in options]

    def _value(self, request: Request):
        if isinstance(request, Chat):
            marked = re.findall(r"«([^»]*)» \d", request.messages[-1][1])
            return f"the token `{Counter(marked).most_common(1)[0][0]}`" if marked else "nothing"
        if isinstance(request, Embed):
            return np.array([len(request.text), request.text.count("import"), 1], np.float32)
        if isinstance(request, JsonQuery):
            return tuple(self._levels(request.messages[-1][1], request.n, request.high))
        return self._reading(request)

    def _reading(self, request: LogprobQuery) -> OptionLogprobs:
        wanted = re.findall("`([^`]*)`", request.context)
        log_probs = np.full((len(request.slots), len(request.options)), -9.0, np.float32)
        for row, slot in enumerate(request.slots):
            line = request.body[:slot].rpartition("\n")[2].removesuffix("\t")
            log_probs[row, -1 if line in wanted else 0] = 0.0
        log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
        if not request.full:
            return OptionLogprobs(log_probs)
        ranks = np.argsort(np.argsort(-log_probs, axis=1), axis=1).astype(np.uint16)
        return OptionLogprobs(log_probs, np.full(len(request.slots), 0.9, np.float32), ranks)

    def _levels(self, asked: str, n: int, top: int) -> list[int]:
        wanted = re.findall("`([^`]*)`", asked.partition("\n")[0])
        rows = re.findall(r"^\d+\t(.*)$", asked, flags=re.M)[:n]
        return [top if row in wanted else 0 for row in rows] + [0] * (n - len(rows))
