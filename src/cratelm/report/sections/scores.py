"""Scores of the models: comparison, layers, null controls, neurons without a score, published numbers."""

from itertools import product
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.config import EXPLAINERS
from cratelm.records import SIMULATION_METRICS, Control, Metric
from cratelm.report.cells import (
    DERIVED_NULLS,
    INTERVAL_NOTE,
    METRIC_NAMES,
    chance_of,
    derived_kinds,
    mean_cell,
    series_of,
    without_score,
)
from cratelm.report.drawing import Figure, Panel, Series, distributions, rows, scores_panel
from cratelm.report.sections import all_tokens, replacement
from cratelm.report.sections.autoencoders import reconstruction_costs
from cratelm.report.sections.models import loss_cell, trained_figures
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.results.scores import find_statistics, layer_intervals, mean_interval
from cratelm.runs.names import NullKind
from cratelm.text.table import Cell, Column, Table

TUNED_NOTE = (
    " Two constants of the look-up and the trie were chosen on held-out scores of two small models, so the"
    " scores of these explainers are not independent of that choice; it changes them by at most one point."
)
PUBLISHED_LOSS = {
    "1l": (4.06, 3.83),
    "2l": (3.55, 3.23),
    "3l": (3.46, 3.11),
    "6l": (2.36, 2.16),
    "12l": (2.27, 2.13),
}
"""by size: CRATE, GPT-2; nats per token on the Pile, read off a plot in arXiv 2410.16443"""
PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "1l": ((3.9, 0), (8.8, 0), (4.8, 0), (8.9, 0), (10.1, 0), (14.2, 0)),
    "2l": ((8.05, 0.06), (4.2, 0.01), (6.95, 1.1), (1.95, 0.12), (11.35, 0), (10.2, 0.25)),
    "3l": ((9.1, 0.26), (3.57, 7.51), (8.43, 1.2), (1.37, 1.93), (11.23, 1.14), (9.2, 19.21)),
    "6l": ((7.96, 2.29), (5.4, 20.85), (6.36, 1.87), (3.14, 18.39), (10.4, 2.01), (8.52, 32.56)),
    "12l": ((6.8, 7.09), (6.34, 11.35), (5.12, 2.83), (2.67, 7.48), (8.88, 18.3), (8.65, 24.65)),
}
"""by size: mean and variance over layers, CRATE then GPT-2, for each metric in the order of SIMULATION_METRICS
(arXiv 2410.16443, table of interpretability, which excludes the last layer for 6l and 12l)"""
_BINS = np.linspace(-1, 1, 41)
"""edges of the bins of the distributions"""
_Line = tuple[Series, ModelResults, Control]


def tables(results: RunResults) -> list[Table]:
    """Return the tables of this section."""
    makers = (
        model_comparison_table,
        mean_and_variance_table,
        by_layer_table,
        by_end_table,
        nulls_table,
        unscored_table,
        reasons_table,
        published_table,
    )
    return [make(results) for make in makers]


def figures(results: RunResults) -> list[Figure]:
    """Return the figures of this section."""
    return [means_figure(results), by_layer_figure(results), distributions_figure(results)]


def model_comparison_table(results: RunResults) -> Table:
    """Return the table that `cratelm demo` prints: a row per model, displayed as a column per model."""
    columns = [
        Column("model", f"explainer: {results.explainer}"),
        *(replacement.COLUMNS if _are_replaced(results) else ()),
        Column("parameters", "parameters", ",d"),
        Column("training_tokens", "training tokens", ",d"),
        Column("validation_loss", "validation loss ± se, nats per token", ".3f"),
    ]
    costs = reconstruction_costs(results)
    if costs:
        columns.append(Column("added", "loss added by the reconstruction ± se", ".3f"))
    columns.append(Column("neurons", "neurons scored", ",d"))
    first = results.principal[0]  # the lines are the same for every model
    columns += [column for column, _ in all_tokens.share_lines(results, first)]
    for metric in results.metrics:
        columns += _metric_columns(metric)
        columns += [column for column, _ in all_tokens.gain_lines(results, first, metric)]
    columns += [column for column, _ in all_tokens.score_lines(results, first)]
    rows = tuple(_comparison_row(results, m, costs) for m in results.principal)
    return Table(
        "comparison",
        "Comparison",
        tuple(columns),
        rows,
        "Scores are correlations × 100: the mean over layers of the mean over neurons. Neurons without a"
        f" score are excluded, and counted. {INTERVAL_NOTE}"
        f"{replacement.COMPARISON_NOTE if _are_replaced(results) else ''} Validation loss: standard error over held-out"
        " sequences. Random init: the same model before training, harvested, explained and scored in the same"
        " way. Shuffled: each neuron is scored with the explanation of another neuron of the layer."
        f"{TUNED_NOTE if results.explainer in EXPLAINERS else ''}"
        f"{all_tokens.NOTE if all_tokens.is_measured(results) else ''}"
        + (
            " MODEL+NAME: latents of autoencoders, with the loss added when their reconstruction replaces the"
            " activations."
            if costs
            else ""
        ),
        flipped=True,
    )


