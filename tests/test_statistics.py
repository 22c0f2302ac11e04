"""Statistics on cases whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cratelm.errors import InputError
from cratelm.records import (
    CORRELATIONS,
    METRICS,
    Estimate,
    Interval,
    NeuronId,
    NeuronScore,
    Score,
    Status,
)
from cratelm.report.cells import estimate_cell, interval_cell
from cratelm.stats.auc import roc_area, roc_area_of_ranks
from cratelm.stats.intervals import bootstrap, resampled_means
from cratelm.stats.ratio import ratio
from cratelm.stats.scores import Counts, all_statistics, compare_models, model_statistics

NO_VALUE = {
    "undefined": Score(None, Status.UNDEFINED, "the truth is constant"),
    "dead": Score(None, Status.DEAD, "never above 0"),
    "failed": Score(None, Status.FAILED, "no explanation"),
}


def scores(
    layers, model="a", site="ista", metric="top_and_random", control="none", explainer="lookup"
) -> list[NeuronScore]:
    """Scores from a list of values per layer; a word stands for why there is no value."""
    return [
        NeuronScore(
            NeuronId(model, site, layer, index),
            explainer,
            metric,
            control,
            NO_VALUE[v] if isinstance(v, str) else Score(float(v)),
        )
        for layer, values in enumerate(layers)
        for index, v in enumerate(values)
    ]


def statistics(layers, resamples=500, **fields):
    return model_statistics(
        scores(layers),
        explainer="lookup",
        metric="top_and_random",
        resamples=resamples,
        **fields,
    )


def test_mean_is_over_layers_of_layer_means_times_100():
    # Layer 0 has more neurons but counts the same.
    found = statistics([[0.1, 0.2, 0.3, 0.4], [0.5, 0.7]])
    assert [layer.mean for layer in found.layers] == pytest.approx([25, 60])
    assert found.mean == pytest.approx(42.5)
    assert found.variance == pytest.approx(17.5**2)
    assert found.low < found.mean < found.high
    assert 10 <= found.layers[0].low < 25 < found.layers[0].high <= 40


def test_policies_and_counts():
    layers = [[0.4, 0.2, "undefined", "dead"], [0.6, "failed", "undefined", "undefined"]]
    out, zero = statistics(layers), statistics(layers, policy="count_zero")
    assert [layer.mean for layer in out.layers] == pytest.approx([30, 60])
    assert [layer.mean for layer in zero.layers] == pytest.approx([15, 15])
    assert (out.mean, zero.mean) == pytest.approx((45, 15))
    assert out.counts == zero.counts == Counts(defined=3, undefined=3, dead=1, failed=1)
    assert out.layers[1].counts == Counts(defined=1, undefined=2, dead=0, failed=1)
    assert out.counts.total == 8
    # One value has no spread to resample: no interval is claimed for its layer or the model.
    assert (out.layers[1].low, out.low) == (None, None)
    assert zero.low is not None


def test_nothing_defined_is_no_number():
    found = statistics([["undefined", "dead"], ["undefined"]])
    assert (found.mean, found.low, found.high, found.variance) == (None, None, None, None)
    zero = statistics([["undefined", "dead"]], policy="count_zero")
    assert (zero.mean, zero.low, zero.high) == (0, 0, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_no_value_counts_as_chance(metric):
    """0 would be worse than an explanation that says nothing where chance is above 0."""
    chance = 20 if metric == "intruder" else 0 if metric in CORRELATIONS else 50
    layers = scores([[0.9, "failed", "undefined", "dead"]], metric=metric)
    zero = model_statistics(layers, explainer="lookup", metric=metric, policy="count_zero")
    assert zero.mean == pytest.approx((90 + 3 * chance) / 4)


def test_layer_without_a_value_is_left_out_of_the_model():
    found = statistics([[0.2, 0.4], ["undefined", "undefined"]])
    assert found.mean == pytest.approx(30)
    assert found.layers[1].mean is None
    assert found.low is not None


def test_interval_is_that_of_the_normal_law_for_many_neurons():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    found = statistics([values], resamples=10_000)
    error = 100 * values.std() / 20
    assert found.low == pytest.approx(100 * values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(100 * values.mean() + 1.96 * error, abs=0.15 * error)
    narrow = statistics([values], confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.15)


def test_interval_covers_the_truth_as_often_as_it_says():
    """95% intervals over 300 made-up models of 3 layers: 0.95 within three standard errors (0.038)."""
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        # Skewed scores with mean 1/6, 1/3, 1/2 in the three layers.
        layers = [draw.beta(1, 5, 40), draw.beta(1, 2, 60), draw.beta(2, 2, 50)]
        found = statistics(layers)
        covered += found.low <= 100 * (1 / 6 + 1 / 3 + 1 / 2) / 3 <= found.high
    assert 0.95 - 0.038 <= covered / 300 <= 0.95 + 0.038


def test_same_seed_same_interval():
    layers = [np.linspace(0, 1, 30)]
    assert statistics(layers, seed=4) == statistics(layers, seed=4)
    assert statistics(layers, seed=4).low != statistics(layers, seed=5).low


def test_all_statistics_has_every_group_and_both_policies():
    both = scores([[0.1, 0.2]]) + scores([[0.5, "dead"]], control="shuffled", metric="anthropic")
    found = all_statistics(both, resamples=200)
    assert [(s.metric, s.control, s.policy) for s in found] == [
        ("top_and_random", "none", "leave_out"),
        ("top_and_random", "none", "count_zero"),
        ("anthropic", "shuffled", "leave_out"),
        ("anthropic", "shuffled", "count_zero"),
    ]
    assert found[0].mean == pytest.approx(15)
    # where every neuron has a value, the second policy is not computed again
    for s in found:
        own = {"metric": s.metric, "control": s.control, "policy": s.policy}
        assert s == model_statistics(both, explainer="lookup", resamples=200, **own)


def test_scores_of_two_models_or_none_are_refused():
    mixed = scores([[0.1]]) + scores([[0.1]], model="b")
    for these in (mixed, []):
        with pytest.raises(InputError, match="exactly one model"):
            model_statistics(these, explainer="lookup", metric="top_and_random")


def compared(a, b, metric="top_and_random", **fields):
    return compare_models(
        scores(a, "crate", metric=metric),
        scores(b, "gpt2", site="mlp", metric=metric),
        metric,
        explainer="lookup",
        resamples=2000,
        **fields,
    )


def test_difference_effect_and_superiority_of_a_known_case():
    found = compared([[0.5, 0.7], [0.4, 0.6]], [[0.2, 0.6], [0.1, 0.5]])
    assert (found.mean_a, found.mean_b, found.difference) == pytest.approx((55, 35, 20))
    # Sums of squares 200, 200, 800, 800 over 8 - 4 degrees of freedom.
    assert found.cohens_d == pytest.approx(20 / np.sqrt(2000 / 4))
    # Layer 0: 0.5 beats 0.2; 0.7 beats both. Layer 1: 0.4 beats 0.1; 0.6 beats both.
    assert found.superiority == 0.75
    assert (found.paired, found.n_a, found.n_b, found.n_layers) == (False, 4, 4, 2)
    assert found.low < 20 < found.high


def test_unpaired_test_agrees_with_scipy():
    draw = np.random.default_rng(2)
    a, b = draw.normal(0.30, 0.1, 60), draw.normal(0.34, 0.1, 50)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), n_resamples=20_000, rng=0
    ).pvalue
    assert 0.01 < expected < 0.2
    assert compared([a], [b]).p_value == pytest.approx(expected, abs=0.02)


def test_paired_test_agrees_with_scipy_and_sees_what_unpaired_cannot():
    draw = np.random.default_rng(3)
    hardness = draw.uniform(0, 1, 80)
    a = hardness + 0.02 + draw.normal(0, 0.05, 80)
    b = hardness + draw.normal(0, 0.05, 80)
    paired = compared([a], [b], "random_only")
    unpaired = compared([a], [b], "random_only", paired=False)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert paired.paired
    assert paired.p_value == pytest.approx(expected, abs=0.02)
    assert paired.p_value < 0.05 < unpaired.p_value
    assert paired.difference == pytest.approx(unpaired.difference)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)
    assert paired.superiority == pytest.approx(np.mean(a > b))


def test_pairs_need_both_values():
    a, b = [[0.5, 0.9, "undefined", 0.7]], [[0.4, "dead", 0.3, 0.7]]
    out = compared(a, b, "random_only")
    assert (out.n_a, out.n_b) == (2, 2)
    assert out.difference == pytest.approx(5)
    assert out.superiority == 0.75  # one better, one tie
    zero = compared(a, b, "random_only", policy="count_zero")
    assert (zero.n_a, zero.difference) == (4, pytest.approx(100 * (2.1 - 1.4) / 4))


def test_pairs_match_by_index_and_not_by_order():
    a = scores([[0.1, 0.5, 0.9]], "crate", metric="random_only")
    b = scores([[0.1, 0.5, 0.9]], "gpt2", metric="random_only")[::-1]
    found = compare_models(a, b, "random_only", explainer="lookup", resamples=200)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.superiority == 0.5


def test_p_values_are_uniform_where_nothing_differs():
    draw = np.random.default_rng(4)
    found = [
        compare_models(
            scores([draw.beta(1, 4, 30), draw.beta(2, 2, 20)], "crate"),
            scores([draw.beta(1, 4, 25), draw.beta(2, 2, 20)], "gpt2"),
            "top_and_random",
            explainer="lookup",
            resamples=200,
        ).p_value
        for _ in range(150)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert min(found) >= 1 / 201


def test_difference_interval_covers_the_truth():
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        common = draw.uniform(0, 0.5, 60)
        a, b = common + draw.beta(2, 8, 60) + 0.1, common + draw.beta(2, 8, 60)
        found = compare_models(
            scores([a], "crate", metric="random_only"),
            scores([b], "gpt2", metric="random_only"),
            "random_only",
            explainer="lookup",
            resamples=400,
        )
        covered += found.low <= 10 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))  # fmt: skip
def test_superiority_is_the_share_of_pairs(a, b):
    found = compare_models(
        scores([[v / 5 for v in a]], "crate"),
        scores([[v / 5 for v in b]], "gpt2"),
        "top_and_random",
        explainer="lookup",
        resamples=1,
    )
    wins = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert found.superiority == pytest.approx(wins)
    assert found.p_value in (0.5, 1)


def test_equal_constants_have_no_effect_size():
    found = compared([[0.5, 0.5]], [[0.5, 0.5]])
    assert (found.cohens_d, found.cohens_d_low, found.p_value) == (None, None, 1)


def test_no_common_layer_is_named():
    b = [replace(s, neuron=replace(s.neuron, layer=7)) for s in scores([[0.3, 0.4]], "gpt2")]
    with pytest.raises(InputError, match="no layer in which both"):
        compare_models(scores([[0.1]], "crate"), b, "top_and_random", explainer="lookup")


@pytest.mark.parametrize("n", [2, 7, 400])
def test_bootstrap_draws_what_scipy_draws(n):
    """SciPy's quantiles may differ in the last digit, its draws may not."""
    values = np.random.default_rng(n).normal(5, 2, n)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(3)
    )
    ours = resampled_means(values, 500, np.random.default_rng(3))
    assert np.array_equal(ours, theirs.bootstrap_distribution)
    found = bootstrap(values, 3, 500)
    assert found is not None
    assert (found.value, found.n) == (values.mean(), n)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval))


