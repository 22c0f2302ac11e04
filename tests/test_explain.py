"""Explainers on neurons whose meaning is known."""

from dataclasses import replace

import numpy as np
import planted
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import STRINGS, corpus, harvested, on_pair, on_token

from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import NO_TOKEN, Evidence, collect_evidence, contexts_of
from cratelm.explain.explain import explain
from cratelm.explain.lookup import token_table
from cratelm.explain.neuron import explain_neuron
from cratelm.explain.selection import explained_from, select_neurons
from cratelm.explain.store import read_explanations, read_selected
from cratelm.explain.trie import ROOT, context_trie
from cratelm.records import Excerpt
from cratelm.score.metrics import correlation_score
from cratelm.score.simulators import simulate
from cratelm.text.display import visible_folded


def score_everywhere(explanation, activations) -> float:
    """Correlation over every token of the held-out corpus, document by document."""
    tokens, _ = corpus("held_out")
    documents = np.split(tokens, planted.N_DOCUMENTS)
    simulated = simulate(explanation.explainer, explanation.payload, documents)
    score = correlation_score(np.split(activations, planted.N_DOCUMENTS), simulated)
    assert score.value is not None
    return score.value


def explained(activations, explainer, **fields):
    config = ExplainConfig(explainers=(explainer,), **fields)
    (explanation,) = explain_neuron(harvested(activations), config, STRINGS)
    return explanation


@pytest.mark.parametrize("explainer", ["lookup", "trie"])
def test_token_neuron_is_recovered(explainer):
    explanation = explained(on_token(corpus("fit")[0], 3), explainer)
    assert score_everywhere(explanation, on_token(corpus("held_out")[0], 3)) > 0.99
    assert explanation.text.startswith("the token `⇥from`; 100% of its activation, fires on ")
    assert "«⇥from»" in explanation.text


def test_pair_neuron_needs_the_trie():
    fit, held_out = corpus("fit")[0], corpus("held_out")[0]
    lookup = explained(on_pair(fit, 1, 2), "lookup")
    trie = explained(on_pair(fit, 1, 2), "trie")
    truth = on_pair(held_out, 1, 2)
    assert score_everywhere(trie, truth) > 0.97
    assert score_everywhere(lookup, truth) < 0.6
    assert trie.text.startswith("the token `␣import` after `⏎`; ")
    assert lookup.text.startswith("the token `␣import`, mostly after `⏎`; ")


def test_trie_of_depth_one_is_the_lookup():
    activations = on_pair(corpus("fit")[0], 1, 2) + on_token(corpus("fit")[0], 5)
    lookup, trie = explained(activations, "lookup"), explained(activations, "trie", depth=1)
    ids = [np.arange(planted.VOCABULARY)]
    np.testing.assert_allclose(
        simulate("trie", trie.payload, ids)[0], simulate("lookup", lookup.payload, ids)[0]
    )


def evidence(rows) -> Evidence:
    contexts, activations, weights = (np.array(c) for c in zip(*rows, strict=True))
    return Evidence(contexts, activations.astype(float), weights.astype(float))


def test_lookup_is_the_shrunk_mean():
    seen = evidence([([4, 9], 1.0, 1.0), ([4, 9], 3.0, 0.5), ([6, 9], 0.0, 1.0)])
    table = token_table(seen, mean=0.2, max_tokens=10, strength=2.0)
    assert table.tokens.tolist() == [4, 6]
    assert table.values.tolist() == pytest.approx(
        [(1 + 1.5 + 2 * 0.2) / (1.5 + 2), (0 + 0.4) / (1 + 2)]
    )
    assert table.counts.tolist() == [2, 1]
    assert table.default == 0.2


def test_lookup_keeps_the_tokens_with_most_evidence():
    # Token 8 is further from the mean, token 7 was seen far more often.
    rows = [([7, 0], 1.0, 1.0)] * 40 + [([8, 0], 2.0, 1.0)] + [([9, 0], 0.1, 1.0)] * 40
    assert token_table(evidence(rows), 0.0, 1).tokens.tolist() == [7]
    assert token_table(evidence(rows), 0.0, 2).tokens.tolist() == [8, 7]


