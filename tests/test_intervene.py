"""Intervention scoring: a planted model, a judge that knows, and one that does not."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fake_llm import FakeModel
from test_steer import small_run
from tiny_run import reseal

import cratelm
from cratelm.activations.open_harvest import open_harvested
from cratelm.cli import main
from cratelm.errors import BudgetReached, InputError
from cratelm.explain.store import (  # fmt: skip
    ExplanationFailure,
    SampledNeuron,
    write_explanations,
    write_selected,
    write_unexplained,
)
from cratelm.llm.client import DryRun, WorkerResult
from cratelm.llm.requests import (
    Answer,
    Failure,
    FailureKind,
    JsonQuery,
    LogprobQuery,
    OptionLogprobs,
)
from cratelm.models import load
from cratelm.records import Explanation, NeuronId, Score, Status
from cratelm.report.sections.effects import interventions_table
from cratelm.results.side_results import read_interventions
from cratelm.runs import Run
from cratelm.score.scorers import Task
from cratelm.steer.config import InterveneConfig
from cratelm.steer.continuations import (
    CLOSE,
    continue_prompts,
    divergence,
    draw_prompts,
    log_probs,
    match_strength,
)
from cratelm.steer.edits import Edit
from cratelm.steer.intervene import InterveneResult, intervene
from cratelm.steer.judging import Pair, mass, task
from cratelm.steer.steering import steering

MODEL = "gpt2-2l"
PLANTED = {index: 40 + 7 * index for index in range(8)}
"""neurons of layer 1, and the token that each writes"""
FIELDS = {
    "model": MODEL, "judge": "hf:any", "explanations": "truth", "neurons": 0, "texts": 3, "prompt_tokens": 8,
    "generate": 10,
    "strength": 40.0, "quiet": True,
}  # fmt: skip


class Judge(FakeModel):
    """Prefers the text that holds more of the tokens between backquotes; if it does not `know`, the first."""

    name = "judge"

    def __init__(self, *, knows: bool = True, **fields):
        super().__init__(**fields)
        self.knows = knows

    def _reading(self, request: LogprobQuery) -> OptionLogprobs:
        leaning = self._more(request.context, request.body)
        log_probs = np.array(
            [[-np.log1p(np.exp(-leaning)), -np.log1p(np.exp(leaning))]], np.float32
        )
        return OptionLogprobs(log_probs, np.array([0.8], np.float32), np.array([[0, 1]], np.uint16))

    def _levels(self, asked: str, n: int, top: int) -> list[int]:
        context, _, body = asked.partition("\n\n")
        return [1 if self._more(context, body) > 0 else 2]

    def _more(self, context: str, body: str) -> float:
        if not self.knows:
            return 2.0
        wanted = re.findall("`([^`]*)`", context)
        first, second = (re.search(rf"^{n}: (.*)$", body, re.M).group(1) for n in (1, 2))  # type: ignore[union-attr]
        return float(np.clip(sum(first.count(w) - second.count(w) for w in wanted), -8, 8))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A GPT-2 whose neurons of layer 1 each write a token of their own, explained by it."""
    path = tmp_path_factory.mktemp("intervene") / "run"
    small_run(path)
    model = load(path / "model" / MODEL)
    rows = model.transformer.wte.weight.data
    with torch.no_grad():
        rows.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
        model.transformer.ln_f.weight.fill_(1)
        last = model.transformer.h[1].mlp.c_proj.weight  # [H, D]
        for index, token in PLANTED.items():  # a direction of its own, which its token alone reads
            rows[token] = 8 * torch.eye(32)[index]
            last[index] = 10 * torch.eye(32)[index]
    model.save_pretrained(path / "model" / MODEL)
    reseal(path / "model" / MODEL)
    cratelm.api.harvest(run=path, model=MODEL, tokens=2000)
    write_truth(path)
    return path


