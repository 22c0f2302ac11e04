"""Questions for the judge: which of two continuations shows more of what an explanation says, in both orders.

Paulo et al. 2024 (arXiv 2410.13928) score an explanation of an effect by how much more likely a model finds
the explanation after text generated under the intervention than after clean text. Not every backend here
returns the log-probability of a whole explanation, so the judge reads the explanation and both continuations,
and the probability of its one-token answer is the score (if a server reports no probability, its answer
counts as 0 or 1). Each pair is asked in both orders, so that position bias cancels. A preference for steered
or for plain text, whatever the explanation, does not cancel: it appears in the control with another neuron's
explanation, with which the own score is compared.

The answer is on a line of its own, as in `cratelm.llm.prompts.scorers`. `VERSION` changes with any word.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cratelm.llm.prompts.scorers import one_line
from cratelm.llm.requests import (
    Answer,
    JsonQuery,
    LogprobQuery,
    OptionLogprobs,
    Outcome,
    Request,
    Role,
)
from cratelm.records import Score, Status
from cratelm.score.scorers import Task, failed
from cratelm.text.display import printable

VERSION = "intervene-1"
ANSWERS = ("1", "2")
_SLOT = "More of it:\n"
_PREAMBLE = """\
Which of the two texts shows more of what the description says? Answer 1 or 2.

Description: names of cities
1:  took the night train from Vienna to Prague, then on to Paris
2:  walked home in the rain and cooked for her sister that
More of it:
1

Description: comparison operators in program code
1:  def close(self):\\n        self.file.close()\\n
2:  if x <= y and y != z or z >= 3:\\n    return x ==
More of it:
2

Description: `in`, ` of` and ` at`
1:  and he ran, and she ran, but nobody cared
2:  in the middle of the town, at the end of
More of it:
2

Description: numbers
1:  1, 22, 340, 4 and 5000 in 1999
2:  the old red house on the hill beside
More of it:
1

"""
_SYSTEM = """\
You are given a description and two texts. Decide which of the two shows more of what the description \
says. Line ends in the texts are written \\n. Answer with JSON alone: {"values": [N]}, N being 1 or 2."""

_KNOWN = (
    (
        "days of the week",
        " on Monday and Tuesday, then on Friday",
        " with a spoon of salt in the pan",
    ),
    ("the tokens `import`, `from`", "\nimport os\nfrom sys import path\n", " = self.value + 1\n\n"),
    (
        "names of colours",
        " a red coat, a blue hat, green shoes",
        " seven pages of notes from the day",
    ),
    ("closing brackets", ")) + f(x)) * g(y)])) - (z))", " the train was late again, and then"),
    (
        "the word `not`",
        " not now, not here and not like that",
        " once a week at the end of the road",
    ),
)
"""made-up descriptions, a text that shows each, and one that does not"""


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt."""

    plain: str
    """without steering"""
    steered: str
    """with the neuron steered"""


def task(
    explanation: str, pairs: Sequence[Pair], *, supports_logprobs: bool, seed: int
) -> Task | Score:
    """Return the task with the requests about one neuron: each pair whose texts differ, in both orders.

    Its score is the mean probability of naming the steered text, 0..1, and FAILED if any request has no
    answer; `n_records` counts pairs. If the texts of every pair are equal, an UNDEFINED score is returned
    instead of a task.
    """
    different = [p for p in pairs if p.plain != p.steered]
    if not different:
        return Score(None, Status.UNDEFINED, "every continuation is the same as without steering")
    ask = _read if supports_logprobs else _fill
    requests: list[Request] = []
    for pair in different:
        requests.append(ask(explanation, pair.steered, pair.plain, seed))
        requests.append(ask(explanation, pair.plain, pair.steered, seed))

    def grade(outcomes: Sequence[Outcome]) -> Score:
        steered_is = [0, 1] * len(different)  # index of the answer that names the steered text
        chances = [_probability(o, answer) for o, answer in zip(outcomes, steered_is, strict=True)]
        return Score(float(np.mean(chances)), n_records=len(different))

    return Task(tuple(requests), lambda outcomes: failed(outcomes) or grade(outcomes))


def known_task(*, supports_logprobs: bool, seed: int) -> Task:
    """Return the task with requests about made-up pairs with a known answer.

    A judge that cannot answer these cannot judge the others. The score is the mean over the pairs.
    """
    parts = [
        task(description, [Pair(other, match)], supports_logprobs=supports_logprobs, seed=seed)
        for description, match, other in _KNOWN
    ]
    tasks = [part for part in parts if isinstance(part, Task)]

    def grade(outcomes: Sequence[Outcome]) -> Score:
        scores = [t.grade(outcomes[2 * i : 2 * i + 2]) for i, t in enumerate(tasks)]
        values = [s.value for s in scores if s.value is not None]
        return Score(float(np.mean(values)), n_records=len(values))

    requests = tuple(r for t in tasks for r in t.requests)
    return Task(requests, lambda outcomes: failed(outcomes) or grade(outcomes))


def mass(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the fraction of all probability on the two answers, for each outcome with probabilities."""
    distributions = [
        o.value for o in outcomes if isinstance(o, Answer) and isinstance(o.value, OptionLogprobs)
    ]
    return [float(r.mass[0]) for r in distributions if r.mass is not None]


def _read(explanation: str, first: str, second: str, seed: int) -> LogprobQuery:
    body = f"{_both(first, second)}\n{_SLOT}"
    context = f"Description: {one_line(explanation)}\n"
    return LogprobQuery(_PREAMBLE, context, body + ANSWERS[0], (len(body),), ANSWERS, full=True)


def _fill(explanation: str, first: str, second: str, seed: int) -> JsonQuery:
    question = f"Description: {one_line(explanation)}\n\n{_both(first, second)}"
    messages: tuple[tuple[Role, str], ...] = (("system", _SYSTEM), ("user", question))
    return JsonQuery(messages, 1, 1, len(ANSWERS), seed)


def _both(first: str, second: str) -> str:
    return f"1: {printable(first)}\n2: {printable(second)}"


def _probability(outcome: Outcome, answer: int) -> float:
    """Return the probability of the answer with index 0 or 1; 0 or 1 for answers in JSON."""
    assert isinstance(outcome, Answer)
    if isinstance(outcome.value, OptionLogprobs):
        return float(np.exp(outcome.value.log_probs[0, answer]))
    assert isinstance(outcome.value, tuple)
    return float(outcome.value[0] == answer + 1)
