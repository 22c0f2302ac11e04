"""`cratelm explain` and `cratelm score` with a language model, on planted neurons and a made-up model."""

import gzip
import importlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from tiny_run import reseal

from cratelm.errors import BudgetReached, InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.store import read_explanations, read_selected, read_unexplained
from cratelm.interop.config import ExportNeuronpediaConfig
from cratelm.interop.neuronpedia import export_neuronpedia
from cratelm.llm.client import DryRun, WorkerResult
from cratelm.llm.requests import LogprobQuery, OptionLogprobs
from cratelm.records import METRICS, SIMULATION_METRICS, Metric, Status
from cratelm.runs import Run
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.score.store import read_scores

ASK = {"model": "m", "quiet": True}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return planted.run_with_harvest(tmp_path / "run", n_neurons=8).path


@pytest.fixture
def model(monkeypatch) -> FakeModel:
    """The language model that every specification names."""
    fake = FakeModel()
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: fake)
    return fake


def explained(run: Path, **fields):
    return explain(ExplainConfig(run=run, explainer="hf:any", **ASK, **fields))


def scored(run: Path, **fields):
    return score(ScoreConfig(run=run, simulator="hf:any", resamples=100, **ASK, **fields))


def values(path: Path, metric: str, control: str = "none", explainer: str = "fake") -> dict:
    wanted = (metric, control, explainer)
    return {
        (s.neuron.layer, s.neuron.index): s.score
        for s in read_scores(path)
        if (s.metric, s.control, s.explainer) == wanted
    }


def test_every_live_neuron_is_explained_from_both_kinds_of_evidence(run, model):
    result = explained(run)
    found = read_explanations(result.path)
    assert result.path.name == "m@fake"
    assert (result.n_neurons, result.n_dead, result.n_explanations) == (16, 2, 28)
    assert {e.payload["evidence"] for e in found} == {"top", "anthropic"}
    # neurons from 3 on fire on one token: the fake names the one that was marked most
    texts = {(e.neuron.layer, e.neuron.index): e.text for e in found}
    assert texts[0, 5] == "the token ` w5`"
    assert len(read_selected(result.path)) == 16
    assert all(d % 2 == 0 for e in found for d in e.documents)  # the fit split's are even


def test_right_explanations_score_high_and_others_near_zero(run, model):
    explained(run)
    result = scored(run, metrics=METRICS)
    for metric in SIMULATION_METRICS:
        own, null = values(result.path, metric), values(result.path, metric, "shuffled")
        for index in range(3, 8):
            assert own[0, index].value > 0.97
            assert abs(null[0, index].value or 0) < 0.2
        assert own[0, 0].status == Status.DEAD
        assert {s.status for s in values(result.path, metric, "constant").values()} <= {
            Status.DEAD, Status.UNDEFINED,
        }  # fmt: skip
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary["leakage_audit"]["shared"] == []
    assert summary["preflight"]["top_level"] == 9  # the fake splits "10"
    assert {s["metric"] for s in summary["statistics"]} == set(METRICS)
    assert json.loads((result.path / "calls.json").read_text())["failed"] == {}


def test_nothing_is_asked_twice_and_redoing_asks_nothing(run, model):
    explained(run)
    scored(run)
    assert set(model.asked.values()) == {1}  # random excerpts that two metrics share, too
    n = sum(model.asked.values())
    first = read_scores(run / "scores/m@fake")
    explained(run, force=True)
    scored(run, force=True)
    assert sum(model.asked.values()) == n
    assert read_scores(run / "scores/m@fake") == first


def test_finished_stages_are_skipped_and_the_free_ones_are_beside(run, model, capsys):
    explain(ExplainConfig(run=run, **ASK))
    explained(run)
    explained(run)
    assert "explanations/m@fake is finished" in capsys.readouterr().out
    score(ScoreConfig(run=run, resamples=100, **ASK))
    scored(run)
    assert sorted(p.name for p in (run / "scores").iterdir()) == ["m", "m@fake"]


def test_the_inputs_that_explain_is_given_stay_as_they_are(run, model):
    room = importlib.import_module("cratelm.explain.explain")
    harvest = Run(run).stage("activations", "m")
    inputs = {"tokens": "t", "activations": harvest.require("harvest")}
    before = dict(inputs)
    config = ExplainConfig(run=run, explainer="hf:any", only=("0:5",), **ASK)
    selected = room.select_neurons(harvest.path, 0, 0, config.only)
    result = room._explain_with_llm(config, Run(run), inputs, selected)
    assert inputs == before
    done = Run(run).stage("explanations", "m@fake").require("explain")
    assert set(done.inputs) == {"tokens", "activations", "prompts"}
    assert result.n_neurons == 1