def _are_replaced(results: RunResults) -> bool:
    """Return whether a model of the comparison was run on its explanations."""
    return any(m.replacement for m in results.principal)


def _metric_columns(metric: Metric) -> list[Column]:
    return [
        Column(metric, f"{METRIC_NAMES[metric]}, mean × 100 [95%]", ".1f", "head"),
        Column(f"{metric}_variance", "variance over layers", ".2f", "minor"),
        Column(
            f"{metric}_count_zero", f"mean, others counted as {chance_of([metric])}", ".1f", "minor"
        ),
        Column(f"{metric}_shuffled", "null: shuffled explanations", ".1f", "minor"),
        Column(f"{metric}_init", "null: random init", ".1f", "minor"),
        Column(f"{metric}_none", "undefined / dead / failed", "", "minor"),
    ]


def _comparison_row(
    results: RunResults, model: ModelResults, costs: dict[str, Cell]
) -> tuple[Cell, ...]:
    trained = trained_figures(model)
    own = [model.find(results.explainer, metric) for metric in results.metrics]
    cells: list[Cell] = [
        model.name,
        *(replacement.comparison_cells(model) if _are_replaced(results) else ()),
        trained.get("parameters"),
        trained.get("tokens"),
        loss_cell(trained),
        *([costs.get(model.name)] if costs else []),
        max((s.counts.total for s in own if s), default=None),
        *(cell for _, cell in all_tokens.share_lines(results, model)),
    ]
    null = results.null(model)
    for metric, s in zip(results.metrics, own, strict=True):
        zero = model.find(results.explainer, metric, policy="count_zero")
        cells += [
            mean_cell(s),
            s.variance if s else None,
            mean_cell(zero),
            mean_cell(model.find(results.explainer, metric, "shuffled")),
            mean_cell(null.find(results.explainer, metric)) if null else None,
            without_score(s.counts) if s else None,
            *(cell for _, cell in all_tokens.gain_lines(results, model, metric)),
        ]
    cells += [cell for _, cell in all_tokens.score_lines(results, model)]
    return tuple(cells)


def mean_and_variance_table(results: RunResults) -> Table:
    """Return the paper's table for this run: mean and variance of each model and of its random initialisation."""
    columns = [Column("explainer", "explainer"), Column("model", "model")]
    for metric in results.metrics:
        name = METRIC_NAMES[metric]
        columns += [
            Column(metric, f"{name}, mean × 100 [95%]", ".1f"),
            Column(f"{metric}_variance", "variance", ".2f"),
            Column(f"{metric}_neurons", "n", ",d"),
        ]
    rows = []
    for explainer, m in product(results.explainers, results.models):
        cells: list[Cell] = [explainer, m.name]
        for metric in results.metrics:
            s = m.find(explainer, metric)
            cells += [mean_cell(s), s.variance, s.counts.defined] if s else [None, None, None]
        rows.append(tuple(cells))
    return Table(
        "mean_and_variance",
        "Mean and variance over layers",
        tuple(columns),
        tuple(rows),
        f"Variance: of the layer means, over the layers, (× 100)². n: neurons with a score. {INTERVAL_NOTE}",
    )


