"""Correlation, explained fractions and levels, against OpenAI's scorer and by their laws."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from cratelm.errors import InputError
from cratelm.records import Status, levels
from cratelm.score.metrics import correlation_score

ORACLE = SHARED / "oracle" / "scoring.json"
CASES = json.loads(ORACLE.read_text()) if ORACLE.is_file() else {"scores": [], "normalization": []}


@needs_shared
def test_oracle_is_there():
    assert len(CASES["scores"]) == 6
    assert CASES["normalization"]


@pytest.mark.parametrize("case", CASES["scores"], ids=lambda c: c["name"])
def test_scores_are_openais(case):
    score = correlation_score(case["true_activations"], case["simulated_activations"])
    for ours, theirs in (
        (score.value, case["ev_correlation_score"]),
        (score.r2, case["rsquared_score"]),
        (score.absolute_deviation, case["absolute_dev_explained_score"]),
    ):
        assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-12))
    assert score.status == (Status.DEFINED if score.value is not None else Status.UNDEFINED)
    assert score.n_records == len(case["true_activations"])


@pytest.mark.parametrize("case", CASES["scores"], ids=lambda c: c["name"])
def test_scores_of_single_records_are_openais(case):
    records = zip(case["true_activations"], case["simulated_activations"], strict=True)
    ours = [correlation_score([a], [b]).value for a, b in records]
    expected = [v if v is None else pytest.approx(v) for v in case["per_sequence_correlation"]]
    assert ours == expected


@pytest.mark.parametrize("case", CASES["normalization"])
def test_levels_are_openais(case):
    found = levels(case["activations"], case["max_activation"])
    assert found.tolist() == case["normalized_0_to_10"]


def test_pooled_and_not_averaged_over_records():
    # Within each record the correlation is -1, pooled it is high.
    score = correlation_score([[0, 1], [10, 11]], [[1, 0], [11, 10]])
    assert score.value == pytest.approx(np.corrcoef([0, 1, 10, 11], [1, 0, 11, 10])[0, 1])
    assert score.value > 0.9
    assert (score.n_tokens, score.n_records) == (4, 2)


@pytest.mark.parametrize(
    ("true", "simulated", "reason"),
    [
        ([], [], "no tokens"),
        ([[], []], [[], []], "no tokens"),
        ([[1, 1, 1]], [[1, 2, 3]], "the truth is constant"),
        ([[0.1, 0.1, 0.1]], [[1, 2, 3]], "the truth is constant"),
        ([[1, 2, 3]], [[0.7, 0.7, 0.7]], "the simulation is constant"),
        ([[5]], [[3]], "the truth is constant"),
        ([[1, float("nan")]], [[1, 2]], "the truth is not finite"),
        ([[1, 2]], [[float("inf"), 2]], "the simulation is not finite"),
    ],
)
def test_undefined_has_its_reason(true, simulated, reason):
    score = correlation_score(true, simulated)
    assert (score.value, score.status, score.reason) == (None, Status.UNDEFINED, reason)


@pytest.mark.parametrize(
    ("true", "simulated"),
    [([[1, 2]], [[1]]), ([[1, 2]], [[1], [2]]), ([[1], [2, 3]], [[1, 2], [3]])],
)
def test_lengths_must_match(true, simulated):
    with pytest.raises(InputError, match="one simulated value per token"):
        correlation_score(true, simulated)


def test_extreme_sizes_neither_over_nor_underflow():
    for scale in (1e-300, 1e300):
        score = correlation_score([[0, scale, 3 * scale]], [[0, 1, 3]])
        assert score.value == pytest.approx(1)


# Whole numbers below 2^20: sums of squares are exact, so laws hold to rounding of a few operations.
numbers = st.integers(-(2**20), 2**20).map(float)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40)


@given(pairs, st.integers(1, 100), st.integers(-1000, 1000))
def test_affine_maps_do_not_matter(rows, slope, shift):
    true, simulated = (list(c) for c in zip(*rows, strict=True))
    score = correlation_score([true], [simulated])
    moved = correlation_score([true], [[slope * s + shift for s in simulated]])
    mirrored = correlation_score([true], [[-s for s in simulated]])
    assert score.status == moved.status == mirrored.status
    if score.value is not None and moved.value is not None and mirrored.value is not None:
        assert moved.value == pytest.approx(score.value, abs=1e-9)
        assert mirrored.value == pytest.approx(-score.value, abs=1e-9)


@given(pairs)
def test_bounded_and_symmetric(rows):
    true, simulated = (list(c) for c in zip(*rows, strict=True))
    there, back = correlation_score([true], [simulated]), correlation_score([simulated], [true])
    assert (there.value is None) == (back.value is None)
    if there.value is not None:
        assert -1 <= there.value <= 1
        assert there.value == pytest.approx(back.value, abs=1e-12)


@given(pairs, st.integers(0, 40))
def test_cutting_into_records_does_not_matter(rows, at):
    true, simulated = (list(c) for c in zip(*rows, strict=True))
    cut = correlation_score([true[:at], true[at:]], [simulated[:at], simulated[at:]])
    whole = correlation_score([true], [simulated])
    assert (cut.value, cut.r2, cut.absolute_deviation) == (
        whole.value, whole.r2, whole.absolute_deviation
    )  # fmt: skip


@given(pairs)
def test_truth_predicts_itself(rows):
    true = [a for a, _ in rows]
    assume(len(set(true)) > 1)
    score = correlation_score([true], [true])
    assert score.value == pytest.approx(1)
    assert score.r2 == score.absolute_deviation == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(-1, 1e6))
def test_levels_are_integers_0_to_10_and_monotone(values, maximum):
    found = levels(values, maximum)
    assert found.dtype == np.int64
    assert ((found >= 0) & (found <= 10)).all()
    assert (np.diff(found[np.argsort(values)]) >= 0).all()
    assert (found[np.array(values) <= 0] == 0).all()


def test_levels_at_their_borders():
    assert levels([0, 0.099, 0.1, 0.5, 0.999, 1, 7, -3], 1).tolist() == [0, 0, 1, 5, 9, 10, 10, 0]
    assert levels([1, 2], 0).tolist() == [0, 0]
    with pytest.raises(InputError, match="finite"):
        levels([float("nan")], 1)