def test_a_killed_command_goes_on_from_the_ledger(run, model):
    explained(run)
    model.asked.clear()
    model.dies_after = 100
    with pytest.raises(KeyboardInterrupt):
        scored(run)
    assert not (run / "scores" / "m@fake").exists()
    model.dies_after = -1
    scored(run)
    assert set(model.asked.values()) == {1}


def test_limits_stop_cleanly_and_resume(run, model):
    with pytest.raises(BudgetReached, match="--max-calls 5"):
        explained(run, max_calls=5)
    assert not (run / "explanations" / "m@fake").exists()
    assert sum(model.asked.values()) == 5
    assert explained(run).n_explanations == 28
    assert set(model.asked.values()) == {1}


def test_a_dry_run_asks_and_writes_nothing_and_counts_right(run, model):
    planned = explained(run, dry_run=True)
    assert isinstance(planned, DryRun)
    assert (planned.calls, sum(model.asked.values())) == (14, 0)  # the two layers are alike
    assert not (run / "explanations" / "m@fake").exists()
    explained(run)
    n = sum(model.asked.values())
    planned = scored(run, dry_run=True)
    n = sum(model.asked.values())  # the preflight's two
    assert not (run / "scores" / "m@fake").exists()
    scored(run)
    assert sum(model.asked.values()) - n == planned.calls


def test_failed_calls_are_counted_never_scored_and_retried_when_asked(run, model, capsys):
    model.fails = 0.2
    result = explained(run)
    lost = read_unexplained(result.path)
    assert 0 < result.n_failed == len(lost) < 28
    assert lost[0].reason == "status: status 500"
    model.fails = 0.02
    explained(run)
    assert "skipped" in capsys.readouterr().out  # failures are no reason to ask again by itself
    done = scored(run)
    top = {(f.neuron.layer, f.neuron.index) for f in lost if f.evidence == "top"}
    for place, found in values(done.path, "top_and_random").items():
        assert (found.value is None) == (found.status != Status.DEFINED)
        if place in top:
            assert found.status == Status.FAILED
            assert "no explanation by fake: status: status 500" in found.reason
    assert done.n_failed > len(top)
    anthropic = values(done.path, "anthropic").values()
    assert any(s.n_failed for s in anthropic if s.status == Status.DEFINED)
    model.fails = 0.0
    assert explained(run, retry_failed=True).n_failed == 0
    assert scored(run, retry_failed=True, force=True).n_failed == 0


class ReadsTexts(FakeModel):
    """It says yes where a text contains, or marks, the token that the explanation names."""

    def _reading(self, request):
        (wanted,) = re.findall("`([^`]*)`", request.context)
        (text,) = re.findall("^Text: (.*)$", request.body, flags=re.M)
        is_there = (f"«{wanted}»" if "«" in text else wanted) in text
        return OptionLogprobs(np.log(np.array([[0.9, 0.1][:: 1 - 2 * is_there]], np.float32)))


def test_hard_negatives_are_reported_next_to_random_ones_with_the_difference(run, model):
    """Neuron 1 fires on a token after another, and its explanation names the token: chance on hard negatives.

    The other neurons fire on each occurrence of a token, so that they have no hard negatives.
    """
    explained(run)
    plain = model._value
    reads = ReadsTexts()._reading
    model._value = lambda request: (
        reads(request)
        if isinstance(request, LogprobQuery) and "Text: " in request.body
        else plain(request)
    )
    metrics: tuple[Metric, ...] = ("detection", "detection_hard", "fuzzing", "fuzzing_hard")
    result = scored(run, metrics=metrics)
    summary = json.loads((result.path / "summary.json").read_text())["hard_negatives"]
    for metric, row in zip(("detection", "fuzzing"), summary, strict=True):
        random, hard = (values(result.path, m) for m in (metric, f"{metric}_hard"))
        assert hard[0, 1].value == hard[1, 1].value == 0.5
        assert random[0, 1].value > 0.5
        assert hard[0, 5].reason == "0 hard negatives, but 3 are needed"
        difference = 100 * np.mean([0.5 - random[layer, 1].value for layer in (0, 1)])
        n_random = sum(s.value is not None for s in random.values())
        counts = {"defined": 2, "undefined": n_random - 2}
        assert row["metric"] == metric
        assert row["difference"]["mean"]["value"] == pytest.approx(difference)
        assert {name: row["difference"][name] for name in counts} == counts
        line = f"fake {metric}, hard - random {difference:+.1f} with hard negatives, paired over 2"
        assert line in " ".join(str(result).split())
    documents = {
        s.metric: s.documents
        for s in read_scores(result.path)
        if (s.neuron.key, s.control) == ((0, 1), "none")
    }
    assert documents["detection_hard"] == documents["fuzzing_hard"] != documents["detection"]