def write_truth(path: Path) -> None:
    run = Run(path)
    strings = [open_harvested(run, MODEL).store.decode_tokens([t])[0] for t in PLANTED.values()]
    neurons = [NeuronId(MODEL, "mlp", 1, index) for index in PLANTED]
    explanations = [
        Explanation(n, "truth", f"the token `{s}`", {"evidence": evidence}, ())
        for n, s in zip(neurons, strings, strict=True)
        for evidence in ("top", "anthropic")
    ]
    with run.stage("explanations", f"{MODEL}@truth").write({}, {}) as draft:
        write_explanations(draft.path, explanations)
        write_selected(draft.path, [SampledNeuron(n, False) for n in neurons])
        write_unexplained(draft.path, [])


@pytest.fixture
def run(planted, tmp_path) -> Path:
    return Path(shutil.copytree(planted, tmp_path / "run"))


@pytest.fixture
def judge(monkeypatch) -> Judge:
    made = Judge()
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: made)
    return made


def test_the_steered_model_is_on_the_device_that_is_named(run, judge):
    with pytest.raises(InputError, match=r"--device cuda:99 cannot be used"):
        intervene(InterveneConfig(run=run, model=MODEL, judge="hf:any", explanations="truth", device="cuda:99"))  # fmt: skip


def rows(result: InterveneResult) -> dict[tuple[str, int], dict]:
    found = pq.read_table(result.path / "interventions.parquet").to_pylist()
    return {(row["control"], row["index"]): row for row in found}


def asked(run: Path, **fields) -> InterveneResult:
    result = intervene(InterveneConfig(run=run, **{**FIELDS, **fields}))
    assert isinstance(result, InterveneResult)
    return result


def test_a_judge_that_knows_scores_high_and_the_nulls_at_chance(run, judge):
    result = asked(run)
    own, shuffled, random = (found.mean for found in result.controls)
    assert result.path == run / "steer" / f"{MODEL}@truth-by-judge"
    assert own.value > 0.9
    assert own.low > 0.85
    assert abs(shuffled.value - 0.5) < 0.1
    assert abs(random.value - 0.5) < 0.15
    assert result.over_shuffled.low > 0.3
    assert result.mass == pytest.approx(0.8)
    assert result.known is not None
    assert 0.5 < result.known < 1  # it reads what stands between backquotes, two pairs of five
    found = rows(result)
    assert {found["none", i]["explanation"] for i in PLANTED} == {found["shuffled", i]["explanation"] for i in PLANTED}  # fmt: skip
    for index in PLANTED:
        mine, other = found["none", index], found["random", index]
        assert found["shuffled", index]["explanation"] != mine["explanation"]
        assert other["explanation"] == mine["explanation"]
        assert mine["steered"] == index != other["steered"]
        assert mine["kl"] > 0.1
    told = str(result)
    assert "another neuron's explanation" in told
    assert json.loads((result.path / "summary.json").read_text())["n_neurons"] == 8
    texts = pq.read_table(result.path / "continuations.parquet").to_pylist()
    assert len(texts) == 8 * 3
    table = interventions_table(read_interventions(Run(run), [MODEL]))
    assert [r["mean"]["value"] for r in table.records()] == [
        own.value,
        shuffled.value,
        random.value,
    ]
    assert all(set(t) >= {"prompt", "plain", "steered", "random"} for t in texts)


def test_a_judge_that_prefers_the_first_text_is_at_chance(run, judge):
    judge.knows = False
    result = asked(run)
    assert result.known == pytest.approx(0.5, abs=1e-3)
    assert "WARNING" in str(result)
    for found in result.controls:
        assert found.mean.value == pytest.approx(0.5, abs=1e-3)
        assert found.mean.low == pytest.approx(0.5, abs=1e-3)


def test_json_where_nothing_is_read(run, judge):
    judge.supports_logprobs = False
    result = asked(run)
    assert result.controls[0].mean.value > 0.85
    assert result.mass is None


def test_strengths_are_matched(planted):
    harvested = open_harvested(Run(planted), MODEL)
    given = draw_prompts(harvested.store.split("held_out"), harvested.store.eot_id, 3, 8, 0, 1, 2)
    x = torch.from_numpy(given)
    plain = log_probs(harvested, x, None)
    target = divergence(harvested, x, 1, 2, 0.4, plain)
    for first in (0.01, 0.013, 0.017, 9.0):  # too weak, and too strong
        found = match_strength(harvested, x, 1, 3, first, target, plain)
        assert found.kl == pytest.approx(target, rel=CLOSE)
    with steering(harvested.subject.model, Edit(1, 3, set=found.value)), torch.no_grad():
        logs = harvested.subject.model(x).logits.log_softmax(-1)
    assert float((logs.exp() * (logs - plain)).sum(-1).mean()) == pytest.approx(found.kl, rel=1e-4)


