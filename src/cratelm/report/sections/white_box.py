"""What `cratelm analyze` measured, read from its files for the report.

`analysis/MODEL/` holds `layers.parquet` (figures of a layer), `readings.parquet` (figures of a neuron beside
its explanation) and `summary.json` (means over neurons): formats in `docs/white-box.md`. A quantity that a
model has not is a dash in a table and no point in a figure; a model that was not analysed has no row.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cratelm.records import Estimate
from cratelm.report.cells import interval_cell
from cratelm.report.drawing import INK, Figure, Panel, Series, by_layer
from cratelm.runs import Run
from cratelm.stats.intervals import resampled_means
from cratelm.text.table import Cell, Column, Table

EPSILON = "0.5"
"""distortion of the coding rates shown"""
SHARE = 0.5
"""how far between the default and the largest value a token must be predicted to be covered"""
MEASURES = ("consistency", "evenness", "distinctiveness", "contrast", "auroc")
DRAWN = ("consistency", "evenness", "distinctiveness", "auroc")
"""in the figure"""
_RATES = {
    "compression_rate": "R^c, heads' projections",
    "subspace_rate": "R^c, heads' subspaces",
    "coding_rate": "R",
}
_STEP_SIZE, _STEPS = ("step_size", ""), ("ista_steps", "")
Value = tuple[float, float | None]
"""with its standard error, where there is one"""


@dataclass(frozen=True, eq=False)
class Analysed:
    """One model's analysis."""

    name: str
    figures: dict[tuple[str, str], dict[int, Value]]
    """by quantity and setting, then by layer"""
    means: tuple[dict[str, Any], ...]
    """over neurons: `summary.json`"""
    readings: Path
    """absent where the model has no explanations"""

    @property
    def layers(self) -> list[int]:
        return sorted({layer for found in self.figures.values() for layer in found})

    def at(self, quantity: str, setting: str, layer: int) -> Value | None:
        return self.figures.get((quantity, setting), {}).get(layer)

    def steps(self) -> list[int]:
        """Steps that the lasso objective was followed along, from 0; empty where it does not exist."""
        return sorted(int(setting) for quantity, setting in self.figures if quantity == "lasso")

    def mean(
        self, measure: str, layer: int, control: str = "none", share: float = SHARE
    ) -> dict[str, Any] | None:
        wanted = (measure, layer, control, share)
        for found in self.means:
            if (found["measure"], found["layer"], found["control"], found["share"]) == wanted:
                return found
        return None


def white_box_tables(
    run: Run,
    models: Sequence[str],
    twins: Sequence[tuple[str, str]] = (),
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Table]:
    """By name, those that have a row; `twins` are pairs of models that are compared, first less second."""
    found = read_analyses(run, models)
    by_name = {a.name: a for a in found}
    pairs = [(by_name[a], by_name[b]) for a, b in twins if a in by_name and b in by_name]
    made = (
        rates_table(found),
        distortion_table(found),
        sparsity_table(found),
        lasso_table(found),
        weights_table(found),
        readings_table(found),
        share_table(found),
        twins_table(pairs, resamples, seed),
    )
    return {table.name: table for table in made if table.rows}


def white_box_figures(run: Run, models: Sequence[tuple[str, Series]]) -> dict[str, Figure]:
    """By name, those that have something to show; each model with how it looks elsewhere in the report."""
    series = dict(models)
    drawn = [(series[a.name], a) for a in read_analyses(run, list(series))]
    made = (
        rates_figure(drawn),
        sparsity_figure(drawn),
        lasso_figure(drawn),
        weights_figure(drawn),
        readings_figure(drawn),
    )
    return {figure.name: figure for figure in made if figure is not None}


def read_analyses(run: Run, models: Sequence[str]) -> list[Analysed]:
    """Those of `models` that are finished, in the order given."""
    there = set(run.models("analysis"))
    return [_read(name, run.stage("analysis", name).path) for name in models if name in there]


def _read(name: str, folder: Path) -> Analysed:
    figures: dict[tuple[str, str], dict[int, Value]] = {}
    for row in pq.read_table(folder / "layers.parquet").to_pylist():
        place = figures.setdefault((row["quantity"], row["setting"]), {})
        place[row["layer"]] = (row["value"], row["error"])
    means = json.loads((folder / "summary.json").read_text())["readings"]
    return Analysed(name, figures, tuple(means), folder / "readings.parquet")