def test_metrics_with_hard_negatives_leave_the_requests_of_the_others_as_they_are(run, model):
    explained(run)
    few: tuple[Metric, ...] = ("detection", "fuzzing")
    scored(run, metrics=few, name="few")
    before = Counter(model.asked)
    hard: tuple[Metric, ...] = ("detection_hard", "fuzzing_hard")
    scored(run, metrics=(*few, *hard), name="all")
    assert all(model.asked[request] == n for request, n in before.items())
    assert len(model.asked) > len(before)


def test_shards_fill_ledgers_of_their_own_and_merge_into_the_same_files(run, model, tmp_path):
    explained(run)
    scored(run)
    whole = [read_explanations(run / "explanations/m@fake"), read_scores(run / "scores/m@fake")]
    other = planned_again(tmp_path / "other")
    for shard in ("0/3", "2/3", "1/3"):
        assert isinstance(explained(other, shard=shard), WorkerResult)
    model.asked.clear()
    explained(other)
    assert not model.asked
    for shard in ("1/2", "0/2"):
        scored(other, shard=shard)
    model.asked.clear()
    scored(other)
    assert sum(model.asked.values()) == 0
    found = read_explanations(other / "explanations/m@fake")
    assert [vars(e) for e in found] == [vars(e) for e in whole[0]]
    assert read_scores(other / "scores/m@fake") == whole[1]


def planned_again(path: Path) -> Path:
    return planted.run_with_harvest(path, n_neurons=8).path


def test_rescoring_offline_needs_no_model(run, model, monkeypatch):
    explained(run)
    scored(run)
    first = read_scores(run / "scores/m@fake")

    def no_model(config, specification):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("cratelm.llm.session._backend", no_model)
    scored(run, offline=True, force=True)
    assert read_scores(run / "scores/m@fake") == first
    with pytest.raises(InputError, match=r"--offline: [\d,]+ answers"):
        scored(run, offline=True, force=True, metrics=("detection",))
    with pytest.raises(InputError, match="has no answers of hf:other"):
        explain(ExplainConfig(run=run, explainer="hf:other", offline=True, **ASK))


def test_the_paper_variant_stands_beside_ours(run, model):
    explained(run)
    result = scored(run, paper_compat=True, metrics=("top_and_random",))
    ours, theirs = (
        values(result.path, "top_and_random", explainer=e) for e in ("fake", "fake+paper-compat")
    )
    assert ours.keys() == theirs.keys()
    assert theirs[0, 5].value > 0.97


def test_a_model_without_log_probabilities_is_asked_for_json(run, model):
    model.supports_logprobs = False
    explained(run)
    result = scored(run, metrics=METRICS)
    assert values(result.path, "top_and_random")[0, 5].value > 0.97
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary["preflight"] == {
        "reads": False, "top_level": 10, "tokens_of_ten": None, "mass": None, "lowest_mass": None,
        "reason": "", "way": "",
    }  # fmt: skip
    with pytest.raises(InputError, match="--paper-compat needs log-probabilities"):
        scored(run, paper_compat=True, name="other")


def test_phrases_made_without_a_model_can_be_read_by_one(run, model):
    explain(ExplainConfig(run=run, **ASK))
    result = scored(run, explanations="llm-free", metrics=("top_and_random",))
    assert result.path.name == "m@llm-free-by-fake"
    found = read_scores(result.path)
    names = ("lookup", "trie", "concepts")
    assert {s.explainer for s in found} == {f"{name}/fake" for name in names}
    assert {(s.explained_by, s.simulator, s.variant) for s in found} == {
        (name, "fake", "") for name in names
    }


