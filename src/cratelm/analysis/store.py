"""Read and write the results of `cratelm analyze`: the folder `analysis/MODEL/` of a run.

`layers.parquet`     one row per figure of a layer
`neurons.parquet`    one row per neuron of the site
`readings.parquet`   one row per neuron, control and share: consistency and distinctiveness; absent if there are
                     no explanations
`summary.json`       means over neurons with their intervals, by layer
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.records import NeuronId, Status
from cratelm.runs import Run, write_json
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import read_json, read_parquet, read_rows, verified

CoverageControl = Literal["none", "shuffled"]
"""`none`: the neuron's own explanation; `shuffled`: that of another neuron of its layer"""
EPSILONS = (0.1, 0.5, 1.0)
"""distortions at which coding rates are computed; tokens come from a LayerNorm, so that their entries have
variance 1"""
EPSILON = 0.5
"""the distortion used in tables and figures"""
SHARES = (0.25, 0.5, 0.75)
"""thresholds for covered tokens, as fractions of the range from an explanation's default to its largest value"""
SHARE = 0.5
"""the share used in tables and figures"""
MEASURES = ("consistency", "evenness", "distinctiveness", "contrast", "auroc")
"""fields of `CoverageMeasures` that are averaged over neurons"""
LAYERS, NEURONS, READINGS = "layers.parquet", "neurons.parquet", "readings.parquet"
SUMMARY = "summary.json"
LAYER_FIGURES = TableFile(
    "analysis/MODEL/layers.parquet",
    (
        FileColumn("layer", pa.int32(), "from 0"),
        FileColumn("quantity", pa.string(), "such as `coding_rate_before`, `lasso`, `nonzero`"),
        FileColumn(
            "setting",
            pa.string(),
            "where it was measured: a distortion, a step, `before` or `after`; empty if there is only one value",
        ),
        FileColumn("value", pa.float64(), "in the quantity's unit"),
        FileColumn(
            "error",
            pa.float64(),
            "standard error over documents; null for figures of the weights",
        ),
    ),
)
NEURON_FACTS = TableFile(
    "analysis/MODEL/neurons.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("dead", pa.bool_(), "never above 0 on the tokens read"),
        FileColumn(
            "group", pa.int32(), "number of its group of neurons that fire alike, -1 for none"
        ),
        FileColumn("nearest", pa.int32(), "index of the neuron with the highest correlation"),
        FileColumn("correlation", pa.float64(), "of the activations with it, -1 to 1"),
        FileColumn("nearest_atom", pa.int32(), "index of the neuron with the most coherent atom"),
        FileColumn("coherence", pa.float64(), "absolute cosine with that atom, 0 to 1"),
        FileColumn("duplicate", pa.bool_(), "cosine of at least 0.95 with another atom"),
    ),
)
NEURON_READINGS = TableFile(
    "analysis/MODEL/readings.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn(
            "explainer",
            pa.string(),
            "explainer of the explanation that determines the covered tokens",
        ),
        FileColumn(
            "control",
            pa.string(),
            "`none`: the neuron's own explanation; `shuffled`: another neuron's",
        ),
        FileColumn(
            "share",
            pa.float64(),
            "threshold for covered tokens, as a fraction of the range from the explanation's default to its largest value",
        ),
        FileColumn("status", pa.string(), "`defined`, `undefined` or `dead`"),
        FileColumn("n_covered", pa.int64(), "covered held-out tokens"),
        FileColumn("n_elsewhere", pa.int64(), "other held-out tokens"),
        FileColumn(
            "consistency", pa.float64(), "fraction of the covered tokens at which it fires, 0 to 1"
        ),
        FileColumn(
            "any_consistency",
            pa.float64(),
            "the same, with every activation above 0 counted as firing",
        ),
        FileColumn(
            "evenness",
            pa.float64(),
            "participation ratio of its activations on the covered tokens, 0 to 1",
        ),
        FileColumn(
            "distinctiveness",
            pa.float64(),
            "fraction of the other tokens at which it does not fire, 0 to 1",
        ),
        FileColumn(
            "any_distinctiveness",
            pa.float64(),
            "the same, with every activation above 0 counted as firing",
        ),
        FileColumn(
            "contrast",
            pa.float64(),
            "mean activations on covered and other tokens: difference divided by sum, -1 to 1",
        ),
        FileColumn(
            "auroc",
            pa.float64(),
            "probability that a covered token has a higher activation than another token, 0 to 1",
        ),
    ),
)


@dataclass(frozen=True)
class LayerFigure:
    """A figure of one layer."""

    layer: int
    quantity: str
    setting: str
    """where it was measured: a distortion, a step, before or after; empty if there is only one value"""
    value: float
    error: float | None = None
    """standard error over documents; None for figures of the weights"""


@dataclass(frozen=True)
class NeuronFacts:
    """Facts about one neuron of the site; a field is None if the quantity does not exist for the model."""

    neuron: NeuronId
    dead: bool
    """never above 0 on the tokens read"""
    group: int
    """number of its group of neurons of the layer that fire alike, -1 for none"""
    nearest: int
    """index of the other neuron of the layer with the highest correlation"""
    correlation: float
    """correlation of the activations with that neuron"""
    nearest_atom: int | None
    """index of the other neuron of the layer with the most coherent atom"""
    coherence: float | None
    """|cosine| with that atom"""
    duplicate: bool | None
    """whether its atom has a cosine of at least 0.95 with another"""


