"""Read and write scores: `scores.parquet`, one row per neuron, explainer, metric and control.

A value that does not exist is null; `status` and `reason` say why. Rows are written in groups while they
are computed, and read by columns. A new field of `records.Score` needs a line in `SCORES` to be stored.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.errors import InputError
from cratelm.records import NeuronId, NeuronScore, Status
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import read_rows, reading, verified
from cratelm.score.simulators import COMPAT
from cratelm.score.whole_records import FIGURES, TokenShare, WholeScore
from cratelm.stats.score_table import ScoreTable, score_columns

_ROWS_A_GROUP = 16_384
"""rows in a row group: about 20 MB as objects"""

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
            "`top_and_random`, `random_only`, `anthropic`, `all_tokens_estimate`; with a language model also `detection`, `detection_hard`, `fuzzing`, `fuzzing_hard`, `intruder`, `embedding`",
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
        FileColumn(
            "accuracy",
            pa.float64(),
            "detection and fuzzing, also with hard negatives: balanced accuracy, 0 to 1",
        ),
        FileColumn("n_tokens", pa.int64(), "tokens scored"),
        FileColumn("n_records", pa.int64(), "excerpts scored"),
        FileColumn(
            "n_failed",
            pa.int64(),
            "further excerpts (of intruder, trials) left out because their call failed; not in files of version 0.1.0",
        ),
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
        FileColumn(
            "low",
            pa.float64(),
            "`all_tokens_estimate`: lower bound of the 95% interval over the draws of excerpts; null if there is none. Only in files with this metric",
            optional=True,
        ),
        FileColumn("high", pa.float64(), "upper bound, likewise", optional=True),
    ),
)

_FIGURE_MEANINGS = {
    "correlation": "Pearson correlation of the simulated with the true activation, -1 to 1",
    "cosine": "their cosine, -1 to 1",
    "precision_top": "average precision for tokens among the highest 1% of the neuron's activations above 0 on the fit split, 0 to 1",
    "chance_top": "share of such tokens, which is the average precision of chance",
    "precision_tenth": "average precision for tokens above a tenth of the neuron's maximum on the fit split, 0 to 1",
    "chance_tenth": "share of such tokens",
    "f1": "F1 of tokens above a tenth of the maximum and those simulated at half the highest simulated value or more, 0 to 1",
    "iou": "intersection over union of the same, 0 to 1",
    "auc": "area under the ROC curve for tokens among the highest 1% against those below a tenth of the maximum, 0 to 1, chance 0.5",
    "auc_hard": "the same against hard negatives: those with the same id as one among the highest 1%",
}
ALL_TOKENS = TableFile(
    "scores/MODEL/all_tokens.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("explainer", pa.string(), "one without a language model, such as `lookup`"),
        FileColumn(
            "control",
            pa.string(),
            "`none`: the neuron's own explanation; `shuffled`: another neuron's",
        ),
        FileColumn(
            "status", pa.string(), "of the correlation: `defined`, `undefined` (constant), `dead`"
        ),
        FileColumn("reason", pa.string(), "why there is no correlation; empty if there is one"),
        *(
            FileColumn(name, pa.float64(), f"{_FIGURE_MEANINGS[name]}; null if it does not exist")
            for name in FIGURES
        ),
        FileColumn("n_tokens", pa.int64(), "held-out tokens, all that the harvest searched"),
    ),
)
TOKEN_SHARES = TableFile(
    "scores/MODEL/token_shares.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn(
            "token_share",
            pa.float64(),
            "fraction of the variance that the mean activation on the token predicts, at most 1; null if the neuron is constant",
        ),
        FileColumn(
            "token_entropy",
            pa.float64(),
            "entropy in nats of the share of the activation above 0 by token; null if it was never above 0",
        ),
        FileColumn("n_tokens", pa.int64(), "held-out tokens"),
    ),
)


def write_whole(
    folder: str | Path, layers: Iterable[tuple[Sequence[TokenShare], Sequence[WholeScore]]]
) -> None:
    """Write `token_shares.parquet` and `all_tokens.parquet` into `folder`; memory: one layer."""
    with (
        pq.ParquetWriter(Path(folder) / "token_shares.parquet", TOKEN_SHARES.schema) as shares,
        pq.ParquetWriter(Path(folder) / "all_tokens.parquet", ALL_TOKENS.schema) as scores,
    ):
        for of_shares, of_scores in layers:
            for writer, rows in ((shares, of_shares), (scores, of_scores)):
                listed = [{**vars(row), **vars(row.neuron)} for row in rows]
                names = writer.schema.names
                columns = {name: [row[name] for row in listed] for name in names}
                writer.write_table(pa.table(columns, writer.schema))


@checked_arguments()
def read_token_shares(folder: str | Path) -> list[TokenShare]:
    """Return what the last token explains of each neuron; none if it was not measured.

    Raises `InputError` if the file is damaged.
    """
    return _read_whole(Path(folder) / "token_shares.parquet", TokenShare)


@checked_arguments()
def read_whole_scores(folder: str | Path) -> list[WholeScore]:
    """Return the scores over all held-out tokens; none if they were not measured.

    Raises `InputError` if the file is damaged.
    """
    return _read_whole(Path(folder) / "all_tokens.parquet", WholeScore)


_Row = TypeVar("_Row", TokenShare, WholeScore)


def _read_whole(path: Path, kind: type[_Row]) -> list[_Row]:
    if not verified(path).is_file():
        return []

    def row_of(row: dict[str, Any]) -> _Row:
        neuron = NeuronId(row.pop("model"), row.pop("site"), row.pop("layer"), row.pop("index"))
        if "status" in row:
            row["status"] = Status(row["status"])
        return kind(neuron=neuron, **row)

    return read_rows(path, row_of)


def write_scores(
    folder: str | Path, scores: Iterable[NeuronScore], *, with_bounds: bool = True
) -> None:
    """Write `scores.parquet` into `folder`, in the order given; memory: one row group.

    Without `with_bounds` the file has no columns for the bounds of intervals.
    """
    schema = SCORES.schema if with_bounds else SCORES.least
    with pq.ParquetWriter(Path(folder) / "scores.parquet", schema) as writer:
        rest = iter(scores)
        while group := list(islice(rest, _ROWS_A_GROUP)):
            writer.write_table(score_columns(group, schema))


@checked_arguments()
def read_scores(folder: str | Path) -> ScoreTable:
    """Return the scores in `folder`, in the order written, as a sequence of `NeuronScore`.

    Raises `InputError` if there are none.
    """
    return read_score_columns(folder, SCORES.schema.names)


def read_score_columns(folder: str | Path, columns: Sequence[str]) -> ScoreTable:
    """Return some columns of the scores in `folder`. Other fields of its items have their defaults.

    The columns that identify a score, and its status, are always read. Raises `InputError` if there are no scores.
    """
    columns = [*_ALWAYS, *(name for name in columns if name not in _ALWAYS)]
    path = Path(folder) / "scores.parquet"
    if not verified(path).is_file():
        raise InputError(f"{path} does not exist: type `cratelm score` for this model first")
    with reading(path, "the columns that docs/files.md lists") as sound:
        stored = pq.read_schema(sound)
        present = [name for name in columns if name in stored.names or name not in _LATER]
        types = [SCORES.schema.field(name).type for name in present]
        for name, expected in zip(present, types, strict=True):
            if stored.field(name).type != expected:
                raise TypeError(f"column {name} has type {stored.field(name).type}")
        words = [n for n, expected in zip(present, types, strict=True) if expected == pa.string()]
        table = pq.read_table(sound, columns=present, read_dictionary=words)
        return _named(_checked(ScoreTable(table)), columns)


_LATER = (
    "accuracy",
    "n_failed",
    "n_duplicates",
    "without_duplicates",
    "explained_by",
    "simulator",
    "variant",
    "low",
    "high",
)
"""columns that files of earlier versions, or without their metric, may lack"""
_ALWAYS = ("model", "site", "layer", "index", "explainer", "metric", "control", "status")
"""columns without which there is no score"""


def _checked(scores: ScoreTable) -> ScoreTable:
    """Return the scores; raise `ValueError` if a row lacks what every score has, or has an unknown status."""
    for name in _ALWAYS:
        if not scores.has(name).all():
            raise ValueError(f"column {name} has empty cells")
    for (status,) in scores.counts("status"):
        Status(status)
    return scores


def _named(scores: ScoreTable, columns: Sequence[str]) -> ScoreTable:
    """Return the scores with explainer, simulator and variant of each.

    Files of version 0.1.0 have only the label, made of names without a slash.
    """
    names = ("explained_by", "simulator", "variant")
    if not set(names) & set(columns):
        return scores
    codes, explainers = scores.words("explained_by")
    labels, words = scores.words("explainer")
    unnamed = np.array([not e for e in explainers], bool)[codes]
    if not unnamed.any():
        return scores
    parts = [_parts(label) for label in words]
    for at, name in enumerate(names):
        codes, values = scores.words(name)
        column = np.array(values, object)[codes]
        column[unnamed] = np.array([p[at] for p in parts], object)[labels[unnamed]]
        scores = scores.replaced(name, pa.array(column, pa.string()))
    return scores


def _parts(label: str) -> tuple[str, str, str]:
    """Return explainer, simulator and variant in a label of version 0.1.0."""
    plain = label.removesuffix(COMPAT)
    explained_by, _, simulator = plain.partition("/")
    return explained_by, simulator, label[len(plain) :]
