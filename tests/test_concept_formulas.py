"""Formulas of concepts: planted ones are found, simulators predict the means of cells, and scores equal brute force."""

from itertools import pairwise

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import STRINGS, corpus, harvested, on_token
from test_whole import groups_of

from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptFeatures, ConceptReader
from cratelm.explain.concepts.fit import FitFeatures
from cratelm.explain.concepts.formula import (
    Formula,
    FormulaSearch,
    cells_of,
    concept_means,
    holds_in,
)
from cratelm.explain.concepts.library import builtin_library
from cratelm.explain.concepts.predict import cells_all, predict_all
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import Evidence, contexts_of
from cratelm.explain.explain import explain
from cratelm.explain.lookup import residual_of, token_table
from cratelm.explain.neuron import explain_neuron
from cratelm.explain.store import read_explanations
from cratelm.score.cells import CellSums, SplitFeatures
from cratelm.score.config import ScoreConfig
from cratelm.score.contexts import SortedContexts, Whole
from cratelm.score.score import score
from cratelm.score.simulators import TokenLists, simulate
from cratelm.score.store import read_scores

LIBRARY = builtin_library()


def columns(n=4000, p=12, seed=0):
    """Independent predicates that hold at a third of the tokens, [n, p]."""
    return np.random.default_rng(seed).uniform(size=(n, p)) < 1 / 3


@pytest.mark.parametrize(
    "formula",
    [
        Formula((3,), ()),
        Formula((3, 7), ("and",)),
        Formula((3, 7), ("or",)),
        Formula((3, 7), ("and not",)),
        Formula((3, 7, 1), ("or", "and not")),
        Formula((3, 7, 1), ("and", "or")),
    ],
)
def test_a_planted_formula_is_found(formula):
    features = columns()
    truth = formula.holds([features[:, t] for t in formula.terms])
    rng = np.random.default_rng(1)
    targets = truth + 0.1 * rng.normal(size=len(truth))
    weights = rng.choice([0.5, 1.0], len(truth))
    found = FormulaSearch(features.astype(np.float32), weights, targets).best()
    assert found is not None
    same = found.holds([features[:, t] for t in found.terms])
    np.testing.assert_array_equal(same, truth)
    if formula.operators == ("and", "or"):
        return  # the search is no exhaustive one: by overlap, 3 AND 7 is worse than 3 alone, and not kept
    overlap = FormulaSearch(
        features.astype(np.float32), weights, truth.astype(float), objective="overlap"
    ).best()
    assert overlap is not None
    np.testing.assert_array_equal(overlap.holds([features[:, t] for t in overlap.terms]), truth)


def test_the_objective_is_the_variance_that_a_formula_explains():
    features = columns(p=5)
    rng = np.random.default_rng(2)
    targets, weights = rng.exponential(size=4000) + features[:, 2], rng.uniform(0.5, 1, 4000)
    search = FormulaSearch(features.astype(np.float32), weights, targets)
    beam = search._longer(search._first())
    mean = np.average(targets, weights=weights)
    for formula, value in zip(beam.formulas, beam.objective, strict=True):
        holds = formula.holds([features[:, t] for t in formula.terms])
        explained = 0.0
        for side in (holds, ~holds):
            explained += weights[side].sum() * (np.average(targets[side], weights=weights[side]) - mean) ** 2  # fmt: skip
        assert value == pytest.approx(explained, rel=1e-4)


def test_a_formula_says_where_the_target_is_high_unless_either_is_allowed():
    features = columns(p=3)
    targets = 1.0 - features[:, 1]
    weights = np.ones(len(targets))
    assert FormulaSearch(features.astype(np.float32)[:, 1:2], weights, targets).best() is None
    found = FormulaSearch(features.astype(np.float32), weights, targets, either=True).best()
    assert found == Formula((1,), ())


def test_nothing_is_found_in_noise_without_predicates():
    empty = np.zeros((100, 4), np.float32)
    assert FormulaSearch(empty, np.ones(100), np.arange(100.0)).best() is None


def test_a_further_term_must_help():
    features = columns()
    targets = features[:, 4] + 0.0
    found = FormulaSearch(features.astype(np.float32), np.ones(len(targets)), targets).best()
    assert found == Formula((4,), ())