def test_the_same_beginnings_and_draws(planted):
    harvested = open_harvested(Run(planted), MODEL)
    split = harvested.store.split("held_out")
    given = draw_prompts(split, harvested.store.eot_id, 3, 8, 0, 1, 2)
    assert given.shape == (3, 8)
    assert harvested.store.eot_id not in given
    assert np.array_equal(given, draw_prompts(split, harvested.store.eot_id, 3, 8, 0, 1, 2))
    assert not np.array_equal(given, draw_prompts(split, harvested.store.eot_id, 3, 8, 0, 1, 3))
    options = {"count": 6, "temperature": 1.0, "seed": 5}
    torch.manual_seed(1)
    first = continue_prompts(harvested, 1, 2, 0.0, None, given, **options)
    second = continue_prompts(harvested, 1, 2, 3.0, 4, given, **options)
    assert np.array_equal(first.plain, second.plain)
    assert first.random is None
    assert not np.array_equal(second.plain, second.steered)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the global draws are left alone
    with pytest.raises(InputError, match="--prompt-tokens"):
        draw_prompts(split, harvested.store.eot_id, 3, 10**6, 0, 1, 2)


def test_what_is_counted_and_never_scored(run, judge):
    """Dead, unexplained, failed and undefined are different."""
    folder = run / "explanations" / f"{MODEL}@truth"
    neurons = [NeuronId(MODEL, "mlp", 1, index) for index in PLANTED]
    write_selected(folder, [SampledNeuron(n, n.index == 0) for n in neurons])
    from cratelm.explain.store import read_explanations

    kept = [e for e in read_explanations(folder) if e.neuron.index > 1]
    write_explanations(folder, kept)
    write_unexplained(folder, [ExplanationFailure(neurons[1], "top", "status: 500")])
    reseal(folder)
    judge.fails = 0.1
    result = asked(run)
    found = rows(result)
    assert {found[c, 0]["status"] for c in ("none", "shuffled", "random")} == {"dead"}
    assert found["none", 1]["status"] == "failed"
    assert "500" in found["none", 1]["reason"]
    broken = [r for r in found.values() if "calls failed" in r["reason"]]
    assert broken
    assert all(r["value"] is None for r in found.values() if r["status"] != "defined")
    own = result.controls[0]
    assert own.dead == 1
    assert own.failed == 1 + sum(r["control"] == "none" for r in broken)
    assert own.defined + own.failed + own.dead + own.undefined == 8
    assert own.mean.n == own.defined
    judge.fails = 0.0
    again = asked(run, retry_failed=True)
    assert again.controls[0].failed == 1  # there is still no explanation of neuron 1


def test_nothing_changed_is_undefined():
    made = task("`x`", [Pair("same", "same")], supports_logprobs=True, seed=0)
    assert isinstance(made, Score)
    assert made.status == Status.UNDEFINED
    made = task("`x`", [Pair("same", "same"), Pair("a", "b")], supports_logprobs=True, seed=0)
    assert isinstance(made, Task)
    assert len(made.requests) == 2