@dataclass(frozen=True)
class CoverageMeasures:
    """Measures of one neuron on the tokens that one explanation covers and on others; None without a value.

    Definitions: `cratelm.analysis.consistency`.
    """

    status: Status
    n_covered: int
    """covered tokens"""
    n_elsewhere: int
    """other tokens"""
    consistency: float | None = None
    any_consistency: float | None = None
    """consistency with every activation above 0 counted as firing"""
    evenness: float | None = None
    distinctiveness: float | None = None
    any_distinctiveness: float | None = None
    """distinctiveness with every activation above 0 counted as firing"""
    contrast: float | None = None
    """also None if an activation is negative, or all are 0"""
    auroc: float | None = None


@dataclass(frozen=True)
class NeuronCoverage:
    """One row of `readings.parquet`."""

    neuron: NeuronId
    explainer: str
    control: CoverageControl
    share: float
    measures: CoverageMeasures


@dataclass(frozen=True)
class MeasureSummary:
    """Mean of one measure over the neurons of a layer."""

    layer: int
    control: CoverageControl
    share: float
    measure: str
    """one of `MEASURES`"""
    mean: float | None
    """None if no neuron has a value"""
    low: float | None
    """95% bootstrap interval over neurons; None with fewer than two"""
    high: float | None
    defined: int
    """neurons with a value"""
    undefined: int
    """neurons whose explanation covers no held-out token, or all; for evenness also those without any
    activation on covered tokens; for contrast also those with a negative activation, or none"""
    dead: int
    """never above 0 on the fit split"""


def write_layers(folder: str | Path, figures: Sequence[LayerFigure]) -> None:
    """Write `layers.parquet` into an existing folder."""
    table = pa.Table.from_pylist([asdict(f) for f in figures], schema=LAYER_FIGURES.schema)
    pq.write_table(table, Path(folder) / LAYERS)


@checked_arguments()
def read_layers(folder: str | Path) -> list[LayerFigure]:
    """Return the figures of all layers, in the order of the file."""
    return read_rows(Path(folder) / LAYERS, lambda row: LayerFigure(**row))


def write_neurons(folder: str | Path, neurons: Sequence[NeuronFacts]) -> None:
    """Write `neurons.parquet` into an existing folder."""
    rows = [{**asdict(n), **vars(n.neuron)} for n in neurons]
    pq.write_table(pa.Table.from_pylist(rows, schema=NEURON_FACTS.schema), Path(folder) / NEURONS)


@checked_arguments()
def read_neurons(folder: str | Path) -> list[NeuronFacts]:
    """Return the facts about all neurons, in the order of the file."""
    return read_rows(
        Path(folder) / NEURONS, lambda row: NeuronFacts(neuron=_take_neuron(row), **row)
    )


def write_readings(folder: str | Path, rows: Sequence[NeuronCoverage]) -> None:
    """Write `readings.parquet` into an existing folder."""
    plain = [
        {
            **vars(row.neuron),
            "explainer": row.explainer,
            "control": row.control,
            "share": row.share,
            **asdict(row.measures),
        }
        for row in rows
    ]
    pq.write_table(
        pa.Table.from_pylist(plain, schema=NEURON_READINGS.schema), Path(folder) / READINGS
    )


@checked_arguments()
def read_readings(folder: str | Path) -> list[NeuronCoverage]:
    """Return the rows of `readings.parquet`, in the order of the file; none if there are no explanations."""
    path = Path(folder) / READINGS
    return read_rows(path, _coverage) if verified(path).is_file() else []


def _coverage(row: dict[str, Any]) -> NeuronCoverage:
    neuron, status = _take_neuron(row), Status(row.pop("status"))
    explainer, control, share = (row.pop(name) for name in ("explainer", "control", "share"))
    return NeuronCoverage(neuron, explainer, control, share, CoverageMeasures(status, **row))


@checked_arguments()
def read_measure_by_layer(folder: str | Path, measure: str) -> dict[int, NDArray[np.float64]]:
    """Return one measure of the neurons that have it, by layer, for their own explanations at `SHARE`.

    Values are in the order of the file. A layer without any value is absent, and so are all layers if there
    are no explanations.
    """
    path = Path(folder) / READINGS
    if not verified(path).is_file():
        return {}
    filters = [("control", "=", "none"), ("share", "=", SHARE)]
    table = read_parquet(path, columns=["layer", measure], filters=filters)
    layer, value = table["layer"].to_numpy(), table[measure].to_numpy().astype(float)
    by_layer = {int(n): value[(layer == n) & ~np.isnan(value)] for n in np.unique(layer)}
    return {number: values for number, values in by_layer.items() if len(values)}


def write_measure_summaries(folder: str | Path, summaries: Sequence[MeasureSummary]) -> None:
    """Write `summary.json` into an existing folder."""
    write_json(Path(folder) / SUMMARY, {"readings": [vars(s) for s in summaries]})


@checked_arguments()
def read_measure_summaries(folder: str | Path) -> list[MeasureSummary]:
    """Return the means over neurons of `summary.json`; none if there are no explanations."""
    return read_json(
        Path(folder) / SUMMARY,
        lambda content: [MeasureSummary(**summary) for summary in content["readings"]],
    )


def models_with_analysis(run: Run) -> list[str]:
    """Return the models for which `cratelm analyze` has finished, sorted."""
    return run.models("analysis")


def _take_neuron(row: dict[str, Any]) -> NeuronId:
    """Return the neuron that a row is about, and remove its columns from the row."""
    return NeuronId(*(row.pop(column.name) for column in NEURON_COLUMNS))
