"""Selection, simulators, controls, audit and the verb, on neurons whose meaning is known."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from planted import STRINGS, corpus, harvested, on_token
from tiny_run import reseal

from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.explain.neuron import explain_neuron
from cratelm.llm.client import Client
from cratelm.llm.config import Budget
from cratelm.llm.ledger import Ledger
from cratelm.llm.requests import JsonQuery
from cratelm.records import SIMULATION_METRICS, Excerpt, Explanation, NeuronId, Score, Status
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import ExplanationSet, audit, shuffled
from cratelm.score.metrics import correlation_score
from cratelm.score.pipeline import Reader, Scoring, score_records
from cratelm.score.score import score
from cratelm.score.scorers import BY_METRIC, Example, Prompting
from cratelm.score.selection import scored_on
from cratelm.score.simulators import ConstantSimulator, TokenLists, simulate
from cratelm.score.store import read_scores


def held_out(token: int):
    return harvested(on_token(corpus("held_out")[0], token), "held_out", token)


def explanation_of(token: int, explainer: str = "lookup") -> Explanation:
    record = harvested(on_token(corpus("fit")[0], token), index=token)
    config = ExplainConfig(explainers=(explainer,))  # type: ignore[arg-type]
    return explain_neuron(record, config, STRINGS)[0]


def score_neuron(record, explanation, donor, explainer, metrics, is_duplicate):
    """Scores of one neuron; `donor` is the only other explanation of its layer, or None."""
    given = [e for e in (explanation, donor) if e is not None]
    explanations = ExplanationSet(given, None, seed=0)
    scoring = Scoring(metrics, (explainer,), explanations, set(), is_duplicate)
    return list(score_records([record], scoring))


# --- selection ----------------------------------------------------------------------------------


def kinds_and_ranks(excerpts):
    return [(e.kind, e.rank) for e in excerpts]


def test_scored_on_is_the_papers_table():
    record = held_out(3)
    random = [("random", rank) for rank in range(5)]
    top = [("top", rank) for rank in (1, 3, 5, 7, 9)]
    assert kinds_and_ranks(scored_on(record, "random_only")) == random
    assert kinds_and_ranks(scored_on(record, "top_and_random")) == top + random
    anthropic = kinds_and_ranks(scored_on(record, "anthropic"))
    assert anthropic[:10] == [("top", rank) for rank in range(15, 25)]
    assert anthropic[-15:-10] == random
    assert anthropic[-10:] == [("out_of_context", rank) for rank in range(10)]


def test_anthropic_excerpts_are_short_and_two_a_bin():
    record = harvested(np.random.default_rng(0).uniform(0, 1, 7200), "held_out")
    excerpts = scored_on(record, "anthropic")
    assert len(excerpts) == 10 + 2 * 12 + 5 + 10
    assert {e.bin for e in excerpts if e.kind == "anthropic_bin"} == set(range(12))
    assert all(len(e) <= (3 if e.kind == "out_of_context" else 8) for e in excerpts)


def test_bins_pass_over_tokens_already_chosen():
    record = harvested(np.random.default_rng(0).uniform(0, 1, 7200), "held_out")
    top = next(e for e in record.of_kind("top") if e.rank == 15)
    first = next(e for e in record.of_kind("anthropic_bin") if (e.bin, e.rank) == (11, 0))
    clash = replace(first, position=top.position)
    changed = replace(record, excerpts=tuple(clash if e is first else e for e in record.excerpts))
    ranks = [e.rank for e in scored_on(changed, "anthropic") if e.bin == 11]
    assert ranks == [1, 2]


def test_few_excerpts_are_all_used_and_counted():
    record = held_out(3)
    few = replace(record, excerpts=record.of_kind("top")[:4] + record.of_kind("random")[:2])
    found = kinds_and_ranks(scored_on(few, "top_and_random"))
    assert found == [("top", 1), ("top", 3), ("random", 0), ("random", 1)]
    scores = score_neuron(
        few, explanation_of(3), None, "lookup", ("top_and_random",), none_is_duplicate
    )
    assert scores[0].score.n_records == 4


# --- simulators ---------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_simulators_never_see_the_truth(monkeypatch):
    """Whatever the activations of the held-out excerpts, the same values are simulated."""
    seen: list[list] = []

    def spy(truth, simulated):
        seen.append([simulated.tolist()])
        raise Stop

    monkeypatch.setattr("cratelm.score.metrics.Truth.score", spy)
    record = held_out(3)
    drawn = np.random.default_rng(1)
    other = replace(
        record,
        excerpts=tuple(
            replace(e, activations=drawn.uniform(0, 9, len(e)).astype(np.float32))
            for e in record.excerpts
        ),
    )
    for explainer in ("lookup", "trie"):
        for one in (record, other):
            with pytest.raises(Stop):
                score_neuron(
                    one,
                    explanation_of(3, explainer),
                    None,
                    explainer,
                    SIMULATION_METRICS,
                    none_is_duplicate,
                )
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert max(max(s) for s in seen[0]) > 0.5


@pytest.mark.parametrize("explainer", ["lookup", "trie"])
@given(data=st.data())
def test_simulation_of_an_excerpt_does_not_depend_on_the_others(explainer, data):
    ids = st.lists(st.integers(0, planted.VOCABULARY - 1), max_size=8).map(np.array)
    several = data.draw(st.lists(ids, min_size=1, max_size=4))
    payload = PAYLOADS[explainer]
    together = simulate(explainer, payload, several)
    assert [len(v) for v in together] == [len(i) for i in several]
    for one, values in zip(several, together, strict=True):
        assert values.tolist() == simulate(explainer, payload, [one])[0].tolist()


PAYLOADS = {name: explanation_of(3, name).payload for name in ("lookup", "trie")}


def test_payload_survives_json_and_ids_beyond_the_table():
    for explainer, payload in PAYLOADS.items():
        copy = json.loads(json.dumps(payload))
        (values,) = simulate(explainer, copy, [np.array([3, 60_000])])
        assert values[0] > 0.9
        assert values[1] == payload["default"]
    explanation = explanation_of(3)
    constant = ConstantSimulator().values(explanation.payload, TokenLists([np.array([1, 2])]))
    assert constant.tolist() == [PAYLOADS["lookup"]["default"]] * 2


def test_empty_payloads_predict_their_default():
    for explainer in ("lookup", "trie"):
        payload = {"default": 0.5, "tokens": [], "values": [], "counts": [], "parents": []}
        assert simulate(explainer, payload, [np.array([1, 2]), np.array([], int)])[0].tolist() == [
            0.5, 0.5,
        ]  # fmt: skip


def test_unknown_simulator_is_named():
    with pytest.raises(InputError, match="no simulator for 'oracle'"):
        simulate("oracle", {}, [np.array([1])])


# --- controls -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 99))
def test_shuffling_is_a_derangement_within_layers(sizes, seed):
    neurons = [NeuronId("m", "s", layer, i) for layer, n in enumerate(sizes) for i in range(n)]
    donors = shuffled(neurons, seed)
    assert donors == shuffled(neurons[::-1], seed)
    assert set(donors) == {n for n in neurons if sizes[n.layer] > 1}
    assert all(a != b and a.layer == b.layer for a, b in donors.items())
    assert len(set(donors.values())) == len(donors)


def test_audit_finds_shared_documents():
    explanation = explanation_of(3)
    scores = score_neuron(
        held_out(3), explanation, None, "lookup", SIMULATION_METRICS, none_is_duplicate
    )
    clean = audit([explanation], scores)
    assert clean.shared == ()
    assert clean.n_explained == len(explanation.documents) > 20
    assert clean.n_scored == len({d for s in scores for d in s.documents}) > 20
    forged = replace(explanation, documents=(1, *explanation.documents))
    leaking = replace(scores[0], documents=(1, 3))
    assert audit([forged], [leaking]).shared == (1,)


# --- one neuron ---------------------------------------------------------------------------------


def test_own_explanation_scores_high_another_near_zero_a_constant_none():
    for token in range(3, 12):
        scores = score_neuron(
            held_out(token),
            explanation_of(token),
            explanation_of(token + 1),
            "lookup",
            SIMULATION_METRICS,
            none_is_duplicate,
        )
        assert len(scores) == 9
        for s in scores:
            if s.control == "none":
                assert s.score.value > 0.97
            elif s.control == "shuffled":
                assert abs(s.score.value) < 0.2
            else:
                assert (s.score.status, s.score.reason) == (
                    Status.UNDEFINED, "the simulation is constant",
                )  # fmt: skip


def test_no_value_has_one_of_three_reasons():
    dead = harvested(np.zeros(7200), "held_out")
    for s in score_neuron(
        dead, explanation_of(3), explanation_of(4), "lookup", SIMULATION_METRICS, none_is_duplicate
    ):
        assert (s.score.status, s.score.value) == (Status.DEAD, None)
    for s in score_neuron(
        held_out(3), None, explanation_of(4), "lookup", SIMULATION_METRICS, none_is_duplicate
    ):
        assert (s.score.status, s.score.reason) == (Status.FAILED, "no explanation by lookup")
    silent = replace(held_out(3), excerpts=tuple(map(silenced, held_out(3).excerpts)))
    for s in score_neuron(
        silent, explanation_of(3), None, "lookup", SIMULATION_METRICS, none_is_duplicate
    ):
        assert s.score.status == Status.UNDEFINED
        if s.control == "shuffled":
            assert "no other neuron with an explanation" in s.score.reason


def none_is_duplicate(excerpts: Sequence[Excerpt]) -> NDArray[np.bool_]:
    return np.zeros(len(excerpts), bool)


def silenced(excerpt: Excerpt) -> Excerpt:
    return replace(excerpt, activations=np.zeros_like(excerpt.activations))


# --- the verb -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    run = planted.run_with_harvest(tmp_path / "run")
    explainers = ("lookup", "trie")
    explain(ExplainConfig(run=run.path, model="m", quiet=True, explainers=explainers))
    return run


def test_every_neuron_has_every_score(run):
    result = score(ScoreConfig(run=run.path, model="m", resamples=200, quiet=True))
    scores = read_scores(result.path)
    assert len(scores) == result.n_scores == 2 * 12 * 2 * 3 * 3
    keys = {(s.neuron, s.explainer, s.metric, s.control) for s in scores}
    assert len(keys) == len(scores)
    # Neuron 0 is dead on the fit split, though it fires on the other; neuron 2 fires at one place of
    # each: undefined where that is not among the excerpts.
    dead = [s for s in scores if s.score.status == Status.DEAD]
    assert {s.neuron.index for s in dead} == {0}
    assert {s.score.reason for s in dead} == {"never above 0 on the fit split"}
    assert result.n_dead == 2
    undefined = {
        s.neuron.index for s in scores if s.score.status == Status.UNDEFINED and s.control == "none"
    }
    assert 2 in undefined
    own = [s.score.value for s in scores if s.control == "none" and s.neuron.index > 2]
    null = [s.score.value for s in scores if s.control == "shuffled" and s.neuron.index > 2]
    assert min(v for v in own if v is not None) > 0.97
    assert abs(np.mean([v for v in null if v is not None])) < 0.05


def test_summary_counts_everything_and_the_audit_is_clean(run):
    result = score(ScoreConfig(run=run.path, model="m", resamples=200, quiet=True))
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary["leakage_audit"]["shared"] == []
    assert summary["leakage_audit"]["n_explained"] > 50
    assert summary["leakage_audit"]["n_scored"] > 50
    assert len(summary["statistics"]) == 2 * 3 * 3 * 2  # explainers, metrics, controls, policies
    for s in summary["statistics"]:
        assert sum(s["counts"].values()) == 24
        assert s["counts"]["dead"] == 2
        if s["control"] == "constant":
            assert s["counts"]["undefined"] == 22
    assert "lookup random_only" in str(result)


def test_scores_are_kept_as_they_were(run):
    result = score(ScoreConfig(run=run.path, model="m", resamples=200, quiet=True))
    first = read_scores(result.path)
    content = (result.path / "scores.parquet").read_bytes()
    again = score(ScoreConfig(run=run.path, model="m", resamples=200, quiet=True, force=True))
    assert read_scores(again.path) == first
    assert (result.path / "scores.parquet").read_bytes() == content
    table = pq.read_table(result.path / "scores.parquet")
    assert table["value"].null_count == sum(s.score.value is None for s in first)


def test_finished_scoring_is_skipped(run, capsys):
    config = ScoreConfig(run=run.path, model="m", resamples=200, quiet=True)
    first = score(config)
    assert score(config) == first
    assert "skipped" in capsys.readouterr().out


def test_failed_explanation_is_counted(run):
    path = run.stage("explanations", "m").path / "explanations.parquet"
    table = pq.read_table(path)
    lost = [(r["index"], r["explainer"]) == (5, "trie") for r in table.to_pylist()]
    pq.write_table(table.filter(~np.array(lost)), path)
    reseal(path.parent)
    result = score(ScoreConfig(run=run.path, model="m", resamples=200, quiet=True))
    failed = [s for s in read_scores(result.path) if s.score.status == Status.FAILED]
    assert {(s.neuron.index, s.explainer) for s in failed} == {(5, "trie")}
    assert len(failed) == 2 * 3 * 3


def test_shared_documents_stop_the_scoring(tmp_path):
    run = planted.run_with_harvest(tmp_path / "run", documents_overlap=True)
    explain(ExplainConfig(run=run.path, model="m", quiet=True))
    with pytest.raises(InputError, match=r"documents \(first: 0\) were both explained from"):
        score(ScoreConfig(run=run.path, model="m", resamples=200, quiet=True))
    assert not (run.path / "scores" / "m").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ()}, "--metrics"),
        ({"metrics": ("random_only", "magic")}, "--metrics is 'magic': choose from top_and_random"),
        ({"resamples": 3}, "--resamples must be at least 100, not 3"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        ScoreConfig(**fields)


def test_missing_explanations_name_the_verb(tmp_path):
    run = planted.run_with_harvest(tmp_path / "run", n_neurons=3, layers=1)
    with pytest.raises(InputError, match="cratelm explain"):
        score(ScoreConfig(run=run.path, model="m"))


# --- adding a simulator ---------------------------------------------------------------------------


class Rereader:
    """A simulator with a language model: its first answer is the level of every token of an excerpt."""

    def requests(self, explanation, token_ids):
        return [
            JsonQuery((("user", f"{explanation.text}: {len(ids)} tokens"),), len(ids), 0, 9)
            for ids in token_ids
        ]

    def simulate(self, explanation, token_ids, answers):
        return [np.array(a.value, dtype=float) for a in answers]


class Parity:
    """A simulator without one: 1 on tokens with an odd id."""

    def requests(self, explanation, token_ids):
        return []

    def simulate(self, explanation, token_ids, answers):
        return [np.asarray(ids) % 2.0 for ids in token_ids]


class Odd(FakeModel):
    """Answers level 9 where the excerpt's length is odd, else counts 0, 1, 2 ..."""

    def _value(self, request):
        return tuple(9 if request.n % 2 else i % 10 for i in range(request.n))


