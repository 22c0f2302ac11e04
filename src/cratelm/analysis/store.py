"""What `cratelm analyze` writes to `analysis/MODEL/`, as open columns.

`layers.parquet`: a row a figure of a layer.
`neurons.parquet`: a row a neuron of the site.
`readings.parquet`: a row a neuron, control and share: consistency and distinctiveness; absent where there
are no explanations.
`summary.json`: means over neurons with their intervals, by layer and over layers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.analysis.consistency import Reading
from cratelm.records import NeuronId
from cratelm.runs.columns import NEURON_COLUMNS, Column, TableFile

LAYERS, NEURONS, READINGS = "layers.parquet", "neurons.parquet", "readings.parquet"
LAYER_FIGURES = TableFile(
    "analysis/MODEL/layers.parquet",
    (
        Column("layer", pa.int32(), "from 0"),
        Column("quantity", pa.string(), "such as `coding_rate_before`, `lasso`, `nonzero`"),
        Column(
            "setting",
            pa.string(),
            "what it was taken at: a distortion, a step, `before` or `after`; empty where there is one alone",
        ),
        Column("value", pa.float64(), "in the quantity's unit"),
        Column(
            "error",
            pa.float64(),
            "standard error over documents; null of what is read off the weights",
        ),
    ),
)
NEURON_FACTS = TableFile(
    "analysis/MODEL/neurons.parquet",
    (
        *NEURON_COLUMNS,
        Column("dead", pa.bool_(), "at 0 on all tokens read"),
        Column("group", pa.int32(), "number of its group of neurons that fire alike, -1 for none"),
        Column("nearest", pa.int32(), "index of the neuron with the highest correlation"),
        Column("correlation", pa.float64(), "of the activations with it, -1 to 1"),
        Column("nearest_atom", pa.int32(), "index of the neuron with the most coherent atom"),
        Column("coherence", pa.float64(), "absolute cosine with that atom, 0 to 1"),
        Column("duplicate", pa.bool_(), "cosine of 0.95 or more with another atom"),
    ),
)
NEURON_READINGS = TableFile(
    "analysis/MODEL/readings.parquet",
    (
        *NEURON_COLUMNS,
        Column("explainer", pa.string(), "whose explanation says what is covered"),
        Column(
            "control",
            pa.string(),
            "`none`: the neuron's own explanation; `shuffled`: another neuron's",
        ),
        Column(
            "share",
            pa.float64(),
            "how far between the explanation's default and its largest value a token must be predicted to be covered",
        ),
        Column("status", pa.string(), "`defined`, `undefined` or `dead`"),
        Column("n_covered", pa.int64(), "held-out tokens covered"),
        Column("n_elsewhere", pa.int64(), "the others"),
        Column("consistency", pa.float64(), "part of the covered tokens at which it fires, 0 to 1"),
        Column(
            "any_consistency", pa.float64(), "the same, every activation above 0 counted as firing"
        ),
        Column(
            "evenness",
            pa.float64(),
            "participation ratio of its activations on the covered tokens, 0 to 1",
        ),
        Column(
            "distinctiveness", pa.float64(), "part of the others at which it does not fire, 0 to 1"
        ),
        Column(
            "any_distinctiveness",
            pa.float64(),
            "the same, every activation above 0 counted as firing",
        ),
        Column(
            "contrast",
            pa.float64(),
            "of the mean activations on covered and other tokens: difference over sum, -1 to 1",
        ),
        Column(
            "auroc",
            pa.float64(),
            "chance that a covered token has the higher activation than another one, 0 to 1",
        ),
    ),
)
Control = Literal["none", "shuffled"]


@dataclass(frozen=True)
class LayerFigure:
    """A figure of one layer."""

    layer: int
    quantity: str
    setting: str
    """what it was taken at: a distortion, a step, before or after; empty where there is only one"""
    value: float
    error: float | None = None


@dataclass(frozen=True)
class NeuronFacts:
    """One neuron of the site. None where a quantity does not exist."""

    neuron: NeuronId
    dead: bool
    """never above 0 on the tokens read"""
    group: int
    """of neurons of the layer that fire alike, -1 for none"""
    nearest: int
    """the other neuron of the layer with the highest correlation"""
    correlation: float
    nearest_atom: int | None
    """the other neuron of the layer with the most coherent atom"""
    coherence: float | None
    """|cosine| with it"""
    duplicate: bool | None
    """its atom has a cosine of 0.95 or more with another"""


@dataclass(frozen=True)
class NeuronReading:
    """One neuron against what one explanation covers."""

    neuron: NeuronId
    explainer: str
    control: Control
    share: float
    reading: Reading


def write_layers(folder: str | Path, figures: Sequence[LayerFigure]) -> None:
    table = pa.Table.from_pylist([asdict(f) for f in figures], schema=LAYER_FIGURES.schema)
    pq.write_table(table, Path(folder) / LAYERS)


def write_neurons(folder: str | Path, neurons: Sequence[NeuronFacts]) -> None:
    rows = [{**asdict(n), **vars(n.neuron)} for n in neurons]
    pq.write_table(pa.Table.from_pylist(rows, schema=NEURON_FACTS.schema), Path(folder) / NEURONS)


def write_readings(folder: str | Path, readings: Sequence[NeuronReading]) -> None:
    rows = [
        {
            **vars(r.neuron),
            "explainer": r.explainer,
            "control": r.control,
            "share": r.share,
            **asdict(r.reading),
        }
        for r in readings
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=NEURON_READINGS.schema), Path(folder) / READINGS
    )
