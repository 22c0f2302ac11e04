"""Tables of the results of `cratelm analyze`. The figures are in `white_box_figures`.

A quantity that does not exist for a model is shown as a dash; a model that was not analysed has no row.
"""

from collections.abc import Sequence

import numpy as np

from cratelm.analysis.store import MEASURES, MeasureSummary
from cratelm.records import Interval
from cratelm.report.cells import estimate_cell, interval_cell
from cratelm.results.side_results import DISTORTION, Analysis
from cratelm.stats.intervals import resampled_means
from cratelm.text.table import Cell, Column, Table

_RATES = {
    "compression_rate": "R^c, heads' projections",
    "subspace_rate": "R^c, heads' subspaces",
    "coding_rate": "R",
}


def tables(
    analyses: Sequence[Analysis],
    twins: Sequence[tuple[str, str]] = (),
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Table]:
    """Return the tables of this section; `twins` are pairs of names of models to compare, first minus second."""
    by_name = {a.name: a for a in analyses}
    pairs = [(by_name[a], by_name[b]) for a, b in twins if a in by_name and b in by_name]
    return [
        rates_table(analyses),
        distortion_table(analyses),
        sparsity_table(analyses),
        lasso_table(analyses),
        weights_table(analyses),
        readings_table(analyses),
        share_table(analyses),
        twins_table(pairs, resamples, seed),
    ]


def rates_table(analyses: Sequence[Analysis]) -> Table:
    """Return coding rates before and after attention."""
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
                estimate_cell(a.at(f"{key}_{when}", DISTORTION, layer))
                for key in _RATES
                for when in ("before", "after", "change")
            ),
        )
        for a in analyses
        for layer in a.layers
        if a.at("coding_rate_before", DISTORTION, layer)
    ]
    return Table(
        "white_box_rates",
        "Coding rates before and after attention",
        tuple(columns),
        tuple(rows),
        f"Coding rates in nats at distortion ε = {DISTORTION} on held-out tokens. Before: the input of attention,"
        " after its LayerNorm. After: the residual stream after attention, passed through the same LayerNorm."
        " R^c is the compression term from whose descent MSSA is derived. It is computed in the heads' own"
        " projections, where their scale matters, and in orthonormal bases of the same subspaces, where it does"
        " not. R is the expansion term. ±: jackknife standard error, leaving out a twentieth of the documents"
        " at a time.",
    )


def distortion_table(analyses: Sequence[Analysis]) -> Table:
    """Return how the changes of the coding rates depend on the distortion."""
    distortions = sorted(
        {s for a in analyses for q, s in a.settings if q == "coding_rate_change"}, key=float
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
            *(
                estimate_cell(a.at(f"{key}_change", e, layer))
                for key in _RATES
                for e in distortions
            ),
        )
        for a in analyses
        for layer in a.layers
        if a.at("coding_rate_before", DISTORTION, layer)
    ]
    return Table(
        "white_box_distortion",
        "Change of the coding rates, by distortion",
        tuple(columns),
        tuple(rows),
        "After minus before attention, in nats. The smaller ε is, the more directions count.",
    )


def sparsity_table(analyses: Sequence[Analysis]) -> Table:
    """Return the sparsity of the input of a layer's second step, and of its neurons."""
    quantities = {"nonzero": "nonzero, %", "above_tenth": "above a tenth, %", "hoyer": "Hoyer"}
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
                estimate_cell(a.at(key, when, layer), 1 if key == "hoyer" else 100)
                for key in quantities
                for when in ("before", "after")
            ),
            estimate_cell(a.at("dead", "", layer), 100),
        )
        for a in analyses
        for layer in a.layers
    ]
    return Table(
        "white_box_sparsity",
        "Sparsity before and after sparse coding",
        tuple(columns),
        tuple(rows),
        "Sparsity of the vector of one token, mean over held-out tokens. Before: the input of ISTA or of the MLP,"
        " after the LayerNorm; after: the neurons. Above a tenth: entries whose absolute value is more than a"
        " tenth of the largest in the vector. Hoyer: 0 if all entries are equal, 1 if only one is nonzero."
        " Dead: never above 0 on these tokens. ±: standard error over documents.",
    )


