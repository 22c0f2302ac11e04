"""Measures over all tokens of a split, against their definitions on every token one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratelm.explain.evidence import evidence_of
from cratelm.explain.lookup import token_table
from cratelm.explain.trie import context_trie
from cratelm.records import Excerpt, Interval
from cratelm.score.contexts import Nodes, NodeSums, SortedContexts, Whole
from cratelm.score.simulators import TokenLists, simulator_of
from cratelm.score.token_share import Highest, TokenMeans
from cratelm.score.whole_summary import FIGURES, WholeMean, WholeSummary
from cratelm.stats.grouped import Groups
from cratelm.stats.layers import LayeredMean, layered_mean

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
    thresholds[:, 0] = thresholds[::-1, 0]  # of one neuron, the first way is the wider one
    whole = Whole(VOCABULARY, thresholds, [own, other])
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
            groups, positive = of_explanation.groups, of_explanation.positive
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
            strong, wide = (activations[:, neuron] >= t[neuron] for t in thresholds)
            for negative, counts in (
                (~wide & ~strong, of_explanation.silent),
                (~wide & ~strong & np.isin(tokens, tokens[strong]), of_explanation.hard),
            ):
                chosen = strong | negative
                _, expected = groups_of(simulated[chosen], true[chosen], strong[chosen])
                assert of_explanation.against(counts).roc_area() == pytest.approx(
                    expected.roc_area()
                )


def test_a_context_with_an_unknown_token_has_no_tokens():
    contexts = SortedContexts(np.array([[1, -1], [1, 1], [2, 1]]))
    group, low, high = contexts.spans(0, np.zeros(3, int), np.array([1, 2, 99]))
    assert group.tolist() == [0, 1, -1]
    assert (high - low).tolist() == [2, 1, 0]
    group, low, high = contexts.spans(1, np.array([0, 1, -1]), np.array([1, 1, 1]))
    assert (high - low).tolist() == [1, 1, 0]


# ---- the share of the last token ------------------------------------------------------------------


def token_share(fit, fit_tokens, held_out, tokens, batch=50):
    means = TokenMeans(VOCABULARY + 1, fit.shape[1])
    for first in range(0, len(fit), batch):
        of = slice(first, first + batch)
        means.add(fit[of].astype(np.float32), fit_tokens[of])
    entropy = means.entropy()
    shrunk = means.shrunk()
    for first in range(0, len(held_out), batch):
        of = slice(first, first + batch)
        shrunk.add(held_out[of].astype(np.float32), tokens[of])
    return shrunk.share(), entropy


def test_the_token_share_of_planted_neurons():
    """A function of the token: 1. Independent of it: 0. Half of the variance from the token: 1/2. Constant: none."""
    rng = np.random.default_rng(0)
    n = 20_000
    value = rng.normal(size=VOCABULARY)
    value = (value - value.mean()) / value.std()

    def draw():
        tokens = rng.integers(0, VOCABULARY, n)
        noise = rng.normal(size=n)
        of_token = value[tokens]
        return tokens, np.stack([of_token, noise, of_token + noise, np.full(n, 0.3)], 1)

    (fit_tokens, fit), (tokens, held_out) = draw(), draw()
    share, _ = token_share(fit, fit_tokens, held_out, tokens)
    assert share[0] == pytest.approx(1, abs=1e-6)
    assert share[1] == pytest.approx(0, abs=0.002)
    assert share[2] == pytest.approx(0.5, abs=0.02)
    assert np.isnan(share[3])


def test_the_token_share_equals_its_definition_without_shrinking():
    """Where nothing varies within a token of the fit split, nothing is shrunk; an unseen token has the mean."""
    fit_tokens = np.array([0, 0, 1, 1, 2])
    fit = np.array([[1.0], [1], [3], [3], [7]])
    tokens, held_out = np.array([0, 1, 2, 3]), np.array([[1.5], [2], [7], [3]])
    share, _ = token_share(fit, fit_tokens, held_out, tokens)
    means = np.array([1, 3, 7, fit.mean()])
    true = held_out[:, 0]
    expected = 1 - ((true - means) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    assert share[0] == pytest.approx(expected, rel=1e-5)


def test_a_rare_token_is_shrunk_by_the_variance_within_tokens():
    """k = within / between: here 1 / 1, so that a token seen once counts half, one seen 999 times all but wholly."""
    rng = np.random.default_rng(1)
    groups, size = 4000, 5
    effect = rng.normal(size=groups)
    tokens = np.repeat(np.arange(groups), size)
    values = (effect[tokens] + rng.normal(size=len(tokens)))[:, None].astype(np.float32)
    means = TokenMeans(groups, 1)
    means.add(values, tokens)
    shrunk = means.shrunk()._means[:, 0]
    own = values[:, 0].reshape(groups, size).mean(1)
    expected = (size * own + values.mean()) / (size + 1)
    np.testing.assert_allclose(shrunk, expected, atol=0.1)
    assert abs(np.polyfit(own, shrunk, 1)[0] - size / (size + 1)) < 0.02


def test_the_token_entropy_of_planted_neurons():
    """One token: 0. Two tokens alike: ln 2. All alike: ln V. Never above 0: none. What is below 0 does not count."""
    tokens = np.tile(np.arange(VOCABULARY), 30)
    one = (tokens == 3) * 2.0
    two = ((tokens == 3) | (tokens == 5)) * 2.0 - (tokens == 1)
    fit = np.stack([one, two, np.ones(len(tokens)), -one], 1)
    _, entropy = token_share(fit, tokens, fit, tokens)
    assert entropy[:3] == pytest.approx([0, np.log(2), np.log(VOCABULARY)], abs=1e-6)
    assert np.isnan(entropy[3])


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 40, 1000]))
@settings(max_examples=30, deadline=None)
def test_the_threshold_of_top_firings(seed, batch):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 400))
    values = np.maximum(0, rng.normal(size=(n, 3)) - [0, 1, 9]).astype(np.float32)
    highest = Highest(3, n, 0.1)
    for first in range(0, n, batch):
        highest.add(values[first : first + batch])
    for neuron in range(3):
        fired = np.sort(values[values[:, neuron] > 0, neuron])[::-1]
        wanted = int(np.ceil(0.1 * len(fired)))
        expected = fired[wanted - 1] if len(fired) else np.inf
        assert highest.threshold()[neuron] == expected
    np.testing.assert_array_equal(highest.maximum(), values.max(0))


def test_only_context_tells_hard_negatives_apart():
    """The neuron fires on token 1 after token 2. A table of tokens is at chance among them, the trie is not."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, 4000)
    fires = (tokens == 1) & (np.roll(tokens, 1) == 2)
    fires[0] = False
    table = {"default": 0.0, "tokens": [1], "values": [0.25]}
    trie = {"default": 0.0, "tokens": [1, 2], "values": [0.0, 1.0], "parents": [-1, 0]}
    sums = NodeSums(Nodes.of([table, trie]), np.array([0, 0]))
    whole = Whole(4, np.full((2, 1), 0.1, np.float32), [sums])
    contexts = TokenLists([tokens]).contexts(2)
    whole.add(fires[:, None].astype(np.float32), SortedContexts(contexts))
    by_table, by_trie = sums.groups(whole)
    assert by_table.against(by_table.hard).roc_area() == 0.5
    assert by_table.against(by_table.silent).roc_area() > 0.85
    assert by_trie.against(by_trie.hard).roc_area() == 1