# ---- tables ---------------------------------------------------------------------------------------


def rates_table(found: Sequence[Analysed]) -> Table:
    """Coding rates before and after attention."""
    columns = [Column("model", "model"), Column("layer", "layer", "d")]
    for key, label in _RATES.items():
        columns += [
            Column(f"{key}_before", f"{label}: before", ".1f"),
            Column(f"{key}_after", "after", ".1f"),
            Column(f"{key}_change", "change", ".1f"),
        ]
    rows = [
        (
            a.name,
            layer,
            *(
                _plus(a.at(f"{key}_{when}", EPSILON, layer))
                for key in _RATES
                for when in ("before", "after", "change")
            ),
        )
        for a in found
        for layer in a.layers
        if a.at("coding_rate_before", EPSILON, layer)
    ]
    return Table(
        "white_box_rates",
        "Coding rates before and after attention",
        tuple(columns),
        tuple(rows),
        f"Nats, at distortion ε = {EPSILON}, of held-out tokens as attention takes them in (after its"
        " LayerNorm), and of the residual stream behind it put through the same LayerNorm. R^c: the"
        " compression term, whose descent MSSA is derived from, in the heads' own projections (their scale"
        " counts) and in orthonormal bases of the same subspaces (it does not). R: the expansion term."
        " ±: standard error, a twentieth of the documents left out at a time (jackknife).",
    )


def distortion_table(found: Sequence[Analysed]) -> Table:
    """How much the changes of the coding rates hang on the distortion."""
    distortions = sorted(
        {s for a in found for q, s in a.figures if q == "coding_rate_change"}, key=float
    )
    columns = [Column("model", "model"), Column("layer", "layer", "d")]
    columns += [
        Column(f"{key}_{epsilon}", f"{label}, ε = {epsilon}", ".1f")
        for key, label in _RATES.items()
        for epsilon in distortions
    ]
    rows = [
        (
            a.name,
            layer,
            *(_plus(a.at(f"{key}_change", e, layer)) for key in _RATES for e in distortions),
        )
        for a in found
        for layer in a.layers
        if a.at("coding_rate_before", EPSILON, layer)
    ]
    return Table(
        "white_box_distortion",
        "Change of the coding rates, by distortion",
        tuple(columns),
        tuple(rows),
        "After less before attention, nats; the smaller ε, the more directions count.",
    )


def sparsity_table(found: Sequence[Analysed]) -> Table:
    """How sparse tokens are before the second step of a layer, and its neurons after it."""
    quantities = {"nonzero": "not 0, %", "above_tenth": "above a tenth, %", "hoyer": "Hoyer"}
    columns = [Column("model", "model"), Column("layer", "layer", "d")]
    for key, label in quantities.items():
        form = ".2f" if key == "hoyer" else ".1f"
        columns += [
            Column(f"{key}_before", f"{label}: before", form),
            Column(f"{key}_after", "after", form),
        ]
    columns += [Column("dead", "dead neurons, %", ".1f")]
    rows = [
        (
            a.name,
            layer,
            *(
                _plus(a.at(key, when, layer), 1 if key == "hoyer" else 100)
                for key in quantities
                for when in ("before", "after")
            ),
            _plus(a.at("dead", "", layer), 100),
        )
        for a in found
        for layer in a.layers
    ]
    return Table(
        "white_box_sparsity",
        "Sparsity before and after sparse coding",
        tuple(columns),
        tuple(rows),
        "Of the vector of one token, mean over held-out tokens. Before: what the LayerNorm puts into ISTA,"
        " or into the MLP; after: the neurons. Above a tenth: entries whose size is more than a tenth of"
        " the vector's largest. Hoyer: 0 for equal entries, 1 for a single one. Dead: never above 0 on"
        " these tokens. ±: standard error over documents.",
    )