def lasso_table(analyses: Sequence[Analysis]) -> Table:
    """Return the lasso objective after each unrolled step."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("step", "step", "d"),
        Column("taken", "taken by the model"),
        Column("objective", "objective", ".2f"),
        Column("relative", "% of the value at step 0", ".1f"),
        Column("falls", "tokens at which the step lowers it, %", ".1f"),
    )
    rows = []
    for a in analyses:
        for layer in a.layers:
            start, taken = a.at("lasso", "0", layer), a.steps_taken(layer)
            for step in a.lasso_steps():
                value = a.at("lasso", str(step), layer)
                if value is None or start is None:
                    continue
                is_taken = "" if taken is None or step > taken else "yes"
                falls = estimate_cell(a.at("lasso_falls", str(step), layer), 100)
                relative = 100 * value.value / start.value
                rows.append((a.name, layer, step, is_taken, estimate_cell(value), relative, falls))
    return Table(
        "white_box_lasso",
        "The lasso objective along the steps",
        columns,
        tuple(rows),
        "1/2 |x − D A|² + λ |A|₁ of the codes A after each step, mean over held-out tokens. Steps beyond those"
        " that the model takes show how the iteration would continue. ±: standard error over documents.",
    )


def weights_table(analyses: Sequence[Analysis]) -> Table:
    """Return measures of the dictionary, the step size, the heads and the groups of neurons."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("step_size", "step size η", ".3g"),
        Column("norm", "norm of D", ".2f"),
        Column("product", "η |D|²", ".2f"),
        Column("mutual_coherence", "mutual coherence", ".3f"),
        Column("median_coherence", "median with the nearest atom", ".3f"),
        Column("welch_bound", "Welch bound", ".3f"),
        Column("duplicated", "duplicated atoms, %", ".1f"),
        Column("effective_rank", "effective rank of a head", ".1f"),
        Column("stable_rank", "stable rank", ".1f"),
        Column("overlap", "overlap of two heads", ".3f"),
        Column("overlap_random", "overlap of random heads", ".3f"),
        Column("angle", "smallest angle, °", ".1f"),
        Column("angle_random", "angle of random heads, °", ".1f"),
        Column("groups", "groups of neurons", ",d"),
        Column("grouped", "neurons in groups, %", ".1f"),
        Column("largest", "largest group", ",d"),
    )
    rows = [_weights_row(a, layer) for a in analyses for layer in a.layers]
    return Table(
        "white_box_weights",
        "Dictionary, heads and groups of neurons",
        columns,
        tuple(rows),
        "Coherence: |cosine| of two atoms; mutual coherence: the largest of these. GPT-2's atoms are the rows of"
        " the last projection of its MLP. Welch bound: the lowest possible mutual coherence. Duplicated: atoms"
        " with a cosine of 0.95 or more with another atom. With η |D|² up to 1, no step raises the lasso"
        " objective; up to 2, the iteration converges. Overlap: mean squared cosine of the principal angles of"
        " two heads' subspaces, also for random subspaces of the same shape. Groups: average linkage of the"
        " correlation over tokens, cut at 0.5.",
    )


def _weights_row(a: Analysis, layer: int) -> tuple[Cell, ...]:
    def plain(quantity: str, setting: str = "", by: float = 1) -> Cell:
        return estimate_cell(a.at(quantity, setting, layer), by)

    def count(quantity: str) -> Cell:
        value = a.at(quantity, "", layer)
        return None if value is None else int(value.value)

    return (
        a.name,
        layer,
        plain("step_size"),
        plain("spectral_norm"),
        a.step_product(layer),
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


def readings_table(analyses: Sequence[Analysis]) -> Table:
    """Return the consistency and distinctiveness of the neurons."""
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
        for a in analyses
        for control in ("none", "shuffled")
        for layer in a.layers
        if a.mean("auroc", layer, control)
    ]
    return Table(
        "white_box_readings",
        "Consistency and distinctiveness",
        columns,
        tuple(rows),
        "On held-out tokens. An explanation covers a token if it predicts at least half of its largest value"
        " there, measured from its default. Consistency: fraction of the covered tokens at which the neuron is"
        " above a tenth of its maximum on the fit documents. Evenness: 1 if its activation is the same at all"
        " covered tokens. Distinctiveness: fraction of the other tokens at which it is not above that tenth."
        " Contrast: (m − m') / (m + m'), with m and m' its mean activations on covered and on other tokens."
        " AUROC: probability that its activation is larger at a covered token than at another token. Shuffled:"
        " another neuron's explanation. Undefined: no token is covered. [ ]: 95% bootstrap interval over neurons.",
    )