def test_truth_of_cells():
    formula = Formula((9, 5, 2), ("or", "and not"))
    expected = [(bool(c & 1) or bool(c & 2)) and not c & 4 for c in range(8)]
    assert formula.truth().tolist() == expected
    payload = {"terms": ["a", "b", "c"], "operators": ["or", "and not"]}
    assert holds_in(payload).tolist() == expected
    assert holds_in({"terms": [], "operators": []}).tolist() == [True]


def test_cells_have_the_shrunk_means_of_their_side():
    a = np.array([True, True, True, False, False])
    b = np.array([False, False, True, True, False])
    weights, targets = np.array([1.0, 1, 0.5, 1, 1]), np.array([4.0, 6, 8, 1, 0])
    formula = Formula((0, 1), ("and not",))
    found = concept_means(formula, ["a", "b"], [a, b], weights, targets, 2.0)
    inside = (10 + 3 * 2.0) / (2 + 3)
    outside = (4 + 1 + 0 + 3 * 2.0) / (2.5 + 3)
    # cells: neither, a alone, b alone, both
    expected = [(0 + 3 * outside) / 4, (10 + 3 * inside) / 5, (1 + 3 * outside) / 4, (4 + 3 * outside) / 3.5]  # fmt: skip
    assert found.cells.tolist() == pytest.approx(expected)
    assert found.counts.tolist() == [1, 2, 1, 1]


# ---- prediction -----------------------------------------------------------------------------------

WORDS = ["def", " get", "(", "self", ".", "x", ")", ":", "\n    ", "return", " 12", " the", ","]
PAYLOADS = [
    {"default": 0.5, "terms": ["digits", "after-return"], "operators": ["or"], "cells": [0.1, 2.0, 3.0, 4.0]},
    {"default": 0.5, "terms": [], "operators": [], "cells": [0.5]},
    {"default": 0.5, "terms": ["comma"], "operators": [], "cells": [-0.25, 1.0], "tokens": [1, 4], "values": [2.0, 3.0]},
    {"default": 0.2, "terms": ["self", "symbol", "keyword"], "operators": ["or", "and not"], "cells": list(range(8))},
    {"default": 0.2, "terms": ["comma"], "operators": [], "cells": [0.0, 1.0], "tokens": [], "values": []},
]  # fmt: skip


def random_lists(seed, n_lists=6):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, len(WORDS), rng.integers(1, 40)) for _ in range(n_lists)]


def predicted(payload, lists):
    """By hand: the mean of each token's cell, plus the table's value."""
    features = ConceptFeatures.of(lists, LIBRARY, WORDS)
    out = []
    for i, token in enumerate(np.concatenate(lists).tolist()):
        cell = sum(int(features.column(t)[i]) << k for k, t in enumerate(payload["terms"]))
        value = payload["cells"][cell]
        if "tokens" in payload:
            table = dict(zip(payload["tokens"], payload["values"], strict=True))
            value += table.get(token, payload["default"])
        out.append(value)
    return np.array(out)


def test_simulators_predict_the_mean_of_the_cell():
    lists = random_lists(0)
    reader = ConceptReader(LIBRARY, WORDS)
    together = predict_all(PAYLOADS, reader.features(lists))
    assert together.dtype == np.float32
    cells = cells_all(PAYLOADS, reader.features(lists))
    assert cells.dtype == np.uint8
    assert together.shape == cells.shape == (sum(map(len, lists)), len(PAYLOADS))
    for e, payload in enumerate(PAYLOADS):
        expected = predicted(payload, lists)
        name = "lookup+concepts" if "tokens" in payload else "concepts"
        simulated = np.concatenate(simulate(name, payload, lists, reader))
        np.testing.assert_allclose(simulated, expected)
        np.testing.assert_allclose(together[:, e], expected, rtol=1e-6)
        if "tokens" not in payload:
            np.testing.assert_allclose(np.array(payload["cells"])[cells[:, e]], expected)


def test_a_simulation_needs_the_library():
    with pytest.raises(InputError, match="need the library that they were made with"):
        simulate("concepts", PAYLOADS[0], [np.array([1])])


