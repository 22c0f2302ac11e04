"""The correlation over all tokens, estimated from a few of each quantile bin, against the figure over all of them."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_llm import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import STRINGS, corpus, harvested, on_pair, on_token
from tiny_run import MODEL, copied

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.llm.requests import Failure, FailureKind
from cratelm.records import OPENAI_QUANTILES, Explanation, NeuronId, NeuronScore, Score, Status
from cratelm.score.config import PER_BIN, ScoreConfig
from cratelm.score.controls import ExplanationSet
from cratelm.score.estimate import NOT_COUNTED, stratum_sizes
from cratelm.score.pipeline import Reader, Scoring, plan_scores, score_records
from cratelm.score.score import score
from cratelm.score.scorers import Prompting
from cratelm.score.selection import drawn_in_bins
from cratelm.score.simulators import LLMSimulator, TokenLists, simulator_of
from cratelm.score.store import read_scores, read_whole_scores, write_scores
from cratelm.stats.stratified import stratified_correlation

N_BINS = len(OPENAI_QUANTILES) - 1


# ---- the formula -----------------------------------------------------------------------------------


def population(rng, n=20_000):
    """True and simulated activations [n] of a sparse neuron, simulated too broadly, and the bin of each."""
    true = np.maximum(0, rng.normal(size=n) - 1)
    simulated = np.maximum(0, 0.6 * true + 0.3 * rng.normal(size=n)) + (rng.random(n) < 0.05)
    edges = np.sort(true)[[int(q * (n - 1)) for q in OPENAI_QUANTILES[:-1]]]
    return true, simulated, np.searchsorted(edges, true, side="right") - 1


def drawn(rng, bins, per_bin):
    """Draws without replacement from each bin, all members if there are fewer."""
    members = [np.flatnonzero(bins == b) for b in range(N_BINS)]
    return np.concatenate([rng.permutation(of)[:per_bin] for of in members])


def estimated(chosen, true, simulated, bins, **options):
    sizes = np.bincount(bins, minlength=N_BINS)
    return stratified_correlation(true[chosen], simulated[chosen], bins[chosen], sizes, **options)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_estimate_is_that_of_each_draw_repeated_for_the_tokens_it_stands_for(seed):
    rng = np.random.default_rng(seed)
    stratum = np.repeat(np.arange(4), rng.integers(1, 5, 4))
    weight = rng.integers(1, 6, 4)
    sizes = weight * np.bincount(stratum)
    a, s = rng.normal(size=(2, len(stratum)))
    order = rng.permutation(len(stratum))
    found = stratified_correlation(1e9 * a[order], s[order] - 1e6, stratum[order], sizes)
    repeated = np.corrcoef(np.repeat(a, weight[stratum]), np.repeat(s, weight[stratum]))[0, 1]
    assert found.value == pytest.approx(repeated, abs=1e-6)


def test_strata_that_were_drawn_whole_are_known():
    true, simulated, bins = population(np.random.default_rng(0), 500)
    found = estimated(np.arange(500), true, simulated, bins)
    exact = np.corrcoef(true, simulated)[0, 1]
    assert (found.value, found.low, found.high) == pytest.approx((exact, exact, exact))


def test_many_draws_come_close_and_without_weights_they_do_not():
    rng = np.random.default_rng(1)
    true, simulated, bins = population(rng)
    exact = np.corrcoef(true, simulated)[0, 1]
    errors = {
        per_bin: [
            estimated(drawn(rng, bins, per_bin), true, simulated, bins, resamples=0).value - exact
            for _ in range(40)
        ]
        for per_bin in (20, 320)
    }
    spread = {per_bin: np.std(of) for per_bin, of in errors.items()}
    assert spread[320] < 0.4 * spread[20]
    assert np.mean(errors[320]) == pytest.approx(0, abs=0.01)
    chosen = drawn(rng, bins, 320)
    assert abs(np.corrcoef(true[chosen], simulated[chosen])[0, 1] - exact) > 0.1


@pytest.mark.parametrize(
    ("per_bin", "least", "most"), [(5, 0.7, 0.9), (20, 0.75, 0.93), (200, 0.9, 0.99)]
)
def test_intervals_of_few_draws_cover_too_little(per_bin, least, most):
    rng = np.random.default_rng(per_bin)
    true, simulated, bins = population(rng)
    exact = np.corrcoef(true, simulated)[0, 1]
    found = [
        estimated(drawn(rng, bins, per_bin), true, simulated, bins, resamples=300)
        for _ in range(150)
    ]
    covered = np.mean([f.low <= exact <= f.high for f in found if f.low is not None])
    assert least <= covered <= most


def test_what_has_no_value_or_no_bounds():
    sizes, bins = [100, 10], [0, 0, 0, 1, 1, 1]
    constant, varied = np.full(6, 0.1), np.array([0, 0, 0, 1.0, 2, 3])
    for a, s in ((constant, varied), (varied, constant)):
        assert stratified_correlation(a, s, bins, sizes).value is None
    once = stratified_correlation([0, 0.1, 1, 2], [0, 1, 1, 2], [0, 0, 0, 1], [100, 10])
    assert once.value is not None
    assert (once.low, once.high) == (None, None)
    # s differs at a single draw of three, which is not among two drawn again in 4 of 9 resamples
    rare = stratified_correlation(varied, [0, 0, 0, 0, 0, 1], bins, sizes, resamples=2000)
    assert rare.undefined / 2000 == pytest.approx(4 / 9, abs=0.04)
    assert rare.low < rare.value < rare.high
    # and a at a single draw of the other stratum: together too often
    both = stratified_correlation([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], bins, sizes)
    assert both.undefined / 2000 == pytest.approx(1 - (5 / 9) ** 2, abs=0.04)
    assert both.value is not None
    assert (both.low, both.high) == (None, None)
    for strata, of in ((bins, [100, 10, 5]), (bins, [100, 0]), ([0] * 6, [100, 10]), ([0, 1], [5])):
        with pytest.raises(InputError, match="draw from each that has members"):
            stratified_correlation(range(len(strata)), range(len(strata)), strata, of)


# ---- of a neuron ------------------------------------------------------------------------------------

RECORD = harvested(on_pair(corpus("held_out")[0], 1, 2), "held_out", n_openai=20)
EXPLANATION = Explanation(
    RECORD.neuron,
    "lookup",
    "the token ` import`",
    {"default": 0.01, "tokens": [1, 2, 4], "values": [0.1, 0.4, 0.05]},
    (),
)


def none_is_duplicate(excerpts):
    return np.zeros(len(excerpts), bool)


def scoring(explanation=EXPLANATION, find_duplicates=none_is_duplicate, **fields):
    explanations = ExplanationSet([explanation], None, seed=0)
    return Scoring(
        ("all_tokens_estimate",),
        (explanation.explainer,),
        explanations,
        (),
        find_duplicates,
        **fields,
    )


def own(record, settings) -> NeuronScore:
    return next(s for s in score_records([record], settings) if s.control == "none")


def test_the_excerpts_are_of_each_bin_and_end_with_the_chosen_token():
    chosen = drawn_in_bins(RECORD, 2)
    bins = [e.bin for e in chosen]
    assert bins == sorted(2 * np.flatnonzero(RECORD.summary.openai_counts).tolist())
    tokens, _ = corpus("held_out")
    for e in chosen:
        assert e.token_ids[-1] == tokens[e.position]
        assert len(e) == min(32, e.position % 60) + 1


def test_neurons_with_the_same_excerpts_choose_different_ones():
    other = replace(RECORD, summary=replace(RECORD.summary, neuron=NeuronId("m", "ista", 0, 1)))

    def positions(record, per_bin):
        return {e.position for e in drawn_in_bins(record, per_bin)}

    assert positions(RECORD, 5) != positions(other, 5)
    assert positions(RECORD, 5) < positions(RECORD, 10)
    assert positions(RECORD, 99) == positions(other, 99)
    assert positions(RECORD, 99) == {e.position for e in RECORD.of_kind("openai_bin")}


def test_only_the_chosen_tokens_are_scored_with_their_weights():
    found = own(RECORD, scoring(per_bin=3))
    excerpts = drawn_in_bins(RECORD, 3)
    values = simulator_of("lookup").values(
        EXPLANATION.payload, TokenLists([e.token_ids[-1:] for e in excerpts])
    )
    bins = np.array([e.bin for e in excerpts])
    weight = np.array(RECORD.summary.openai_counts)[bins] / np.bincount(bins)[bins]
    true = np.array([e.activations[-1] for e in excerpts], np.float64)
    covariance = np.cov(true, values, aweights=weight, ddof=0)
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert found.score.value == pytest.approx(expected)
    assert (found.score.n_records, found.score.n_tokens) == (len(excerpts), len(excerpts))
    assert found.score.low <= found.score.value <= found.score.high
    assert (found.score.r2, found.score.absolute_deviation) == (None, None)
    assert found.documents == tuple(sorted({e.document for e in excerpts}))


def test_all_members_of_all_bins_give_the_figure_over_all_tokens():
    tokens, _ = corpus("held_out")
    true = on_token(tokens, 5) + on_token(tokens, 6) / 2
    record = harvested(true, "held_out", n_openai=len(tokens))
    table = {"default": 0.0, "tokens": [5, 7], "values": [1.0, 1.0]}
    found = own(record, scoring(replace(EXPLANATION, payload=table), per_bin=len(tokens)))
    exact = np.corrcoef(true.astype(np.float32), np.isin(tokens, [5, 7]))[0, 1]
    assert found.score.value == pytest.approx(exact)
    assert found.score.high - found.score.low < 1e-9
    few = own(record, scoring(replace(EXPLANATION, payload=table)))
    assert few.score.n_records == np.minimum(PER_BIN, record.summary.openai_counts).sum()
    assert few.score.value != pytest.approx(exact, abs=1e-3)


def test_tokens_below_the_lowest_edge_count_with_the_lowest_bin():
    summary = replace(RECORD.summary, openai_counts=np.array([2, 598, 300, 90, 10]))
    for edges, sizes in (
        ([0, 0, 0.5, 1, 2, 3], [0, 600, 300, 90, 10]),  # nothing is drawn from a bin of no width
        ([0, 0.1, 0.5, 1, 2, 3], [2, 598, 300, 90, 10]),
    ):
        of = replace(summary, openai_edges=np.array(edges, np.float32))
        assert stratum_sizes(of, np.array([4, 1, 2, 3, 1])).tolist() == sizes
    assert summary.openai_counts[0] == 2  # is not changed


def test_what_is_not_counted_or_not_drawn_has_no_value():
    unknown = replace(RECORD, summary=replace(RECORD.summary, openai_counts=None))
    assert own(unknown, scoring()).score.reason == NOT_COUNTED
    last = max(e.bin for e in RECORD.of_kind("openai_bin"))
    part = replace(RECORD, excerpts=[e for e in RECORD.excerpts if e.bin != last])
    n = np.count_nonzero(RECORD.summary.openai_counts)
    found = own(part, scoring()).score
    assert (found.status, found.reason) == (
        Status.UNDEFINED,
        f"no excerpts from 1 of {n} quantile bins that have tokens",
    )


def test_near_duplicates_are_left_out_of_the_second_value():
    first = {e.position for e in drawn_in_bins(RECORD, 1)}

    def duplicates(excerpts):
        return np.array([e.position in first for e in excerpts], bool)

    found = own(RECORD, scoring(find_duplicates=duplicates, per_bin=99)).score
    kept = [e for e in RECORD.excerpts if e.position not in first]
    rest = own(replace(RECORD, excerpts=kept), scoring(per_bin=99)).score
    assert found.n_duplicates == len(first)
    assert found.without_duplicates == pytest.approx(rest.value)
    assert found.without_duplicates != found.value


# ---- with a language model ---------------------------------------------------------------------------

GONE = Failure(FailureKind.STATUS, "status 500")


def test_failed_calls_cost_their_excerpts_and_a_whole_bin_the_score():
    by_model = replace(EXPLANATION, explainer="fake")
    reader = Reader("fake", {"": LLMSimulator(STRINGS, True, 9, 10)}, Prompting(STRINGS, True, 0))
    settings = scoring(by_model, reader=reader)
    pending, *controls = plan_scores(RECORD, settings)
    assert [p.row.control for p in controls] == ["shuffled", "constant"]
    assert pending.task is not None
    outcomes = [outcome for ((_, outcome),) in FakeModel().answer(pending.task.requests)]
    excerpts = drawn_in_bins(RECORD, PER_BIN)
    assert len(outcomes) == len(excerpts)

    def graded(lost):
        return pending.task.grade([GONE if i in lost else o for i, o in enumerate(outcomes)])

    whole, part = graded(set()), graded({0, 1, len(excerpts) - 1})
    assert (whole.status, whole.n_failed, whole.n_records) == (Status.DEFINED, 0, len(excerpts))
    assert (part.status, part.n_failed, part.n_records) == (Status.DEFINED, 3, len(excerpts) - 3)
    last = [i for i, e in enumerate(excerpts) if e.bin == excerpts[-1].bin]
    assert graded(set(last[1:])).status == Status.DEFINED
    assert graded(set(last)).status == Status.FAILED
    assert graded(set(last)).n_failed == len(last)


# ---- of a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The tiny run as version 0.1.0 harvested it."""
    return copied(tmp_path_factory.mktemp("old"))


