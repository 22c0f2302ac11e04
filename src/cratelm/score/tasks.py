"""A task: what is asked of a language model to score one neuron, and how its answers become the score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cratelm.llm.requests import Failure, Outcome, Request
from cratelm.records import Score, Status


@dataclass(frozen=True, eq=False)
class Task:
    """The requests of one neuron, scorer and control."""

    requests: tuple[Request, ...]
    grade: Callable[[Sequence[Outcome]], Score]
    """from the outcomes, in the order of the requests; failures among them are its to deal with"""


def failed(outcomes: Sequence[Outcome]) -> Score | None:
    """FAILED, with a count and the first reason, where any of the outcomes is a failure; else None."""
    failures = [o for o in outcomes if isinstance(o, Failure)]
    if not failures:
        return None
    first = failures[0]
    reason = (
        f"{len(failures)} of {len(outcomes)} calls failed, the first: {first.kind}: {first.reason}"
    )
    return Score(None, Status.FAILED, reason)