def test_scores_by_another_model_are_exported_to_neuronpedia(run, model, tmp_path):
    explain(ExplainConfig(run=run, **ASK))
    explained(run, name="mine")  # a name of its own: the reader goes by another
    for explanations in ("llm-free", "mine"):
        scored(run, explanations=explanations, metrics=("top_and_random", "intruder"))
    result = export_neuronpedia(
        ExportNeuronpediaConfig(run=run, model="m", out=tmp_path / "out", quiet=True)
    )
    folders = [run / "scores" / f"m@{name}" for name in ("llm-free-by-fake", "mine-by-fake")]
    own = [s for f in folders for s in read_scores(f) if s.control == "none"]
    with_value = [s for s in own if s.score.value is not None]
    rows = [
        json.loads(line)
        for path in (tmp_path / "out").rglob("explanation-scores/*.gz")
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    found = sorted((json.loads(r["jsonDetails"])["explainer"], r["value"]) for r in rows)
    of_dead = [s for s in own if s.score.status == Status.DEAD]
    assert {label for label, _ in found} == {"lookup/fake", "trie/fake", "concepts/fake", "mine/fake"}  # fmt: skip
    assert found == sorted((s.explainer, s.score.value) for s in with_value)
    assert (result.scores, result.without_value) == (len(with_value), len(own) - len(with_value))
    assert of_dead


def test_score_files_of_version_0_1_0_are_read(run, model):
    """They have the label alone."""
    explain(ExplainConfig(run=run, **ASK))
    path = scored(run, explanations="llm-free", metrics=("top_and_random",)).path
    found = read_scores(path)
    table = pq.read_table(path / "scores.parquet")
    old = table.drop_columns(["explained_by", "simulator", "variant"])
    pq.write_table(old, path / "scores.parquet")
    reseal(path)
    assert read_scores(path) == found
    labels = ["mine", "mine+paper-compat", "mine/other+paper-compat"]
    place = old.schema.get_field_index("explainer")
    pq.write_table(
        old.slice(0, 3).set_column(place, "explainer", [labels]), path / "scores.parquet"
    )
    reseal(path)
    assert [(s.explained_by, s.simulator, s.variant) for s in read_scores(path)] == [
        ("mine", "", ""),
        ("mine", "", "+paper-compat"),
        ("mine", "other", "+paper-compat"),
    ]


def test_a_list_of_neurons_and_a_sample(run, model):
    result = explained(run, only=("1:3", "0:5"))
    assert [(s.neuron.layer, s.neuron.index) for s in read_selected(result.path)] == [
        (0, 5),
        (1, 3),
    ]
    with pytest.raises(InputError, match=r"--only 0:99: .* layers 0, 1 of 8 neurons"):
        explained(run, only=("0:99",), name="x")
    sample = explained(run, neurons=3, name="sample")
    assert sample.path.name == "m@sample"
    assert sample.n_neurons == 6


def test_contrast_excerpts_are_shown_and_audited(run, model):
    plain = explained(run, name="plain", only=("0:5",))
    with_silent = explained(run, name="silent", only=("0:5",), contrast=3)
    before, after = (read_explanations(r.path)[0].documents for r in (plain, with_silent))
    assert set(before) < set(after)
    assert sum(model.asked.values()) == 4


def test_missing_explanations_say_what_there_is(run, model):
    explained(run, name="mine")
    with pytest.raises(InputError, match="name one of mine, llm-free with --explanations"):
        scored(run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"explainer": "gpt-4"}, "--explainer gpt-4: it must be hf:ID_OR_PATH"),
        ({"explainer": "hf:"}, "must be hf:ID_OR_PATH"),
        ({"shard": "3/3"}, "--shard 3/3: it must be I/N"),
        ({"shard": "a"}, "--shard a"),
        ({"max_cost": 1.0}, "--max-cost needs prices"),
        ({"max_calls": -1}, "--max-calls must be at least 0, not -1"),
        ({"deadline": 0.0}, "--deadline 0.0"),
        ({"only": ("5",)}, "--only 5: write a neuron as LAYER:INDEX"),
        ({"only": ("0:5",), "neurons": 2}, "--only and --neurons"),
        ({"temperature": -1.0}, "--temperature must be at least 0, not -1"),
        ({"contrast": -1}, "--contrast must be at least 0, not -1"),
        ({"evidence": ("top", "top")}, "--evidence top top"),
    ],
)
def test_bad_options_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        ExplainConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("detection",)}, r"need --simulator"),
        ({"explanations": "x"}, "add --simulator"),
        ({"paper_compat": True}, "add --simulator"),
        ({"simulator": "mistral"}, "--simulator mistral: it must be hf:"),
    ],
)
def test_bad_scoring_options_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        ScoreConfig(**fields)


def test_the_truth_never_reaches_the_simulator(run, model, monkeypatch):
    """With other activations of the same excerpts the requests are the same."""
    from cratelm.score import pipeline as with_model

    seen: list[list] = []
    original = with_model.requests_of
    monkeypatch.setattr(
        with_model, "requests_of", lambda asked: seen.append(original(asked)) or seen[-1]
    )
    explained(run)
    scored(run)
    from cratelm.score import score as module

    real = module.read_selected_records

    def disturbed(harvest, split, selected):
        for record in real(harvest, split, selected):
            if split == "held_out":
                noise = np.random.default_rng(0)
                record = replace(
                    record,
                    excerpts=tuple(
                        replace(e, activations=noise.uniform(size=len(e)).astype(np.float32))
                        for e in record.excerpts
                    ),
                )
            yield record

    monkeypatch.setattr(module, "read_selected_records", disturbed)
    n = len(seen)
    scored(run, force=True)
    assert seen[n:] == seen[:n]
