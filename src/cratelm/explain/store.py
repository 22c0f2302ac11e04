"""Read and write explanations.

`explanations.parquet`   one row per neuron and explainer
`neurons.parquet`        one row per neuron selected to be explained, including dead ones
`unexplained.parquet`    one row per explanation that was requested from a language model and failed

The folder is `explanations/MODEL/` without a language model and `explanations/MODEL@NAME/` with one.
A language model explains a neuron once for each kind of evidence, which `payload` names.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.errors import InputError
from cratelm.records import Explanation, NeuronId
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import read_rows, verified

_ROWS_A_GROUP = 256
"""rows that are read to get the payload of one neuron: about 1 MB"""
EXPLANATIONS = TableFile(
    "explanations/MODEL/explanations.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("explainer", pa.string(), "`lookup`, `trie`, or the name of a language model"),
        FileColumn(
            "text", pa.string(), "for people, and for language models that simulate from it"
        ),
        FileColumn("payload", pa.string(), "for the simulator of the same name, JSON"),
        FileColumn(
            "documents",
            pa.list_(pa.int64()),
            "`ordinal`s of the documents that it was made from, all of split `fit`",
        ),
    ),
)
UNEXPLAINED = TableFile(
    "explanations/MODEL/unexplained.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("evidence", pa.string(), "kind of excerpts in the prompt: `top` or `anthropic`"),
        FileColumn("reason", pa.string(), "why it failed, in words"),
    ),
)
SELECTED = TableFile(
    "explanations/MODEL/neurons.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("dead", pa.bool_(), "never above 0 on the fit split"),
    ),
)


@dataclass(frozen=True)
class SampledNeuron:
    """A neuron selected to be explained."""

    neuron: NeuronId
    dead: bool
    """never above 0 on the fit split, and so without an explanation"""


@dataclass(frozen=True)
class ExplanationFailure:
    """An explanation that was requested from a language model and failed."""

    neuron: NeuronId
    evidence: str
    reason: str


def write_explanations(folder: str | Path, explanations: Sequence[Explanation]) -> None:
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
    table = pa.Table.from_pylist(rows, schema=EXPLANATIONS.schema)
    pq.write_table(table, Path(folder) / "explanations.parquet", row_group_size=_ROWS_A_GROUP)


@checked_arguments()
def read_explanations(folder: str | Path) -> list[Explanation]:
    """Return the explanations in `folder`, in the order written; raise `InputError` if there are none."""
    return read_rows(_existing(Path(folder) / "explanations.parquet"), explanation_of)


def explanation_of(row: dict[str, Any]) -> Explanation:
    """Return the explanation in a row of `explanations.parquet`."""
    return Explanation(
        _neuron(row),
        row["explainer"],
        row["text"],
        json.loads(row["payload"]),
        tuple(row["documents"]),
    )


def write_selected(folder: str | Path, selected: Sequence[SampledNeuron]) -> None:
    """Write `neurons.parquet`, the neurons selected to be explained, into `folder`."""
    rows = [{**vars(s.neuron), "dead": s.dead} for s in selected]
    table = pa.Table.from_pylist(rows, schema=SELECTED.schema)
    pq.write_table(table, Path(folder) / "neurons.parquet")


@checked_arguments()
def read_selected(folder: str | Path) -> list[SampledNeuron]:
    """Return the neurons selected to be explained, including dead ones, by layer and index.

    Raises `InputError` if the file does not exist.
    """
    path = _existing(Path(folder) / "neurons.parquet")
    return read_rows(path, lambda row: SampledNeuron(_neuron(row), row["dead"]))


def write_unexplained(folder: str | Path, failures: Sequence[ExplanationFailure]) -> None:
    """Write `unexplained.parquet`, the failed explanations, into `folder`."""
    rows = [{**vars(f.neuron), "evidence": f.evidence, "reason": f.reason} for f in failures]
    table = pa.Table.from_pylist(rows, schema=UNEXPLAINED.schema)
    pq.write_table(table, Path(folder) / "unexplained.parquet")


@checked_arguments()
def read_unexplained(folder: str | Path) -> list[ExplanationFailure]:
    """Return the explanations that a language model failed to give; none if the file does not exist."""
    path = Path(folder) / "unexplained.parquet"
    if not verified(path).is_file():
        return []
    return read_rows(
        path, lambda row: ExplanationFailure(_neuron(row), row["evidence"], row["reason"])
    )


def _existing(path: Path) -> Path:
    if not verified(path).is_file():
        raise InputError(f"{path} does not exist: type `cratelm explain` for this model first")
    return path


def _neuron(row: dict) -> NeuronId:
    return NeuronId(row["model"], row["site"], row["layer"], row["index"])
