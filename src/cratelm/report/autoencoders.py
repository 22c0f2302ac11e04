"""Neurons beside latents of sparse autoencoders: scores, loss, what is rebuilt, how faithful steering is.

Reads what `cratelm sae evaluate` kept in the run: `sae/MODEL@NAME/evaluation.json`, or `sae/MODEL@FOLDER.json`
for autoencoders from elsewhere. Latents are models like any other, harvested as `MODEL+NAME`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.evaluate.estimates import Estimate, ratio
from cratelm.records import Metric, Status
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, mean_cell
from cratelm.report.comparisons import FIGURES, figures_of
from cratelm.report.figures import Figure, Panel, Series, by_layer, scatter
from cratelm.report.gather import ModelResults, RunResults
from cratelm.report.tables import Cell, Column, PlusMinus, Table
from cratelm.runs import Completion, Run, hash_file
from cratelm.score.statistics import (
    POLICIES,
    LayerStatistics,
    ModelStatistics,
    compare_models,
    model_statistics,
)

_Z95 = 1.959964
"""standard errors in half a 95% interval of a normal distribution"""
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


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of one model's autoencoders, beside the neurons of the model."""

    results: ModelResults
    base: str
    """the model that they are of"""
    told: dict[str, Any] | None
    """what `cratelm sae evaluate` measured of these very autoencoders; None where it did not"""

    @cached_property
    def all_layers(self) -> dict[str, Any] | None:
        """Loss with all layers rebuilt at once, of the only one where there is one."""
        return self.told["places"][-1] if self.told else None


def evaluation_path(run: Run, harvest: Completion) -> Path | None:
    """Where the figures of a harvest's autoencoders are kept; None where it is of neurons."""
    sae = harvest.config.get("sae")
    if not sae:
        return None
    name = f"{Path(harvest.config['model']).name}@{Path(sae).name}"
    own = run.path / "sae" / name
    return own / "evaluation.json" if own.is_dir() else own.with_name(f"{name}.json")


