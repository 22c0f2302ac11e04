"""Summarise measures of neurons as means with intervals, and format the table that `cratelm analyze` prints."""

from collections import defaultdict
from collections.abc import Sequence

from cratelm.analysis.store import (
    EPSILON,
    MEASURES,
    SHARE,
    CoverageControl,
    LayerFigure,
    MeasureSummary,
    NeuronCoverage,
)
from cratelm.records import Status
from cratelm.stats.ends import neuron_means
from cratelm.stats.intervals import bootstrap
from cratelm.text.table import align


def summarise(rows: Sequence[NeuronCoverage], resamples: int, seed: int) -> list[MeasureSummary]:
    """Return the mean of each measure over neurons, by layer, control, share and measure."""
    cells: dict[tuple[int, CoverageControl, float], list[NeuronCoverage]] = defaultdict(list)
    for row in rows:
        cells[row.neuron.layer, row.control, row.share].append(row)
    return [
        _summary(*cell, measure, of_cell, resamples, seed)
        for cell, of_cell in sorted(cells.items())
        for measure in MEASURES
    ]


def _summary(
    layer: int,
    control: CoverageControl,
    share: float,
    measure: str,
    rows: Sequence[NeuronCoverage],
    resamples: int,
    seed: int,
) -> MeasureSummary:
    values = [getattr(row.measures, measure) for row in rows]
    dead = sum(row.measures.status is Status.DEAD for row in rows)
    of_neurons = neuron_means((row.neuron for row in rows), values)
    mean = bootstrap(list(of_neurons.values()), seed, resamples)
    defined = sum(v is not None for v in values)
    undefined = len(rows) - defined - dead
    bounds = (None, None, None) if mean is None else (mean.value, mean.low, mean.high)
    return MeasureSummary(layer, control, share, measure, *bounds, defined, undefined, dead)


_ROWS = (
    ("compression rate before MSSA, nats", "compression_rate_before", f"{EPSILON:g}", ".1f"),
    ("compression rate after", "compression_rate_after", f"{EPSILON:g}", ".1f"),
    ("coding rate before, nats", "coding_rate_before", f"{EPSILON:g}", ".1f"),
    ("coding rate after", "coding_rate_after", f"{EPSILON:g}", ".1f"),
    ("not 0 before, %", "nonzero", "before", ".1%"),
    ("not 0 after, %", "nonzero", "after", ".1%"),
    ("above a tenth of the largest, %", "above_tenth", "after", ".1%"),
    ("lasso objective, step 0", "lasso", "0", ".2f"),
    ("step 1", "lasso", "1", ".2f"),
    ("step 2", "lasso", "2", ".2f"),
    ("step size", "step_size", "", ".3g"),
    ("1 / spectral norm squared", "step_size_bound", "", ".3g"),
    ("mutual coherence", "mutual_coherence", "", ".3f"),
    ("duplicated atoms", "duplicated", "", ".1%"),
    ("dead neurons", "dead", "", ".1%"),
    ("head overlap", "head_overlap", "", ".3f"),
    ("of random subspaces", "head_overlap", "random", ".3f"),
    ("neurons in groups", "grouped", "", ".1%"),
)
"""label, quantity, setting and format of each line of the table"""


def show(figures: Sequence[LayerFigure], summaries: Sequence[MeasureSummary]) -> str:
    """Return a text table with a line per quantity that the model has, and a column per layer."""
    layers = sorted({f.layer for f in figures})
    by_quantity = {(f.layer, f.quantity, f.setting): f for f in figures}
    lines = [["layer", *(str(layer) for layer in layers)]]
    for label, quantity, setting, form in _ROWS:
        cells = [by_quantity.get((layer, quantity, setting)) for layer in layers]
        if any(cells):
            lines.append([label, *(_cell(cell, form) for cell in cells)])
    for control in ("none", "shuffled"):
        for measure in MEASURES:
            by_layer = {
                s.layer: s
                for s in summaries
                if (s.control, s.share, s.measure) == (control, SHARE, measure)
            }
            if by_layer:  # a layer none of whose explained neurons fires has no summary
                name = measure if control == "none" else f"{measure}, shuffled explanations"
                lines.append([name, *(_mean(by_layer.get(layer)) for layer in layers)])
    return "\n".join(f"  {line}" for line in align(lines))


def _cell(figure: LayerFigure | None, form: str) -> str:
    if figure is None:
        return "–"
    value = format(figure.value, form)
    return value if figure.error is None else f"{value} ± {format(figure.error, form)}"


def _mean(summary: MeasureSummary | None) -> str:
    if summary is None or summary.mean is None:
        return "–"
    bounds = "" if summary.low is None else f" [{summary.low:.3f}, {summary.high:.3f}]"
    return f"{summary.mean:.3f}{bounds}"
