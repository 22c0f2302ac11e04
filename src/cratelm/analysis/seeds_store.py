"""Read and write the results of `cratelm seeds`: the folder `seeds/MODEL/` of a run.

`matches.parquet`     one row per pair of neurons of two seeds
`transfers.parquet`   one row per explanation of a neuron and other seed; no rows without explanations
`summary.json`        means, each with its null control
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.records import Interval
from cratelm.runs import Completion, Run, known_fields, write_json
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import FileColumn, TableFile
from cratelm.runs.names import seed_of
from cratelm.runs.reading import read_json, read_rows

Similarity = Literal["activations", "atoms"]
"""`activations`: |correlation| over held-out tokens; `atoms`: |cosine| of the atoms of the dictionary"""
MatchControl = Literal["none", "untrained"]
MATCHES, TRANSFERS, SUMMARY = "matches.parquet", "transfers.parquet", "summary.json"
_PAIR = (
    FileColumn("model_a", pa.string(), "one model"),
    FileColumn("model_b", pa.string(), "the same model with another seed"),
    FileColumn("site", pa.string(), "where the neurons are"),
    FileColumn("layer", pa.int32(), "from 0"),
    FileColumn("index_a", pa.int32(), "neuron of `model_a`"),
)
SEED_MATCHES = TableFile(
    "seeds/MODEL/matches.parquet",
    (
        *_PAIR,
        FileColumn("index_b", pa.int32(), "neuron of `model_b` that it is matched with"),
        FileColumn("similarity", pa.string(), "what is similar: `activations` or `atoms`"),
        FileColumn(
            "control",
            pa.string(),
            "`none`: the trained models; `untrained`: both with their initial weights",
        ),
        FileColumn(
            "value",
            pa.float64(),
            "absolute correlation over held-out tokens, or absolute cosine of the atoms, 0 to 1",
        ),
    ),
)
SEED_TRANSFERS = TableFile(
    "seeds/MODEL/transfers.parquet",
    (
        *_PAIR,
        FileColumn("index_b", pa.int32(), "its match in `model_b` by activations"),
        FileColumn(
            "index_random", pa.int32(), "random neuron of the same layer of `model_b`: the null"
        ),
        FileColumn("explainer", pa.string(), "`lookup` or `trie`"),
        FileColumn(
            "own",
            pa.float64(),
            "correlation over held-out tokens of what the explanation predicts with the neuron itself, -1 to 1; null if one is constant",
        ),
        FileColumn("on_match", pa.float64(), "the same with its match"),
        FileColumn("on_random", pa.float64(), "the same with the random neuron"),
    ),
)


@dataclass(frozen=True)
class SeedMatch:
    """One row of `matches.parquet`."""

    model_a: str
    model_b: str
    site: str
    layer: int
    index_a: int
    index_b: int
    similarity: Similarity
    control: MatchControl
    value: float
    """0 to 1"""


@dataclass(frozen=True)
class SeedTransfer:
    """One row of `transfers.parquet`: an explanation of a neuron of `model_a` on two neurons of `model_b`."""

    model_a: str
    model_b: str
    site: str
    layer: int
    index_a: int
    index_b: int
    """the match of the neuron by activations"""
    index_random: int
    """a random neuron of the layer"""
    explainer: str
    own: float | None
    """correlation of the simulation with the neuron itself over held-out tokens; None if one is constant"""
    on_match: float | None
    on_random: float | None


@dataclass(frozen=True)
class MatchSummary:
    """The matched neurons of one layer of two seeds."""

    model_a: str
    model_b: str
    layer: int
    similarity: Similarity
    mean: float
    """over pairs, 0 to 1: PW-MCC if the similarity is that of activations (Song et al. 2025)"""
    untrained: float
    """the same of both models with their initial weights: the null"""
    neurons: int
    """pairs"""
    constant: int
    """neurons of either model whose activation (or atom) is constant (or 0): their similarity is 0"""


@dataclass(frozen=True)
class TransferSummary:
    """The explanations of one seed on the matches of their neurons in another."""

    model_a: str
    """whose neurons are explained"""
    model_b: str
    explainer: str
    own: float | None
    """mean correlation with the neurons themselves; None without any"""
    transfer: Interval | None
    """mean correlation with the matches, divided by `own`; None if `own` is not above 0"""
    random: Interval | None
    """the same for random neurons of the layer: the null"""
    neurons: int
    """neurons whose own explanation has a correlation, of all layers"""
    undefined: int
    """further neurons: they or their simulations are constant"""
    constant: int
    """matches without a correlation, which counts as 0"""


@dataclass(frozen=True)
class SeedsSummary:
    """Contents of `summary.json`."""

    model: str
    seeds: tuple[str, ...]
    """names of the models"""
    tokens: int
    """held-out text tokens read"""
    matches: tuple[MatchSummary, ...]
    transfers: tuple[TransferSummary, ...]


def write_matches(folder: str | Path, blocks: Iterable[dict[str, Any]]) -> None:
    """Write `matches.parquet`; each block has a value, or an array of values, for every column."""
    _write(Path(folder) / MATCHES, SEED_MATCHES.schema, blocks)


def write_transfers(folder: str | Path, rows: Sequence[SeedTransfer]) -> None:
    """Write `transfers.parquet` into an existing folder."""
    table = pa.Table.from_pylist([vars(row) for row in rows], schema=SEED_TRANSFERS.schema)
    pq.write_table(table, Path(folder) / TRANSFERS)


def write_summary(folder: str | Path, summary: SeedsSummary) -> None:
    """Write `summary.json` into an existing folder."""
    write_json(Path(folder) / SUMMARY, asdict(summary))


@checked_arguments()
def read_matches(folder: str | Path) -> list[SeedMatch]:
    """Return the matched neurons, in the order of the file."""
    return read_rows(Path(folder) / MATCHES, lambda row: SeedMatch(**row))


@checked_arguments()
def read_transfers(folder: str | Path) -> list[SeedTransfer]:
    """Return the explanations scored on matches, in the order of the file."""
    return read_rows(Path(folder) / TRANSFERS, lambda row: SeedTransfer(**row))


@checked_arguments()
def read_seeds_summary(folder: str | Path) -> SeedsSummary:
    """Return the means of `summary.json`."""
    return read_json(Path(folder) / SUMMARY, _summary)


def different_option(a: Completion, b: Completion) -> str:
    """Return the first option, in words, by which the stages of two seeds differ; empty if only the seeds do.

    Records lack options that were not given to a version without them: absent counts as empty.
    """
    for option in sorted((a.config.keys() | b.config.keys()) - {"seed", "model", "name"}):
        values = [of.config.get(option) or None for of in (a, b)]
        if values[0] != values[1]:
            flag = option.replace("_", "-")
            shown = ["nothing" if value is None else value for value in values]
            return f"has --{flag} {shown[1]} and {a.name} {shown[0]} in {a.stage}"
    return ""


def seed_studies(run: Run, models: Sequence[str]) -> list[str]:
    """Return the names in `seeds/` that stand for any of the `models`, sorted."""
    bases = {seed_of(model)[0] for model in models}
    return [name for name in run.models("seeds") if name in bases]


def _write(path: Path, schema: pa.Schema, blocks: Iterable[dict[str, Any]]) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks:
            n = max(len(value) for value in block.values() if not isinstance(value, str | int))
            columns = {
                name: pa.array([value] * n if isinstance(value, str | int) else value)
                for name, value in ((name, block[name]) for name in schema.names)
            }
            writer.write_table(pa.table(columns).cast(schema))


def _summary(record: dict[str, Any]) -> SeedsSummary:
    matches = (MatchSummary(**known_fields(MatchSummary, row)) for row in record["matches"])
    transfers = (
        TransferSummary(
            **known_fields(
                TransferSummary,
                {**row, **{name: _interval(row[name]) for name in ("transfer", "random")}},
            )
        )
        for row in record["transfers"]
    )
    return SeedsSummary(
        record["model"], tuple(record["seeds"]), record["tokens"], tuple(matches), tuple(transfers)
    )


def _interval(record: dict[str, Any] | None) -> Interval | None:
    return None if record is None else Interval(**known_fields(Interval, record))
