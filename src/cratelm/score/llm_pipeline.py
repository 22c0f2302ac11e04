"""Scoring explanations with a language model: what is asked about each neuron, and what comes of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cratelm.explain.store import ExplanationFailure
from cratelm.llm.client import Client
from cratelm.llm.requests import Request
from cratelm.records import (
    METRICS,
    Control,
    Explanation,
    Metric,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    Score,
    Status,
)
from cratelm.score.controls import shuffled
from cratelm.score.scorers import TASKS
from cratelm.score.selection import scored_on
from cratelm.score.simulation import COMPAT, IsDuplicate, Simulator, simulation_task
from cratelm.score.tasks import Task

_CONTROLS: tuple[Control, ...] = ("none", "shuffled", "constant")
REQUESTS_A_NEURON = 128
"""about; says how many neurons are asked about together"""


@dataclass(frozen=True, eq=False)
class Reader:
    """What is the same for all neurons of one scoring."""

    name: str
    """of the language model that reads"""
    simulators: Mapping[str, Simulator]
    """by what is added to the explainer's name: "" and, with --paper-compat, its variant"""
    metrics: tuple[Metric, ...]
    strings: Sequence[str]
    """[V] shows each token"""
    is_duplicate: IsDuplicate
    seed: int

    @property
    def supports_logprobs(self) -> bool:
        """True where log-probabilities are read, else JSON is asked for."""
        return self.simulators[""].supports_logprobs


class Explanations:
    """Explanations of one set, by explainer, kind of evidence and neuron, with the shuffled control's donors."""

    def __init__(
        self, explanations: Sequence[Explanation], failures: Sequence[ExplanationFailure], seed: int
    ):
        self._found: dict[tuple[str, str], dict[NeuronId, Explanation]] = {}
        for e in explanations:
            evidence = str(e.payload.get("evidence", ""))
            self._found.setdefault((e.explainer, evidence), {})[e.neuron] = e
        self._donors = {k: shuffled(list(found), seed) for k, found in self._found.items()}
        self._reasons = {(f.neuron, f.evidence): f.reason for f in failures}

    def find(
        self, neuron: NeuronId, explainer: str, metric: Metric, control: Control
    ) -> str | Score:
        """The text that is scored, or the score where there is none."""
        evidence = "anthropic" if metric == "anthropic" else "top"
        place = (explainer, evidence)
        if place not in self._found:
            place = (explainer, "")  # made without a language model: one for all metrics
        found = self._found.get(place, {})
        if neuron not in found:
            reason = self._reasons.get((neuron, evidence), "none was asked for from this evidence")
            return Score(None, Status.FAILED, f"no explanation by {explainer}: {reason}")
        if control != "shuffled":
            return found[neuron].text
        donor = self._donors[place].get(neuron)
        if donor is None:
            reason = "the layer has no other explained neuron to take an explanation from"
            return Score(None, Status.UNDEFINED, reason)
        return found[donor].text


@dataclass(frozen=True, eq=False)
class PendingScore:
    """A score in the making: what names it, and the task or the score itself."""

    score: NeuronScore
    task: Task | None


def asked_about(
    record: NeuronRecord,
    dead: bool,
    explainers: Sequence[str],
    explanations: Explanations,
    reader: Reader,
) -> Iterator[PendingScore]:
    """All scores of one neuron, by explainer, variant, metric and control. `record` is of the held-out
    split; `dead`: it never fired on the fit split."""
    for explainer in explainers:
        for variant, simulator in reader.simulators.items():
            label = _label(explainer, reader.name) + variant
            for metric in reader.metrics:
                if variant == COMPAT and metric not in METRICS:
                    continue
                excerpts = scored_on(record, metric if metric in METRICS else "top_and_random")
                documents = tuple(sorted({e.document for e in excerpts}))
                for control in _CONTROLS if metric in METRICS else _CONTROLS[:2]:
                    made = _made(
                        record, dead, explainer, metric, control, explanations, reader, simulator
                    )
                    ready = made if isinstance(made, Score) else Score(None)
                    row = NeuronScore(record.neuron, label, metric, control, ready, documents)
                    yield PendingScore(row, made if isinstance(made, Task) else None)


def _made(
    record: NeuronRecord,
    dead: bool,
    explainer: str,
    metric: Metric,
    control: Control,
    explanations: Explanations,
    reader: Reader,
    simulator: Simulator,
) -> Task | Score:
    if dead or record.summary.dead:
        split = "fit" if dead else "held-out"
        return Score(None, Status.DEAD, f"never above 0 on the {split} split")
    text = explanations.find(record.neuron, explainer, metric, control)
    if metric == "intruder":
        text = ""  # asks about the excerpts alone
    if isinstance(text, Score):
        return text
    if control == "constant":
        return Score(None, Status.UNDEFINED, "the simulation is constant")
    if metric not in METRICS:
        return TASKS[metric](
            record,
            text,
            control,
            strings=reader.strings,
            supports_logprobs=reader.supports_logprobs,
            seed=reader.seed,
        )
    excerpts = scored_on(record, metric)
    return simulation_task(text, excerpts, simulator, reader.strings, reader.is_duplicate)


def windows(asked: Iterator[list[PendingScore]], client: Client) -> Iterator[list[PendingScore]]:
    """The scores in the making of as many neurons as keep the backend busy."""
    n = max(1, client.backend.window // REQUESTS_A_NEURON)
    while some := list(islice(asked, n)):
        yield [one for of_neuron in some for one in of_neuron]


def requests_of(asked: Sequence[PendingScore]) -> list[Request]:
    return [request for one in asked if one.task for request in one.task.requests]


def answered(asked: Sequence[PendingScore], client: Client) -> Iterator[NeuronScore]:
    """The scores. Raises `BudgetReached` as `Client.ask`."""
    outcomes = client.ask(requests_of(asked))
    at = 0
    for one in asked:
        if one.task is None:
            yield one.score
            continue
        mine = outcomes[at : at + len(one.task.requests)]
        at += len(mine)
        yield replace(one.score, score=one.task.grade(mine))


def _label(explainer: str, reader: str) -> str:
    """A model that reads its own explanations goes by its name."""
    return explainer if explainer == reader else f"{explainer}/{reader}"