def test_the_median_of_token_shares_is_not_moved_by_a_few_neurons():
    """A neuron that fires on one token of the fit split and hardly on the held-out one has a share far below 0."""
    fit, held_out = np.zeros((400, 2), np.float32), np.zeros((400, 2), np.float32)
    tokens = np.arange(400) % 20
    fit[:, 0] = held_out[:, 0] = tokens == 3
    fit[7, 1], held_out[7, 1] = 1.0, 0.01
    share, _ = token_share(fit, tokens, held_out, tokens)
    assert share[0] == pytest.approx(1)
    assert share[1] < -1
    values = [0.4, 0.5, 0.6, share[1] * 100, 0.2, 0.3, 0.7]
    layers = [0, 0, 0, 0, 1, 1, 1]
    mean, median = (layered_mean(values, layers, medians=m) for m in (False, True))
    assert mean.mean.value < -1
    assert median.mean.value == pytest.approx(np.mean([0.45, 0.3]))
    assert (median.defined, median.undefined) == (7, 0)
    summary = WholeSummary(100, mean, mean, (), (), median, 1)
    assert "1 of 7 token shares are below 0 (the fit split misleads): median 37.5" in summary.in_words()["last token alone"]  # fmt: skip


def test_one_scored_neuron_has_no_shuffled_control():
    """Explanations are shuffled among neurons: with one there is no such score, and the others are reported."""
    one = LayeredMean(Interval(0.5, None, None, 1), 1, 0)
    scores = tuple(WholeMean("lookup", "none", name, one) for name in FIGURES)
    words = WholeSummary(100, one, one, scores, ()).in_words()
    assert words["lookup all tokens"].startswith("correlation 50.0; shuffled none; 0 undefined")
