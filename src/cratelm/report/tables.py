"""The tables of a report, from the figures of a run."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np

from cratelm.records import METRICS, Estimate, Metric
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, mean_cell, without_score
from cratelm.report.sections.autoencoders import reconstruction_costs
from cratelm.report.sections.comparisons import model_less_free, twins, twins_with_model
from cratelm.report.sections.leakage import (
    duplicate_effects,
    duplicate_examples,
    leakage,
    near_duplicates,
)
from cratelm.report.sections.llm import calls, preflights, side_by_side
from cratelm.results.run_results import MODEL_STAGES, ModelResults, RunResults
from cratelm.text.table import Cell, Column, Table

PUBLISHED_LOSS = {
    "1l": (4.06, 3.83),
    "2l": (3.55, 3.23),
    "3l": (3.46, 3.11),
    "6l": (2.36, 2.16),
    "12l": (2.27, 2.13),
}
"""by size: CRATE, GPT-2, nats a token on the Pile, read off the plot of arXiv 2410.16443"""
PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "1l": ((3.9, 0), (8.8, 0), (4.8, 0), (8.9, 0), (10.1, 0), (14.2, 0)),
    "2l": ((8.05, 0.06), (4.2, 0.01), (6.95, 1.1), (1.95, 0.12), (11.35, 0), (10.2, 0.25)),
    "3l": ((9.1, 0.26), (3.57, 7.51), (8.43, 1.2), (1.37, 1.93), (11.23, 1.14), (9.2, 19.21)),
    "6l": ((7.96, 2.29), (5.4, 20.85), (6.36, 1.87), (3.14, 18.39), (10.4, 2.01), (8.52, 32.56)),
    "12l": ((6.8, 7.09), (6.34, 11.35), (5.12, 2.83), (2.67, 7.48), (8.88, 18.3), (8.65, 24.65)),
}
"""by size: mean and variance over layers, CRATE then GPT-2, for each metric in the order of METRICS
(arXiv 2410.16443, table of interpretability; last layer left out for 6l and 12l)"""


def comparison(results: RunResults) -> Table:
    """The table that `cratelm demo` prints: a column a model when shown."""
    columns = [
        Column("model", f"explainer: {results.explainer}"),
        Column("parameters", "parameters", ",d"),
        Column("training_tokens", "training tokens", ",d"),
        Column("validation_loss", "validation loss ± se, nats a token", ".3f"),
    ]
    costs = reconstruction_costs(results)
    if costs:
        columns.append(Column("added", "loss added by the reconstruction ± se", ".3f"))
    columns.append(Column("neurons", "neurons scored", ",d"))
    for metric in results.metrics:
        columns += _metric_columns(metric)
    rows = tuple(_comparison_row(results, m, costs) for m in results.principal)
    return Table(
        "comparison",
        "Comparison",
        tuple(columns),
        rows,
        "Scores are correlations × 100, mean over layers of the mean over neurons; neurons without a"
        f" score are left out, and counted. {INTERVAL_NOTE} Validation loss: standard error over held-out"
        " sequences. Random init: the same model before training, harvested, explained and scored alike."
        " Shuffled: explanations dealt to other neurons of the layer."
        + (
            " MODEL+NAME: latents of autoencoders, with the loss that their reconstruction costs in the"
            " place of the activations."
            if costs
            else ""
        ),
        flipped=True,
    )


def _metric_columns(metric: Metric) -> list[Column]:
    return [
        Column(metric, f"{METRIC_NAMES[metric]}, mean × 100 [95%]", ".1f", "head"),
        Column(f"{metric}_variance", "variance over layers", ".2f", "minor"),
        Column(f"{metric}_count_zero", "mean with the others as 0", ".1f", "minor"),
        Column(f"{metric}_shuffled", "null: shuffled explanations", ".1f", "minor"),
        Column(f"{metric}_init", "null: random init", ".1f", "minor"),
        Column(f"{metric}_none", "undefined / dead / failed", "", "minor"),
    ]


def _comparison_row(
    results: RunResults, model: ModelResults, costs: dict[str, Cell]
) -> tuple[Cell, ...]:
    trained = _training(model)
    own = [model.figure(results.explainer, metric) for metric in results.metrics]
    cells: list[Cell] = [
        model.name,
        trained.get("parameters"),
        trained.get("tokens"),
        _loss(trained),
        *([costs.get(model.name)] if costs else []),
        max((s.counts.total for s in own if s), default=None),
    ]
    null = results.null(model)
    for metric, s in zip(results.metrics, own, strict=True):
        zero = model.figure(results.explainer, metric, policy="count_zero")
        cells += [
            mean_cell(s),
            s.variance if s else None,
            mean_cell(zero),
            mean_cell(model.figure(results.explainer, metric, "shuffled")),
            mean_cell(null.figure(results.explainer, metric)) if null else None,
            without_score(s.counts) if s else None,
        ]
    return tuple(cells)


def stages(results: RunResults) -> Table:
    """Seconds of every stage, a line a model."""
    verbs = MODEL_STAGES.values()
    columns = (
        Column("model", "model"),
        Column("tokenize", "tokenize", ",.1f"),
        *(Column(verb, verb, ",.1f") for verb in verbs),
        Column("finished_at", "finished (UTC)"),
    )
    none = [None] * len(verbs)
    rows: list[tuple[Cell, ...]] = []
    if results.tokens:
        rows.append(("all", results.tokens.seconds, *none, results.tokens.finished_at))
    for m in results.models:
        done = [m.completions.get(stage) for stage in MODEL_STAGES]
        last = max((c.finished_at for c in done if c), default=None)
        rows.append((m.name, None, *(c.seconds if c else None for c in done), last))
        for found in m.with_model:
            made = [found.completions.get(stage) for stage in MODEL_STAGES]
            last = max(c.finished_at for c in made if c)
            seconds = (c.seconds if c else None for c in made)
            rows.append((found.label(m.name), None, *seconds, last))
    return Table("stages", "Seconds of each stage", columns, tuple(rows))


def models(results: RunResults) -> Table:
    """Parameters and losses."""
    columns = (
        Column("model", "model"),
        Column("site", "site"),
        Column("layers", "layers", ",d"),
        Column("neurons_per_layer", "neurons a layer", ",d"),
        Column("parameters", "parameters", ",d"),
        Column("training_tokens", "training tokens", ",d"),
        Column("steps", "steps", ",d"),
        Column("optimizer", "optimizer"),
        Column("learning_rate", "peak learning rate", ".2g"),
        Column("seed", "seed", "d"),
        Column("loss", "last training loss", ".3f"),
        Column("validation_loss", "validation loss ± se", ".3f"),
    )
    return Table(
        "models",
        "Parameters and loss",
        columns,
        tuple(_model_row(m) for m in results.models),
        "Site: where in a layer its neurons live. Parameters: trainable, position embedding left out. Losses in nats a token; the training loss is"
        " that of one batch, the validation loss the mean over fixed held-out sequences ± its standard"
        " error over them. One training run each: the spread over seeds is not measured here.",
    )


def _model_row(m: ModelResults) -> tuple[Cell, ...]:
    trained = _training(m)
    config = m.completions["model"].config if "model" in m.completions else {}
    neurons = Counter(s.neuron.layer for s in m.summaries)
    return (
        m.name,
        next((s.neuron.site for s in m.scores), None),
        len(neurons) or None,
        max(neurons.values(), default=None),
        trained.get("parameters"),
        trained.get("tokens"),
        trained.get("steps"),
        config.get("optimizer") if trained.get("steps") else None,
        config.get("learning_rate") if trained.get("steps") else None,
        config.get("seed"),
        trained.get("loss"),
        _loss(trained),
    )


def mean_and_variance(results: RunResults) -> Table:
    """The paper's table, for this run: each model, and its random initialisation."""
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
            s = m.figure(explainer, metric)
            cells += [mean_cell(s), s.variance, s.counts.defined] if s else [None, None, None]
        rows.append(tuple(cells))
    return Table(
        "mean_and_variance",
        "Mean and variance over layers",
        tuple(columns),
        tuple(rows),
        f"Variance: of the layer means over the layers, (× 100)². n: neurons with a score. {INTERVAL_NOTE}",
    )


