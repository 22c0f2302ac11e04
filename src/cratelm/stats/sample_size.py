"""How many neurons to score: the interval that a random sample of them will give.

A model's figure is the mean over its layers of the mean over the neurons sampled in each
(`cratelm.stats.scores`), so with n of the N neurons of each of L layers, drawn without
replacement, and a standard deviation s of the scores within a layer, its standard error is
s sqrt((1 - n / N) / (n L)) (Cochran 1977, sections 2.6 and 5.3), and the half-width of the interval
is that times the normal quantile.

The bootstrap (`cratelm.stats.intervals`) draws with replacement, which omits the factor 1 - n / N:
where the sample is a large fraction of the layer, the bootstrap interval is wider. It answers another
question: what other neurons of the same kind would give, not what the rest of this layer would.
"""

import math

from scipy.stats import norm

from cratelm.errors import InputError

DEFAULT_SD = 15.0
"""standard deviation of scores within a layer, x 100, where it is not known. Simulated correlations
of the demo's models have 8 to 18 by model, layer and metric. Detection, fuzzing and embedding rest on
 at most ten texts per neuron and vary more (12 to 35 with a small model): give your own"""


def half_width(
    n_per_layer: int,
    n_layers: int,
    sd: float,
    population_per_layer: int | None = None,
    confidence: float = 0.95,
) -> float:
    """Return the half-width of the interval of the model's mean, in the unit of `sd`; 0 if all are scored.

    `sd`: sample standard deviation of scores within a layer. `population_per_layer`: neurons that
    each layer has, None for the interval that the bootstrap gives (no correction for a large sample).

    Raises `InputError` on numbers that make no sense.
    """
    _check(n_layers, sd, population_per_layer, confidence)
    if not 1 <= n_per_layer <= (population_per_layer or n_per_layer):
        most = f"1 to {population_per_layer:,}" if population_per_layer else "1 or more"
        raise InputError(f"{n_per_layer:,} neurons of a layer were asked for: give {most}")
    left = 1 - n_per_layer / population_per_layer if population_per_layer else 1.0
    return _quantile(confidence) * sd * math.sqrt(left / (n_per_layer * n_layers))


def precision_statement(
    n_per_layer: int,
    n_layers: int,
    sd: float = DEFAULT_SD,
    population_per_layer: int | None = None,
    confidence: float = 0.95,
) -> str:
    """Return in one sentence how wide the interval of a sample of neurons will be; figures are x 100.

    Raises `InputError` on numbers that make no sense.
    """
    half = half_width(n_per_layer, n_layers, sd, population_per_layer, confidence)
    layers = f"each of {n_layers:,} layers" if n_layers > 1 else "the one layer"
    of = f" of {population_per_layer:,}" if population_per_layer else ""
    return (
        f"{n_per_layer:,}{of} neurons of {layers} give an interval of +-{half:.1f} around the"
        f" model's mean (x 100, {100 * confidence:g}%), if scores vary by {sd:.1f} within a layer"
    )


def _quantile(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2))


def _check(n_layers: int, sd: float, population: int | None, confidence: float) -> None:
    if n_layers < 1:
        raise InputError(f"{n_layers} layers: give 1 or more")
    if not (math.isfinite(sd) and sd >= 0):
        raise InputError(f"a standard deviation of {sd:g}: give a finite one of 0 or more")
    if population is not None and population < 1:
        raise InputError(f"a layer of {population} neurons: give 1 or more")
    if not 0 < confidence < 1:
        raise InputError(f"a confidence of {confidence:g}: give one between 0 and 1, such as 0.95")
