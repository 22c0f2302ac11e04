"""How many neurons to score: the interval that a random sample of them will give.

A model's figure is the mean over its layers of the mean over the neurons sampled in each
(`cratelm.stats.scores`), so with n of the N neurons of each of L layers, drawn without
replacement, and a standard deviation s of the scores within a layer, its standard error is
s sqrt((1 - n / N) / (n L)) (Cochran 1977, sections 2.6 and 5.3), and the half-width of the interval
is that times the normal quantile.

The bootstrap (`cratelm.stats.intervals`) draws with replacement, which omits the factor 1 - n / N:
if the sample is a large fraction of the layer, the bootstrap interval is wider. It answers another
question: what other neurons of the same kind would give, not what the other neurons of this layer would.
"""

import math

from scipy.special import ndtri

from cratelm.errors import InputError

DEFAULT_SD = 15.0
"""assumed standard deviation of scores within a layer, x 100. Simulated correlations of the demo's models
have 8 to 18, depending on model, layer and metric. Detection, fuzzing and embedding use at most ten texts
per neuron and vary more (12 to 35 with a small model): give your own value for these"""


def half_width(
    n_per_layer: int,
    n_layers: int,
    sd: float,
    population_per_layer: int | None = None,
    confidence: float = 0.95,
) -> float:
    """Return the half-width of the interval of the model's mean, in the unit of `sd`; 0 if all are scored.

    `sd`: sample standard deviation of scores within a layer. `population_per_layer`: number of neurons in
    each layer; None for the interval that the bootstrap gives (no correction for a large sample).

    Raises `InputError` for numbers out of their range.
    """
    _check(n_layers, sd, population_per_layer, confidence)
    if not 1 <= n_per_layer <= (population_per_layer or n_per_layer):
        limits = f"from 1 to {population_per_layer:,}" if population_per_layer else "at least 1"
        raise InputError(f"the number of neurons per layer must be {limits}, not {n_per_layer:,}")
    unsampled = 1 - n_per_layer / population_per_layer if population_per_layer else 1.0
    return _quantile(confidence) * sd * math.sqrt(unsampled / (n_per_layer * n_layers))


def precision_statement(
    n_per_layer: int,
    n_layers: int,
    sd: float = DEFAULT_SD,
    population_per_layer: int | None = None,
    confidence: float = 0.95,
) -> str:
    """Return a sentence that says how wide the interval of a sample of neurons will be; figures are x 100.

    Raises `InputError` for numbers out of their range.
    """
    half = half_width(n_per_layer, n_layers, sd, population_per_layer, confidence)
    layers = f"each of {n_layers:,} layers" if n_layers > 1 else "the one layer"
    of = f" of {population_per_layer:,}" if population_per_layer else ""
    return (
        f"{n_per_layer:,}{of} neurons of {layers} give an interval of +-{half:.1f} around the"
        f" model's mean (x 100, {100 * confidence:g}%), if scores vary by {sd:.1f} within a layer"
    )


def _quantile(confidence: float) -> float:
    return float(ndtri((1 + confidence) / 2))


def _check(n_layers: int, sd: float, population: int | None, confidence: float) -> None:
    if n_layers < 1:
        raise InputError(f"the number of layers must be at least 1, not {n_layers}")
    if not (math.isfinite(sd) and sd >= 0):
        raise InputError(f"the standard deviation must be finite and at least 0, not {sd:g}")
    if population is not None and population < 1:
        raise InputError(f"a layer must have at least 1 neuron, not {population}")
    if not 0 < confidence < 1:
        raise InputError(
            f"the confidence must be between 0 and 1, such as 0.95, not {confidence:g}"
        )
