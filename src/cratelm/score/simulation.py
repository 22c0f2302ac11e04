"""Simulating a neuron with a language model that reads its explanation (Bills et al. 2023).

One request an excerpt: the level of every token is read from one pass, as the expected value over
the levels. `paper_compat` is what Bai & Ma (2025) did instead: levels 0..10, only the first token of
a level is read (where "10" is two tokens a 10 reads as 1), and only the five likeliest tokens of all
are searched; where no level is among them the value is 0.

Shapes: n tokens of an excerpt, O options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.config import Prompts
from cratelm.llm.probe import ProbeResult
from cratelm.llm.prompts.neurons import simulate_fill, simulate_read
from cratelm.llm.prompts.openai import openai_simulate_read
from cratelm.llm.requests import Answer, OptionLogprobs, Outcome, Request
from cratelm.records import MAX_LEVEL, Excerpt, Score
from cratelm.score.metrics import correlation_score
from cratelm.score.tasks import Task, failed

COMPAT_SEARCHED = 5
"""likeliest tokens in which the paper's code looks for a level"""
COMPAT = "+paper-compat"
"""added to the explainer's name in the rows of that variant"""

IsDuplicate = Callable[[Excerpt], bool]


@dataclass(frozen=True)
class Simulator:
    """How levels are asked for and read."""

    supports_logprobs: bool
    """log-probabilities; else JSON"""
    top_level: int
    """levels 0..top_level are asked for"""
    n_options: int
    """levels that are single tokens: 0..n_options - 1 are read"""
    paper_compat: bool = False
    prompts: Prompts = "cratelm"

    @classmethod
    def of(
        cls, found: ProbeResult, prompts: Prompts = "cratelm", *, paper_compat: bool = False
    ) -> "Simulator":
        """Raises `InputError` where the model gives no log-probabilities and these are needed."""
        needs = "--paper-compat" if paper_compat else "--prompts openai"
        if not found.supports_logprobs and (paper_compat or prompts == "openai"):
            raise InputError(
                f"{needs} reads log-probabilities, which this server does not give: leave it out"
            )
        # OpenAI's prompts speak of 0..10 whatever the model's tokens
        ten = paper_compat or prompts == "openai"
        top = MAX_LEVEL if ten else found.top_level
        return cls(found.supports_logprobs, top, found.top_level + 1, paper_compat, prompts)

    def request(self, explanation: str, excerpt: Excerpt, strings: Sequence[str]) -> Request:
        """What asks for the levels of one excerpt; `strings` [V] shows each token."""
        if not self.supports_logprobs:
            return simulate_fill(explanation, excerpt.token_ids, strings, self.top_level)
        ids, full = excerpt.token_ids, self.paper_compat
        if self.prompts == "openai":
            read = openai_simulate_read(explanation, ids, strings, full=full)
        else:
            read = simulate_read(explanation, ids, strings, self.top_level, full=full)
        return replace(read, options=read.options[: self.n_options])

    def levels(self, answer: Answer) -> NDArray[np.float64]:
        """[n] simulated levels, 0..top_level."""
        if isinstance(answer.value, tuple):
            return np.array(answer.value, dtype=np.float64)
        assert isinstance(answer.value, OptionLogprobs)
        shares = np.exp(answer.value.log_probs.astype(np.float64))  # [n, O]
        if self.paper_compat:
            assert answer.value.ranks is not None
            shares = np.where(answer.value.ranks < COMPAT_SEARCHED, shares, 0.0)
            total = shares.sum(axis=1, keepdims=True)
            shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
        return shares @ np.arange(shares.shape[1])


def simulation_task(
    explanation: str,
    excerpts: Sequence[Excerpt],
    simulator: Simulator,
    strings: Sequence[str],
    is_duplicate: IsDuplicate,
) -> Task:
    """Asks for the levels of all `excerpts`; the score is their correlation with the activations."""
    requests = tuple(simulator.request(explanation, e, strings) for e in excerpts)

    def grade(outcomes: Sequence[Outcome]) -> Score:
        if (none := failed(outcomes)) is not None:
            return none
        simulated = [simulator.levels(o) for o in outcomes if isinstance(o, Answer)]
        return graded(excerpts, simulated, is_duplicate)

    return Task(requests, grade)


def graded(
    excerpts: Sequence[Excerpt], simulated: Sequence[NDArray], is_duplicate: IsDuplicate
) -> Score:
    """The score of simulated activations, and beside it that without the near-duplicates."""
    score = correlation_score([e.activations for e in excerpts], simulated)
    kept = [i for i, e in enumerate(excerpts) if not is_duplicate(e)]
    if len(kept) == len(excerpts):
        return score
    rest = correlation_score([excerpts[i].activations for i in kept], [simulated[i] for i in kept])
    return replace(score, n_duplicates=len(excerpts) - len(kept), without_duplicates=rest.value)
