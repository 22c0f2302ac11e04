"""Read and write explanations: Parquet files, one row per neuron and explainer.

`explanations.parquet`: model, site, layer, index, explainer, text, payload (JSON), documents.
`neurons.parquet`: model, site, layer, index, dead: every neuron that was to be explained, dead ones too.
`unexplained.parquet`: model, site, layer, index, evidence, reason: explanations that a language model was
asked for and did not give.

The folder is `explanations/MODEL/` without a language model and `explanations/MODEL@NAME/` with one.
A language model explains a neuron once for each kind of evidence; `payload` says from which.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.errors import InputError
from cratelm.records import Explanation, NeuronId

_ROWS_A_GROUP = 256
"""rows read for the payload of one neuron: some 1 MB"""
_NEURON = [
    ("model", pa.string()),
    ("site", pa.string()),
    ("layer", pa.int32()),
    ("index", pa.int32()),
]
_EXPLANATION_SCHEMA = pa.schema(
    [
        *_NEURON,
        ("explainer", pa.string()),
        ("text", pa.string()),
        ("payload", pa.string()),
        ("documents", pa.list_(pa.int64())),
    ]
)
_UNEXPLAINED_SCHEMA = pa.schema([*_NEURON, ("evidence", pa.string()), ("reason", pa.string())])
_SELECTED_SCHEMA = pa.schema([*_NEURON, ("dead", pa.bool_())])


@dataclass(frozen=True)
class SampledNeuron:
    """A neuron that was to be explained."""

    neuron: NeuronId
    dead: bool
    """never above 0 on the fit split, so that there is no explanation"""


@dataclass(frozen=True)
class ExplanationFailure:
    """An explanation that a language model was asked for and did not give."""

    neuron: NeuronId
    evidence: str
    reason: str


def explanation_set_name(model: str, name: str) -> str:
    """Return the folder's name of results by a language model (or a pair of them) called `name`."""
    return f"{model}@{name}" if name else model


def write_explanations(folder: Path, explanations: Sequence[Explanation]) -> None:
    """Write `explanations.parquet` into `folder`, in the order given."""
    rows = [
        {
            **vars(e.neuron),
            "explainer": e.explainer,
            "text": e.text,
            "payload": json.dumps(e.payload),
            "documents": e.documents,
        }
        for e in explanations
    ]
    table = pa.Table.from_pylist(rows, schema=_EXPLANATION_SCHEMA)
    pq.write_table(table, folder / "explanations.parquet", row_group_size=_ROWS_A_GROUP)


def read_explanations(folder: Path) -> list[Explanation]:
    """Return the explanations in `folder`, in the order written; `InputError` where there are none."""
    return [
        Explanation(
            _neuron(row),
            row["explainer"],
            row["text"],
            json.loads(row["payload"]),
            tuple(row["documents"]),
        )
        for row in _rows(folder / "explanations.parquet")
    ]


def write_selected(folder: Path, selected: Sequence[SampledNeuron]) -> None:
    """Write `neurons.parquet` into `folder`."""
    rows = [{**vars(s.neuron), "dead": s.dead} for s in selected]
    table = pa.Table.from_pylist(rows, schema=_SELECTED_SCHEMA)
    pq.write_table(table, folder / "neurons.parquet")


def read_selected(folder: Path) -> list[SampledNeuron]:
    """Return the neurons that were to be explained, dead ones too, by layer and index."""
    return [SampledNeuron(_neuron(row), row["dead"]) for row in _rows(folder / "neurons.parquet")]


def write_unexplained(folder: Path, failures: Sequence[ExplanationFailure]) -> None:
    """Write `unexplained.parquet` into `folder`."""
    rows = [{**vars(f.neuron), "evidence": f.evidence, "reason": f.reason} for f in failures]
    table = pa.Table.from_pylist(rows, schema=_UNEXPLAINED_SCHEMA)
    pq.write_table(table, folder / "unexplained.parquet")


def read_unexplained(folder: Path) -> list[ExplanationFailure]:
    """Return the explanations that a language model did not give; none where it was not asked."""
    path = folder / "unexplained.parquet"
    rows = _rows(path) if path.is_file() else []
    return [ExplanationFailure(_neuron(row), row["evidence"], row["reason"]) for row in rows]


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise InputError(f"{path} is not there: type `cratelm explain` for this model first")
    return pq.read_table(path).to_pylist()


def _neuron(row: dict) -> NeuronId:
    return NeuronId(row["model"], row["site"], row["layer"], row["index"])