# ---- explaining -----------------------------------------------------------------------------------


def test_features_of_the_evidence_are_those_of_its_segments():
    """By position of the split, where a segment ends with its sequence; else from the contexts in the evidence."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(WORDS), 100)

    class Split:
        n_tokens, starts = 100, np.array([0, 37, 100])

        def read(self, low, high):
            return tokens[low:high].astype(np.int64)

    positions = np.sort(rng.choice(99, 30, replace=False))
    contexts = contexts_of([tokens], 4)[positions]
    evidence = Evidence(contexts, np.zeros(30), np.ones(30), positions)
    found = FitFeatures(LIBRARY, WORDS, Split(), 16).of(evidence)  # type: ignore[arg-type]
    edges = sorted({0, 36, 37, 99, 100, *range(0, 100, 16)})
    lists = [tokens[a:b] for a, b in pairwise(edges)]
    expected = ConceptFeatures.of(lists, LIBRARY, WORDS).matrix[positions]
    np.testing.assert_array_equal(found, expected)
    others = Evidence((contexts + 1) % len(WORDS), np.zeros(30), np.ones(30), positions)
    apart = FitFeatures(LIBRARY, WORDS, Split(), 16).of(others)  # type: ignore[arg-type]
    own = [row[row >= 0][::-1] for row in others.contexts]
    last = [ConceptFeatures.of([ids], LIBRARY, WORDS).matrix[-1] for ids in own]
    np.testing.assert_array_equal(apart, np.stack(last))


def test_what_a_look_up_leaves_is_computed_without_the_activation_itself():
    contexts = np.array([[4], [4], [4], [6]])
    evidence = Evidence(contexts, np.array([1.0, 2, 6, 5]), np.array([1.0, 0.5, 1, 1]))
    table = token_table(evidence, 0.5, 1, strength=1.0)
    assert table.tokens.tolist() == [4]
    expected = [
        1 - (0.5 * 2 + 6 + 0.5) / (1.5 + 1),
        2 - (1 + 6 + 0.5) / (2 + 1),
        6 - (1 + 0.5 * 2 + 0.5) / (1.5 + 1),
        5 - 0.5,  # not in the table
    ]
    assert residual_of(evidence, table, strength=1.0).tolist() == pytest.approx(expected)


def in_line_of_import(split):
    """Whether a token of the planted corpus is in the line after the word import: more on all tokens there."""
    tokens, documents = corpus(split)
    active = np.zeros(len(tokens), bool)
    seen = False
    for i, token in enumerate(tokens):
        if i and documents[i] != documents[i - 1]:
            seen = False
        seen = (token == 2 and (i == 0 or tokens[i - 1] == 1)) or (seen and token != 1)
        active[i] = seen
    return active


def test_stacked_on_a_look_up_a_formula_adds_what_the_context_says():
    def activations(split):
        return 2.0 * on_token(corpus(split)[0], 5) + 1.0 * in_line_of_import(split)

    config = ExplainConfig(explainers=("lookup", "concepts", "lookup+concepts"))
    explanations = explain_neuron(harvested(activations("fit")), config, STRINGS)
    lists = np.split(corpus("held_out")[0], 120)
    reader, truth = ConceptReader(LIBRARY, STRINGS), activations("held_out")
    scores = {}
    for e in explanations:
        simulated = np.concatenate(simulate(e.explainer, e.payload, lists, reader))
        scores[e.explainer] = np.corrcoef(simulated, truth)[0, 1]
    assert scores["lookup+concepts"] > scores["lookup"] + 0.1
    assert scores["lookup+concepts"] > scores["concepts"] + 0.1


OWN = """[[predicate]]
name = "sevens"
kind = "sevens"
token = " w[0-9]*7"
example = "a¦« w7»¦ w8"
"""


def test_explanations_with_a_users_predicate_are_scored_with_it(tmp_path):
    """The library travels with the explanations; a changed file is another input."""
    run = planted.run_with_harvest(tmp_path / "run", n_neurons=8, layers=1)
    file = tmp_path / "own.toml"
    file.write_text(OWN, encoding="utf-8")
    config = ExplainConfig(
        run=run.path, model="m", explainers=("lookup", "concepts"), concepts=(file,), quiet=True
    )
    found = read_explanations(explain(config).path)
    by_index = {e.neuron.index: e for e in found if e.explainer == "concepts"}
    assert "sevens" in by_index[7].payload["terms"]
    file.write_text(OWN.replace("sevens", "others"), encoding="utf-8")
    with pytest.raises(InputError, match="input concepts that has changed since"):
        explain(config)
    score(ScoreConfig(run=run.path, model="m", resamples=100, quiet=True))
    scores = [s for s in read_scores(run.path / "scores" / "m") if s.explainer == "concepts"]
    own = [s.score.value for s in scores if (s.control, s.neuron.index) == ("none", 7)]
    assert len(own) == 3
    assert min(own) > 0.4  # of the five tokens that end in 7, the neuron fires on one


# ---- over a whole split ---------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([5, 64, 1000]))
@settings(max_examples=25, deadline=None)
def test_streamed_scores_equal_those_of_simulating_every_token(seed, batch):
    """Own and another neuron's, in batches of whole texts; one neuron has no donor."""
    rng = np.random.default_rng(seed)
    lists = random_lists(seed, 12)
    tokens, n_neurons = np.concatenate(lists), 3
    activations = np.maximum(0, rng.normal(size=(len(tokens), n_neurons)) + (tokens == 2)[:, None])
    activations = activations.astype(np.float32)
    thresholds = np.quantile(activations, [0.9, 0.5], axis=0).astype(np.float32)
    thresholds[:, 0] = thresholds[::-1, 0]  # of one neuron, the first way is the wider one
    payloads = [PAYLOADS[i] for i in rng.permutation(len(PAYLOADS))[:n_neurons]]
    roles = np.array([[0, 1, 2], [1, -1, 0]])
    sums, whole = CellSums(payloads, roles, thresholds), Whole(len(WORDS), thresholds, [])
    kept = SplitFeatures([t for p in payloads for t in p["terms"]])
    reader, first = ConceptReader(LIBRARY, WORDS), 0
    while lists:
        part = [lists.pop(0)]
        while lists and sum(map(len, part)) < batch:
            part.append(lists.pop(0))
        of = slice(first, first + sum(map(len, part)))
        whole.add(activations[of], SortedContexts(TokenLists(part).contexts(1)))
        features = reader.features(part)
        sums.add(activations[of], features)
        kept.add(features)
        first = of.stop
    lists = random_lists(seed, 12)
    found = list(sums.simulated(whole, kept.ids(), kept.columns()))
    assert sorted((role, s.neuron) for role, s in found) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for role, of_explanation in found:
        number = roles[role].tolist().index(of_explanation.neuron)
        simulated, neuron = predicted(payloads[number], lists), of_explanation.neuron
        true = activations[:, neuron].astype(np.float64)
        groups = of_explanation.groups
        for t in (0, 1):
            expected, ranking = groups_of(simulated, true, true >= thresholds[t, neuron])
            assert groups.correlation() == pytest.approx(expected.correlation(), abs=1e-6)
            assert groups.cosine() == pytest.approx(expected.cosine(), abs=1e-6)
            ordered = groups.ordered(of_explanation.positive[t])
            assert ordered.average_precision() == pytest.approx(ranking.average_precision())
            assert ordered.overlap() == pytest.approx(ranking.overlap())
        strong, wide = (activations[:, neuron] >= t[neuron] for t in thresholds)
        silent = ~wide & ~strong
        for negative, counts in (
            (silent, of_explanation.silent),
            (silent & np.isin(tokens, tokens[strong]), of_explanation.hard),
        ):
            chosen = strong | negative
            _, expected = groups_of(simulated[chosen], true[chosen], strong[chosen])
            assert of_explanation.against(counts).roc_area() == pytest.approx(expected.roc_area())


def test_cells_number_the_terms_by_bits():
    a, b = np.array([True, False, True]), np.array([False, True, True])
    assert cells_of([a, b], 3).tolist() == [1, 2, 3]
    assert cells_of([], 3).tolist() == [0, 0, 0]
