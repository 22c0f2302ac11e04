"""The interval that a sample of neurons gives, against the bootstrap, sampling and known figures."""

import math

import numpy as np
import pytest

from cratelm.errors import InputError
from cratelm.records import NeuronId, NeuronScore, Score
from cratelm.stats.sample_size import (
    half_width,
    precision_statement,
)
from cratelm.stats.scores import model_statistics


def scored(values: np.ndarray) -> list[NeuronScore]:
    """Scores of [L, n] values, 0..1."""
    return [
        NeuronScore(NeuronId("m", "ista", layer, i), "x", "detection", "none", Score(float(v)))
        for layer, row in enumerate(values)
        for i, v in enumerate(row)
    ]


def test_known_figure():
    # 1.96 x 15 / sqrt(64 x 2)
    assert half_width(64, 2, 15.0) == pytest.approx(2.5986, abs=1e-4)
    assert half_width(64, 2, 15.0, confidence=0.99) == pytest.approx(3.4151, abs=1e-4)


@pytest.mark.parametrize(("n", "layers"), [(64, 2), (200, 1), (30, 12)])
def test_as_wide_as_the_bootstrap(n, layers):
    values = np.random.default_rng(n).normal(0.6, 0.12, (layers, n))
    values += np.linspace(0, 0.2, layers)[:, None]  # layers differ: only what is within counts
    scores = scored(values)
    found = model_statistics(scores, explainer="x", metric="detection", resamples=4000)
    assert found.low is not None
    assert found.high is not None
    sd = 100 * math.sqrt(values.var(axis=1, ddof=1).mean())  # pooled within layers
    assert half_width(n, layers, sd) == pytest.approx((found.high - found.low) / 2, rel=0.07)


def test_covers_the_whole_layers_mean_as_often_as_said():
    """Drawn without replacement: 160 of 200 neurons of two layers, the correction cuts the width by half."""
    rng = np.random.default_rng(0)
    layers = rng.beta(2, 5, (2, 200)) * 100
    sd = math.sqrt(layers.var(axis=1, ddof=1).mean())
    half = half_width(160, 2, sd, 200)
    means = [
        np.mean([rng.choice(row, 160, replace=False).mean() for row in layers]) for _ in range(4000)
    ]
    inside = np.mean(np.abs(np.array(means) - layers.mean()) <= half)
    assert inside == pytest.approx(0.95, abs=0.015)
    assert half == pytest.approx(half_width(160, 2, sd) * math.sqrt(0.2))


def test_all_neurons_leave_nothing_open():
    assert half_width(256, 2, 15.0, 256) == 0


def test_told_in_one_sentence():
    assert precision_statement(64, 2, 15.0, 256) == (
        "64 of 256 neurons of each of 2 layers give an interval of +-2.3 around the model's mean"
        " (x 100, 95%), if scores vary by 15.0 within a layer"
    )
    assert "64 neurons of the one layer" in precision_statement(64, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 2, 15.0), "neurons per layer must be at least 1, not 0"),
        ((300, 2, 15.0, 256), "neurons per layer must be from 1 to 256, not 300"),
        ((10, 0, 15.0), "layers must be at least 1, not 0"),
        ((10, 2, math.nan), "standard deviation must be finite and at least 0, not nan"),
        ((10, 2, -1.0), "standard deviation must be finite and at least 0, not -1"),
        ((10, 2, 1.0, 0), "a layer must have at least 1 neuron, not 0"),
        ((10, 2, 1.0, None, 95), "confidence must be between 0 and 1, such as 0.95, not 95"),
    ],
)
def test_numbers_that_make_no_sense(arguments, said):
    with pytest.raises(InputError, match=said):
        half_width(*arguments)
