"""Neurons compared with latents of sparse autoencoders: scores, loss, reconstruction, fidelity of steering.

Latents are harvested as a model of their own, `MODEL+NAME`. `cratelm sae evaluate` measures the reconstruction
by their autoencoders.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.records import Estimate, Interval, Metric, Status
from cratelm.report.cells import (
    INTERVAL_NOTE,
    METRIC_NAMES,
    chance_of,
    estimate_cell,
    mean_cell,
    series_of,
)
from cratelm.report.drawing import Figure, Panel, scatter, scores_panel
from cratelm.report.sections.comparisons import (
    COMPARISON_COLUMNS,
    comparison_cells,
    comparisons,
)
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.results.scores import layer_intervals, mean_interval
from cratelm.runs import Completion
from cratelm.sae.store import LayerReconstruction, LayerReplacements
from cratelm.stats.ratio import ratio
from cratelm.stats.scores import POLICIES, ModelStatistics, model_statistics
from cratelm.text.table import Cell, Column, Table

_BUDGET = (
    "tokens",
    "sequence_length",
    "top",
    "random",
    "per_bin",
    "context",
    "short_context",
    "seed",
)
"""harvest settings that must be equal for scores to be comparable"""
_Z95 = 1.959964
"""standard errors in half a 95% interval of a normal distribution"""


def tables(results: RunResults, resamples: int, seed: int) -> list[Table]:
    """Return the tables of this section; none if no latents were scored."""
    latents = latent_models(results)
    if not latents:
        return []
    return [
        _policies(results, latents, resamples, seed),
        _built_in(results, latents, resamples, seed),
        _budget(results, latents),
        _loss_and_scores(results, latents),
        _rebuilt(results, latents),
        _steering(latents),
    ]


def figures(results: RunResults) -> list[Figure | None]:
    """Return the figures of this section; none if no latents were scored."""
    latents = latent_models(results)
    return [_by_layer_figure(results, latents), _loss_figure(results, latents)] if latents else []


def latent_models(results: RunResults) -> list[ModelResults]:
    """Return all models of the report that are latents, except those of untrained models."""
    return [m for m in results.principal if m.latents_of]


def reconstruction_costs(results: RunResults) -> dict[str, Cell]:
    """Return the loss, in nats per token, that the reconstruction by a model's latents adds, by model."""
    return {
        m.name: estimate_cell(m.evaluation.figures.all_layers.reconstruction.added)
        for m in latent_models(results)
        if m.evaluation is not None
    }


def _with_bases(results: RunResults, latents: Sequence[ModelResults]) -> list[ModelResults]:
    """Return the models that have latents, each followed by its latents."""
    bases = {m.latents_of for m in latents}
    names = [m.name for m in results.principal]

    def order(m: ModelResults) -> tuple[int, bool, str]:
        base = m.latents_of or m.name
        return (names.index(base) if base in names else len(names), bool(m.latents_of), m.name)

    models = [m for m in results.principal if m.name in bases or m.latents_of]
    return sorted(models, key=order)


# ---- tables ---------------------------------------------------------------------------------------


