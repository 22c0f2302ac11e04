"""Statistics over several seeds, on planted cases."""

import numpy as np
import pytest

from cratelm.errors import InputError
from cratelm.stats.layers import layered_mean
from cratelm.stats.seeds import (
    compare_over_seeds,
    correlations,
    cosines,
    holm,
    match,
    mean_over_seeds,
    transfer,
)


def planted(rng, n_seeds, spread, shift=0.0, effects=None):
    """Two layers of 30 neurons per seed; seeds differ by `spread`, neurons by 1."""
    effects = rng.normal(scale=spread, size=n_seeds) if effects is None else effects
    return [
        {layer: shift + effect + layer + rng.normal(size=30) for layer in (0, 1)}
        for effect in effects
    ]


def test_the_interval_covers_the_mean_over_seeds_and_that_over_neurons_does_not():
    rng = np.random.default_rng(0)
    covered, of_neurons = 0, 0
    for trial in range(100):
        seeds = planted(rng, 10, 1.0)
        interval = mean_over_seeds(seeds, resamples=300, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
        one = layered_mean(
            np.concatenate([*seeds[0].values()]), np.repeat([0, 1], 30), resamples=300
        ).mean
        of_neurons += one.low <= 0.5 <= one.high
    assert covered >= 85  # 95 but for the percentile bootstrap of ten values
    assert of_neurons < 50


def test_one_seed_gives_the_interval_over_its_neurons():
    seeds = planted(np.random.default_rng(1), 1, 0.0)
    interval = mean_over_seeds(seeds, resamples=4000)
    values = np.concatenate([*seeds[0].values()])
    over_neurons = layered_mean(values, np.repeat([0, 1], 30), resamples=4000).mean
    assert interval.value == pytest.approx(over_neurons.value)
    assert (interval.low, interval.high) == pytest.approx(
        (over_neurons.low, over_neurons.high), abs=0.03
    )


def test_a_difference_is_paired_by_seed():
    """Seeds differ by 10, the models by 1: only the pairs show it."""
    rng = np.random.default_rng(2)
    effects = rng.normal(scale=10, size=5)
    a, b = planted(rng, 5, 0, 1.0, effects), planted(rng, 5, 0, 0.0, effects)
    interval = compare_over_seeds(a, b).difference
    assert 0.5 < interval.low < 1 < interval.high + 0.5
    assert interval.high - interval.low < 1
    shuffled = compare_over_seeds(a, b[::-1]).difference
    assert shuffled.high - shuffled.low > 5
    with pytest.raises(InputError, match="5 seeds are compared with 4"):
        compare_over_seeds(a, b[:4])


def test_what_cannot_be_averaged_is_said():
    with pytest.raises(InputError, match="no seeds"):
        mean_over_seeds([])
    with pytest.raises(InputError, match="a layer has no values"):
        mean_over_seeds([{0: [1.0], 1: []}])


def test_holm_adjusts_as_by_hand():
    """4 x .005, 3 x .01, 2 x .03, and what is not below the one before; at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_a_permuted_dictionary_is_matched_exactly_and_duplicates_are_not():
    rng = np.random.default_rng(3)
    atoms = rng.normal(size=(40, 12))
    order = rng.permutation(12)
    signs = rng.choice([-1, 1], 12)
    found = match(cosines(atoms, (atoms * signs)[:, order]))
    assert found.mean == pytest.approx(1)
    assert order[found.b].tolist() == found.a.tolist()
    duplicates = np.repeat(atoms[:, :1], 12, axis=1)
    assert match(cosines(atoms, duplicates)).mean < 0.3
    unrelated = match(cosines(atoms, rng.normal(size=(40, 12)))).mean
    assert 0.1 < unrelated < 0.5  # the null is above 0


def test_neurons_are_matched_by_their_activations():
    rng = np.random.default_rng(4)
    a = rng.normal(size=(500, 6))
    b = np.hstack([a[:, [2, 0, 1]] + 0.1 * rng.normal(size=(500, 3)), np.full((500, 1), 3.0)])
    similarity = correlations(a, b)
    np.testing.assert_allclose(similarity[:, :3], np.corrcoef(a.T, b[:, :3].T)[:6, 6:], atol=1e-9)
    assert (similarity[:, 3] == 0).all()  # constant
    found = match(similarity)
    assert dict(zip(found.a.tolist(), found.b.tolist(), strict=True)) | {0: 1, 1: 2, 2: 0} == dict(
        zip(found.a.tolist(), found.b.tolist(), strict=True)
    )


def test_transfer_is_a_ratio_of_means():
    own = np.array([0.8, 0.6, 0.4, 0.2])
    interval = transfer(own, own / 2)
    assert interval.value == pytest.approx(0.5)
    assert interval.low == pytest.approx(0.5)
    assert transfer(np.zeros(3), own[:3]) is None
    assert transfer([], []) is None
    with pytest.raises(InputError, match="4 scores are compared with 3"):
        transfer(own, own[:3])
