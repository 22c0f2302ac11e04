"""What `cratelm analyze` writes to `analysis/MODEL/`, as open columns.

`layers.parquet`: layer, quantity, setting, value, error: a row a figure of a layer; `error` is its standard
error over documents, null where the figure is of the weights.
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

from cratelm.activations.store import NEURON_FIELDS
from cratelm.analysis.consistency import Reading
from cratelm.records import NeuronId

LAYERS, NEURONS, READINGS = "layers.parquet", "neurons.parquet", "readings.parquet"
LAYER_SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("quantity", pa.string()),
        ("setting", pa.string()),
        ("value", pa.float64()),
        ("error", pa.float64()),
    ]
)
NEURON_SCHEMA = pa.schema(
    [
        *NEURON_FIELDS,
        ("dead", pa.bool_()),
        ("group", pa.int32()),
        ("nearest", pa.int32()),
        ("correlation", pa.float64()),
        ("nearest_atom", pa.int32()),
        ("coherence", pa.float64()),
        ("duplicate", pa.bool_()),
    ]
)
READING_SCHEMA = pa.schema(
    [
        *NEURON_FIELDS,
        ("explainer", pa.string()),
        ("control", pa.string()),
        ("share", pa.float64()),
        ("status", pa.string()),
        ("n_covered", pa.int64()),
        ("n_elsewhere", pa.int64()),
        ("consistency", pa.float64()),
        ("any_consistency", pa.float64()),
        ("evenness", pa.float64()),
        ("distinctiveness", pa.float64()),
        ("any_distinctiveness", pa.float64()),
        ("contrast", pa.float64()),
        ("auroc", pa.float64()),
    ]
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


def write_layers(folder: Path, figures: Sequence[LayerFigure]) -> None:
    table = pa.Table.from_pylist([asdict(f) for f in figures], schema=LAYER_SCHEMA)
    pq.write_table(table, folder / LAYERS)


def write_neurons(folder: Path, neurons: Sequence[NeuronFacts]) -> None:
    rows = [{**asdict(n), **vars(n.neuron)} for n in neurons]
    pq.write_table(pa.Table.from_pylist(rows, schema=NEURON_SCHEMA), folder / NEURONS)


def write_readings(folder: Path, readings: Sequence[NeuronReading]) -> None:
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
    pq.write_table(pa.Table.from_pylist(rows, schema=READING_SCHEMA), folder / READINGS)
