"""Audit of metrics: the published known answers, and changed explanations of a run."""

import json

import numpy as np
import pytest
import torch
from tiny_run import MODEL, copied

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import open_harvested
from cratelm.errors import InputError
from cratelm.explain.store import read_explanations
from cratelm.models.sites import hooked
from cratelm.runs import Run
from cratelm.score.audit import CHANGES, METRICS, RATES, passes, planted_audit, table
from cratelm.score.audit_run import changed_payload
from cratelm.score.config import PER_BIN, ScoreConfig
from cratelm.score.score import score
from cratelm.score.simulators import simulate
from cratelm.score.store import read_whole_scores


@pytest.fixture(scope="module")
def audits():
    return planted_audit(n_tokens=100_000, trials=10)


def test_metrics_pass_and_fail_as_published(audits):
    """Oikarinen, Yan & Weng 2025: which metrics notice missing and extra labels."""
    expected = {
        "correlation": (True, True),
        "cosine": (True, True),
        "average precision": (True, True),
        "F1": (True, True),
        "IoU": (True, True),
        "AUC": (True, False),
        "recall": (True, False),
        "precision": (False, True),
        "top and random": (True, False),
        "all tokens, estimated": (False, False),  # of a single neuron, from a few draws
    }
    found = {m: tuple(passes(audits, m, change) for change in CHANGES) for m in METRICS}
    assert found == expected


def test_auc_misses_extra_labels_where_few_tokens_are_active(audits):
    noticed = {a.rate: a.noticed for a in audits if a.metric == "AUC" and a.change == "extra"}
    assert noticed[0.1] == noticed[0.01] == 1
    assert noticed[0.001] == noticed[0.0001] == 0


def test_top_and_random_misses_extra_labels_as_often_as_published():
    """Shares of trials in which it falls: .93, .20, .023 and .002 at rates of .1, .01, .001 and .0001."""
    audits = planted_audit(n_tokens=20_000, trials=400, seed=1, metrics=["top and random"])
    noticed = {
        a.rate: a.noticed for a in audits if a.metric == "top and random" and a.change == "extra"
    }
    assert noticed[0.1] == pytest.approx(0.93, abs=0.05)
    assert noticed[0.01] == pytest.approx(0.20, abs=0.07)
    assert noticed[0.001] == pytest.approx(0.023, abs=0.025)
    assert noticed[0.0001] == pytest.approx(0.002, abs=0.01)


def test_the_estimate_notices_what_its_draws_contain():
    """Extra labels are among the draws of the zeros, or not; of the draws of the ones half are missing."""
    audits = planted_audit(n_tokens=20_000, trials=150, metrics=["all tokens, estimated"])
    noticed = {(a.change, a.rate): a.noticed for a in audits}
    for rate in (0.1, 0.01):
        drawn = 1 - (1 - rate / (1 - rate)) ** PER_BIN
        assert noticed["extra", rate] == pytest.approx(drawn, abs=0.1)
        assert noticed["missing", rate] > 0.98  # all but 1 of 1,024
    for rate in (0.001, 0.0001):  # the ones are in a bin with zeros, and hardly ever drawn
        assert noticed["extra", rate] < 0.03
        assert noticed["missing", rate] < 0.03


def test_the_table_has_a_row_per_metric_and_change(audits):
    lines = table(audits)
    assert len(lines) == 1 + 2 * len(METRICS)
    assert lines[0].split() == ["metric", "change", *(f"{r:g}" for r in RATES), "passes"]
    assert next(line for line in lines if line.startswith("precision")).endswith("no")


# ---- on a run ---------------------------------------------------------------------------------------

TRIE = {
    "default": 1.0,
    "tokens": [4, 5, 6, 7, 9],
    "values": [2.0, 3.0, 5.0, 4.0, 2.5],
    "counts": [1, 2, 3, 4, 5],
    "parents": [-1, -1, 0, 2, -1],
}
"""single tokens 4, 5 and 9; 6 before 4, and 7 before that"""
OTHER = {
    "default": 0.0,
    "tokens": [5, 8, 3],
    "values": [1.0, 2.0, 8.0],
    "counts": [1, 1, 1],
    "parents": [-1, -1, 1],
}


def test_half_of_the_single_tokens_are_dropped_with_their_contexts():
    for seed in range(8):
        changed = changed_payload(TRIE, OTHER, "missing", np.random.default_rng(seed))
        roots = [t for t, p in zip(changed["tokens"], changed["parents"], strict=True) if p == -1]
        assert len(roots) == 2
        assert (6 in changed["tokens"]) == (7 in changed["tokens"]) == (4 in roots)
        simulate("trie", changed, [np.array([4, 5, 9])])  # a trie still
        if 4 in roots:
            assert simulate("trie", changed, [np.array([7, 6, 4])])[0][-1] == 4.0