def by_layer_table(results: RunResults) -> Table:
    """Return the mean score of each layer and its shuffled null control."""
    columns = (
        Column("metric", "metric"),
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("mean", "mean × 100 [95%]", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("defined", "neurons with a score", ",d"),
        Column("neurons", "neurons", ",d"),
    )
    rows = []
    for metric, m in product(results.metrics, results.models):
        own = m.find(results.explainer, metric)
        null = m.find(results.explainer, metric, "shuffled")
        shuffled = {layer.layer: layer for layer in null.layers} if null else {}
        for layer in own.layers if own else ():
            other = shuffled.get(layer.layer)
            rows.append(
                (
                    METRIC_NAMES[metric],
                    m.name,
                    layer.layer,
                    mean_cell(layer),
                    mean_cell(other),
                    layer.counts.defined,
                    layer.counts.total,
                )
            )
    title = f"Score by layer, explainer {results.explainer}"
    return Table("by_layer", title, columns, tuple(rows), f"Layers count from 0. {INTERVAL_NOTE}")


def by_end_table(results: RunResults) -> Table:
    """Return the mean scores of each end of the neurons; without rows if the neurons of all models have one end."""
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("metric", "metric"),
        Column("end", "end"),
        Column("mean", "mean × 100 [95%]", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("defined", "ends with a score", ",d"),
        Column("ends", "ends", ",d"),
    )
    rows = []
    for m in results.models:
        for of_set in m.sets:
            for end, statistics in of_set.by_end.items():
                own = (s for s in statistics if (s.control, s.policy) == ("none", "leave_out"))
                for s in own:
                    null = find_statistics(statistics, s.explainer, s.metric, "shuffled")
                    counts = (s.counts.defined, s.counts.total)
                    name = METRIC_NAMES[s.metric]
                    side = "above 0 (+)" if end == "+" else "below 0 (-)"
                    rows.append(
                        (m.name, s.explainer, name, side, mean_cell(s), mean_cell(null), *counts)
                    )
    rows.sort(key=lambda row: row[:4])
    return Table(
        "by_end",
        "Scores by end",
        columns,
        tuple(rows),
        "Neurons of these models fire at two ends: + where the activation is above 0, - where it is below. Both are"
        " explained and scored by themselves. In all other tables the score of a neuron is the mean over its ends that"
        " have one, and counts of neurons without a score are of ends. An end that never fires is left out if the"
        f" other one does. {INTERVAL_NOTE}",
    )


def nulls_table(results: RunResults) -> Table:
    """Return the mean scores next to those of the null controls, of which two kinds may be absent."""
    others = derived_kinds(results)
    columns = (
        Column("metric", "metric"),
        Column("model", "model"),
        Column("own", "own explanations", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("init", "random init", ".1f"),
        *(Column(kind, DERIVED_NULLS[kind][0], ".1f") for kind in others),
        Column("constant_defined", "constant simulation: scores that exist", ",d"),
    )
    rows = []
    for metric, m in product(results.metrics, results.principal):
        kinds: tuple[NullKind, ...] = ("init", *others)
        nulls = [results.null(m, kind) for kind in kinds]
        constant = m.find(results.explainer, metric, "constant")
        rows.append(
            (
                METRIC_NAMES[metric],
                m.name,
                mean_cell(m.find(results.explainer, metric)),
                mean_cell(m.find(results.explainer, metric, "shuffled")),
                *(mean_cell(n.find(results.explainer, metric)) if n else None for n in nulls),
                constant.counts.defined if constant else None,
            )
        )
    return Table(
        "nulls",
        f"Scores next to the nulls, explainer {results.explainer}",
        columns,
        tuple(rows),
        "Mean × 100. Shuffled: each neuron is simulated from the explanation of another neuron of its"
        " layer. Random init: the untrained model with its own explanations; this score does not depend on"
        f" training.{''.join(DERIVED_NULLS[kind][1] for kind in others)} Constant simulation: a correlation with it is undefined, so the count must be 0."
        f" {INTERVAL_NOTE}",
    )


def unscored_table(results: RunResults) -> Table:
    """Return the counts of neurons without a score, and the means including and excluding them."""
    chance = chance_of(results.metrics)
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("metric", "metric"),
        Column("neurons", "neurons", ",d"),
        Column("defined", "with a score", ",d"),
        Column("undefined", "undefined", ",d"),
        Column("dead", "dead", ",d"),
        Column("failed", "failed", ",d"),
        Column("leave_out", "mean × 100, others excluded", ".1f"),
        Column("count_zero", f"mean × 100, others counted as {chance}", ".1f"),
    )
    rows = []
    for m, explainer, metric in product(results.models, results.explainers, results.metrics):
        s = m.find(explainer, metric)
        if s is None:
            continue
        zero = m.find(explainer, metric, policy="count_zero")
        c = s.counts
        counts = (c.total, c.defined, c.undefined, c.dead, c.failed)
        rows.append(
            (m.name, explainer, METRIC_NAMES[metric], *counts, mean_cell(s), mean_cell(zero))
        )
    return Table(
        "ledger",
        "Neurons without a score",
        columns,
        tuple(rows),
        "Undefined: the correlation does not exist, because the true or the simulated activations are constant"
        " on the excerpts. Dead: never above 0 on the fit or on the held-out split. Failed: the explainer or"
        f" the simulator did not answer. {INTERVAL_NOTE}",
    )


def reasons_table(results: RunResults) -> Table:
    """Return the reasons for missing scores, with the number of neurons for each reason."""
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("metric", "metric"),
        Column("status", "status"),
        Column("reason", "reason"),
        Column("neurons", "neurons", ",d"),
    )
    rows = []
    for m in results.models:
        unscored = m.scores.where(~m.scores.has("value"))
        counts = {
            (explainer, METRIC_NAMES[cast("Metric", metric)], *why): n
            for (explainer, metric, *why), n in unscored.counts(
                "explainer", "metric", "status", "reason"
            ).items()
        }
        rows += [(m.name, *key, n) for key, n in sorted(counts.items())]
    return Table("reasons", "Why there is no score", columns, tuple(rows))