def by_layer(results: RunResults) -> Table:
    columns = (
        Column("metric", "metric"),
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("mean", "mean × 100 [95%]", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("defined", "neurons with a score", ",d"),
        Column("neurons", "of", ",d"),
    )
    rows = []
    for metric, m in product(results.metrics, results.models):
        own = m.figure(results.explainer, metric)
        null = m.figure(results.explainer, metric, "shuffled")
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


def nulls(results: RunResults) -> Table:
    columns = (
        Column("metric", "metric"),
        Column("model", "model"),
        Column("own", "own explanations", ".1f"),
        Column("shuffled", "shuffled explanations", ".1f"),
        Column("init", "random init", ".1f"),
        Column("constant_defined", "constant simulation: scores that exist", ",d"),
    )
    rows = []
    for metric, m in product(results.metrics, results.principal):
        null = results.null(m)
        constant = m.figure(results.explainer, metric, "constant")
        rows.append(
            (
                METRIC_NAMES[metric],
                m.name,
                mean_cell(m.figure(results.explainer, metric)),
                mean_cell(m.figure(results.explainer, metric, "shuffled")),
                mean_cell(null.figure(results.explainer, metric)) if null else None,
                constant.counts.defined if constant else None,
            )
        )
    return Table(
        "nulls",
        f"Beside the nulls, explainer {results.explainer}",
        columns,
        tuple(rows),
        "Mean × 100. Shuffled: each neuron is simulated from the explanation of another neuron of its"
        " layer. Random init: the untrained model, with explanations of its own; what it scores needs no"
        " training. Constant simulation: its correlation cannot exist, so the"
        f" count must be 0. {INTERVAL_NOTE}",
    )


def sparsity(results: RunResults) -> Table:
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("neurons", "neurons", ",d"),
        Column("dead", "dead", ",d"),
        Column("dead_percent", "dead, %", ".1f"),
        Column("active_percent", "active on a token, % of neurons", ".1f"),
        Column("rate_p5", "firing rate: 5%", ".3g"),
        Column("rate_median", "median", ".3g"),
        Column("rate_p95", "95%", ".3g"),
        Column("kurtosis_median", "median kurtosis", ".3g"),
    )
    rows = [
        (m.name, layer, *_sparsity_row(m, layer))
        for m in results.models
        for layer in sorted({s.neuron.layer for s in m.summaries})
    ]
    return Table(
        "sparsity",
        "Sparsity by layer",
        columns,
        tuple(rows),
        "Over the tokens searched in the held-out split. Dead: never above 0 there. Firing rate: % of"
        " tokens on which a neuron is above 0; its quantiles and the kurtosis are over neurons that are"
        " not dead. Kurtosis is 3 for a normal distribution.",
    )