def lasso_table(found: Sequence[Analysed]) -> Table:
    """The lasso objective along the unrolled steps."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("step", "step", "d"),
        Column("taken", "taken by the model"),
        Column("objective", "objective", ".2f"),
        Column("relative", "of that at step 0, %", ".1f"),
        Column("falls", "tokens where the step lowers it, %", ".1f"),
    )
    rows = []
    for a in found:
        for layer in a.layers:
            start, taken = a.at("lasso", "0", layer), a.at(*_STEPS, layer)
            for step in a.steps():
                value = a.at("lasso", str(step), layer)
                if value is None or start is None:
                    continue
                own = "" if taken is None or step > taken[0] else "yes"
                falls = _plus(a.at("lasso_falls", str(step), layer), 100)
                relative = 100 * value[0] / start[0]
                rows.append((a.name, layer, step, own, _plus(value), relative, falls))
    return Table(
        "white_box_lasso",
        "The lasso objective along the steps",
        columns,
        tuple(rows),
        "1/2 |x − D A|² + λ |A|₁ of the codes A after each step, mean over held-out tokens; steps beyond"
        " those that the model takes show where the iteration goes. ±: standard error over documents.",
    )


def weights_table(found: Sequence[Analysed]) -> Table:
    """Dictionary, step size, heads and groups of neurons."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("step_size", "step size η", ".3g"),
        Column("norm", "norm of D", ".2f"),
        Column("product", "η |D|²", ".2f"),
        Column("mutual_coherence", "mutual coherence", ".3f"),
        Column("median_coherence", "median to the nearest atom", ".3f"),
        Column("welch_bound", "least possible", ".3f"),
        Column("duplicated", "duplicated atoms, %", ".1f"),
        Column("effective_rank", "effective rank of a head", ".1f"),
        Column("stable_rank", "stable rank", ".1f"),
        Column("overlap", "overlap of two heads", ".3f"),
        Column("overlap_random", "of random ones", ".3f"),
        Column("angle", "smallest angle, °", ".1f"),
        Column("angle_random", "of random ones, °", ".1f"),
        Column("groups", "groups of neurons", ",d"),
        Column("grouped", "neurons in them, %", ".1f"),
        Column("largest", "largest", ",d"),
    )
    rows = [_weights_row(a, layer) for a in found for layer in a.layers]
    return Table(
        "white_box_weights",
        "Dictionary, heads and groups of neurons",
        columns,
        tuple(rows),
        "Coherence: |cosine| of two atoms; mutual: the largest; GPT-2's atoms are the rows of its MLP's"
        " last projection. Duplicated: a cosine of 0.95 or more with another. With η |D|² up to 1 no step"
        " raises the lasso objective, up to 2 the iteration converges. Overlap: mean squared cosine of the"
        " principal angles of two heads' subspaces; random ones of the same shape beside it. Groups:"
        " average linkage of the correlation over tokens, cut at 0.5.",
    )


def _weights_row(a: Analysed, layer: int) -> tuple[Cell, ...]:
    def plain(quantity: str, setting: str = "", by: float = 1) -> Cell:
        return _plus(a.at(quantity, setting, layer), by)

    def count(quantity: str) -> Cell:
        value = a.at(quantity, "", layer)
        return None if value is None else int(value[0])

    return (
        a.name,
        layer,
        plain("step_size"),
        plain("spectral_norm"),
        _step_product(a, layer),
        plain("mutual_coherence"),
        plain("median_coherence"),
        plain("welch_bound"),
        plain("duplicated", by=100),
        plain("head_effective_rank"),
        plain("head_stable_rank"),
        plain("head_overlap"),
        plain("head_overlap", "random"),
        plain("head_angle"),
        plain("head_angle", "random"),
        count("groups"),
        plain("grouped", by=100),
        count("largest_group"),
    )


def _step_product(a: Analysed, layer: int) -> float | None:
    """eta |D|^2, where the model has a step size."""
    step, norm = a.at(*_STEP_SIZE, layer), a.at("spectral_norm", "", layer)
    return None if step is None or norm is None else step[0] * norm[0] ** 2