def test_trie_values_are_shrunk_toward_the_parent():
    rows = [([5, 1], 2.0, 1.0)] * 3 + [([5, 2], 0.0, 1.0)] * 2 + [([5, 3], 9.0, 0.5)]
    trie = context_trie(evidence(rows), mean=0.5, max_nodes=10, depth=2, strength=1.0)
    single = (6 + 0 + 4.5 + 0.5) / 6.5
    rest = (4.5 + single) / (0.5 + 1)  # what neither of the two children covers
    assert [trie.context(node) for node in range(len(trie.tokens))] == [[5], [1, 5], [2, 5]]
    assert trie.values.tolist() == pytest.approx([rest, (6 + single) / 4, single / 3])
    assert trie.counts.tolist() == [6, 3, 2]  # the context seen once, [3, 5], is not kept


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(tokens, st.integers(1, 6), st.integers(0, 1000))
def test_pruned_trie_keeps_its_ways_and_its_size(ids, max_nodes, seed):
    drawn = np.random.default_rng(seed).uniform(0, 1, len(ids))
    contexts = contexts_of([np.array(ids)], 3)
    seen = Evidence(contexts, drawn, np.ones(len(ids)))
    whole = context_trie(seen, 0.5, 10_000, depth=3)
    trie = context_trie(seen, 0.5, max_nodes, depth=3)
    assert len(trie.tokens) == min(max_nodes, len(whole.tokens))
    assert all(parent < node for node, parent in enumerate(trie.parents))
    all_contexts = {tuple(whole.context(n)): whole.counts[n] for n in range(len(whole.tokens))}
    for node in range(len(trie.tokens)):
        assert all_contexts[tuple(trie.context(node))] == trie.counts[node]
    # The simulator predicts by the deepest node: the same as a search by hand.
    kept = {tuple(trie.context(n)): trie.values[n] for n in range(len(trie.tokens))}
    (found,) = simulate("trie", trie.payload(), [np.array(ids)])
    for at in range(len(ids)):
        suffixes = [tuple(ids[max(0, at - k) : at + 1]) for k in (2, 1, 0)]
        expected = next((kept[s] for s in suffixes if s in kept), trie.default)
        assert found[at] == pytest.approx(expected, rel=1e-4)


def test_contexts_end_at_the_borders_of_excerpts():
    found = contexts_of([np.array([5, 6, 7]), np.array([8, 9])], 3)
    no = NO_TOKEN
    assert found.tolist() == [[5, no, no], [6, 5, no], [7, 6, 5], [8, no, no], [9, 8, no]]


def excerpt(kind, position, ids, activations, peak=0, document=0, rank=0):
    return Excerpt(
        kind, rank, -1, np.array(ids, np.int32), np.array(activations, np.float32),
        peak, document, position,
    )  # fmt: skip


def test_each_position_counts_once_with_most_context():
    record = replace(
        harvested(on_token(corpus("fit")[0], 3)),
        excerpts=(
            excerpt("top", 102, [1, 2, 3, 4], [0, 0, 7, 0], peak=2),  # positions 100..103
            excerpt("random", 103, [3, 4, 5], [7, 0, 1], peak=1),  # positions 102..104
        ),
    )
    found = collect_evidence(record, depth=2, weight=0.25)
    assert found.contexts.tolist() == [[1, -1], [2, 1], [3, 2], [4, 3], [5, 4]]
    assert found.activations.tolist() == [0, 0, 7, 0, 1]
    assert found.weights.tolist() == [0.25, 0.25, 1, 1, 1]


def test_max_entries_limits_both_payloads():
    activations = np.random.default_rng(0).uniform(0, 1, len(corpus("fit")[0]))
    for explainer in ("lookup", "trie"):
        payload = explained(activations, explainer, max_entries=7).payload
        assert len(payload["tokens"]) == len(payload["values"]) == len(payload["counts"]) == 7
    assert ROOT in payload["parents"]


def test_explanations_name_the_documents_they_saw():
    record = harvested(on_token(corpus("fit")[0], 3))
    for explanation in explain_neuron(record, ExplainConfig(), STRINGS):
        assert explanation.documents == tuple(sorted({e.document for e in record.excerpts}))


def test_dead_neuron_has_no_explanation_and_held_out_records_are_refused():
    assert explain_neuron(harvested(np.zeros(7200)), ExplainConfig(), STRINGS) == []
    held_out = harvested(on_token(corpus("held_out")[0], 3), "held_out")
    with pytest.raises(InputError, match="held_out"):
        explain_neuron(held_out, ExplainConfig(), STRINGS)