def _sparsity_row(m: ModelResults, layer: int) -> tuple[Cell, ...]:
    here = [s for s in m.summaries if s.neuron.layer == layer]
    rates = 100 * np.array([s.firing_rate for s in here])
    live = rates[[not s.dead for s in here]]
    kurtosis = np.array([s.kurtosis for s in here if not s.dead])
    kurtosis = kurtosis[np.isfinite(kurtosis)]
    quantiles = np.quantile(live, [0.05, 0.5, 0.95]).tolist() if len(live) else [None] * 3
    n_dead = len(rates) - len(live)
    return (
        len(here),
        n_dead,
        100 * n_dead / len(here),
        float(rates.mean()),
        *quantiles,
        float(np.median(kurtosis)) if len(kurtosis) else None,
    )


def ledger(results: RunResults) -> Table:
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("metric", "metric"),
        Column("neurons", "neurons", ",d"),
        Column("defined", "with a score", ",d"),
        Column("undefined", "undefined", ",d"),
        Column("dead", "dead", ",d"),
        Column("failed", "failed", ",d"),
        Column("leave_out", "mean × 100, others left out", ".1f"),
        Column("count_zero", "mean × 100, others as 0", ".1f"),
    )
    rows = []
    for m, explainer, metric in product(results.models, results.explainers, results.metrics):
        s = m.figure(explainer, metric)
        if s is None:
            continue
        zero = m.figure(explainer, metric, policy="count_zero")
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
        "Undefined: the correlation does not exist, because the truth or the simulation is constant on"
        " the excerpts. Dead: never above 0 on the fit or on the held-out split. Failed: the explainer or"
        f" the simulator did not answer. {INTERVAL_NOTE}",
    )