def scoring_with(simulator, supports_logprobs: bool = False) -> Scoring:
    explanation = explanation_of(3)
    prompting = Prompting(STRINGS, supports_logprobs, 0)
    return Scoring(
        metrics=("top_and_random",),
        explainers=("lookup",),
        explanations=ExplanationSet([explanation], [], seed=0),
        dead_on_fit=(),
        find_duplicates=none_is_duplicate,
        reader=Reader("mine", {"": simulator}, prompting),
    )


@pytest.mark.parametrize(("simulator", "n_requests"), [(Rereader(), 10), (Parity(), 0)])
def test_a_simulator_is_a_class_with_two_methods(simulator, n_requests, tmp_path):
    record, model = held_out(3), Odd()
    client = Client(model, Ledger(tmp_path / "ledger.sqlite"), Budget())
    own, null, constant = score_records([record], scoring_with(simulator), client)
    excerpts = scored_on(record, "top_and_random")
    ids = [e.token_ids for e in excerpts]
    if n_requests:
        expected = [np.array([9 if len(i) % 2 else n % 10 for n in range(len(i))]) for i in ids]
    else:
        expected = [i % 2 for i in ids]
    assert own.score == correlation_score([e.activations for e in excerpts], expected)
    assert (own.explainer, own.explained_by, own.simulator) == ("lookup/mine", "lookup", "mine")
    assert null.score.status == Status.UNDEFINED  # no other neuron's explanation
    assert (constant.score.status, constant.score.reason) == (
        Status.UNDEFINED, "the simulation is constant",
    )  # fmt: skip
    assert len(model.asked) == (len({len(i) for i in ids}) if n_requests else 0)  # equal ones once