def test_phrases_differ_between_neurons_and_are_short():
    texts = [explained(on_token(corpus("fit")[0], t), "lookup").text for t in range(1, 12)]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) < 200


def test_phrase_of_a_neuron_that_is_the_same_everywhere():
    text = explained(np.ones(7200), "lookup").text
    assert text.startswith("no token much more than others; fires on 100% of tokens; e.g. ")


def test_white_space_is_visible_folded():
    assert visible_folded(" a\n\tb") == "␣a⏎⇥b"
    assert visible_folded(" " * 12 + "x") == "␣×12x"
    assert visible_folded("\x00\r") == "\\x00\\r"
    assert visible_folded("é😀") == "é😀"


def test_paper_ranks_are_explained_from():
    record = harvested(on_token(corpus("fit")[0], 3))
    assert [e.rank for e in explained_from(record, "top_and_random")] == [0, 2, 4, 6, 8]
    assert {e.kind for e in explained_from(record, "random_only")} == {"top"}
    short = explained_from(record, "anthropic")
    assert [e.rank for e in short[:15]] == list(range(15))
    assert all(len(e) <= 8 for e in short)
    assert [e.rank for e in short[-5:]] == [0, 1, 2, 3, 4]
    bins = [e.bin for e in short if e.kind == "anthropic_bin"]
    assert bins == sorted(bins)
    assert max(map(bins.count, bins)) == 2
    few = replace(record, excerpts=record.of_kind("top")[:3])
    assert [e.rank for e in explained_from(few, "top_and_random")] == [0, 2]


@pytest.fixture
def run(tmp_path):
    return planted.run_with_harvest(tmp_path / "run")


def test_explain_writes_every_live_neuron_and_is_skipped_then(run, capsys):
    config = ExplainConfig(run=run.path, model="m", quiet=True)
    result = explain(config)
    assert (result.n_neurons, result.n_dead, result.n_explanations) == (24, 2, 66)
    explanations = read_explanations(result.path)
    assert [(e.neuron.layer, e.neuron.index) for e in explanations[::3]] == [
        (layer, index) for layer in (0, 1) for index in range(1, 12)
    ]
    assert [s.neuron.index for s in read_selected(result.path) if s.dead] == [0, 0]
    direct, *_ = explain_neuron(harvested(planted.activations("fit", 4), index=4), config, STRINGS)
    stored = next(e for e in explanations if e.neuron == direct.neuron)
    assert (stored.text, stored.payload, stored.documents) == (
        direct.text, direct.payload, direct.documents
    )  # fmt: skip
    before = (result.path / "explanations.parquet").stat().st_mtime_ns
    assert explain(config) == result
    assert "skipped" in capsys.readouterr().out
    assert (result.path / "explanations.parquet").stat().st_mtime_ns == before


def test_sample_is_the_same_for_twins(run):
    harvest = run.stage("activations", "m").path
    drawn = select_neurons(harvest, 5, seed=1)
    assert [s.neuron.layer for s in drawn] == [0] * 5 + [1] * 5
    assert drawn == select_neurons(harvest, 5, seed=1)
    assert drawn != select_neurons(harvest, 5, seed=2)
    assert len(select_neurons(harvest, 0, seed=1)) == len(select_neurons(harvest, 99, seed=1)) == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"explainers": ()}, "--explainers"),
        (
            {"explainers": ("lookup", "oracle")},
            "--explainers is 'oracle': choose from lookup, trie, concepts",
        ),
        ({"explainers": ("trie", "trie")}, "each once"),
        ({"max_entries": 0}, "--max-entries must be at least 1, not 0"),
        ({"depth": 0}, "--depth must be at least 1, not 0"),
        ({"neurons": -1}, "--neurons must be at least 0, not -1"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        ExplainConfig(**fields)


def test_missing_harvest_names_the_verb(tmp_path):
    with pytest.raises(InputError, match="cratelm tokenize"):
        explain(ExplainConfig(run=tmp_path, model="m"))


def test_a_smaller_sample_is_part_of_a_larger_one(run):
    harvest = run.stage("activations", "m").path
    small, large = (select_neurons(harvest, n, seed=3) for n in (3, 7))
    assert len(small) == 6
    assert {s.neuron for s in small} < {s.neuron for s in large}
    assert [s.neuron for s in small] != [s.neuron for s in select_neurons(harvest, 3, seed=4)]