def _policies(
    results: RunResults, latents: Sequence[ModelResults], resamples: int, seed: int
) -> Table:
    """Return the means under each policy for neurons and latents without a score."""
    chance = chance_of(results.metrics)
    columns = (
        Column("metric", "metric"),
        Column("model", "model"),
        Column("neurons", "neurons", ",d"),
        Column("defined", "with a score", ",d"),
        Column("undefined", "undefined", ",d"),
        Column("dead", "dead", ",d"),
        Column("failed", "failed", ",d"),
        Column("leave_out", "mean × 100 of those with a score", ".1f"),
        Column("live", f"mean without dead: undefined as {chance}", ".1f"),
        Column("all", f"mean of all: dead also as {chance}", ".1f"),
        Column("shuffled", "null: shuffled explanations", ".1f"),
        Column("init", "null: random init", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for metric, m in product(results.metrics, _with_bases(results, latents)):
        own = m.find(results.explainer, metric)
        if own is None:
            continue
        c, null = own.counts, results.null(m)
        rows.append(
            (
                METRIC_NAMES[metric],
                m.name,
                *(c.total, c.defined, c.undefined, c.dead, c.failed),
                mean_cell(own),
                mean_cell(_live(m, results.explainer, metric, resamples, seed)),
                mean_cell(m.find(results.explainer, metric, policy="count_zero")),
                mean_cell(m.find(results.explainer, metric, "shuffled")),
                mean_cell(null.find(results.explainer, metric)) if null else None,
            )
        )
    return Table(
        "sae_policies",
        f"Neurons and latents under each counting policy, explainer {results.explainer}",
        columns,
        tuple(rows),
        "Latents and neurons are sampled, searched, explained and scored in the same way. A latent that fires"
        " very rarely has no score if it fires in none of the random excerpts. The first mean excludes it, the"
        " second counts it as 0, and the third also counts latents that never fired as 0."
        " Random init: the first mean of the untrained model, and of autoencoders trained on it. Undefined, dead,"
        f" failed: see “Neurons without a score” below. {INTERVAL_NOTE}",
    )


def _live(
    m: ModelResults, explainer: str, metric: Metric, resamples: int, seed: int
) -> ModelStatistics | None:
    """Return statistics of all that are not dead, counting those without a score as chance; None if all are dead."""
    statuses, words = m.scores.words("status")
    live = m.scores.where(np.array([w != Status.DEAD for w in words], bool)[statuses])
    try:
        return model_statistics(
            live,
            explainer=explainer,
            metric=metric,
            policy="count_zero",
            resamples=resamples,
            seed=seed,
        )
    except InputError:  # all dead
        return None


def _built_in(
    results: RunResults, latents: Sequence[ModelResults], resamples: int, seed: int
) -> Table:
    """Return the differences of CRATE and its twin's latents, and of each model and its own latents."""
    rows: list[tuple[Cell, ...]] = []
    for a, b in _pairs(results, latents):
        for c in comparisons(a, b, results.explainer, results.metrics, resamples, seed, False):
            rows.append((f"{c.model_a} − {c.model_b}", *comparison_cells(c)))
    return Table(
        "sae_built_in",
        f"Built-in sparsity compared with sparse autoencoders: differences, explainer {results.explainer}",
        (Column("models", "a − b"), *COMPARISON_COLUMNS),
        tuple(rows),
        "Difference × 100 over the layers in which both have scores. [ ], p and P(a > b) as in the table of"
        f" twins; p is not corrected for the {len(rows)} comparisons here. Neurons and latents with the same"
        " number are unrelated, so none are paired.",
    )


def _pairs(
    results: RunResults, latents: Sequence[ModelResults]
) -> Iterator[tuple[ModelResults, ModelResults]]:
    """Yield the pairs to compare: CRATE and the latents of its twin; each model and its own latents."""
    for crate, other in results.twins():
        yield from ((crate, m) for m in latents if m.latents_of == other.name)
    for m in latents:
        base = results.model(m.latents_of)
        if base is not None:
            yield base, m


def _budget(results: RunResults, latents: Sequence[ModelResults]) -> Table:
    """Return the tokens and excerpts used for each model, and whether the budget equals that of its neurons."""
    columns = (
        Column("model", "model"),
        Column("fit", "tokens explained from", ",d"),
        Column("held_out", "tokens scored on", ",d"),
        Column("settings", "length; top, random, per bin; context; seed"),
        Column("per_layer", "per layer", ",d"),
        Column("neurons", "scored", ",d"),
        Column("same", "same budget as the model's neurons"),
    )
    rows = []
    for m in _with_bases(results, latents):
        harvest = m.completions.get("activations")
        if harvest is None:
            continue
        c, searched = harvest.config, harvest.results.get("tokens", {})
        settings = (
            f"{c.get('sequence_length')}; {c.get('top')}, {c.get('random')}, {c.get('per_bin')};"
            f" {c.get('context')} and {c.get('short_context')}; {c.get('seed')}"
        )
        base = results.model(m.latents_of)
        rows.append(
            (
                m.name,
                searched.get("fit"),
                searched.get("held_out"),
                settings,
                max(harvest.results.get("neurons", [0])),
                len(m.scores.neurons()),
                _same(harvest, base) if m.latents_of else "",
            )
        )
    return Table(
        "sae_budget",
        "The same tokens and the same excerpts",
        columns,
        tuple(rows),
        "Context: number of tokens on each side, for long and for short excerpts.",
    )


def _same(harvest: Completion, base: ModelResults | None) -> str:
    other = base.completions.get("activations") if base else None
    if other is None:
        return "its neurons were not scored"
    differing = [key for key in _BUDGET if harvest.config.get(key) != other.config.get(key)]
    if harvest.results.get("tokens") == other.results.get("tokens"):
        # requesting more tokens than exist is the same as requesting all
        differing = [key for key in differing if key != "tokens"]
    if harvest.inputs.get("tokens") != other.inputs.get("tokens"):
        differing.append("shards")
    return f"no: {', '.join(differing)} differ" if differing else "yes"


@dataclass(frozen=True, eq=False)
class _LossPoint:
    """Loss of a model read by its neurons, or by latents whose reconstruction replaces its activations."""

    model: ModelResults
    loss: Estimate
    """nats per token"""
    added: Estimate | None
    """loss added by the reconstruction; None for the unmodified model"""
    tokens: tuple[tuple[int, int], ...]
    """[C] ordinal and number of predicted tokens of each document"""
    totals: NDArray[np.float64]
    """[C] summed loss of each document"""


def _loss_points(results: RunResults, latents: Sequence[ModelResults]) -> list[_LossPoint]:
    """Return the loss of each unmodified model, and with reconstructed activations in all layers, on the same tokens."""
    points: dict[str, _LossPoint] = {}
    for m in latents:
        if m.evaluation is None:
            continue
        sums, replaced = m.evaluation.by_document, m.evaluation.figures.all_layers.reconstruction
        tokens = tuple(zip(sums.document, sums.targets, strict=True))
        points[m.name] = _LossPoint(
            m, replaced.loss, replaced.added, tokens, np.array(sums.reconstruction)
        )
        base = results.model(m.latents_of)
        if base is not None:
            points[base.name] = _LossPoint(
                base, m.evaluation.figures.loss, None, tokens, np.array(sums.loss)
            )
    return [points[m.name] for m in _with_bases(results, latents) if m.name in points]


def _above_best(points: Sequence[_LossPoint]) -> tuple[str, list[Estimate]] | None:
    """Return the name of the model with the lowest loss, and the excess of each point's loss over it.

    None if the losses were not measured on the same tokens.
    """
    if not points or len({p.tokens for p in points}) > 1:
        return None
    targets = np.array([n for _, n in points[0].tokens], dtype=float)
    best = min(points, key=lambda p: p.loss.value)
    return best.model.name, [ratio(p.totals - best.totals, targets) for p in points]


def _loss_and_scores(results: RunResults, latents: Sequence[ModelResults]) -> Table:
    """Return the losses of the unmodified models and of their reconstructions, with the scores of each."""
    points = _loss_points(results, latents)
    above = _above_best(points)
    columns = [
        Column("model", "model"),
        Column("loss", "held-out loss ± se, nats per token", ".3f"),
        Column("above", f"above {above[0]} ± se" if above else "above the best", ".3f"),
        Column("added", "by the reconstruction ± se", ".3f"),
    ]
    for metric in results.metrics:
        name = METRIC_NAMES[metric]
        columns.append(Column(metric, f"{name}, mean × 100 [95%]", ".1f"))
        columns.append(Column(f"{metric}_all", f"{name}, others as 0", ".1f"))
    rows = []
    for number, p in enumerate(points):
        cells: list[Cell] = [estimate_cell(p.loss)]
        cells.append(estimate_cell(above[1][number]) if above else None)
        cells.append(estimate_cell(p.added))
        for metric, policy in product(results.metrics, POLICIES):
            cells.append(mean_cell(p.model.find(results.explainer, metric, policy=policy)))
        rows.append((p.model.name, *cells))
    return Table(
        "sae_loss_and_scores",
        f"Loss against interpretability, explainer {results.explainer}",
        tuple(columns),
        tuple(rows),
        "Latents describe the model only to the extent that their reconstruction can replace the activations."
        " Their loss is the loss of the model with the activations reconstructed in all layers that have an"
        " autoencoder. Reading a model by its own neurons adds no loss. Standard errors are over documents; those"
        " of differences are over differences on the same documents."
        + (
            ""
            if above
            else " The losses were measured on different tokens, so no difference is given."
        ),
        flipped=True,
    )


def _rebuilt(results: RunResults, latents: Sequence[ModelResults]) -> Table:
    """Return how well the autoencoders of each layer, and all of them together, reconstruct the activations.

    Those of untrained models come last.
    """
    columns = (
        Column("model", "model"),
        Column("layer", "layer"),
        Column("inputs", "inputs", ",d"),
        Column("latents", "latents", ",d"),
        Column("explained_variance", "explained variance, %", ".1f"),
        Column("l0", "L0", ".1f"),
        Column("own_l0", "own L0", ".1f"),
        Column("dead", "dead, %", ".1f"),
        Column("shrinkage", "shrinkage", ".3f"),
        Column("added", "loss added", ".3f"),
        Column("recovered", "loss recovered, %", ".2f"),
        Column("own_top", "own code at that L0: loss added", ".3f"),
        Column("own", "own code, all: loss added", ".3f"),
    )
    rows: list[tuple[Cell, ...]] = []
    nulls = [m for m in results.models if m.null_of and m.latents_of]
    for m in [*latents, *nulls]:
        if m.evaluation is None:
            continue
        for replaced in m.evaluation.figures.replacements:
            alone = (
                m.evaluation.figures.of_layer(replaced.layers[0])
                if len(replaced.layers) == 1
                else None
            )
            rows.append((m.name, *_reconstruction_cells(alone), *_replaced_cells(replaced)))
    return Table(
        "sae_rebuilt",
        "Reconstruction by the autoencoders",
        columns,
        tuple(rows),
        "On held-out text, ± standard error over documents. L0: number of active latents per token; own L0:"
        " number of nonzero activations of the site per token. Shrinkage: below 1 if reconstructions are too"
        " small. Loss added: nats per token; loss recovered: percent, relative to replacing the activations by"
        " zeros. Own code at that L0: for each token, as many of the largest activations as there are active"
        " latents, all others set to 0. Own code, all: the activations are unchanged, so nothing is lost.",
    )


def _reconstruction_cells(layer: LayerReconstruction | None) -> tuple[Cell, ...]:
    """Return the cells of one layer; None stands for all layers together."""
    if layer is None:
        return ("all", *[None] * 7)
    return (
        str(layer.layer),
        layer.inputs,
        layer.latents,
        estimate_cell(layer.explained_variance, 100),
        estimate_cell(layer.l0),
        estimate_cell(layer.own_l0),
        estimate_cell(layer.dead, 100),
        estimate_cell(layer.shrinkage),
    )


def _replaced_cells(replaced: LayerReplacements) -> tuple[Cell, ...]:
    return (
        estimate_cell(replaced.reconstruction.added),
        estimate_cell(replaced.reconstruction.recovered_from_zero, 100),
        estimate_cell(replaced.own_top.added),
        estimate_cell(replaced.own.added),
    )


def _steering(latents: Sequence[ModelResults]) -> Table:
    """Return how much of the change made by steering is due to the edit itself."""
    columns = (
        Column("model", "steered"),
        Column("layer", "layer", "d"),
        Column("steered", "number of them", ",d"),
        Column("fidelity", "fidelity ± se", ".3f"),
        Column("edit", "KL of the edit ± se, nats per token", ".3f"),
        Column("rebuilt", "KL of the reconstruction alone", ".3f"),
        Column("added", "loss added ± se", ".3f"),
    )
    rows: list[tuple[Cell, ...]] = []
    bases: set[str] = set()
    for m in latents:
        if m.evaluation is None:
            continue
        sides = [(m.name, m.evaluation.figures.steering, "reconstruction")]
        if m.latents_of not in bases:  # a model's neurons are the same for all of its autoencoders
            bases.add(m.latents_of)
            sides.insert(0, (m.latents_of, m.evaluation.figures.own_steering, "own"))
        for name, by_layer, kind in sides:
            for f in by_layer:
                added = getattr(m.evaluation.figures.layer_alone(f.layer), kind).added
                cells = (estimate_cell(f.fidelity), estimate_cell(f.edit), f.rebuilt)
                rows.append((name, f.layer, len(f.steered), *cells, estimate_cell(added)))
    return Table(
        "sae_steering",
        "Fidelity of steering",
        columns,
        tuple(rows),
        "Neurons or latents are sampled among those that fire. Each is set to its largest value at every token,"
        " one at a time. Steering a latent replaces the activations by a reconstruction, which already changes"
        " the predictions before anything is steered. Fidelity is the cosine, over tokens and vocabulary,"
        " between the whole change of the logits and the change due to the edit alone (in which the"
        " reconstruction error is added back). Steering a neuron needs no reconstruction: its fidelity is 1 and"
        " no loss is added. The stronger the edit, the smaller the contribution of the reconstruction."
        " ± standard error over the steered neurons or latents; for the loss, over documents.",
    )


# ---- figures --------------------------------------------------------------------------------------


def _by_layer_figure(results: RunResults, latents: Sequence[ModelResults]) -> Figure:
    models = _with_bases(results, latents)
    series = [series_of(m) for m in models]

    def panel(metric: Metric) -> Panel:
        lines = [layer_intervals(m.find(results.explainer, metric)) for m in models]
        return scores_panel(METRIC_NAMES[metric], series, lines)

    return Figure(
        "sae_scores",
        "Neurons and latents by layer",
        f"Explainer {results.explainer}. Mean over the neurons or latents of a layer that have a score; bars:"
        " 95% bootstrap interval over them.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(series),
    )


def _loss_figure(results: RunResults, latents: Sequence[ModelResults]) -> Figure | None:
    points = _loss_points(results, latents)
    above = _above_best(points)
    if above is None:
        return None
    series = [series_of(p.model) for p in points]
    losses = [_interval(e) for e in above[1]]

    def panel(metric: Metric) -> Panel:
        means = [mean_interval(p.model.find(results.explainer, metric)) for p in points]
        pairs = [None if y is None else (x, y) for x, y in zip(losses, means, strict=True)]
        x = f"loss above {above[0]}, nats per token"
        return Panel(METRIC_NAMES[metric], scatter(series, pairs, x, "mean score × 100"))

    return Figure(
        "sae_loss",
        "Loss against interpretability",
        f"Explainer {results.explainer}; up and to the left is better. The loss of latents is the loss of the"
        f" model with their reconstruction instead of its activations. Losses are relative to that of {above[0]},"
        " on the same held-out documents. Bars: 95% intervals, of the difference in loss over documents and of the"
        " score over neurons; a bar that is not visible is narrower than the marker.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(series),
    )


def _interval(e: Estimate) -> Interval:
    """Return the value with the 95% interval of a normal distribution."""
    half = _Z95 * (e.error or 0.0)
    return Interval(e.value, e.value - half, e.value + half)