def readings_table(found: Sequence[Analysed]) -> Table:
    """Consistency and distinctiveness of the neurons."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("explanations", "explanations"),
        *(Column(m, _label(m), _form(m)) for m in MEASURES),
        Column("defined", "neurons", ",d"),
        Column("none", "undefined / dead"),
    )
    rows = [
        _readings_row(a, layer, control)
        for a in found
        for control in ("none", "shuffled")
        for layer in a.layers
        if a.mean("auroc", layer, control)
    ]
    return Table(
        "white_box_readings",
        "Consistency and distinctiveness",
        columns,
        tuple(rows),
        "On held-out tokens. An explanation covers a token where it predicts at least half of its largest"
        " value (counted from its default). Consistency: part of the covered tokens at which the neuron is"
        " above a tenth of its maximum on the fit documents; evenness: 1 where it is equally strong at all"
        " of them; distinctiveness: part of the other tokens at which it is not above that tenth; contrast:"
        " (m − m') / (m + m') of its mean activations m on covered and m' on other tokens; AUROC:"
        " chance that it is stronger at a covered token than at another. Shuffled: another neuron's"
        " explanation. Undefined: nothing is covered. [ ]: 95% bootstrap interval over neurons.",
    )


def _readings_row(a: Analysed, layer: int, control: str) -> tuple[Cell, ...]:
    told = [a.mean(m, layer, control) for m in MEASURES]
    own = a.mean("auroc", layer, control)
    assert own is not None
    return (
        a.name,
        layer,
        "own" if control == "none" else control,
        *(_interval(m, told_m) for m, told_m in zip(MEASURES, told, strict=True)),
        own["defined"],
        f"{own['undefined']:,} / {own['dead']:,}",
    )


def share_table(found: Sequence[Analysed]) -> Table:
    """How much hangs on what counts as covered."""
    shares = sorted({m["share"] for a in found for m in a.means})
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("share", "covered from", ".2f"),
        *(Column(m, _label(m), _form(m)) for m in MEASURES),
        Column("defined", "neurons", ",d"),
    )
    rows = []
    for a in found:
        for layer in a.layers:
            for share in shares:
                told = [a.mean(m, layer, share=share) for m in MEASURES]
                if told[-1] is not None:
                    cells = (_interval(m, t) for m, t in zip(MEASURES, told, strict=True))
                    rows.append((a.name, layer, share, *cells, told[-1]["defined"]))
    return Table(
        "white_box_shares",
        "The same, by what counts as covered",
        columns,
        tuple(rows),
        "Covered from: how far a prediction lies between the default of the explanation (0) and its largest"
        " value (1).",
    )


def twins_table(pairs: Sequence[tuple[Analysed, Analysed]], resamples: int, seed: int) -> Table:
    """Differences of the neurons' means, by layer and over the layers."""
    columns = (
        Column("models", "a − b"),
        Column("layer", "layer"),
        Column("measure", "measure"),
        Column("mean_a", "mean a", ".3f"),
        Column("mean_b", "mean b", ".3f"),
        Column("difference", "difference [95%]", "+.3f"),
        Column("n_a", "n a", ",d"),
        Column("n_b", "n b", ",d"),
    )
    rows: list[tuple[Cell, ...]] = []
    for a, b in pairs:
        for measure in MEASURES:
            rows += _twin_rows(a, b, measure, resamples, seed)
    return Table(
        "white_box_twins",
        "Consistency and distinctiveness: CRATE less GPT-2",
        columns,
        tuple(rows),
        "Means over neurons with a value, of each layer, and the mean of these over the layers; [ ]: 95%"
        " bootstrap interval over neurons, drawn within their layer and model. Neurons of twins are not"
        " paired: that of the same index means something else. One training of each: a difference may be"
        " one of these seeds.",
    )


def _twin_rows(
    a: Analysed, b: Analysed, measure: str, resamples: int, seed: int
) -> list[tuple[Cell, ...]]:
    sides = [_values(one, measure) for one in (a, b)]
    layers = sorted(sides[0].keys() & sides[1].keys())
    rng = np.random.default_rng(seed)
    drawn = {
        layer: tuple(resampled_means(side[layer], resamples, rng) for side in sides)
        for layer in layers
    }
    rows: list[tuple[Cell, ...]] = []
    means = [[float(side[layer].mean()) for layer in layers] for side in sides]
    counts = [[len(side[layer]) for layer in layers] for side in sides]
    groups = [(str(layer), [i]) for i, layer in enumerate(layers)]
    if len(layers) > 1:
        groups.append(("mean", list(range(len(layers)))))
    for label, places in groups:
        mean_a, mean_b = (float(np.mean([side[i] for i in places])) for side in means)
        gaps = np.mean([drawn[layers[i]][0] - drawn[layers[i]][1] for i in places], axis=0)
        several = all(side[i] > 1 for side in counts for i in places)
        low, high = np.quantile(gaps, [0.025, 0.975]).tolist() if several else (None, None)
        difference = interval_cell(mean_a - mean_b, low, high)
        n_a, n_b = (sum(side[i] for i in places) for side in counts)
        names = f"{a.name} − {b.name}"
        rows.append((names, label, _plain_label(measure), mean_a, mean_b, difference, n_a, n_b))
    return rows


