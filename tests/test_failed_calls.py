"""Failed calls cost a score their excerpts; too many of them, or all of one kind, cost the score."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from planted import STRINGS, corpus, harvested, on_pair
from tiny_run import reseal

from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.llm.requests import Failure, FailureKind, Outcome
from cratelm.records import Explanation, Metric, NeuronRecord, Status
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import ExplanationSet
from cratelm.score.pipeline import Reader, Scoring, Task, plan_scores
from cratelm.score.score import score
from cratelm.score.scorers import Prompting
from cratelm.score.selection import scored_on
from cratelm.score.simulators import LLMSimulator
from cratelm.score.store import read_scores

RECORD = harvested(on_pair(corpus("held_out")[0], 1, 2), "held_out")
GONE = Failure(FailureKind.STATUS, "status 500")
METRICS: tuple[Metric, ...] = ("top_and_random", "random_only", "anthropic")


def task(record: NeuronRecord, metric: Metric) -> Task:
    """The task that simulates the excerpts of `metric` from the name of the neuron's token."""
    text = Explanation(record.neuron, "fake", "the token ` import`", {}, ())
    reader = Reader("fake", {"": LLMSimulator(STRINGS, True, 9, 10)}, Prompting(STRINGS, True, 0))
    explanations = ExplanationSet([text], [], 0)
    scoring = Scoring(
        (metric,), ("fake",), explanations, (), lambda e: np.zeros(len(e), bool), reader
    )
    (pending,) = (p for p in plan_scores(record, scoring) if p.row.control == "none")
    assert pending.task is not None
    return pending.task


def outcomes(asked: Task, lost: set[int]) -> list[Outcome]:
    answered = [outcome for ((_, outcome),) in FakeModel().answer(asked.requests)]
    return [GONE if i in lost else outcome for i, outcome in enumerate(answered)]


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_is_that_of_the_excerpts_left(metric):
    lost = {0, 4}
    gone = {(e.kind, e.position) for i, e in enumerate(scored_on(RECORD, metric)) if i in lost}
    kept = [e for e in RECORD.excerpts if (e.kind, e.position) not in gone]
    asked = task(RECORD, metric)
    score = asked.grade(outcomes(asked, lost))
    assert (score.status, score.n_failed) == (Status.DEFINED, 2)
    assert score.n_records == len(asked.requests) - 2
    if metric == "top_and_random":  # further ones do not take their places
        part = task(replace(RECORD, excerpts=kept), metric)
        assert replace(score, n_failed=0) == part.grade(outcomes(part, set()))
    whole = asked.grade(outcomes(asked, set()))
    assert (whole.n_failed, whole.n_records) == (0, len(asked.requests))
    assert whole.value != score.value


@pytest.mark.fault(
    "some calls of a score fail",
    "their excerpts are left out and counted; without half of the excerpts and one of each kind the score is `failed`",
)
@pytest.mark.parametrize(
    ("metric", "lost", "enough"),
    [
        ("top_and_random", {0, 1, 2, 3, 9}, True),
        ("top_and_random", {0, 1, 2, 3, 8, 9}, False),  # below half
        ("top_and_random", {0, 1, 2, 3, 4}, False),  # no top excerpt is left
        ("top_and_random", {5, 6, 7, 8, 9}, False),  # no random excerpt
        ("random_only", {0, 1}, True),
        ("random_only", {0, 1, 2}, False),
    ],
)
def test_half_of_the_excerpts_and_one_of_each_kind_must_be_left(metric, lost, enough):
    asked = task(RECORD, metric)
    score = asked.grade(outcomes(asked, lost))
    assert (score.status == Status.FAILED) == (not enough)
    assert score.n_failed == len(lost)
    if not enough:
        n, total = len(lost), len(asked.requests)
        assert score.reason == f"{n} of {total} calls failed, the first: status: status 500"
        assert (score.value, score.n_records) == (None, 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return planted.run_with_harvest(tmp_path / "run", n_neurons=5, layers=1).path


def test_counts_are_reported_and_the_calls_repeated(run, monkeypatch):
    model = FakeModel()
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: model)

    def scored(**fields):
        return score(
            ScoreConfig(
                run=run,
                model="m",
                quiet=True,
                simulator="hf:any",
                resamples=100,
                metrics=("top_and_random", "detection"),
                **fields,
            )
        )

    explain(ExplainConfig(run=run, model="m", quiet=True, explainer="hf:any"))
    model.fails = 0.03
    result = scored()
    rows = read_scores(result.path)
    lost = {(s.metric, s.control): 0 for s in rows}
    for s in rows:
        lost[s.metric, s.control] += s.score.n_failed
    assert result.n_failed == 0
    assert result.n_lost == sum(lost.values()) > 0
    assert f"{result.n_lost} excerpts left out of scores (--retry-failed" in str(result)
    written = json.loads((result.path / "summary.json").read_text())["lost_excerpts"]
    assert {(r["metric"], r["control"]): r["n_excerpts"] for r in written} == {
        key: n for key, n in lost.items() if n
    }
    for metric in ("top_and_random", "detection"):
        n = lost[metric, "none"]
        assert (f"{n} excerpts left out" in result.means[f"fake {metric}"]) == (n > 0)
    assert scored().means == result.means  # finished: by itself nothing is repeated
    model.fails = 0.0
    again = scored(retry_failed=True)
    assert (again.n_failed, again.n_lost) == (0, 0)
    assert "left out" not in str(again)
    table = pq.read_table(again.path / "scores.parquet")
    pq.write_table(table.drop_columns(["n_failed"]), again.path / "scores.parquet")
    reseal(again.path)
    assert [s.score.n_failed for s in read_scores(again.path)] == [0] * len(table)  # earlier files
