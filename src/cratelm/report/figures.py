"""The figures of a report, from the figures of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cratelm.records import Metric
from cratelm.report.cells import METRIC_NAMES
from cratelm.report.drawing import Figure, Panel, Series, by_layer, curves, distributions, rows
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.stats.scores import Control, LayerStatistics, ModelStatistics

_BINS = np.linspace(-1, 1, 41)
_Drawn = tuple[Series, ModelResults, Control]


def all_figures(results: RunResults) -> dict[str, Figure]:
    """By name; a figure without data is left out."""
    made = (
        means(results),
        loss(results),
        score_by_layer(results),
        score_distributions(results),
        sparsity(results),
    )
    return {f.name: f for f in made if f is not None}


def means(results: RunResults) -> Figure:
    """Means over layers beside both nulls."""
    drawn = _with_nulls(results)
    series = [s for s, _, _ in drawn]

    def panel(metric: Metric) -> Panel:
        found = [m.figure(results.explainer, metric, control) for _, m, control in drawn]
        return Panel(
            METRIC_NAMES[metric], rows(series, [bar(f) for f in found], "mean score × 100")
        )

    return Figure(
        "means",
        "Mean score and its nulls",
        f"Explainer {results.explainer}. Bars: 95% bootstrap interval over neurons; where none is seen"
        " it is narrower than the marker. A score says something about a model only as far as it lies"
        " beyond that of shuffled explanations and of the same model before training.",
        tuple(panel(metric) for metric in results.metrics),
        (),
    )


def loss(results: RunResults) -> Figure | None:
    trained = [m for m in results.models if any("loss" in line for line in m.curve)]
    if not trained:
        return None
    series = [own_series(m) for m in trained]
    points = [(*_points(m, "loss"), *_points(m, "validation_loss")) for m in trained]
    return Figure(
        "loss",
        "Training",
        "Thin lines: loss of each step's batch. Markers: loss on fixed held-out sequences.",
        (Panel("Loss over training tokens", curves(series, points, "nats a token")),),
        tuple(series),
    )


def score_by_layer(results: RunResults) -> Figure:
    drawn = _with_nulls(results)
    series = [s for s, _, _ in drawn]

    def panel(metric: Metric) -> Panel:
        found = [m.figure(results.explainer, metric, control) for _, m, control in drawn]
        return layers_panel(metric, series, found)

    return Figure(
        "score_by_layer",
        "Score by layer",
        f"Explainer {results.explainer}. Mean over the neurons of a layer that have a score; bars: 95%"
        " bootstrap interval over them. Layers count from 0; points of one layer stand side by side.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(series),
    )


def layers_panel(
    metric: Metric, series: Sequence[Series], found: Sequence[ModelStatistics | None]
) -> Panel:
    """Scores by layer of one metric."""
    points = [_layer_bars(f.layers if f else ()) for f in found]
    return Panel(METRIC_NAMES[metric], by_layer(series, points, "mean score × 100", zero=True))


def score_distributions(results: RunResults) -> Figure:
    series = [own_series(m) for m in results.models]

    def panel(metric: Metric) -> Panel:
        values = [_values(m, results.explainer, metric) for m in results.models]
        draw = distributions(series, values, _BINS, "score (correlation)")
        return Panel(METRIC_NAMES[metric], draw)

    return Figure(
        "distributions",
        "Scores of the neurons",
        f"Explainer {results.explainer}. Share of a model's neurons with a score in bins of 0.05; the"
        " marker stands on the fullest bin. Neurons without a score are in the ledger below.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(series),
    )


def sparsity(results: RunResults) -> Figure | None:
    models = [m for m in results.models if m.summaries]
    if not models:
        return None
    series = [own_series(m) for m in models]
    rates, dead = zip(*(_sparsity_points(m) for m in models), strict=True)
    return Figure(
        "sparsity",
        "Sparsity",
        "Over the tokens searched in the held-out split. Firing rate: share of tokens on which a neuron is"
        " above 0; marker: median over the neurons that are not dead, bars: their 5% and 95% quantiles"
        " (spread of the neurons, no uncertainty of the median).",
        (
            Panel("Firing rate", by_layer(series, rates, "tokens, %", log=True)),
            Panel("Dead neurons", by_layer(series, dead, "neurons never above 0, %", floor=True)),
        ),
        tuple(series),
    )


def own_series(m: ModelResults) -> Series:
    return Series(m.name, m.place, "init" if m.null_of else "")


def _with_nulls(results: RunResults) -> list[_Drawn]:
    """Each model, then the shuffled null of the trained ones, then the random initialisations."""
    drawn: list[_Drawn] = [(own_series(m), m, "none") for m in results.principal]
    for m in results.principal:
        series = Series(f"{m.name}, shuffled", m.place, "shuffled")
        drawn.append((series, m, "shuffled"))
    return drawn + [(own_series(m), m, "none") for m in results.models if m.null_of]


def bar(s: ModelStatistics | LayerStatistics | None) -> tuple[float, float, float] | None:
    """A mean and the ends of its interval; the mean itself where there are none."""
    if s is None or s.mean is None:
        return None
    return s.mean, s.mean if s.low is None else s.low, s.mean if s.high is None else s.high


def _layer_bars(layers: tuple[LayerStatistics, ...]) -> tuple[list, list, list, list]:
    """Numbers of the layers that have a mean, the means, and the ends of their intervals."""
    bars = [(layer.layer, found) for layer in layers if (found := bar(layer)) is not None]
    return ([at for at, _ in bars], *([found[i] for _, found in bars] for i in range(3)))  # type: ignore[return-value]


def _points(m: ModelResults, key: str) -> tuple[list[int], list[float]]:
    lines = [line for line in m.curve if key in line]
    return [line["tokens"] for line in lines], [line[key] for line in lines]


def _values(m: ModelResults, explainer: str, metric: Metric) -> list[float]:
    mine = [s.score for s in m.scores if s.explainer == explainer and s.metric == metric]
    return [s.value for s in mine if s.value is not None]


def _sparsity_points(m: ModelResults) -> tuple[Any, Any]:
    """By layer: quantiles of the firing rate, and the share of dead neurons, both in %."""
    layers = sorted({s.neuron.layer for s in m.summaries})
    rates, dead = [], []
    for layer in layers:
        here = [s for s in m.summaries if s.neuron.layer == layer]
        live = [100 * s.firing_rate for s in here if not s.dead]
        rates.append(np.quantile(live, [0.5, 0.05, 0.95]) if live else [np.nan] * 3)
        dead.append(100 * (1 - len(live) / len(here)))
    return (layers, *np.array(rates).T), (layers, dead, dead, dead)
