"""Read and write scores: `scores.parquet`, one row per neuron, explainer, metric and control.

A value that does not exist is null; `status` and `reason` say why.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.errors import InputError
from cratelm.records import NeuronId, NeuronScore, Score, Status
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import read_rows, verified
from cratelm.score.simulators import COMPAT

SCORES = TableFile(
    "scores/MODEL/scores.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn(
            "explainer",
            pa.string(),
            "label: the explainer, then `/` and the simulator if another language model read its explanation, then the variant",
        ),
        FileColumn(
            "metric",
            pa.string(),
            "`top_and_random`, `random_only`, `anthropic`; with a language model also `detection`, `fuzzing`, `intruder`, `embedding`",
        ),
        FileColumn(
            "control",
            pa.string(),
            "`none`: the neuron's own explanation; `shuffled`: another neuron's; `constant`: a constant simulation",
        ),
        FileColumn(
            "value",
            pa.float64(),
            "simulation: Pearson correlation, -1 to 1; intruder: fraction of trials won, 0 to 1; other metrics: area under the ROC curve or balanced accuracy, 0 to 1. Null if there is none",
        ),
        FileColumn(
            "status",
            pa.string(),
            "`defined`, `undefined` (truth or simulation is constant), `dead`, `failed` (no answer)",
        ),
        FileColumn("reason", pa.string(), "why there is no value; empty if there is one"),
        FileColumn("r2", pa.float64(), "1 - mean squared error / mean squared truth, at most 1"),
        FileColumn(
            "absolute_deviation",
            pa.float64(),
            "1 - mean absolute error / mean absolute truth, at most 1",
        ),
        FileColumn("accuracy", pa.float64(), "detection and fuzzing: balanced accuracy, 0 to 1"),
        FileColumn("n_tokens", pa.int64(), "tokens scored"),
        FileColumn("n_records", pa.int64(), "excerpts scored"),
        FileColumn("n_duplicates", pa.int64(), "of these, near-duplicates of text explained from"),
        FileColumn(
            "without_duplicates",
            pa.float64(),
            "`value` over the other excerpts; null if there are no near-duplicates",
        ),
        FileColumn(
            "documents",
            pa.list_(pa.int64()),
            "`ordinal`s of the documents scored on, all of split `held_out`",
        ),
        FileColumn(
            "explained_by",
            pa.string(),
            "the explainer, as in `explanations.parquet`; not in files of version 0.1.0",
        ),
        FileColumn(
            "simulator",
            pa.string(),
            "the language model that read the explanation; empty if the explainer's own simulator did. Not in files of version 0.1.0",
        ),
        FileColumn(
            "variant", pa.string(), "`+paper-compat`, or empty. Not in files of version 0.1.0"
        ),
    ),
)


def write_scores(folder: str | Path, scores: Sequence[NeuronScore]) -> None:
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
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCORES.schema), Path(folder) / "scores.parquet"
    )


@checked_arguments()
def read_scores(folder: str | Path) -> list[NeuronScore]:
    """Return the scores in `folder`, in the order written; raise `InputError` if there are none."""
    path = Path(folder) / "scores.parquet"
    if not verified(path).is_file():
        raise InputError(f"{path} does not exist: type `cratelm score` for this model first")
    return read_rows(path, _score)


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
            accuracy=row.get("accuracy"),  # missing in old files, like `n_duplicates` and the next
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

    Files of version 0.1.0 have only the label, made of names without a slash.
    """
    if row.get("explained_by"):
        return row["explained_by"], row["simulator"], row["variant"]
    label: str = row["explainer"]
    plain = label.removesuffix(COMPAT)
    explained_by, _, simulator = plain.partition("/")
    return explained_by, simulator, label[len(plain) :]
