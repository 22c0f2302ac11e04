"""The models: duration of each stage, parameters, losses, and sparsity of the neurons."""

from collections.abc import Iterable

import numpy as np

from cratelm.records import Estimate, Interval
from cratelm.report.cells import series_of
from cratelm.report.drawing import Figure, Panel, by_layer, curves
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.results.sparsity import LayerSparsity
from cratelm.results.stages import MODEL_STAGES
from cratelm.runs import Completion
from cratelm.text.table import Cell, Column, Table


def tables(results: RunResults) -> list[Table]:
    """Return the tables of this section."""
    return [models_table(results), sparsity_table(results), stages_table(results)]


def figures(results: RunResults) -> list[Figure | None]:
    """Return the figures of this section, with None for a figure without data."""
    return [loss_figure(results), sparsity_figure(results)]


def stages_table(results: RunResults) -> Table:
    """Return the duration of each stage in seconds, with a row per model and set."""
    verbs = MODEL_STAGES.values()
    columns = (
        Column("model", "model"),
        Column("tokenize", "tokenize", ",.1f"),
        *(Column(verb, verb, ",.1f") for verb in verbs),
        Column("finished_at", "finished (UTC)"),
        Column("state", "inputs"),
    )
    no_seconds = [None] * len(verbs)
    rows: list[tuple[Cell, ...]] = []
    if results.tokens:
        rows.append(
            ("all", results.tokens.seconds, *no_seconds, results.tokens.finished_at, "fresh")
        )
    for m in results.models:
        done = [m.completions.get(stage) for stage in MODEL_STAGES]
        last = max((c.finished_at for c in done if c), default=None)
        seconds = (c.seconds if c else None for c in done)
        rows.append((m.name, None, *seconds, last, _state(m, done)))
        for of_set in m.llm_sets:
            done = [of_set.completions.get(stage) for stage in MODEL_STAGES]
            last = max(c.finished_at for c in done if c)
            seconds = (c.seconds if c else None for c in done)
            rows.append((of_set.label, None, *seconds, last, _state(m, done)))
    return Table("stages", "Seconds of each stage", columns, tuple(rows))


def _state(model: ModelResults, done: Iterable[Completion | None]) -> str:
    """Return `fresh`, or the stages whose inputs have changed since."""
    stale = [c.stage for c in done if c and c.label in model.stale]
    return f"stale: {', '.join(stale)}" if stale else "fresh"


def models_table(results: RunResults) -> Table:
    """Return parameters and losses."""
    columns = (
        Column("model", "model"),
        Column("site", "site"),
        Column("layers", "layers", ",d"),
        Column("neurons_per_layer", "neurons per layer", ",d"),
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
        "Site: position in a layer at which its neurons are read. Parameters: trainable parameters without the"
        " position embedding. Losses are in nats per token: the training loss is that of one batch; the validation"
        " loss is the mean over fixed held-out sequences ± its standard error over them. Each model was trained"
        " once: the variation over seeds is not measured here.",
    )


def _model_row(m: ModelResults) -> tuple[Cell, ...]:
    trained = trained_figures(m)
    config = m.completions["model"].config if "model" in m.completions else {}
    return (
        m.name,
        next((site for (site,) in m.scores.counts("site")), None),
        len(m.sparsity) or None,
        max((len(of_layer.dead) for of_layer in m.sparsity.values()), default=None),
        trained.get("parameters"),
        trained.get("tokens"),
        trained.get("steps"),
        config.get("optimizer") if trained.get("steps") else None,
        config.get("learning_rate") if trained.get("steps") else None,
        config.get("seed"),
        trained.get("loss"),
        loss_cell(trained),
    )