def test_a_failed_answer_of_a_simulator_fails_the_score(tmp_path):
    client = Client(Odd(fails=1.0), Ledger(tmp_path / "ledger.sqlite"), Budget())
    own, *_ = score_records([held_out(3)], scoring_with(Rereader()), client)
    assert (own.score.status, own.score.value) == (Status.FAILED, None)
    assert own.score.reason.startswith("10 of 10 calls failed, the first: status")


# --- adding a scorer ------------------------------------------------------------------------------


class Longest:
    """Scores by whether a model names the longer of two texts; needs no explanation."""

    uses_explanation = False

    def examples(self, record, control, seed):
        top = sorted(scored_on(record, "top_and_random"), key=len)
        if len(top[0]) == len(top[-1]):
            return Score(None, Status.UNDEFINED, "all texts are equally long")
        return [[Example(top[0], False), Example(top[-1], True)]]

    def prompt(self, explanation, examples, prompting):
        texts = [e.text(prompting.strings) for group in examples for e in group]
        return [JsonQuery((("user", "\n".join(texts)),), 1, 1, 2, prompting.seed)]

    def answered(self, examples, answered):
        return examples if all(answered) else []

    def classes(self, examples):
        return [True for _ in examples]

    def grade(self, examples, values):
        (answer,) = values
        return Score(float(examples[0][answer[0] - 1].positive), n_records=1)


class Second(FakeModel):
    """Always names the second text."""

    def _value(self, request):
        return (2,)


def test_a_scorer_is_a_class_with_five_methods(tmp_path, monkeypatch):
    monkeypatch.setitem(BY_METRIC, "intruder", Longest())
    scoring = replace(scoring_with(Parity()), metrics=("intruder",))
    client = Client(Second(), Ledger(tmp_path / "ledger.sqlite"), Budget())
    own, null = score_records([held_out(3)], scoring, client)
    assert (own.score.value, own.metric, own.control) == (1.0, "intruder", "none")
    # without a donor too: this scorer reads no explanation
    assert null.score.value == 1.0
    same = replace(held_out(3), excerpts=held_out(3).of_kind("top")[:2])
    (only, _) = score_records([same], scoring, client)
    assert only.score.reason == "all texts are equally long"
