"""Measures over all tokens of a split, against their definitions on every token one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratelm.explain.evidence import evidence_of
from cratelm.explain.lookup import token_table
from cratelm.explain.trie import context_trie
from cratelm.records import Excerpt
from cratelm.score.contexts import Nodes, NodeSums, SortedContexts, Whole
from cratelm.score.simulators import TokenLists, simulator_of
from cratelm.stats.grouped import Groups

VOCABULARY = 7


def groups_of(simulated, true, positive):
    """Each token a group of its own: nothing is summed beforehand."""
    groups = Groups(simulated, np.ones(len(true), int), true, float(true @ true))
    return groups, groups.ordered(positive.astype(np.int64))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["many values", "few values"]))
@settings(max_examples=40, deadline=None)
def test_measures_equal_those_of_scikit_learn_and_scipy(seed, kind):
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    true, simulated = rng.exponential(size=(2, 200))
    simulated = np.round(simulated) if kind == "few values" else simulated + 0.3 * true
    positive = true > 1
    groups, ranking = groups_of(simulated, true, positive)
    assert groups.correlation() == pytest.approx(stats.pearsonr(true, simulated).statistic)
    cosine = true @ simulated / np.sqrt((true @ true) * (simulated @ simulated))
    assert groups.cosine() == pytest.approx(cosine)
    assert ranking.average_precision() == pytest.approx(
        metrics.average_precision_score(positive, simulated)
    )
    assert ranking.roc_area() == pytest.approx(metrics.roc_auc_score(positive, simulated))
    assert ranking.base_rate == positive.mean()
    chosen = simulated >= simulated.max() / 2
    expected = metrics.f1_score(positive, chosen), metrics.jaccard_score(positive, chosen)
    assert ranking.overlap() == pytest.approx(expected)


def test_measures_that_do_not_exist():
    constant, some = np.full(4, 0.1), np.array([0.0, 1.0, 2.0, 0.0])
    none = np.zeros(4, bool)
    assert groups_of(constant, some, none)[0].correlation() is None
    assert groups_of(some, constant, none)[0].correlation() is None
    assert groups_of(np.zeros(4), some, none)[0].cosine() is None
    ranking = groups_of(some, some, none)[1]
    assert ranking.average_precision() is ranking.roc_area() is ranking.overlap() is None
    assert groups_of(-some, some, some > 0)[1].overlap() is None  # never above 0
    empty, ranking = groups_of(np.zeros(0), np.zeros(0), none[:0])
    assert empty.correlation() is empty.cosine() is ranking.base_rate is None


def payload_of(rng, tokens, activations, explainer):
    record = Excerpt("random", 0, -1, tokens[:60].astype(np.int32), activations[:60], 5, 0, 5)
    evidence = evidence_of([record], 3, 1.0)
    mean = float(activations.mean())
    if explainer == "lookup":
        return token_table(evidence, mean, 4).payload()
    return context_trie(evidence, mean, 12, depth=3).payload()


@given(st.integers(0, 2**32 - 1), st.sampled_from([5, 64, 1000]))
@settings(max_examples=40, deadline=None)
def test_streamed_scores_equal_those_of_simulating_every_token(seed, batch):
    """Look-up and trie, own and another neuron's, in batches; one neuron has no donor."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, 8)  # of segments, over whose starts no context reaches
    segments = [rng.integers(0, VOCABULARY, n) for n in lengths]
    tokens = np.concatenate(segments)
    n_neurons = 3
    activations = np.maximum(0, rng.normal(size=(len(tokens), n_neurons)) + (tokens == 2)[:, None])
    activations = activations.astype(np.float32)
    explained = rng.integers(0, VOCABULARY, 60)
    explained_by = np.maximum(0, rng.normal(size=(60, n_neurons)) + (explained == 2)[:, None])
    kinds = ["lookup", "trie", "trie"]
    payloads = [
        payload_of(rng, explained, explained_by[:, h].astype(np.float32), kind)
        for h, kind in enumerate(kinds)
    ]
    nodes = Nodes.of(payloads)
    own, other = NodeSums(nodes, np.array([0, 1, 2])), NodeSums(nodes, np.array([1, -1, 0]))
    thresholds = np.quantile(activations, [0.9, 0.5], axis=0).astype(np.float32)
    whole = Whole(n_neurons, thresholds, [own, other])
    depth = 3
    contexts = TokenLists(segments).contexts(depth)
    for first in range(0, len(tokens), batch):
        of = slice(first, first + batch)
        whole.add(activations[of], SortedContexts(contexts[of]))
    assert whole.n == len(tokens)
    np.testing.assert_allclose(whole.total, activations.sum(0), rtol=1e-5)
    lists = TokenLists(segments)
    for sums in (own, other):
        for number, of_explanation in enumerate(sums.groups(whole)):
            neuron = sums.neurons[number]
            if neuron < 0:
                assert of_explanation is None
                continue
            groups, positive = of_explanation
            simulated = simulator_of(kinds[number]).values(payloads[number], lists)
            true = activations[:, neuron].astype(np.float64)
            for t in (0, 1):
                is_positive = activations[:, neuron] >= thresholds[t, neuron]
                expected, ranking = groups_of(simulated, true, is_positive)
                assert groups.correlation() == pytest.approx(expected.correlation(), abs=1e-6)
                assert groups.cosine() == pytest.approx(expected.cosine(), abs=1e-6)
                found = groups.ordered(positive[t])
                assert found.average_precision() == pytest.approx(ranking.average_precision())
                assert found.overlap() == pytest.approx(ranking.overlap())
                assert found.base_rate == ranking.base_rate


def test_a_context_with_an_unknown_token_has_no_tokens():
    contexts = SortedContexts(np.array([[1, -1], [1, 1], [2, 1]]))
    group, low, high = contexts.spans(0, np.zeros(3, int), np.array([1, 2, 99]))
    assert group.tolist() == [0, 1, -1]
    assert (high - low).tolist() == [2, 1, 0]
    group, low, high = contexts.spans(1, np.array([0, 1, -1]), np.array([1, 1, 1]))
    assert (high - low).tolist() == [1, 1, 0]
