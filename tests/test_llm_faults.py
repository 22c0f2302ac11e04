"""Explaining and scoring through a real local server that fails in every way: no run dies, no failure is a score."""

import subprocess
import sys
from pathlib import Path

import planted
import pytest
from llm_server import MODEL, Fault, LLMServer, storm

from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations, read_unexplained
from cratelm.records import SIMULATION_METRICS, Metric, Status
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_scores

SECRET = "sk-very-secret-0123456789"
SOME: tuple[Metric, ...] = ("top_and_random", "detection", "embedding")
FAULTS = [f for f in Fault if f not in (Fault.STALL, Fault.DRIBBLE)]
"""those that take no waiting; the two others are met one by one in the tests of the backend"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    return planted.run_with_harvest(tmp_path / "run", n_neurons=5, layers=1).path


def asked(run: Path, server: LLMServer, **fields):
    return {
        "run": run, "model": "m", "base_url": server.base_url, "quiet": True, "retries": 3,
        "deadline": 20.0, **fields,
    }  # fmt: skip


def explained(run: Path, server: LLMServer, **fields):
    return explain(ExplainConfig(explainer=f"openai:{MODEL}", **asked(run, server, **fields)))


def scored(run: Path, server: LLMServer, **fields):
    fields = {"resamples": 100, "method": "logprobs", **fields}
    return score(ScoreConfig(simulator=f"openai:{MODEL}", **asked(run, server, **fields)))


@pytest.mark.parametrize("method", ["logprobs", "json"])
def test_a_storm_of_faults_gives_what_a_calm_server_gives_less_what_is_counted(run, method):
    with LLMServer(storm(0.3, FAULTS), seed=3) as server:
        result = explained(run, server, method=method)
        unexplained = read_unexplained(result.path)
        assert result.n_explanations + len(unexplained) == 8
        done = scored(run, server, method=method, metrics=SOME)
        found = read_scores(done.path)
        assert len(found) == 5 * (3 + 2 + 2)
        for s in found:
            assert (s.score.value is None) == (s.score.status != Status.DEFINED)
        failed = [s for s in found if s.score.status == Status.FAILED]
        assert failed
        assert all(s.score.reason for s in failed)
        # again and again until nothing fails: what succeeded is never asked for twice
        for _ in range(12):
            explained(run, server, method=method, retry_failed=True)
            done = scored(run, server, method=method, metrics=SOME, retry_failed=True, force=True)
            if not (done.n_failed or done.n_lost):
                break
        assert (done.n_failed, done.n_lost) == (0, 0)
        # each command asks anew in which way the server reads label probabilities: one call, which no ledger keeps
        repeated = [n for n in server.answered.values() if n > 1]
        assert len(repeated) == (1 if method == "logprobs" else 0)
        after_storm = {_name(s): s.score for s in read_scores(done.path)}
        texts = [vars(e) for e in read_explanations(result.path)]
    other = planted.run_with_harvest(run.parent / "calm", n_neurons=5, layers=1).path
    with LLMServer(seed=3) as calm:
        assert [
            vars(e) for e in read_explanations(explained(other, calm, method=method).path)
        ] == texts
        path = scored(other, calm, method=method, metrics=SOME).path
        assert {_name(s): s.score for s in read_scores(path)} == after_storm


def _name(s):
    return (s.neuron, s.metric, s.control)


def test_the_key_is_in_no_file(run):
    with LLMServer(storm(0.3, FAULTS), seed=1, key=SECRET) as server:
        explained(run, server)
        scored(run, server, metrics=SIMULATION_METRICS[:1])
        files = [p for p in run.rglob("*") if p.is_file()]
        assert len(files) > 20
        assert not [p for p in files if SECRET.encode() in p.read_bytes()]


def test_a_server_that_is_not_there_is_one_line(run):
    with LLMServer() as server:
        url = server.base_url
    command = [
        *(sys.executable, "-m", "cratelm", "explain", "--run", str(run), "--model", "m"),
        *(
            "--explainer",
            f"openai:{MODEL}",
            "--base-url",
            url,
            "--retries",
            "0",
            "--method",
            "json",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cratelm explain:")
    assert "cannot be reached" in last
    assert SECRET not in done.stdout + done.stderr
    assert not (run / "explanations").exists()
