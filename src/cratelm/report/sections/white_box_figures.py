"""Figures of the results of `cratelm analyze`. The tables are in `white_box`.

A quantity that does not exist for a model is not drawn; a figure with nothing to draw is omitted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cratelm.records import Interval
from cratelm.report.drawing import INK, Figure, Panel, Series, by_layer
from cratelm.report.sections.white_box import plain_label, scale
from cratelm.results.side_results import DISTORTION, Analysis

_DRAWN = ("consistency", "evenness", "distinctiveness", "auroc")
"""measures shown in `readings_figure`"""
Drawn = Sequence[tuple[Series, Analysis]]
"""the analyses of the models, each with the colour and marker of its model"""
Draw = Callable[[Axes], None]


def figures(analyses: Sequence[Analysis], series: Mapping[str, Series]) -> list[Figure]:
    """Return the figures of this section; `series` holds the colour and marker of each model in the report."""
    drawn = [(series[a.name], a) for a in analyses]
    all_figures = (
        rates_figure(drawn),
        sparsity_figure(drawn),
        lasso_figure(drawn),
        weights_figure(drawn),
        readings_figure(drawn),
    )
    return [figure for figure in all_figures if figure is not None]


def rates_figure(drawn: Drawn) -> Figure | None:
    """Return coding rates before and after attention; None if they do not exist for any model."""
    titles = {
        "compression_rate": "Compression term R^c",
        "subspace_rate": "In orthonormal bases",
        "coding_rate": "Expansion term R",
    }
    panels = tuple(
        Panel(
            title,
            _before_after(drawn, f"{key}_before", f"{key}_after", DISTORTION, DISTORTION, "nats"),
        )
        for key, title in titles.items()
        if any(a.by_layer(f"{key}_before", DISTORTION) for _, a in drawn)
    )
    return _figure(
        drawn,
        "white_box_rates",
        "Coding rates around attention",
        f"Dash: before attention; marker: after it; at distortion ε = {DISTORTION}, for the input of MSSA (or of"
        " GPT-2's attention) on held-out tokens. R^c is the cost of distinguishing tokens inside the subspaces of"
        " the heads; according to the derivation, it decreases. It exists only for CRATE, whose heads have one"
        " subspace each. In orthonormal bases, the scale of the projections does not matter. R, the cost of"
        " distinguishing tokens at all, stays large. Standard errors over documents are smaller than the markers.",
        panels,
    )


def sparsity_figure(drawn: Drawn) -> Figure | None:
    """Return sparsity before and after sparse coding; None if no model was analysed."""
    share = "entries of a token's vector, %"
    panels = (
        Panel("Nonzero", _before_after(drawn, "nonzero", "nonzero", "before", "after", share, 100)),
        Panel(
            "Above a tenth of the largest",
            _before_after(drawn, "above_tenth", "above_tenth", "before", "after", share, 100),
        ),
        Panel(
            "Hoyer's measure",
            _before_after(
                drawn, "hoyer", "hoyer", "before", "after", "0: equal, 1: a single entry"
            ),
        ),
    )
    return _figure(
        drawn,
        "white_box_sparsity",
        "Sparsity around ISTA and the MLP",
        "Dash: the input of ISTA (or of GPT-2's MLP) after the LayerNorm; marker: the neurons. Means over held-out"
        " tokens; standard errors over documents are smaller than the markers.",
        panels if any(a.figures for _, a in drawn) else (),
    )


def lasso_figure(drawn: Drawn) -> Figure | None:
    """Return the lasso objective after each step, and the step size with its bounds; None without CRATE."""
    crates = [(s, a) for s, a in drawn if a.lasso_steps()]
    if not crates:
        return None
    panels = [Panel(s.label, _along_steps(s, a)) for s, a in crates]
    series = [s for s, _ in crates]
    lines = [_step_products(a) for _, a in crates]

    def product(axes: Axes) -> None:
        by_layer(series, lines, "step size × |D|²")(axes)
        axes.set_ylim(0, max(2.3, 1.05 * axes.get_ylim()[1]))
        for bound in (1, 2):
            axes.axhline(bound, color=INK, linewidth=0.7)

    panels.append(Panel("Step size against its bounds", product))
    return Figure(
        "white_box_lasso",
        "The lasso objective along the unrolled steps",
        "Left: 1/2 |x − D A|² + λ |A|₁ over held-out tokens, as a percentage of its value at A = 0, with one line"
        " per layer, later layers darker; markers: steps that the model takes. Right: up to 1, no step can raise"
        " the objective; below 2, the iteration converges; above 2, neither is guaranteed.",
        tuple(panels),
        tuple(series),
    )


def weights_figure(drawn: Drawn) -> Figure | None:
    """Return coherence of the atoms, overlap of the heads and neurons in groups, by layer; None without data."""
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
        "Mutual coherence of CRATE's dictionary, and of the rows of the last projection of GPT-2's MLP. Overlap of"
        " the subspaces of two heads, mean over pairs; horizontal line: random subspaces of the same shape."
        " Groups: neurons of a layer whose activations on held-out tokens have an average correlation of 0.5 or"
        " more.",
        tuple(panel for panel in panels if panel is not None),
    )


def readings_figure(drawn: Drawn) -> Figure | None:
    """Return consistency and distinctiveness by layer, also for shuffled explanations; None without data."""
    own = [(s, a, "none") for s, a in drawn if a.means]
    shuffled = [
        (replace(s, label=f"{s.label}, shuffled", null="shuffled"), a, "shuffled")
        for s, a in drawn
        if a.means and not s.null
    ]
    ordered = [*(t for t in own if not t[0].null), *shuffled, *(t for t in own if t[0].null)]
    if not ordered:
        return None
    series = [s for s, _, _ in ordered]

    def panel(measure: str) -> Panel:
        lines = [_means(a, measure, control) for _, a, control in ordered]
        y = {"auroc": "P(covered > other)", "evenness": "evenness, 0 to 1"}
        return Panel(
            plain_label(measure).capitalize() if measure != "auroc" else "AUROC",
            by_layer(series, lines, y.get(measure, f"{_tokens(measure)} tokens, %")),
        )

    return Figure(
        "white_box_readings",
        "Consistency and distinctiveness",
        "On held-out tokens. Consistency: fraction of the tokens covered by a neuron's explanation at which the"
        " neuron fires. Evenness: how equal its activations are at these tokens. Distinctiveness: fraction of the"
        " other tokens at which it does not fire. AUROC: probability that its activation is larger at a covered"
        " token than at another token. Mean over the neurons of a layer; bars: 95% bootstrap interval over them."
        " Shuffled: another neuron's explanation.",
        tuple(panel(measure) for measure in _DRAWN),
        tuple(series),
    )


def _tokens(measure: str) -> str:
    return "covered" if measure == "consistency" else "other"


def _figure(
    drawn: Drawn, name: str, title: str, caption: str, panels: tuple[Panel, ...]
) -> Figure | None:
    return Figure(name, title, caption, panels, tuple(s for s, _ in drawn)) if panels else None


def _before_after(
    drawn: Drawn, before: str, after: str, first: str, second: str, y: str, by: float = 1
) -> Draw:
    """Return a function that draws a quantity by layer: a dash for `before` joined to a marker for `after`.

    `first` and `second` are the settings of the two quantities. Models are drawn side by side.
    """

    def draw(axes: Axes) -> None:
        layers = sorted({layer for _, a in drawn for layer in a.layers})
        for number, (s, a) in enumerate(drawn):
            shift = 0.8 * ((number + 0.5) / len(drawn) - 0.5)
            for layer in layers:
                ends = (a.at(before, first, layer), a.at(after, second, layer))
                if None in ends:
                    continue
                x = layer + shift
                low, high = (by * end.value for end in ends if end is not None)
                axes.plot([x, x], [low, high], color=s.colour, linewidth=1.0)
                axes.plot([x], [low], color=s.colour, marker="_", markersize=6, linestyle="none")
                size = 5 if len(layers) <= 6 else 3.5
                style = {**s.style(), "linestyle": "none", "markersize": size}
                axes.plot([x], [high], **style)
        axes.set(xlabel="layer", ylabel=y, xticks=layers)
        if layers:
            axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)

    return draw


def _along_steps(series: Series, a: Analysis) -> Draw:
    """Return a function that draws the objective as a percentage of its start, one line per layer, later darker."""

    def draw(axes: Axes) -> None:
        layers, steps = a.layers, a.lasso_steps()
        ends: dict[int, float] = {}
        for number, layer in enumerate(layers):
            values = np.array([a.by_layer("lasso", str(step))[layer].value for step in steps])
            percent = 100 * values / values[0]
            alpha = 1.0 if len(layers) == 1 else 0.35 + 0.65 * number / (len(layers) - 1)
            taken = a.steps_taken(layer)
            assert taken is not None, "a model with a lasso objective takes ISTA steps"
            axes.plot(steps, percent, color=series.colour, linewidth=1.2, alpha=alpha)
            style = {**series.style(), "linestyle": "none", "alpha": alpha, "markersize": 4}
            axes.plot(steps[: taken + 1], percent[: taken + 1], **style)
            ends[layer] = float(percent[-1])
        _name_ends(axes, steps[-1], {layer: ends[layer] for layer in (layers[0], layers[-1])})
        axes.set(xlabel="step", ylabel="objective, % of its value at A = 0", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def _name_ends(axes: Axes, x: float, ends: dict[int, float]) -> None:
    """Label the ends of the lines in `ends` (layer: height at x), above the upper line and below the lower."""
    for number, layer in enumerate(sorted(ends, key=lambda layer: -ends[layer])):
        shift = 4 if number == 0 else -11
        axes.annotate(
            f"layer {layer}",
            (x, ends[layer]),
            (-2, shift),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
        )


def _by_layer_panel(
    drawn: Drawn, title: str, y: str, quantity: str, *, by: float = 1, at_random: bool = False
) -> Panel | None:
    """Return a panel of a quantity by layer, for the models that have it; None if no model has it.

    With `at_random`, a horizontal line shows the mean value for random weights.
    """
    with_quantity = [(s, a) for s, a in drawn if a.by_layer(quantity)]
    if not with_quantity:
        return None
    lines = [_values(a, quantity, by) for _, a in with_quantity]
    levels = [e.value for _, a in with_quantity for e in a.by_layer(quantity, "random").values()]

    def draw(axes: Axes) -> None:
        by_layer([s for s, _ in with_quantity], lines, y)(axes)
        if at_random and levels:
            axes.axhline(float(np.mean(levels)), color=INK, linewidth=0.7)
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.03 * top, 1.08 * top)  # markers at 0 are not cut off

    return Panel(title, draw)


def _values(a: Analysis, quantity: str, by: float) -> dict[int, Interval]:
    """Return a quantity by layer, without bars, because errors over documents are smaller than the markers."""
    sizes = a.by_layer(quantity)
    return {layer: Interval(by * sizes[layer].value, None, None) for layer in sorted(sizes)}


def _step_products(a: Analysis) -> dict[int, Interval]:
    products = {layer: a.step_product(layer) for layer in a.layers}
    return {layer: Interval(p, None, None) for layer, p in products.items() if p is not None}


def _means(a: Analysis, measure: str, control: str) -> dict[int, Interval]:
    """Return the means of a measure over neurons by layer, for the layers that have a value."""
    by = scale(measure)
    means: dict[int, Interval] = {}
    for layer in a.layers:
        m = a.mean(measure, layer, control)
        if m is not None and m.mean is not None:
            low, high = (None if v is None else by * v for v in (m.low, m.high))
            means[layer] = Interval(by * m.mean, low, high)
    return means