def test_draws_do_not_depend_on_the_blocks(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = resampled_means(values, 333, np.random.default_rng(1))
    monkeypatch.setattr("cratelm.stats.intervals._BLOCK", 150)
    assert np.array_equal(whole, resampled_means(values, 333, np.random.default_rng(1)))


def test_an_interval_in_words():
    assert Interval(0.719, 0.712, 0.7274).in_words(".1f", 100) == "71.9 (71.2 to 72.7)"
    assert Interval(-0.25, -0.5, 0.125).in_words("+.2f") == "-0.25 (-0.50 to +0.12)"
    assert Interval(0.5, None, None, 1).in_words(".1f", 100) == "50.0"


def test_area_of_ranks_is_the_area():
    values = np.random.default_rng(0).integers(0, 9, 40).astype(float)
    mask = np.arange(40) % 3 == 0
    ranks = stats.rankdata(values)[mask]
    pairs = [(p > q) + (p == q) / 2 for p in values[mask] for q in values[~mask]]
    assert roc_area_of_ranks(ranks, int((~mask).sum())) == roc_area(values[mask], values[~mask])
    assert roc_area(values[mask], values[~mask]) == pytest.approx(np.mean(pairs))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=9))
def test_the_error_of_a_ratio_is_not_negative(pairs):
    """Neither for a negative ratio nor for a negative denominator; the sign of both sums changes nothing."""
    x, y = np.array(pairs).T
    if abs(y.sum()) < 1e-3:
        return
    of, turned, negative = ratio(x, y), ratio(-x, -y), ratio(x, -y)
    assert of.error is not None
    assert of.error >= 0
    assert (turned.value, turned.error) == pytest.approx((of.value, of.error))
    assert (negative.value, negative.error) == pytest.approx((-of.value, of.error))


def test_a_negative_ratio_shows_a_positive_error():
    assert ratio([-3.0, -2.9], [-2.0, 4.0]).show(".2f") == "-2.95 ± 8.90"
    with pytest.raises(ValueError, match="must be at least 0"):
        Estimate(-1.482, -0.010)


def test_a_negative_factor_keeps_intervals_in_order():
    assert Interval(1.0, 0.5, 2.0).in_words(".1f", -1) == "-1.0 (-2.0 to -0.5)"
    cell = interval_cell(Interval(1.0, 0.5, 2.0), -1)
    assert (cell.low, cell.high) == (-2.0, -0.5)
    assert estimate_cell(Estimate(1.0, 0.1), -1) == Estimate(-1.0, 0.1)
