"""Readings of neurons as means with intervals, and the table that `cratelm analyze` prints."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cratelm.analysis.coding_rate import EPSILON
from cratelm.analysis.consistency import MEASURES, SHARE, Reading
from cratelm.analysis.store import Control, LayerFigure, NeuronReading
from cratelm.records import Status
from cratelm.stats.intervals import bootstrap
from cratelm.text.table import align


@dataclass(frozen=True)
class Summary:
    """Mean of one measure over the neurons of a layer."""

    layer: int
    control: Control
    share: float
    measure: str
    """consistency, evenness, distinctiveness, contrast or auroc"""
    mean: float | None
    """None where no neuron has a value"""
    low: float | None
    """95% bootstrap interval over neurons; None below two"""
    high: float | None
    defined: int
    """neurons with a value"""
    undefined: int
    """the explanation covers no held-out token, or all; or no covered token has an activation (evenness)"""
    dead: int
    """never above 0 on the fit split"""


def summarise(read: Sequence[NeuronReading], resamples: int, seed: int) -> list[Summary]:
    """By layer, control, share and measure."""
    cells: dict[tuple[int, Control, float], list[Reading]] = defaultdict(list)
    for r in read:
        cells[r.neuron.layer, r.control, r.share].append(r.reading)
    return [
        _summary(*cell, measure, found, resamples, seed)
        for cell, found in sorted(cells.items())
        for measure in MEASURES
    ]


def _summary(
    layer: int,
    control: Control,
    share: float,
    measure: str,
    found: Sequence[Reading],
    resamples: int,
    seed: int,
) -> Summary:
    values = [v for r in found if (v := getattr(r, measure)) is not None]
    dead = sum(r.status is Status.DEAD for r in found)
    mean = bootstrap(values, seed, resamples)
    undefined = len(found) - len(values) - dead
    bounds = (None, None, None) if mean is None else (mean.value, mean.low, mean.high)
    return Summary(layer, control, share, measure, *bounds, len(values), undefined, dead)


_SHOWN = (
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


def show(figures: Sequence[LayerFigure], summaries: Sequence[Summary]) -> str:
    """A line a quantity, a column a layer; quantities that the model has not are left out."""
    layers = sorted({f.layer for f in figures})
    by_place = {(f.layer, f.quantity, f.setting): f for f in figures}
    lines = [["layer", *(str(layer) for layer in layers)]]
    for label, quantity, setting, form in _SHOWN:
        cells = [by_place.get((layer, quantity, setting)) for layer in layers]
        if any(cells):
            lines.append([label, *(_cell(cell, form) for cell in cells)])
    for control in ("none", "shuffled"):
        for measure in MEASURES:
            cells = [
                s
                for layer in layers
                for s in summaries
                if (s.layer, s.control, s.share, s.measure) == (layer, control, SHARE, measure)
            ]
            if cells:
                name = measure if control == "none" else f"{measure}, shuffled explanations"
                lines.append([name, *map(_mean, cells)])
    return "\n".join(f"  {line}" for line in align(lines))


def _cell(figure: LayerFigure | None, form: str) -> str:
    if figure is None:
        return "–"
    shown = format(figure.value, form)
    return shown if figure.error is None else f"{shown} ± {format(figure.error, form)}"


def _mean(found: Summary) -> str:
    if found.mean is None:
        return "–"
    bounds = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.mean:.3f}{bounds}"