def _values(a: Analysed, measure: str) -> dict[int, NDArray[np.float64]]:
    """By layer, of the neurons that have a value under their own explanation."""
    if not a.readings.is_file():
        return {}
    wanted = [("control", "=", "none"), ("share", "=", SHARE)]
    table = pq.read_table(a.readings, columns=["layer", measure], filters=wanted)
    layer, value = table["layer"].to_numpy(), table[measure].to_numpy().astype(float)
    found = {number: value[(layer == number) & ~np.isnan(value)] for number in np.unique(layer)}
    return {int(number): values for number, values in found.items() if len(values)}


def _plus(value: Value | None, by: float = 1) -> Cell:
    """A figure with its standard error, times `by`."""
    if value is None:
        return None
    return by * value[0] if value[1] is None else Estimate(by * value[0], by * value[1])


def _interval(measure: str, told: dict[str, Any] | None) -> Cell:
    """A mean over neurons with its interval."""
    if told is None:
        return None
    by = _by(measure)
    ends = (None if told[key] is None else by * told[key] for key in ("mean", "low", "high"))
    return interval_cell(*ends)


def _by(measure: str) -> float:
    return 100 if measure in ("consistency", "distinctiveness") else 1


def _form(measure: str) -> str:
    return ".1f" if _by(measure) == 100 else ".3f"


def _plain_label(measure: str) -> str:
    return "AUROC" if measure == "auroc" else measure


def _label(measure: str) -> str:
    return _plain_label(measure) + (", %" if _by(measure) == 100 else "")


# ---- figures --------------------------------------------------------------------------------------

Drawn = Sequence[tuple[Series, Analysed]]
Draw = Callable[[Axes], None]


def rates_figure(drawn: Drawn) -> Figure | None:
    """Coding rates before and after attention."""
    titles = {
        "compression_rate": "Compression term R^c",
        "subspace_rate": "In orthonormal bases",
        "coding_rate": "Expansion term R",
    }
    panels = tuple(
        Panel(
            title, _before_after(drawn, f"{key}_before", f"{key}_after", EPSILON, EPSILON, "nats")
        )
        for key, title in titles.items()
        if any((f"{key}_before", EPSILON) in a.figures for _, a in drawn)
    )
    return _figure(
        drawn,
        "white_box_rates",
        "Coding rates around attention",
        f"Dash: before; marker: after, at distortion ε = {EPSILON}, of held-out tokens as MSSA (or GPT-2's"
        " attention) takes them in. The derivation wants R^c, the cost of telling tokens apart inside the"
        " heads' subspaces, to fall; it exists for CRATE alone, whose heads have one subspace each. In"
        " orthonormal bases the scale of the projections does not count. R, the cost of telling them apart"
        " at all, is to stay large. Errors over documents are smaller than the markers.",
        panels,
    )


def sparsity_figure(drawn: Drawn) -> Figure | None:
    """Sparsity before and after sparse coding."""
    share = "entries of a token's vector, %"
    panels = (
        Panel("Not 0", _before_after(drawn, "nonzero", "nonzero", "before", "after", share, 100)),
        Panel(
            "Above a tenth of the largest",
            _before_after(drawn, "above_tenth", "above_tenth", "before", "after", share, 100),
        ),
        Panel(
            "Hoyer's measure",
            _before_after(drawn, "hoyer", "hoyer", "before", "after", "0 equal, 1 a single entry"),
        ),
    )
    return _figure(
        drawn,
        "white_box_sparsity",
        "Sparsity around ISTA and the MLP",
        "Dash: what the LayerNorm puts into ISTA (or GPT-2's MLP); marker: the neurons. Means over held-out"
        " tokens; errors over documents are smaller than the markers.",
        panels if any(a.figures for _, a in drawn) else (),
    )