def test_a_harvest_without_counts_is_named_with_what_to_type(old):
    config = ScoreConfig(run=old, model=MODEL, metrics=("all_tokens_estimate",), force=True)
    with pytest.raises(InputError, match=r"harvest of crate-2l lacks .* `cratelm harvest --force"):
        score(config)


@pytest.fixture(scope="module")
def estimated_run(old):
    """The tiny run, harvested and scored again, once without the metric and once with it."""
    common = {"run": old, "model": MODEL, "force": True, "quiet": True}
    sizes = {"top": 4, "random": 4, "context": 8, "short_context": 2, "pilot_tokens": 500}
    harvest(HarvestConfig(tokens=1000, per_bin=20, device="cpu", **sizes, **common))
    explain(ExplainConfig(**common))
    without = score(ScoreConfig(all_tokens=False, resamples=300, **common))
    names = pq.read_schema(without.path / "scores.parquet").names
    means = without.means
    metrics = ("top_and_random", "all_tokens_estimate")
    return names, means, score(ScoreConfig(metrics=metrics, per_bin=20, resamples=300, **common))


def test_estimates_agree_with_the_figures_over_all_tokens(estimated_run):
    """Of the neurons of a run, without a language model: each against its own figure, and the means.

    Neurons share drawn tokens, so that the mean of 64 is not 8 times as exact as one of them.
    """
    _, _, result = estimated_run
    exact = {
        (s.neuron, s.explainer, s.control): s.correlation for s in read_whole_scores(result.path)
    }
    scores = [
        s
        for s in read_scores(result.path)
        if s.metric == "all_tokens_estimate" and s.score.value is not None
    ]
    own = [s for s in scores if s.control == "none"]
    assert len(own) > 0.9 * sum(key[2] == "none" for key in exact)
    for control in ("none", "shuffled"):
        of = [s for s in scores if s.control == control]
        true = np.array([exact[s.neuron, s.explainer, control] for s in of])
        value, low, high = (
            np.array([getattr(s.score, n) for s in of]) for n in ("value", "low", "high")
        )
        assert value.mean() == pytest.approx(true.mean(), abs=0.06)
        assert ((low - 1e-4 <= true) & (true <= high + 1e-4)).mean() > 0.85
        assert np.corrcoef(value, true)[0, 1] > 0.6
        assert (high - low).mean() < 0.5


def test_other_scores_are_the_same_with_and_without_the_estimate(estimated_run):
    names, means, result = estimated_run
    assert not {"low", "high"} & set(names)
    for explainer in ("lookup", "trie"):
        assert result.means[f"{explainer} top_and_random"] == means[f"{explainer} top_and_random"]
        assert f"{explainer} all_tokens_estimate" in result.means
        assert f"{explainer} all_tokens_estimate" not in means


# ---- files -------------------------------------------------------------------------------------------


def test_bounds_are_written_with_their_metric_alone(tmp_path):
    neuron = NeuronId("m", "ista", 0, 1)
    score = Score(0.5, n_records=25, low=0.25, high=0.75)
    rows = [NeuronScore(neuron, "trie", "all_tokens_estimate", "none", score, explained_by="trie")]
    for with_bounds in (True, False):
        folder = tmp_path / str(with_bounds)
        folder.mkdir()
        write_scores(folder, rows, with_bounds=with_bounds)
        names = pq.read_schema(folder / "scores.parquet").names
        assert ("low" in names, "high" in names) == (with_bounds, with_bounds)
        (read,) = read_scores(folder)
        expected = score if with_bounds else replace(score, low=None, high=None)
        assert read.score == expected