def test_both_orders_and_no_half_answers():
    made = task("a `b`\nMore of it:", [Pair("plain\n", "steered")], supports_logprobs=True, seed=0)
    assert isinstance(made, Task)
    first, second = made.requests
    assert isinstance(first, LogprobQuery)
    assert isinstance(second, LogprobQuery)
    assert "1: steered\n2: plain\\n\n" in first.body
    assert "1: plain\\n\n2: steered\n" in second.body
    assert first.context == "Description: a `b` More of it:\n"
    assert first.text[first.offsets[0] - 1] == "\n"

    def answer(p):
        return Answer(OptionLogprobs(np.log([[p, 1 - p]]).astype(np.float32), np.array([0.5], np.float32)), 1, 1)  # fmt: skip

    assert made.grade([answer(0.9), answer(0.3)]).value == pytest.approx((0.9 + 0.7) / 2)
    assert made.grade([answer(0.9), answer(0.9)]).value == pytest.approx(0.5)
    assert made.grade([answer(0.9), Failure(FailureKind.EMPTY, "no")]).status == Status.FAILED
    assert mass([answer(0.9), Failure(FailureKind.EMPTY, "no")]) == [0.5]
    asked_json = task("x", [Pair("a", "b")], supports_logprobs=False, seed=0)
    assert isinstance(asked_json, Task)
    assert all(
        isinstance(r, JsonQuery) and (r.n, r.low, r.high) == (1, 1, 2) for r in asked_json.requests
    )
    assert asked_json.grade([Answer((1,), 1, 1), Answer((1,), 1, 1)]).value == 0.5


def test_planned_sharded_bounded_and_continued(run, judge):
    planned = intervene(InterveneConfig(run=run, dry_run=True, **FIELDS))
    assert isinstance(planned, DryRun)
    assert planned.calls == planned.requests > 0
    assert not judge.asked
    with pytest.raises(BudgetReached):
        asked(run, max_calls=20)
    assert not (run / "steer").exists()
    shards = [intervene(InterveneConfig(run=run, shard=f"{i}/2", **FIELDS)) for i in (0, 1)]
    assert all(isinstance(s, WorkerResult) for s in shards)
    before = sum(judge.asked.values())
    whole = asked(run)
    assert sum(judge.asked.values()) == before  # the shards had asked all
    assert "0 calls" in whole.calls
    offline = asked(run, offline=True, force=True)
    assert replace(offline, calls="") == replace(whole, calls="")


def test_promoted_tokens_as_explanations(run, judge):
    cratelm.api.effects(run=run, model=MODEL, only=tuple(f"1:{i}" for i in PLANTED), tokens=200, positions=4, quiet=True)  # fmt: skip
    result = asked(run, explanations="promoted")
    assert result.explainer == "promoted"
    assert result.controls[0].mean.value > result.controls[1].mean.value
    assert result.path.name == f"{MODEL}@promoted-by-judge"


def test_the_explanations_made_without_a_model(run, judge):
    cratelm.api.explain(run=run, model=MODEL, neurons=3, quiet=True)
    result = asked(run, explanations="llm-free", explainer="trie", neurons=2)
    assert (result.explainer, result.n_neurons) == ("trie", 4)
    assert result.path.name == f"{MODEL}@judge"
    assert asked(run, explanations="llm-free", neurons=2, name="mine").explainer == "concepts"


def test_mistakes(run, judge, capsys):
    shared = ["intervene", "--run", str(run), "--model", MODEL, "--quiet"]
    for arguments, told in (
        ([], "--judge is missing"),
        (["--judge", "nothing"], "hf:ID_OR_PATH"),
        (["--judge", "hf:x", "--explanations", "nobody"], "truth"),
        (["--judge", "hf:x"], "called llm-free"),
        (["--judge", "hf:x", "--explanations", "truth", "--explainer", "no"], "--explainer no"),
        (["--judge", "hf:x", "--explanations", "truth", "--only", "0:1"], "--only 0:1"),
        (["--judge", "hf:x", "--explanations", "truth", "--generate", "900"], "give lower numbers"),
        (["--judge", "hf:x", "--strength", "0"], "--strength"),
        (["--judge", "hf:x", "--explanations", "promoted"], "type `cratelm effects"),
    ):
        assert main([*shared, *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_a_judge_that_fails_every_call_writes_nothing(run, judge):
    """The calls about made-up pairs, which are answered, do not count."""
    asked(run, only=("1:0",), name="one")  # those answers are in the ledger
    shutil.rmtree(run / "steer")
    judge.fails = 1.0
    others = {"only": ("1:6", "1:7")}
    with pytest.raises(InputError, match=r"all [\d,]+ calls to judge failed, .*status 500"):
        asked(run, **others)
    assert not (run / "steer").exists()
    judge.fails = 0.0
    assert asked(run, **others).controls[0].defined == 2
