"""One pipeline for all scores: each explainer, variant, metric and control of each neuron.

A score is first planned: its row, and the requests that it needs (none for simulators without a language
model). The requests of a batch of neurons are sent together, and each score is computed from its answers.
Only one batch of neurons is in memory.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cratelm.llm.client import Client
from cratelm.llm.requests import Answer, Outcome, Request
from cratelm.records import (
    CONTROLS,
    CONTROLS_WITHOUT_SIMULATION,
    SIMULATION_METRICS,
    Control,
    Excerpt,
    Metric,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    Score,
    Status,
)
from cratelm.score.controls import ExplanationSet, dead_score
from cratelm.score.metrics import CONSTANT, IsDuplicate, simulation_score
from cratelm.score.scorers import BY_METRIC, Prompting, Task, failed, scorer_task
from cratelm.score.selection import scored_on
from cratelm.score.simulators import COMPAT, ConstantSimulator, Simulator, simulator_of

REQUESTS_PER_NEURON = 128
"""rough estimate, from which the number of neurons per batch is computed"""


@dataclass(frozen=True, eq=False)
class Reader:
    """The language model that reads explanations."""

    name: str
    simulators: Mapping[str, Simulator]
    """simulators by variant: "" and, with --paper-compat, `COMPAT`"""
    prompting: Prompting


@dataclass(frozen=True, eq=False)
class Scoring:
    """Settings that are the same for all neurons of one `cratelm score`."""

    metrics: Sequence[Metric]
    explainers: Sequence[str]
    explanations: ExplanationSet
    dead_on_fit: Collection[NeuronId]
    """neurons that never fired on the fit split and so have no explanation"""
    is_duplicate: IsDuplicate
    reader: Reader | None = None
    """None: each explainer's own simulator is used, without a language model"""

    def simulators(self, explainer: str) -> Mapping[str, Simulator]:
        """Return the simulators for an explainer's explanations, by variant."""
        return self.reader.simulators if self.reader else {"": simulator_of(explainer)}


@dataclass(frozen=True, eq=False)
class PendingScore:
    """A planned score: its row, and the task that computes it; `task` is None if the row is complete."""

    row: NeuronScore
    task: Task | None


def plan_scores(record: NeuronRecord, scoring: Scoring) -> Iterator[PendingScore]:
    """Yield all planned scores of one neuron, by explainer, variant, metric and control.

    `record` is of the held-out split.
    """
    sources: set[Metric] = {_source(metric) for metric in scoring.metrics}
    chosen = {source: scored_on(record, source) for source in sources}
    for explainer in scoring.explainers:
        for variant, simulator in scoring.simulators(explainer).items():
            for metric in scoring.metrics:
                simulated = metric in SIMULATION_METRICS
                if variant == COMPAT and not simulated:
                    continue
                excerpts = chosen[_source(metric)]
                documents = tuple(sorted({e.document for e in excerpts}))
                for control in CONTROLS if simulated else CONTROLS_WITHOUT_SIMULATION:
                    plan = _plan(record, excerpts, explainer, simulator, metric, control, scoring)
                    score = plan if isinstance(plan, Score) else Score(None)
                    row = NeuronScore(
                        record.neuron,
                        _label(explainer, scoring.reader) + variant,
                        metric,
                        control,
                        score,
                        () if _is_without_excerpts(score, scoring) else documents,
                        explained_by=explainer,
                        simulator=scoring.reader.name if scoring.reader else "",
                        variant=variant,
                    )
                    yield PendingScore(row, plan if isinstance(plan, Task) else None)


def _source(metric: Metric) -> Metric:
    """Return the metric whose excerpts `metric` uses."""
    return metric if metric in SIMULATION_METRICS else "top_and_random"


def _plan(
    record: NeuronRecord,
    excerpts: Sequence[Excerpt],
    explainer: str,
    simulator: Simulator,
    metric: Metric,
    control: Control,
    scoring: Scoring,
) -> Task | Score:
    if record.neuron in scoring.dead_on_fit:
        return dead_score("fit")
    if record.summary.dead:
        return dead_score("held-out")
    explanation = scoring.explanations.find(record.neuron, explainer, metric, control)
    scorer = BY_METRIC.get(metric)
    if scorer is not None:
        assert scoring.reader is not None  # `ScoreConfig` rejects these metrics without one
        if isinstance(explanation, Score) and scorer.uses_explanation:
            return explanation
        text = "" if isinstance(explanation, Score) else explanation.text
        return scorer_task(scorer, record, text, control, scoring.reader.prompting)
    if isinstance(explanation, Score):
        return explanation
    if control == "constant":
        if scoring.reader is not None:
            # levels have no unit, so there is no value for a constant simulation
            return Score(None, Status.UNDEFINED, CONSTANT)
        simulator = ConstantSimulator()
    token_ids = [e.token_ids for e in excerpts]  # simulators get token ids only, never activations

    def grade(outcomes: Sequence[Outcome]) -> Score:
        failure = failed(outcomes)
        if failure is not None:
            return failure
        answers = [o for o in outcomes if isinstance(o, Answer)]
        simulated = simulator.simulate(explanation, token_ids, answers)
        return simulation_score(excerpts, simulated, scoring.is_duplicate)

    return Task(tuple(simulator.requests(explanation, token_ids)), grade)


def _is_without_excerpts(score: Score, scoring: Scoring) -> bool:
    """Return True for rows that list no documents: dead and failed ones, without a language model.

    With a language model, these rows list the documents that would have been scored on. The difference is
    kept because the audit in `summary.json` counts documents.
    """
    return scoring.reader is None and score.status in (Status.DEAD, Status.FAILED)


def _label(explainer: str, reader: Reader | None) -> str:
    """Return the label in tables; a model that reads its own explanations is named only once."""
    return explainer if reader is None or explainer == reader.name else f"{explainer}/{reader.name}"


def plan_batches(
    records: Iterable[NeuronRecord], scoring: Scoring, client: Client | None
) -> Iterator[list[PendingScore]]:
    """Yield planned scores in batches of neurons that keep the backend busy; without a client, of one neuron."""
    n = max(1, client.backend.window // REQUESTS_PER_NEURON) if client else 1
    plans = (list(plan_scores(record, scoring)) for record in records)
    while batch := list(islice(plans, n)):
        yield [pending for of_neuron in batch for pending in of_neuron]


def requests_of(batch: Sequence[PendingScore]) -> list[Request]:
    """Return all requests of the planned scores, in order."""
    return [request for pending in batch if pending.task for request in pending.task.requests]


def score_records(
    records: Iterable[NeuronRecord], scoring: Scoring, client: Client | None = None
) -> Iterator[NeuronScore]:
    """Yield the scores of held-out records, in their order.

    `client` calls the language model of `scoring.reader`. Raises `BudgetReached` as `Client.ask` does.
    """
    for batch in plan_batches(records, scoring, client):
        requests = requests_of(batch)
        outcomes = client.ask(requests) if client else []
        assert len(outcomes) == len(requests)  # without a client, no simulator has requests
        start = 0
        for pending in batch:
            if pending.task is None:
                yield pending.row
                continue
            stop = start + len(pending.task.requests)
            yield replace(pending.row, score=pending.task.grade(outcomes[start:stop]))
            start = stop