def lasso_figure(drawn: Drawn) -> Figure | None:
    """The lasso objective along the steps, and the step size beside its bounds; of CRATE."""
    own = [(s, a) for s, a in drawn if a.steps()]
    if not own:
        return None
    panels = [Panel(s.label, _along_steps(s, a)) for s, a in own]
    series = [s for s, _ in own]
    points = [_line({layer: (p, None) for layer in a.layers if (p := _step_product(a, layer)) is not None}) for _, a in own]  # fmt: skip

    def product(axes: Axes) -> None:
        by_layer(series, points, "step size × |D|²")(axes)
        axes.set_ylim(0, max(2.3, 1.05 * axes.get_ylim()[1]))
        for bound in (1, 2):
            axes.axhline(bound, color=INK, linewidth=0.7)

    panels.append(Panel("Step size against its bounds", product))
    return Figure(
        "white_box_lasso",
        "The lasso objective along the unrolled steps",
        "Left: 1/2 |x − D A|² + λ |A|₁ over held-out tokens, as part of its value at A = 0, a line a layer;"
        " later ones darker; markers: steps that the model takes. Right: at 1 and below no step can raise the"
        " objective, below 2 the iteration converges; above, neither is promised.",
        tuple(panels),
        tuple(series),
    )


def weights_figure(drawn: Drawn) -> Figure | None:
    """Coherence of the atoms, overlap of the heads, neurons in groups."""
    panels = [
        _by_layer_panel(
            drawn, "Mutual coherence", "largest |cosine| of two atoms", "mutual_coherence"
        ),
        _by_layer_panel(
            drawn, "Heads' overlap", "mean squared cosine", "head_overlap", at_random=True
        ),
        _by_layer_panel(drawn, "Neurons in groups", "neurons, %", "grouped", by=100),
    ]
    return _figure(
        drawn,
        "white_box_weights",
        "Dictionaries, heads and groups",
        "Mutual coherence of CRATE's dictionary, and of the rows of the MLP's last projection. Overlap of the"
        " subspaces of two heads, mean over pairs; line: random subspaces of the same shape. Groups: neurons"
        " of a layer whose activations over held-out tokens correlate by 0.5 or more on average.",
        tuple(panel for panel in panels if panel is not None),
    )


def readings_figure(drawn: Drawn) -> Figure | None:
    """Consistency and distinctiveness by layer, beside shuffled explanations."""
    told = [(s, a, "none") for s, a in drawn if a.means]
    shuffled = [
        (replace(s, label=f"{s.label}, shuffled", null="shuffled"), a, "shuffled")
        for s, a in drawn
        if a.means and not s.null
    ]
    lines = [*(t for t in told if not t[0].null), *shuffled, *(t for t in told if t[0].null)]
    if not lines:
        return None
    series = [s for s, _, _ in lines]

    def panel(measure: str) -> Panel:
        points = [_measured(a, measure, control) for _, a, control in lines]
        y = {"auroc": "chance, covered > other", "evenness": "evenness, 0 to 1"}
        return Panel(
            _plain_label(measure).capitalize() if measure != "auroc" else "AUROC",
            by_layer(series, points, y.get(measure, f"{_place(measure)} tokens, %")),
        )

    return Figure(
        "white_box_readings",
        "Consistency and distinctiveness",
        "On held-out tokens. Consistency: part of the tokens that a neuron's explanation covers at which it"
        " fires; evenness: how equal its activations are there; distinctiveness: part of the other tokens at"
        " which it is silent. Mean over the neurons of a layer; bars: 95% bootstrap interval over them."
        " Shuffled: another neuron's explanation.",
        tuple(panel(measure) for measure in DRAWN),
        tuple(series),
    )


def _place(measure: str) -> str:
    return "covered" if measure == "consistency" else "other"


def _figure(
    drawn: Drawn, name: str, title: str, caption: str, panels: tuple[Panel, ...]
) -> Figure | None:
    return Figure(name, title, caption, panels, tuple(s for s, _ in drawn)) if panels else None


