"""One pipeline for all scores: each explainer, variant, metric and control of each neuron.

A score is first planned: its row, and the requests that it needs (none for simulators without a language
model). The requests of a batch of neurons are sent together, and each score is computed from its answers.
A failed call costs its excerpt, and the score only if too few excerpts are left (`scorers.is_enough`).
Only one batch of neurons is in memory.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.named_set import simulated_label
from cratelm.llm.client import Client
from cratelm.llm.requests import Answer, Outcome, Request
from cratelm.records import (
    CONTROLS,
    CONTROLS_WITHOUT_SIMULATION,
    CORRELATIONS,
    HARD_METRICS,
    Control,
    Explanation,
    Metric,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    Score,
    Status,
)
from cratelm.score.config import PER_BIN
from cratelm.score.controls import ExplanationSet, dead_score
from cratelm.score.estimate import StratifiedSample
from cratelm.score.metrics import CONSTANT, FindDuplicates, Sample
from cratelm.score.scorers import BY_METRIC, Prompting, Task, scorer_task, too_few
from cratelm.score.selection import drawn_in_bins, scored_on
from cratelm.score.simulators import (
    COMPAT,
    ConstantSimulator,
    Simulator,
    TokenLists,
    simulator_of,
)
from cratelm.stats.intervals import RESAMPLES

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
    find_duplicates: FindDuplicates
    reader: Reader | None = None
    """None: each explainer's own simulator is used, without a language model"""
    per_bin: int = PER_BIN
    """`all_tokens_estimate`: excerpts per quantile bin"""
    resamples: int = RESAMPLES
    """`all_tokens_estimate`: bootstrap resamples for the interval of each neuron"""
    concepts: ConceptReader | None = None
    """what evaluates formulas of concepts; None if there are none"""

    @property
    def variants(self) -> Sequence[str]:
        """Return the variants of each simulated score: "" and, with --paper-compat, `COMPAT`."""
        return tuple(self.reader.simulators) if self.reader else ("",)


class _HeldOut:
    """A held-out record, with the excerpts of each metric."""

    def __init__(self, record: NeuronRecord, scoring: Scoring):
        self.record, self._concepts = record, scoring.concepts
        sources: dict[Metric, None] = {_source(metric): None for metric in scoring.metrics}
        self.samples: dict[Metric, Sample] = {
            source: _sample(record, source, scoring) for source in sources
        }
        self._simulated: dict[tuple[str, Control], Mapping[Metric, NDArray[np.float64]]] = {}

    @cached_property
    def _token_ids(self) -> TokenLists:
        """Return the token ids of all samples, one after another."""
        lists = [ids for sample in self.samples.values() for ids in sample.token_ids]
        return TokenLists(lists, self._concepts)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Return where each sample ends among their tokens."""
        return np.cumsum([sum(map(len, sample.token_ids)) for sample in self.samples.values()])

    def simulated(
        self, explanation: Explanation, explainer: str, control: Control
    ) -> Mapping[Metric, NDArray[np.float64]]:
        """Return the activations [n] that the explanation predicts without a language model, by metric.

        They are computed once for all metrics.
        """
        key = explainer, control
        if key not in self._simulated:
            simulator = ConstantSimulator() if control == "constant" else simulator_of(explainer)
            values = simulator.values(explanation.payload, self._token_ids)
            parts = zip(self.samples, np.split(values, self._ends[:-1]), strict=True)
            self._simulated[key] = dict(parts)
        return self._simulated[key]


def _sample(record: NeuronRecord, metric: Metric, scoring: Scoring) -> Sample:
    if metric != "all_tokens_estimate":
        return Sample(scored_on(record, metric), scoring.find_duplicates)
    excerpts = drawn_in_bins(record, scoring.per_bin)
    return StratifiedSample(excerpts, scoring.find_duplicates, record.summary, scoring.resamples)


@dataclass(frozen=True, eq=False)
class PendingScore:
    """A planned score: its row, and the task that computes it; `task` is None if the row is complete."""

    row: NeuronScore
    task: Task | None


def plan_scores(record: NeuronRecord, scoring: Scoring) -> Iterator[PendingScore]:
    """Yield all planned scores of one neuron, by explainer, variant, metric and control.

    `record` is of the held-out split. Without a language model the rows are complete.
    """
    held_out = _HeldOut(record, scoring)
    simulator = scoring.reader.name if scoring.reader else ""
    for explainer in scoring.explainers:
        for variant in scoring.variants:
            for metric in scoring.metrics:
                simulated = metric in CORRELATIONS
                if variant == COMPAT and not simulated:
                    continue
                for control in CONTROLS if simulated else CONTROLS_WITHOUT_SIMULATION:
                    plan = _plan(held_out, explainer, variant, metric, control, scoring)
                    score = plan if isinstance(plan, Score) else Score(None)
                    without = _is_without_excerpts(score, scoring)
                    row = NeuronScore(
                        record.neuron,
                        simulated_label(explainer, simulator) + variant,
                        metric,
                        control,
                        score,
                        () if without else held_out.samples[_source(metric)].documents,
                        explained_by=explainer,
                        simulator=simulator,
                        variant=variant,
                    )
                    yield PendingScore(row, plan if isinstance(plan, Task) else None)


def _source(metric: Metric) -> Metric:
    """Return the metric whose excerpts `metric` uses."""
    if metric in HARD_METRICS.values():
        return "detection_hard"
    return metric if metric in CORRELATIONS else "top_and_random"


def _plan(
    held_out: _HeldOut,
    explainer: str,
    variant: str,
    metric: Metric,
    control: Control,
    scoring: Scoring,
) -> Task | Score:
    record, reader = held_out.record, scoring.reader
    if record.neuron in scoring.dead_on_fit:
        return dead_score("fit")
    if record.summary.silent:
        return dead_score("held-out")
    explanation = scoring.explanations.find(record.neuron, explainer, metric, control)
    scorer = BY_METRIC.get(metric)
    if scorer is not None:
        assert reader is not None  # `ScoreConfig` rejects these metrics without one
        if isinstance(explanation, Score) and scorer.uses_explanation:
            return explanation
        text = "" if isinstance(explanation, Score) else explanation.text
        return scorer_task(scorer, record, text, control, reader.prompting)
    if isinstance(explanation, Score):
        return explanation
    sample = held_out.samples[metric]
    if reader is None:
        simulated = held_out.simulated(explanation, explainer, control)
        return sample.score_pooled(simulated[metric])
    if control == "constant":
        # levels have no unit, so there is no value for a constant simulation
        return Score(None, Status.UNDEFINED, CONSTANT)
    simulator, token_ids = reader.simulators[variant], sample.token_ids

    def grade(outcomes: Sequence[Outcome]) -> Score:
        remaining = sample.where([isinstance(o, Answer) for o in outcomes])
        if failure := too_few(outcomes, remaining.classes, sample.classes):
            return failure
        answers = [o for o in outcomes if isinstance(o, Answer)]
        score = remaining.score(simulator.simulate(explanation, remaining.token_ids, answers))
        return replace(score, n_failed=len(sample.excerpts) - len(remaining.excerpts))

    return Task(tuple(simulator.requests(explanation, token_ids)), grade)


def _is_without_excerpts(score: Score, scoring: Scoring) -> bool:
    """Return True for rows that list no documents: dead and failed ones, without a language model.

    With a language model, these rows list the documents that would have been scored on. The difference is
    kept because the audit in `summary.json` counts documents.
    """
    return scoring.reader is None and score.status in (Status.DEAD, Status.FAILED)


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
