"""The tables of neurons beside latents."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from cratelm.errors import InputError
from cratelm.records import Estimate, Metric, Status
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, mean_cell
from cratelm.report.sections.autoencoders import (
    Latents,
    above_best,
    estimate,
    latents,
    loss_points,
    shown_models,
)
from cratelm.report.sections.comparisons import FIGURES, figures_of
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.runs import Completion
from cratelm.stats.scores import (
    POLICIES,
    ModelStatistics,
    compare_models,
    model_statistics,
)
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
"""settings of a harvest that must be equal for scores to be compared"""


def autoencoder_tables(results: RunResults, resamples: int, seed: int) -> dict[str, Table]:
    """By name; none where no latents were scored."""
    found = latents(results)
    if not found:
        return {}
    made = [
        _policies(results, found, resamples, seed),
        _built_in(results, found, resamples, seed),
        _budget(results, found),
        _loss_and_scores(results, found),
        _rebuilt(found),
        _steering(found),
    ]
    return {t.name: t for t in made if t.rows}


def _policies(results: RunResults, found: Sequence[Latents], resamples: int, seed: int) -> Table:
    columns = (
        Column("metric", "metric"),
        Column("model", "model"),
        Column("neurons", "neurons", ",d"),
        Column("defined", "with a score", ",d"),
        Column("undefined", "undefined", ",d"),
        Column("dead", "dead", ",d"),
        Column("failed", "failed", ",d"),
        Column("leave_out", "mean × 100 of those with a score", ".1f"),
        Column("live", "per live one: undefined as 0", ".1f"),
        Column("all", "per one of all: dead as 0, too", ".1f"),
        Column("shuffled", "null: shuffled explanations", ".1f"),
        Column("init", "null: random init", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for metric, m in product(results.metrics, shown_models(results, found)):
        own = m.figure(results.explainer, metric)
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
                mean_cell(m.figure(results.explainer, metric, policy="count_zero")),
                mean_cell(m.figure(results.explainer, metric, "shuffled")),
                mean_cell(null.figure(results.explainer, metric)) if null else None,
            )
        )
    return Table(
        "sae_policies",
        f"Neurons and latents under each way to count, explainer {results.explainer}",
        columns,
        tuple(rows),
        "Latents and neurons are drawn, searched, explained and scored alike. A latent that hardly ever"
        " fires has no score where the excerpts drawn at random miss it: the first mean leaves it out,"
        " the second counts it as 0, the third counts those that never fired as 0 as well."
        " Random init: the untrained model, and autoencoders trained on that; first mean. Undefined, dead,"
        f" failed: as in the ledger below. {INTERVAL_NOTE}",
    )


def _live(
    m: ModelResults, explainer: str, metric: Metric, resamples: int, seed: int
) -> ModelStatistics | None:
    """All that are not dead, those without a score counted as chance."""
    live = [s for s in m.scores if s.score.status != Status.DEAD]
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


def _built_in(results: RunResults, found: Sequence[Latents], resamples: int, seed: int) -> Table:
    rows: list[tuple[Cell, ...]] = []
    pairs = list(_pairs(results, found))
    for (a, b), metric, policy in product(pairs, results.metrics, POLICIES):
        try:
            c = compare_models(
                a.scores,
                b.scores,
                metric,
                explainer=results.explainer,
                policy=policy,
                paired=False,
                resamples=resamples,
                seed=seed,
            )
        except InputError:  # no layer where both have scores
            continue
        rows.append((f"{c.model_a} − {c.model_b}", *figures_of(c)))
    return Table(
        "sae_built_in",
        f"Sparsity built in, and bolted on: differences, explainer {results.explainer}",
        (Column("models", "a − b"), *FIGURES),
        tuple(rows),
        "Difference × 100 over the layers where both have scores. [ ], p and P(a > b) as in the table of"
        f" twins; p not corrected for the {len(rows)} comparisons here. Neurons and latents of one number"
        " have nothing in common, so that none are paired.",
    )


def _pairs(
    results: RunResults, found: Sequence[Latents]
) -> Iterator[tuple[ModelResults, ModelResults]]:
    """CRATE and what an autoencoder makes of its twin; each model and its own latents."""
    by_name = {m.name: m for m in results.models}
    for crate, other in results.twins():
        yield from ((crate, one.results) for one in found if one.base == other.name)
    yield from ((by_name[one.base], one.results) for one in found if one.base in by_name)


def _budget(results: RunResults, found: Sequence[Latents]) -> Table:
    """What each was given, and whether that is the same."""
    columns = (
        Column("model", "model"),
        Column("fit", "tokens explained from", ",d"),
        Column("held_out", "tokens scored on", ",d"),
        Column("settings", "length; top, random, per bin; context; seed"),
        Column("per_layer", "a layer", ",d"),
        Column("neurons", "scored", ",d"),
        Column("same", "same budget as the model's neurons"),
    )
    by_name = {m.name: m for m in results.models}
    of = {one.results.name: one.base for one in found}
    rows = []
    for m in shown_models(results, found):
        harvest = m.completions.get("activations")
        if harvest is None:
            continue
        c, searched = harvest.config, harvest.results.get("tokens", {})
        settings = (
            f"{c.get('sequence_length')}; {c.get('top')}, {c.get('random')}, {c.get('per_bin')};"
            f" {c.get('context')} and {c.get('short_context')}; {c.get('seed')}"
        )
        base = by_name.get(of.get(m.name, ""))
        rows.append(
            (
                m.name,
                searched.get("fit"),
                searched.get("held_out"),
                settings,
                max(harvest.results.get("neurons", [0])),
                len({s.neuron for s in m.scores}),
                "" if m.name not in of else _same(harvest, base),
            )
        )
    return Table(
        "sae_budget",
        "The same tokens and the same excerpts",
        columns,
        tuple(rows),
        "Context in tokens to each side, of long and of short excerpts.",
    )


def _same(harvest: Completion, base: ModelResults | None) -> str:
    other = base.completions.get("activations") if base else None
    if other is None:
        return "its neurons were not scored"
    asked = [(c.config.get(key), other.config.get(key)) for c, key in product([harvest], _BUDGET)]
    differs = [key for key, (a, b) in zip(_BUDGET, asked, strict=True) if a != b]
    if harvest.results.get("tokens") == other.results.get("tokens"):
        # more tokens asked for than there are is the same as all
        differs = [key for key in differs if key != "tokens"]
    if harvest.inputs.get("tokens") != other.inputs.get("tokens"):
        differs.append("shards")
    return f"no: {', '.join(differs)} differ" if differs else "yes"


def _loss_and_scores(results: RunResults, found: Sequence[Latents]) -> Table:
    points = loss_points(results, found)
    above = above_best(points)
    columns = [
        Column("model", "model"),
        Column("loss", "held-out loss ± se, nats a token", ".3f"),
        Column("above", f"above {above[0]} ± se" if above else "above the best", ".3f"),
        Column("added", "by the reconstruction ± se", ".3f"),
    ]
    for metric in results.metrics:
        name = METRIC_NAMES[metric]
        columns.append(Column(metric, f"{name}, mean × 100 [95%]", ".1f"))
        columns.append(Column(f"{metric}_all", f"{name}, others as 0", ".1f"))
    rows = []
    for place, p in enumerate(points):
        cells: list[Cell] = [estimate(p.loss), _plus_minus(above[1][place]) if above else None]
        cells.append(p.added)
        for metric, policy in product(results.metrics, POLICIES):
            cells.append(mean_cell(p.model.figure(results.explainer, metric, policy=policy)))
        rows.append((p.model.name, *cells))
    return Table(
        "sae_loss_and_scores",
        f"Loss against interpretability, explainer {results.explainer}",
        tuple(columns),
        tuple(rows),
        "Latents tell what the model does only as far as their reconstruction stands in the place of the"
        " activations: their loss is that of the model with all layers rebuilt that have an autoencoder. A"
        " model read by its own neurons loses nothing. Standard errors over documents; of differences,"
        " over differences on the same documents."
        + ("" if above else " Not measured on the same tokens, so that no difference is given."),
        flipped=True,
    )


def _rebuilt(found: Sequence[Latents]) -> Table:
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
    for one in found:
        if one.told is None:
            continue
        layers = {layer["layer"]: layer for layer in one.told["layers"]}
        for place in one.told["places"]:
            only = layers[place["layers"][0]] if len(place["layers"]) == 1 else None
            rows.append((one.results.name, *_layer_cells(only), *_place_cells(place)))
    return Table(
        "sae_rebuilt",
        "What autoencoders rebuild",
        columns,
        tuple(rows),
        "On held-out text, ± standard error over documents. L0: latents on at a token; own L0: activations"
        " of the site that are not 0. Shrinkage: below 1 where reconstructions are too small. Loss added"
        " and recovered (from zeros in the place of the activations): nats a token and percent. Own code"
        " at that L0: as many of the strongest activations of each token as there are latents on, the"
        " rest 0. Own code, all: nothing is rebuilt, so that nothing is lost; measured like the rest.",
    )


def _layer_cells(layer: dict[str, Any] | None) -> tuple[Cell, ...]:
    if layer is None:
        return ("all", *[None] * 7)
    return (
        str(layer["layer"]),
        layer["inputs"],
        layer["latents"],
        estimate(layer["explained_variance"], 100),
        estimate(layer["l0"]),
        estimate(layer["own_l0"]),
        estimate(layer["dead"], 100),
        estimate(layer["shrinkage"]),
    )


def _place_cells(place: dict[str, Any]) -> tuple[Cell, ...]:
    return (
        estimate(place["reconstruction"]["added"]),
        estimate(place["reconstruction"]["recovered_from_zero"], 100),
        estimate(place["own_top"]["added"]),
        estimate(place["own"]["added"]),
    )


def _steering(found: Sequence[Latents]) -> Table:
    columns = (
        Column("model", "steered"),
        Column("layer", "layer", "d"),
        Column("steered", "of them", ",d"),
        Column("fidelity", "fidelity ± se", ".3f"),
        Column("edit", "KL of the edit ± se, nats a token", ".3f"),
        Column("rebuilt", "KL of the reconstruction alone", ".3f"),
        Column("added", "loss that it costs ± se", ".3f"),
    )
    rows: list[tuple[Cell, ...]] = []
    told: set[str] = set()
    for one in found:
        if one.told is None:
            continue
        alone = {p["layers"][0]: p for p in one.told["places"] if len(p["layers"]) == 1}
        sides = [(one.results.name, "steering", "reconstruction")]
        if (
            one.base not in told
        ):  # the neurons of a model are the same beside each of its autoencoders
            sides.insert(0, (one.base, "own_steering", "own"))
            told.add(one.base)
        for name, key, kind in sides:
            for f in one.told[key]:
                cost = estimate(alone[f["layer"]][kind]["added"])
                shown = (estimate(f["fidelity"]), estimate(f["edit"]), f["rebuilt"], cost)
                rows.append((name, f["layer"], len(f["steered"]), *shown))
    return Table(
        "sae_steering",
        "Fidelity of steering",
        columns,
        tuple(rows),
        "Neurons or latents drawn among those that fire, set to their largest value at every token, one at"
        " a time. Steering a latent puts a reconstruction into the place of the activations, which moves"
        " the predictions before anything is steered: fidelity is the cosine, over tokens and vocabulary,"
        " of the whole change of the logits with the change of the edit alone (what cannot be rebuilt kept"
        " as it is). Neurons are steered without loss: 1, at no cost. The stronger the edit, the smaller"
        " the part of the reconstruction. ± standard error over those steered; of the loss, over documents.",
    )


def _plus_minus(e: Estimate) -> Cell:
    return e.value if e.error is None else Estimate(e.value, e.error)