def _readings_row(a: Analysis, layer: int, control: str) -> tuple[Cell, ...]:
    means = [a.mean(m, layer, control) for m in MEASURES]
    auroc = a.mean("auroc", layer, control)
    assert auroc is not None
    return (
        a.name,
        layer,
        "own" if control == "none" else control,
        *(_mean_cell(mean) for mean in means),
        auroc.defined,
        f"{auroc.undefined:,} / {auroc.dead:,}",
    )


def share_table(analyses: Sequence[Analysis]) -> Table:
    """Return the same measures for each threshold from which a token counts as covered."""
    shares = sorted({m.share for a in analyses for m in a.means})
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("share", "covered from", ".2f"),
        *(Column(m, _label(m), _form(m)) for m in MEASURES),
        Column("defined", "neurons", ",d"),
    )
    rows = []
    for a in analyses:
        for layer in a.layers:
            for share in shares:
                means = [a.mean(m, layer, share=share) for m in MEASURES]
                if means[-1] is not None:
                    cells = map(_mean_cell, means)
                    rows.append((a.name, layer, share, *cells, means[-1].defined))
    return Table(
        "white_box_shares",
        "The same measures, by the threshold for covered tokens",
        columns,
        tuple(rows),
        "Covered from: the prediction from which a token counts as covered, between the default of the"
        " explanation (0) and its largest value (1).",
    )


def twins_table(pairs: Sequence[tuple[Analysis, Analysis]], resamples: int, seed: int) -> Table:
    """Return the differences between the means over neurons of two models, by layer and over the layers."""
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
        "Consistency and distinctiveness: CRATE minus GPT-2",
        columns,
        tuple(rows),
        "Mean over the neurons of a layer that have a value, and the mean of these over the layers. [ ]: 95%"
        " bootstrap interval over neurons, resampled within their layer and model. Neurons of twins are not"
        " paired, because neurons with the same index are unrelated. Each model was trained once, so a"
        " difference may be due to the random seed.",
    )


def _twin_rows(
    a: Analysis, b: Analysis, measure: str, resamples: int, seed: int
) -> list[tuple[Cell, ...]]:
    sides = [one.neuron_values(measure) for one in (a, b)]
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
    for label, at in groups:
        mean_a, mean_b = (float(np.mean([side[i] for i in at])) for side in means)
        gaps = np.mean([drawn[layers[i]][0] - drawn[layers[i]][1] for i in at], axis=0)
        several = all(side[i] > 1 for side in counts for i in at)
        low, high = np.quantile(gaps, [0.025, 0.975]).tolist() if several else (None, None)
        difference = interval_cell(Interval(mean_a - mean_b, low, high))
        n_a, n_b = (sum(side[i] for i in at) for side in counts)
        names = f"{a.name} − {b.name}"
        rows.append((names, label, plain_label(measure), mean_a, mean_b, difference, n_a, n_b))
    return rows


def _mean_cell(mean: MeasureSummary | None) -> Cell:
    """Return a mean over neurons with its interval."""
    if mean is None or mean.mean is None:
        return None
    return interval_cell(Interval(mean.mean, mean.low, mean.high), scale(mean.measure))


def scale(measure: str) -> float:
    """Return the factor by which a measure is multiplied for display: 100 for fractions, shown as percentages."""
    return 100 if measure in ("consistency", "distinctiveness") else 1


def _form(measure: str) -> str:
    return ".1f" if scale(measure) == 100 else ".3f"


def plain_label(measure: str) -> str:
    """Return the display name of a measure."""
    return "AUROC" if measure == "auroc" else measure


def _label(measure: str) -> str:
    return plain_label(measure) + (", %" if scale(measure) == 100 else "")