def test_as_many_single_tokens_of_another_neuron_are_added_in_the_units_of_this_one():
    changed = changed_payload(TRIE, OTHER, "extra", np.random.default_rng(0))
    assert changed["tokens"] == [4, 5, 6, 7, 9, 8, 3]  # 5 is there already
    assert changed["parents"] == [-1, -1, 0, 2, -1, -1, 5]
    # the other's highest, 8 above its default, becomes this one's, 4 above its default
    assert changed["values"][5:] == [2.0, 5.0]
    assert simulate("trie", changed, [np.array([3, 8])])[0].tolist() == [1.0, 5.0]
    table = {name: TRIE[name] for name in ("default", "tokens", "values", "counts")}
    wide = {name: [*range(20, 40)] for name in ("tokens", "values", "counts")} | {"default": 0.0}
    assert len(changed_payload(table, wide, "extra", np.random.default_rng(0))["tokens"]) == 2 * 5
    assert "parents" not in changed_payload(table, table, "extra", np.random.default_rng(0))


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The tiny run, scored again with an audit."""
    run = copied(tmp_path_factory.mktemp("audited"))
    config = ScoreConfig(run=run, model=MODEL, audit=True, resamples=100, quiet=True, force=True)
    return run, score(config)


def test_an_audit_of_a_run_is_written_and_shown(audited):
    run, result = audited
    found = json.loads((run / "scores" / MODEL / "audit.json").read_text())
    assert {a["change"] for a in found["run"]} == set(CHANGES)
    figures = {a["figure"] for a in found["run"]}
    assert {"top_and_random", "anthropic", "correlation", "precision_top", "auc_hard"} <= figures
    assert len(found["planted"]) == len(METRICS) * len(CHANGES) * len(RATES)
    assert "explanations of the run" in str(result)
    assert "last token alone" in str(result)
    stored = Run(run).stage("scores", MODEL).require("score").results
    assert stored["audit"] == result.audit


def test_scores_over_all_tokens_are_those_of_every_token_simulated(audited):
    """The model is run here token by token of the held-out split; explanations are read as any user would."""
    run, _ = audited
    opened = open_harvested(Run(run), MODEL)
    tokens = Run(run).stage("activations", MODEL).require("harvest").config["tokens"]
    store = opened.store
    plan = SearchPlan.of(
        store.split("held_out"), "held_out", store.eot_id, opened.sequence_length, tokens, 0
    )
    texts, rows = [], []
    for batch in plan.batches(10**6, torch.device("cpu")):
        seen = {}
        with torch.no_grad(), hooked(opened.subject.model, opened.site, seen.__setitem__):
            opened.subject.model(input_ids=batch.input_ids)
        ids = batch.input_ids.flatten().numpy()
        texts += [ids[low:high] for low, high in batch.segments]
        layers = [seen[layer].flatten(0, 1).numpy() for layer in sorted(seen)]
        rows += [[a[low:high] for a in layers] for low, high in batch.segments]
    true = [np.concatenate([row[layer] for row in rows]) for layer in range(len(rows[0]))]
    scores = {
        (s.neuron, s.explainer): s
        for s in read_whole_scores(run / "scores" / MODEL)
        if s.control == "none"
    }
    explanations = read_explanations(run / "explanations" / MODEL)
    assert {(e.neuron, e.explainer) for e in explanations} == set(scores)
    for e in explanations:
        a = true[e.neuron.layer][:, e.neuron.index].astype(np.float64)
        s = np.concatenate(simulate(e.explainer, e.payload, texts))
        found = scores[e.neuron, e.explainer]
        assert found.n_tokens == len(a)
        if found.correlation is not None:
            assert found.correlation == pytest.approx(np.corrcoef(a, s)[0, 1], abs=1e-4)
            assert found.cosine == pytest.approx(a @ s / np.sqrt(a @ a * (s @ s)), abs=1e-4)
        else:
            assert a.std() < 1e-9 or s.std() < 1e-9


def test_without_all_tokens_nothing_is_run_again(tmp_path):
    run = copied(tmp_path)
    config = ScoreConfig(
        run=run, model=MODEL, all_tokens=False, resamples=100, quiet=True, force=True
    )
    assert score(config).whole == {}
    assert not (run / "scores" / MODEL / "all_tokens.parquet").exists()


def test_an_audit_needs_explanations_that_can_be_changed():
    with pytest.raises(InputError, match="omit --simulator"):
        ScoreConfig(model=MODEL, audit=True, simulator="hf:any")