def sparsity_table(results: RunResults) -> Table:
    """Return dead neurons and firing rates by layer."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("neurons", "neurons", ",d"),
        Column("dead", "dead", ",d"),
        Column("dead_percent", "dead, %", ".1f"),
        Column("active_percent", "active per token, % of neurons", ".1f"),
        Column("rate_p5", "firing rate: 5% quantile", ".3g"),
        Column("rate_median", "median", ".3g"),
        Column("rate_p95", "95% quantile", ".3g"),
        Column("kurtosis_median", "median kurtosis", ".3g"),
    )
    rows = [
        (m.name, layer, *_sparsity_row(of_layer))
        for m in results.models
        for layer, of_layer in m.sparsity.items()
    ]
    return Table(
        "sparsity",
        "Sparsity by layer",
        columns,
        tuple(rows),
        "Over the tokens searched in the held-out split. Dead: never fires on these tokens. Firing rate: % of"
        " tokens on which a neuron fires; its quantiles and the median kurtosis are over neurons that are"
        f" not dead. A normal distribution has kurtosis 3. {firing_note(results)}",
    )


def firing_note(results: RunResults) -> str:
    """Return when a neuron fires, in words, for the models of a report that have a harvest."""
    records = [(m.name, m.completions["activations"].results) for m in results.models if "activations" in m.completions]  # fmt: skip
    inexact = [name for name, of in records if not of.get("exact_zeros", True)]
    both = [name for name, of in records if of.get("polarity") == "both"]
    note = "A neuron fires where it is above 0"
    if inexact:
        note += (
            f"; of {', '.join(inexact)}, whose neurons are hardly ever 0, where its activation is at least a power of"
            " two, the largest that is at most a tenth of its maximum"
        )
    if both:
        note += f". Neurons of {', '.join(both)} fire at two ends, and count once"
    return f"{note}."


def _sparsity_row(layer: LayerSparsity) -> tuple[Cell, ...]:
    rates = 100 * layer.firing_rate
    live = rates[~layer.dead]
    kurtosis = layer.kurtosis[~layer.dead]
    kurtosis = kurtosis[np.isfinite(kurtosis)]
    quantiles = np.quantile(live, [0.05, 0.5, 0.95]).tolist() if len(live) else [None] * 3
    n_dead = len(rates) - len(live)
    return (
        len(rates),
        n_dead,
        100 * n_dead / len(rates),
        float(rates.mean()),
        *quantiles,
        float(np.median(kurtosis)) if len(kurtosis) else None,
    )


def trained_figures(m: ModelResults) -> dict[str, int | float | None]:
    """Return the results that `cratelm train` recorded: parameters, tokens, losses; empty for other models."""
    return m.completions["model"].results if "model" in m.completions else {}


def loss_cell(trained: dict[str, int | float | None]) -> Cell:
    """Return the validation loss with its standard error, if it has one."""
    loss, error = trained.get("validation_loss"), trained.get("validation_standard_error")
    return loss if loss is None or error is None else Estimate(loss, error)


def loss_figure(results: RunResults) -> Figure | None:
    """Return the losses over training; None if the run trained no model."""
    trained = [m for m in results.models if any("loss" in line for line in m.curve)]
    if not trained:
        return None
    series = [series_of(m) for m in trained]
    points = [(*_points(m, "loss"), *_points(m, "validation_loss")) for m in trained]
    return Figure(
        "loss",
        "Training",
        "Thin lines: loss on the batch of each step. Markers: loss on fixed held-out sequences.",
        (Panel("Loss over training tokens", curves(series, points, "nats per token")),),
        tuple(series),
    )


def sparsity_figure(results: RunResults) -> Figure | None:
    """Return firing rates and dead neurons by layer; None without a harvest."""
    models = [m for m in results.models if m.sparsity]
    if not models:
        return None
    series = [series_of(m) for m in models]
    rates, dead = [_firing_rates(m) for m in models], [_dead_percent(m) for m in models]
    return Figure(
        "sparsity",
        "Sparsity",
        "Over the tokens searched in the held-out split. Firing rate: percentage of tokens on which a neuron fires."
        f" {firing_note(results)} Marker: median over the neurons that are not dead; bars: their 5% and 95% quantiles, which show"
        " the spread of the neurons and not the uncertainty of the median.",
        (
            Panel("Firing rate", by_layer(series, rates, "tokens, %", log=True)),
            Panel("Dead neurons", by_layer(series, dead, "neurons that never fire, %", floor=True)),
        ),
        tuple(series),
    )


def _points(m: ModelResults, key: str) -> tuple[list[int], list[float]]:
    lines = [line for line in m.curve if key in line]
    return [line["tokens"] for line in lines], [line[key] for line in lines]


def _firing_rates(m: ModelResults) -> dict[int, Interval]:
    """Return the median and the 5% and 95% quantiles over the live neurons of each layer, in %."""
    quantiles = {}
    for layer, neurons in m.sparsity.items():
        live = 100 * neurons.firing_rate[~neurons.dead]
        quantiles[layer] = np.quantile(live, [0.5, 0.05, 0.95]) if len(live) else [np.nan] * 3
    return {
        layer: Interval(float(q[0]), float(q[1]), float(q[2])) for layer, q in quantiles.items()
    }


def _dead_percent(m: ModelResults) -> dict[int, Interval]:
    dead = {}
    for layer, neurons in m.sparsity.items():
        n = len(neurons.dead)
        live = n - int(neurons.dead.sum())
        dead[layer] = Interval(100 * (1 - live / n), None, None)
    return dead