def published_table(results: RunResults) -> Table:
    """Return this run's means, followed by the paper's for all sizes."""
    columns = [Column("source", "source"), Column("model", "model")]
    for metric in SIMULATION_METRICS:
        columns += [
            Column(metric, f"{METRIC_NAMES[metric]}, mean × 100", ".2f"),
            Column(f"{metric}_variance", "variance", ".2f"),
        ]
    columns.append(Column("validation_loss", "validation loss", ".2f"))
    rows = [_our_row(results, m) for m in results.principal]
    for size, family in product(PUBLISHED, (0, 1)):
        figures = [x for pair in PUBLISHED[size][family::2] for x in pair]
        name = f"{('crate', 'gpt2')[family]}-{size}"
        rows.append(("published", name, *figures, PUBLISHED_LOSS[size][family]))
    return Table(
        "published",
        "Published numbers next to this run's",
        tuple(columns),
        tuple(rows),
        "For reference, not for comparison: Bai and Ma (2025, arXiv 2410.16443) trained on the Pile with"
        " up to 157 billion tokens, explained with Mistral-7B and simulated with LLaMA-2-7B. This run differs"
        f" in scale, corpus and explainer ({results.explainer}), so its scores and losses cannot be compared"
        " with theirs. Published losses were read off a plot.",
    )


def _our_row(results: RunResults, m: ModelResults) -> tuple[Cell, ...]:
    cells: list[Cell] = ["this run", m.name]
    for metric in SIMULATION_METRICS:
        s = m.find(results.explainer, metric)
        cells += [s.mean, s.variance] if s else [None, None]
    return (*cells, trained_figures(m).get("validation_loss"))


def means_figure(results: RunResults) -> Figure:
    """Return the means over layers, compared with both null controls."""
    lines = _with_nulls(results)
    series = [s for s, _, _ in lines]

    def panel(metric: Metric) -> Panel:
        statistics = [m.find(results.explainer, metric, control) for _, m, control in lines]
        means = [mean_interval(s) for s in statistics]
        return Panel(METRIC_NAMES[metric], rows(series, means, "mean score × 100"))

    return Figure(
        "means",
        "Mean score and its nulls",
        f"Explainer {results.explainer}. Bars: 95% bootstrap interval over neurons; a bar that is not visible is"
        " narrower than the marker. A score says something about a model only to the extent that it exceeds the"
        " scores of shuffled explanations and of the same model before training.",
        tuple(panel(metric) for metric in results.metrics),
        (),
    )


def by_layer_figure(results: RunResults) -> Figure:
    """Return the scores by layer, a panel per metric."""
    lines = _with_nulls(results)
    series = [s for s, _, _ in lines]

    def panel(metric: Metric) -> Panel:
        statistics = [m.find(results.explainer, metric, control) for _, m, control in lines]
        return scores_panel(METRIC_NAMES[metric], series, [layer_intervals(s) for s in statistics])

    return Figure(
        "score_by_layer",
        "Score by layer",
        f"Explainer {results.explainer}. Mean over the neurons of a layer that have a score; bars: 95%"
        " bootstrap interval over them. Layers count from 0; points of the same layer are drawn side by side.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(series),
    )


def distributions_figure(results: RunResults) -> Figure:
    """Return the distribution of the scores of the neurons."""
    series = [series_of(m) for m in results.models]

    def panel(metric: Metric) -> Panel:
        values = [_values(m, results.explainer, metric) for m in results.models]
        draw = distributions(series, values, _BINS, "score (correlation)")
        return Panel(METRIC_NAMES[metric], draw)

    return Figure(
        "distributions",
        "Scores of the neurons",
        f"Explainer {results.explainer}. Percentage of a model's scored neurons in bins of 0.05; the marker is"
        " at the fullest bin. Neurons without a score are listed under “Neurons without a score” below.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(series),
    )


def _with_nulls(results: RunResults) -> list[_Line]:
    """Return the lines of a figure: each model, the shuffled nulls of trained models, the random initialisations."""
    lines: list[_Line] = [(series_of(m), m, "none") for m in results.principal]
    for m in results.principal:
        series = Series(f"{m.name}, shuffled", m.place, "shuffled")
        lines.append((series, m, "shuffled"))
    return lines + [(series_of(m), m, "none") for m in results.models if m.null_of]


def _values(m: ModelResults, explainer: str, metric: Metric) -> NDArray[np.float64]:
    scores = m.scores.select(explainer=explainer, metric=metric)
    return scores.numbers("value")[scores.has("value")]