def _before_after(
    drawn: Drawn, before: str, after: str, first: str, second: str, y: str, by: float = 1
) -> Draw:
    """A dash where a quantity was, and a marker where it came to, joined; models side by side."""

    def draw(axes: Axes) -> None:
        layers = sorted({layer for _, a in drawn for layer in a.layers})
        for place, (s, a) in enumerate(drawn):
            shift = 0.8 * ((place + 0.5) / len(drawn) - 0.5)
            for layer in layers:
                ends = (a.at(before, first, layer), a.at(after, second, layer))
                if None in ends:
                    continue
                x = layer + shift
                low, high = (by * end[0] for end in ends if end is not None)
                axes.plot([x, x], [low, high], color=s.colour, linewidth=1.0)
                axes.plot([x], [low], color=s.colour, marker="_", markersize=6, linestyle="none")
                size = 5 if len(layers) <= 6 else 3.5
                style = {**s.style(), "linestyle": "none", "markersize": size}
                axes.plot([x], [high], **style)
        axes.set(xlabel="layer", ylabel=y, xticks=layers)
        if layers:
            axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)

    return draw


def _along_steps(series: Series, a: Analysed) -> Draw:
    """The objective as part of its start, a line a layer, later ones darker."""

    def draw(axes: Axes) -> None:
        layers, steps = a.layers, a.steps()
        ends: dict[int, float] = {}
        for place, layer in enumerate(layers):
            values = np.array([_first(a.at("lasso", str(step), layer)) for step in steps])
            part = 100 * values / values[0]
            alpha = 1.0 if len(layers) == 1 else 0.35 + 0.65 * place / (len(layers) - 1)
            taken = int(_first(a.at(*_STEPS, layer)))
            axes.plot(steps, part, color=series.colour, linewidth=1.2, alpha=alpha)
            style = {**series.style(), "linestyle": "none", "alpha": alpha, "markersize": 4}
            axes.plot(steps[: taken + 1], part[: taken + 1], **style)
            ends[layer] = float(part[-1])
        _name_ends(axes, steps[-1], {layer: ends[layer] for layer in (layers[0], layers[-1])})
        axes.set(xlabel="step", ylabel="objective, % of that at A = 0", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def _name_ends(axes: Axes, x: float, ends: dict[int, float]) -> None:
    """Names the first and the last layer at their lines' ends: the upper line above it, the lower one below."""
    for place, layer in enumerate(sorted(ends, key=lambda layer: -ends[layer])):
        shift = 4 if place == 0 else -11
        axes.annotate(
            f"layer {layer}",
            (x, ends[layer]),
            (-2, shift),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
        )


def _first(value: Value | None) -> float:
    assert value is not None
    return value[0]


def _by_layer_panel(
    drawn: Drawn, title: str, y: str, quantity: str, *, by: float = 1, at_random: bool = False
) -> Panel | None:
    """The quantity by layer of the models that have it, and its value for random weights; None without any."""
    own = [(s, a) for s, a in drawn if (quantity, "") in a.figures]
    if not own:
        return None
    points = [_line(a.figures[quantity, ""], by) for _, a in own]
    levels = [v for _, a in own for v, _ in a.figures.get((quantity, "random"), {}).values()]

    def draw(axes: Axes) -> None:
        by_layer([s for s, _ in own], points, y)(axes)
        if at_random and levels:
            axes.axhline(float(np.mean(levels)), color=INK, linewidth=0.7)
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.03 * top, 1.08 * top)  # markers at 0 are seen whole

    return Panel(title, draw)


Line = tuple[list[int], list[float], list[float], list[float]]
"""layers, values, and the ends of their bars"""


def _line(found: dict[int, Value], by: float = 1) -> Line:
    layers = sorted(found)
    values = [by * found[layer][0] for layer in layers]
    return layers, values, values, values


def _measured(a: Analysed, measure: str, control: str) -> Line:
    """Means over the neurons of each layer that has any."""
    told = [(layer, m) for layer in a.layers if (m := a.mean(measure, layer, control))]
    known = [(layer, m) for layer, m in told if m["mean"] is not None]
    by = _by(measure)
    values = [by * m["mean"] for _, m in known]
    low, high = (
        [v if m[end] is None else by * m[end] for v, (_, m) in zip(values, known, strict=True)]
        for end in ("low", "high")
    )
    return [layer for layer, _ in known], values, low, high
