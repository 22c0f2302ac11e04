"""The figures of neurons beside latents."""

from collections.abc import Sequence

from cratelm.records import Estimate, Metric
from cratelm.report.cells import METRIC_NAMES
from cratelm.report.drawing import Figure, Panel, Series, scatter
from cratelm.report.figures import bar, layers_panel
from cratelm.report.sections.autoencoders import (
    Latents,
    above_best,
    latents,
    loss_points,
    shown_models,
)
from cratelm.results.run_results import RunResults

_Z95 = 1.959964
"""standard errors in half a 95% interval of a normal distribution"""


def autoencoder_figures(
    results: RunResults, series: Sequence[tuple[str, Series]]
) -> dict[str, Figure]:
    found = latents(results)
    if not found:
        return {}
    made = [_by_layer(results, found, dict(series)), _scatter(results, found, dict(series))]
    return {f.name: f for f in made if f is not None}


def _by_layer(results: RunResults, found: Sequence[Latents], series: dict[str, Series]) -> Figure:
    shown = shown_models(results, found)
    drawn = [series[m.name] for m in shown]

    def panel(metric: Metric) -> Panel:
        found_here = [m.figure(results.explainer, metric) for m in shown]
        return layers_panel(metric, drawn, found_here)

    return Figure(
        "sae_scores",
        "Neurons and latents by layer",
        f"Explainer {results.explainer}. Mean over the neurons, or latents, of a layer that have a score;"
        " bars: 95% bootstrap interval over them.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(drawn),
    )


def _scatter(
    results: RunResults, found: Sequence[Latents], series: dict[str, Series]
) -> Figure | None:
    points = loss_points(results, found)
    above = above_best(points)
    if above is None:
        return None
    drawn = [series[p.model.name] for p in points]
    along = [(e.value, *_ends(e)) for e in above[1]]

    def panel(metric: Metric) -> Panel:
        figures = [p.model.figure(results.explainer, metric) for p in points]
        places = [
            None if (y := bar(s)) is None else (x, y) for x, s in zip(along, figures, strict=True)
        ]
        x = f"loss above {above[0]}, nats a token"
        return Panel(METRIC_NAMES[metric], scatter(drawn, places, x, "mean score × 100"))

    return Figure(
        "sae_loss",
        "Loss against interpretability",
        f"Explainer {results.explainer}; up and to the left is better. Loss of latents: that of the model"
        f" with their reconstruction in the place of the activations. Loss is told above that of {above[0]},"
        " on the same held-out documents. Bars: 95%, of that difference over documents, of the score over"
        " neurons; where none is seen it is narrower than the marker.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(drawn),
    )


def _ends(e: Estimate) -> tuple[float, float]:
    """Of a 95% interval."""
    half = _Z95 * (e.error or 0.0)
    return e.value - half, e.value + half
