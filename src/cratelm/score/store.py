"""Read and write scores: `scores.parquet`, one row per neuron, explainer, metric and control.

Columns: model, site, layer, index, explainer, metric, control, value, status, reason, r2,
absolute_deviation, accuracy, n_tokens, n_records, n_duplicates, without_duplicates, documents,
explained_by, simulator, variant. A value that does not exist is null, and `status` with `reason` says
why.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.errors import InputError
from cratelm.records import NeuronId, NeuronScore, Score, Status
from cratelm.score.simulators import COMPAT

_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("site", pa.string()),
        ("layer", pa.int32()),
        ("index", pa.int32()),
        ("explainer", pa.string()),
        ("metric", pa.string()),
        ("control", pa.string()),
        ("value", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("r2", pa.float64()),
        ("absolute_deviation", pa.float64()),
        ("accuracy", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_records", pa.int64()),
        ("n_duplicates", pa.int64()),
        ("without_duplicates", pa.float64()),
        ("documents", pa.list_(pa.int64())),
        ("explained_by", pa.string()),
        ("simulator", pa.string()),
        ("variant", pa.string()),
    ]
)


def write_scores(folder: Path, scores: Sequence[NeuronScore]) -> None:
    """Write `scores.parquet` into `folder`, in the order given."""
    rows = [
        {
            **vars(s.neuron),
            "explainer": s.explainer,
            "metric": s.metric,
            "control": s.control,
            **vars(s.score),
            "status": str(s.score.status),
            "documents": s.documents,
            "explained_by": s.explained_by,
            "simulator": s.simulator,
            "variant": s.variant,
        }
        for s in scores
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), folder / "scores.parquet")


def read_scores(folder: Path) -> list[NeuronScore]:
    """Return the scores in `folder`, in the order written; `InputError` where there are none."""
    path = folder / "scores.parquet"
    if not path.is_file():
        raise InputError(f"{path} is not there: type `cratelm score` for this model first")
    return [_score(row) for row in pq.read_table(path).to_pylist()]


def _score(row: dict) -> NeuronScore:
    explained_by, simulator, variant = _names(row)
    return NeuronScore(
        neuron=NeuronId(row["model"], row["site"], row["layer"], row["index"]),
        explainer=row["explainer"],
        metric=row["metric"],
        control=row["control"],
        score=Score(
            value=row["value"],
            status=Status(row["status"]),
            reason=row["reason"],
            r2=row["r2"],
            absolute_deviation=row["absolute_deviation"],
            accuracy=row.get("accuracy"),  # this and the next two: not in the first files
            n_tokens=row["n_tokens"],
            n_records=row["n_records"],
            n_duplicates=row.get("n_duplicates", 0),
            without_duplicates=row.get("without_duplicates"),
        ),
        documents=tuple(row["documents"]),
        explained_by=explained_by,
        simulator=simulator,
        variant=variant,
    )


def _names(row: dict) -> tuple[str, str, str]:
    """Return explainer, simulator and variant of a row.

    Files of version 0.1.0 have the label alone, made of names without a slash.
    """
    if row.get("explained_by"):
        return row["explained_by"], row["simulator"], row["variant"]
    label: str = row["explainer"]
    plain = label.removesuffix(COMPAT)
    explained_by, _, simulator = plain.partition("/")
    return explained_by, simulator, label[len(plain) :]