def evaluation_inputs(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Hash of every evaluation that the report reads."""
    found = {}
    for name in names:
        harvest = run.stage("activations", name).completion()
        path = evaluation_path(run, harvest) if harvest else None
        if path is not None and path.is_file():
            found[f"evaluation/{name}"] = hash_file(path)
    return found


def latents(results: RunResults) -> list[Latents]:
    """All models of the report that are latents, those of untrained models left out."""
    found = []
    for m in results.principal:
        harvest = m.completions.get("activations")
        path = evaluation_path(results.run, harvest) if harvest else None
        if harvest is None or path is None:
            continue
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        # figures of autoencoders, or a model, that have been trained again since say nothing of these
        if told and (told.get("identity"), told.get("model_identity")) != (
            harvest.inputs.get("sae"),
            harvest.inputs.get("model"),
        ):
            told = None
        found.append(Latents(m, Path(harvest.config["model"]).name, told))
    return found


def missing_evaluations(results: RunResults) -> list[str]:
    path = results.run.path
    lines = []
    for one in latents(results):
        if one.told is None:
            config = one.results.completions["activations"].config
            lines.append(
                f"what the autoencoders of {one.results.name} rebuild (`cratelm sae evaluate --run {path}"
                f" --model {config['model']} --sae {config['sae']}`)"
            )
    return lines


def reconstruction_costs(results: RunResults) -> dict[str, Cell]:
    """Loss that the latents of each model add, nats a token, by their name."""
    return {
        one.results.name: estimate(whole["reconstruction"]["added"])
        for one in latents(results)
        if (whole := one.all_layers) is not None
    }


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


def autoencoder_figures(
    results: RunResults, series: Sequence[tuple[str, Series]]
) -> dict[str, Figure]:
    found = latents(results)
    if not found:
        return {}
    made = [_by_layer(results, found, dict(series)), _scatter(results, found, dict(series))]
    return {f.name: f for f in made if f is not None}


def _shown(results: RunResults, found: Sequence[Latents]) -> list[ModelResults]:
    """Each model, its latents behind it."""
    bases = {one.base for one in found}
    of = {one.results.name: one.base for one in found}
    order = [m for m in results.principal if m.name in bases or m.name in of]
    names = [m.name for m in results.principal]

    def place(m: ModelResults) -> tuple[int, bool, str]:
        base = of.get(m.name, m.name)
        return (names.index(base) if base in names else len(names), m.name in of, m.name)

    return sorted(order, key=place)


# ---- scores ---------------------------------------------------------------------------------------


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
    for metric, m in product(results.metrics, _shown(results, found)):
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
    for m in _shown(results, found):
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


def _by_layer(results: RunResults, found: Sequence[Latents], series: dict[str, Series]) -> Figure:
    shown = _shown(results, found)
    drawn = [series[m.name] for m in shown]

    def panel(metric: Metric) -> Panel:
        points = []
        for m in shown:
            own = m.figure(results.explainer, metric)
            layers = [layer for layer in (own.layers if own else ()) if layer.mean is not None]
            ends = [_bar(layer) for layer in layers]
            points.append(
                (
                    [layer.layer for layer in layers],
                    [layer.mean for layer in layers],
                    [low for low, _ in ends],
                    [high for _, high in ends],
                )
            )
        return Panel(METRIC_NAMES[metric], by_layer(drawn, points, "mean score × 100", zero=True))

    return Figure(
        "sae_scores",
        "Neurons and latents by layer",
        f"Explainer {results.explainer}. Mean over the neurons, or latents, of a layer that have a score;"
        " bars: 95% bootstrap interval over them.",
        tuple(panel(metric) for metric in results.metrics),
        tuple(drawn),
    )


# ---- loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Point:
    """What reading a model in one way costs, and gives."""

    model: ModelResults
    loss: dict[str, Any]
    """nats a token: value and error"""
    added: Cell
    """by the reconstruction"""
    tokens: tuple[tuple[int, int], ...]
    """ordinal and tokens predicted of each document [C]"""
    totals: NDArray[np.float64]
    """[C] sum of the losses of each document"""


def _points(results: RunResults, found: Sequence[Latents]) -> list[_Point]:
    """Loss of each model as it is, and with its reconstruction in all layers, on the same tokens."""
    by_name = {m.name: m for m in results.models}
    points: dict[str, _Point] = {}
    for one in found:
        if one.told is None or one.all_layers is None:
            continue
        sums = one.told["by_document"]
        tokens = tuple(zip(sums["document"], sums["targets"], strict=True))
        spliced = one.all_layers["reconstruction"]
        added = estimate(spliced["added"])
        sides = [(one.results, spliced["loss"], added, sums["reconstruction"])]
        if one.base in by_name:
            sides.append((by_name[one.base], one.told["loss"], None, sums["loss"]))
        for m, loss, cost, totals in sides:
            points[m.name] = _Point(m, loss, cost, tokens, np.array(totals))
    return [points[m.name] for m in _shown(results, found) if m.name in points]


def _above(points: Sequence[_Point]) -> tuple[str, list[Estimate]] | None:
    """Name of the model of least loss, and how far the others lie above it on the same documents.

    None where they were not measured on the same tokens.
    """
    if not points or len({p.tokens for p in points}) > 1:
        return None
    targets = np.array([n for _, n in points[0].tokens], dtype=float)
    best = min(points, key=lambda p: p.loss["value"])
    return best.model.name, [ratio(p.totals - best.totals, targets) for p in points]


def _loss_and_scores(results: RunResults, found: Sequence[Latents]) -> Table:
    points = _points(results, found)
    above = _above(points)
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


def _scatter(
    results: RunResults, found: Sequence[Latents], series: dict[str, Series]
) -> Figure | None:
    points = _points(results, found)
    above = _above(points)
    if above is None:
        return None
    drawn = [series[p.model.name] for p in points]
    along = [(e.value, *_ends(e)) for e in above[1]]

    def panel(metric: Metric) -> Panel:
        figures = [p.model.figure(results.explainer, metric) for p in points]
        places = [
            None if s is None or s.mean is None else (x, (s.mean, *_bar(s)))
            for x, s in zip(along, figures, strict=True)
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


def _bar(s: ModelStatistics | LayerStatistics) -> tuple[float, float]:
    """Ends of the interval of a mean that exists; the mean itself where there are none."""
    assert s.mean is not None
    return s.mean if s.low is None else s.low, s.mean if s.high is None else s.high


# ---- autoencoders ---------------------------------------------------------------------------------


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
    return e.value if e.error is None else PlusMinus(e.value, e.error)


def estimate(told: dict[str, Any] | None, by: float = 1) -> Cell:
    """A figure with its standard error, times `by`."""
    if told is None or told["value"] is None:
        return None
    if told["error"] is None:
        return by * told["value"]
    return PlusMinus(by * told["value"], by * told["error"])
