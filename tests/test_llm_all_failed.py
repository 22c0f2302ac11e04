"""A command whose every call failed: one line and an exit status, no stage, and the next command asks again."""

from pathlib import Path

import planted
import pytest
from fake_llm import FakeModel
from llm_server import MODEL, Fault, LLMServer, always

from cratelm.cli import main
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations
from cratelm.llm.backends import openai as server_module
from cratelm.llm.ledger import Ledger
from cratelm.llm.requests import Chat
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score

ASK = {"model": "m", "quiet": True}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return planted.run_with_harvest(tmp_path / "run", n_neurons=5, layers=1).path


@pytest.fixture
def model(monkeypatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)
    return fake


def explained(run: Path, **fields):
    return explain(ExplainConfig(run=run, explainer="hf:any", **ASK, **fields))


def scored(run: Path, **fields):
    return score(ScoreConfig(run=run, simulator="hf:any", resamples=100, **ASK, **fields))


def typed(run: Path, verb: str, option: str, capsys) -> tuple[int, str]:
    status = main([verb, "--run", str(run), "--model", "m", option, "hf:any", "--quiet"])
    return status, capsys.readouterr().err


@pytest.mark.fault(
    "every call of `explain` fails",
    "exit status 2, one line with the count and the first reason, no stage; asked again by the same command",
)
def test_explain(run, model, capsys):
    model.fails = 1.0
    for n in (1, 2):  # the second time they are asked again, and fail again
        status, error = typed(run, "explain", "--explainer", capsys)
        assert status == 2
        assert error.count("\n") == 1
        assert "all 8 calls to fake failed, the first with status: status 500" in error
        assert "type the same command again" in error
        assert not (run / "explanations").exists()
        assert set(model.asked.values()) == {n}
    model.fails = 0.0
    assert typed(run, "explain", "--explainer", capsys)[0] == 0
    assert set(model.asked.values()) == {3}
    assert len(read_explanations(run / "explanations/m@fake")) == 8
    with Ledger(run / "ledger.sqlite") as ledger:  # failed calls stay on the bill
        assert ledger.bill("fake", (0, 0)).calls == 3 * 8


SHORT = {"metrics": ("top_and_random",)}


@pytest.mark.fault(
    "every call of `score` fails",
    "exit status 2, one line with the count and the first reason, no stage; asked again by the same command",
)
def test_score(run, model):
    explained(run)
    model.answer = AnswersProbes().answer
    with pytest.raises(
        InputError, match=r"all \d+ calls to fake failed, the first with status: st"
    ):
        scored(run, **SHORT)
    assert not (run / "scores").exists()
    del model.answer
    assert scored(run, **SHORT).n_failed == 0
    model.fails = 1.0  # what was answered for other scores counts
    assert scored(run, metrics=("top_and_random", "detection"), name="other").n_failed > 0


class AnswersProbes(FakeModel):
    """And no other request."""

    def answer(self, requests):
        is_probe = "animals" in requests[0].context  # type: ignore[union-attr]
        self.fails = 0.0 if is_probe else 1.0
        yield from super().answer(requests)


def test_the_old_result_stays_until_there_is_a_new_one(run, model):
    explained(run)
    before = read_explanations(run / "explanations/m@fake")
    model.fails = 1.0
    with pytest.raises(InputError, match="all 8 calls"):
        explained(run, force=True, temperature=1.0)
    assert [vars(e) for e in read_explanations(run / "explanations/m@fake")] == [
        vars(e) for e in before
    ]


def test_one_answer_is_enough(run, model):
    """As before: the others are counted, and `--retry-failed` repeats them."""
    model.fails = 0.95
    result = explained(run)
    assert 0 < result.n_explanations < result.n_failed
    n = sum(model.asked.values())
    explained(run, name="again")
    assert sum(model.asked.values()) == n


def test_failures_of_an_earlier_command_count_too(run, model):
    model.fails = 1.0
    model.dies_after = 6
    with pytest.raises(KeyboardInterrupt):
        explained(run)
    model.dies_after = -1
    with pytest.raises(InputError, match="all 8 calls"):
        explained(run)
    assert sum(model.asked.values()) == 8
    with pytest.raises(InputError, match="--offline: 8 answers"):
        explained(run, offline=True)


def test_a_worker_fails_too_and_its_calls_are_asked_again_by_the_command_that_merges(run, model):
    model.fails = 1.0
    for _ in range(2):
        with pytest.raises(InputError, match="all 8 calls to fake failed"):
            explained(run, shard="0/1")
    model.fails = 0.0
    model.asked.clear()
    assert explained(run).n_explanations == 8
    assert sum(model.asked.values()) == 8


def test_answers_without_a_word_are_no_explanations(run, model):
    class Mute(FakeModel):
        def _value(self, request):
            return "..." if isinstance(request, Chat) else super()._value(request)

    model._value = Mute()._value
    with pytest.raises(InputError, match="none of the 8 answers of fake is an explanation"):
        explained(run)
    assert not (run / "explanations").exists()


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.REFUSAL, Fault.TRUNCATED, Fault.EMPTY])
def test_a_server_that_fails_every_call_is_named(run, fault, capsys, monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    with LLMServer(always(fault)) as server:
        command = ["explain", "--run", str(run), "--model", "m", "--explainer", f"openai:{MODEL}"]
        options = ["--base-url", server.base_url, "--retries", "1", "--quiet"]
        assert main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert server.base_url.removeprefix("http://") in error
        assert "all 8 calls to tiny at" in error
        server.faults = None
        assert main([*command, *options]) == 0


@pytest.mark.parametrize("method", ["auto", "json", "logprobs"])
@pytest.mark.parametrize("verb", ["explain", "score"])
@pytest.mark.fault("there is no server", "one line with its address")
def test_no_server_is_one_line_with_its_address(run, verb, method, capsys, monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.02)
    option = "--explainer" if verb == "explain" else "--simulator"
    with LLMServer() as server:
        url = server.base_url
        words = ["--run", str(run), "--model", "m", "--base-url", url, "--quiet", "--retries", "1"]
        if verb == "score":
            assert main(["explain", *words, "--explainer", f"openai:{MODEL}"]) == 0
    capsys.readouterr()
    assert main([verb, *words, option, f"openai:{MODEL}", "--method", method]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{url.removeprefix('http://')} cannot be reached" in error
    assert "--base-url" in error
    assert not (run / ("explanations" if verb == "explain" else "scores")).exists()


def test_a_server_that_goes_away_after_its_probe_is_named(run, capsys, monkeypatch):
    """It answers the 14 calls about how it splits levels, and no other."""
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.02)
    with LLMServer() as server:
        words = ["--run", str(run), "--model", "m", "--base-url", server.base_url, "--quiet"]
        assert main(["explain", *words, "--explainer", f"openai:{MODEL}"]) == 0
        most = len(server.calls) + 14
        server.faults = lambda seed, call: Fault.DROP if len(server.calls) > most else None
        words += ["--retries", "1", "--metrics", "top_and_random", "--simulator", f"openai:{MODEL}"]
        for _ in range(2):
            assert main(["score", *words]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert server.base_url.removeprefix("http://") in error
            assert not (run / "scores").exists()
        server.faults = None
        assert main(["score", *words]) == 0
    assert "failed" not in (run / "scores/m@tiny/calls.json").read_text().replace(
        '"failed": {}', ""
    )