def reasons(results: RunResults) -> Table:
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
        found = Counter(
            (s.explainer, METRIC_NAMES[s.metric], str(s.score.status), s.score.reason)
            for s in m.scores
            if s.score.value is None
        )
        rows += [(m.name, *key, n) for key, n in sorted(found.items())]
    return Table("reasons", "Why there is no score", columns, tuple(rows))


def published(results: RunResults) -> Table:
    """Our means above those of the paper, all sizes."""
    columns = [Column("source", "source"), Column("model", "model")]
    for metric in METRICS:
        columns += [
            Column(metric, f"{METRIC_NAMES[metric]}, mean × 100", ".2f"),
            Column(f"{metric}_variance", "variance", ".2f"),
        ]
    columns.append(Column("validation_loss", "validation loss", ".2f"))
    rows = [_our_row(results, m) for m in results.principal]
    for size, place in product(PUBLISHED, (0, 1)):
        figures = [x for pair in PUBLISHED[size][place::2] for x in pair]
        name = f"{('crate', 'gpt2')[place]}-{size}"
        rows.append(("published", name, *figures, PUBLISHED_LOSS[size][place]))
    return Table(
        "published",
        "The published numbers beside this run's",
        tuple(columns),
        tuple(rows),
        "For reference, not for comparison: Bai and Ma (2025, arXiv 2410.16443) trained on the Pile with"
        " up to 157 billion tokens, explained with Mistral-7B and simulated with LLaMA-2-7B. This run has"
        f" another scale, another corpus and another explainer ({results.explainer}), so its scores and"
        " losses are on another footing. Published losses are read off a plot.",
    )


def _our_row(results: RunResults, m: ModelResults) -> tuple[Cell, ...]:
    cells: list[Cell] = ["this run", m.name]
    for metric in METRICS:
        s = m.figure(results.explainer, metric)
        cells += [s.mean, s.variance] if s else [None, None]
    return (*cells, _training(m).get("validation_loss"))


def all_tables(results: RunResults, resamples: int, seed: int) -> dict[str, Table]:
    """By name; tables without a row are left out."""
    makers = (comparison, models, mean_and_variance, by_layer, nulls, sparsity, ledger, reasons)
    compared = (twins, side_by_side, model_less_free, twins_with_model)
    checked = (preflights, calls, leakage, near_duplicates, duplicate_effects, duplicate_examples)
    made: Sequence[Table] = [
        *(make(results) for make in makers),
        *(make(results, resamples, seed) for make in compared),
        *(make(results) for make in checked),
        published(results),
        stages(results),
    ]
    return {t.name: t for t in made if t.rows}


def _training(m: ModelResults) -> dict[str, int | float | None]:
    return m.completions["model"].results if "model" in m.completions else {}


def _loss(trained: dict[str, int | float | None]) -> Cell:
    loss, error = trained.get("validation_loss"), trained.get("validation_standard_error")
    return loss if loss is None or error is None else Estimate(loss, error)
