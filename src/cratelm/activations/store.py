"""Harvested neurons on disk: two Parquet files per split, read lazily.

`summaries-SPLIT.parquet` has a row per neuron (fields of `NeuronSummary`), `excerpts-SPLIT.parquet` a
row per excerpt (fields of `Excerpt`, with model, site, layer and index of the neuron). Both are sorted by
layer and index, excerpts also by kind, bin and rank. The rows of a neuron are never split between row
groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.errors import InputError
from cratelm.records import (
    EXCERPT_KINDS,
    Excerpt,
    NeuronId,
    NeuronKey,
    NeuronRecord,
    NeuronSummary,
    Split,
)
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import read_rows, reading, verified

EXCERPTS = TableFile(
    "activations/MODEL/excerpts-SPLIT.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn(
            "kind",
            pa.dictionary(pa.int8(), pa.string()),
            "`top`, `random`, `openai_bin`, `anthropic_bin` or `out_of_context`",
        ),
        FileColumn("bin", pa.int8(), "bin it was drawn from, -1 if the kind has no bins"),
        FileColumn("rank", pa.int16(), "`top`: 0 is the strongest; others: order of drawing"),
        FileColumn(
            "peak", pa.int16(), "offset in the excerpt, in tokens, of the token it was chosen for"
        ),
        FileColumn("document", pa.int64(), "`ordinal` of its document"),
        FileColumn(
            "position", pa.int64(), "position of the token it was chosen for in the split, tokens"
        ),
        FileColumn("token_ids", pa.list_(pa.int32()), "n tokens"),
        FileColumn("activations", pa.list_(pa.float32()), "n raw activations"),
    ),
)
SUMMARIES = TableFile(
    "activations/MODEL/summaries-SPLIT.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("n_tokens", pa.int64(), "number of tokens searched"),
        FileColumn("mean", pa.float64(), "raw activation"),
        FileColumn("variance", pa.float64(), "population variance, raw activation squared"),
        FileColumn("skew", pa.float64(), "standardised third moment; NaN if the variance is 0"),
        FileColumn(
            "kurtosis",
            pa.float64(),
            "standardised fourth moment, 3 for a normal distribution; NaN if the variance is 0",
        ),
        FileColumn(
            "firing_rate",
            pa.float64(),
            "fraction of tokens with an activation above 0, or of at least `firing_threshold` if the file has it",
        ),
        FileColumn(
            "maximum",
            pa.float32(),
            "raw activation; 0 or less: the neuron is dead on the split, or this end of it is silent",
        ),
        FileColumn("histogram", pa.list_(pa.int64()), "64 counts of tokens over equal bins"),
        FileColumn(
            "histogram_low",
            pa.float32(),
            "lower edge of the first bin, raw activation; the bin also counts lower values",
        ),
        FileColumn(
            "histogram_high",
            pa.float32(),
            "upper edge of the last bin, raw activation; the bin also counts higher values",
        ),
        FileColumn(
            "openai_edges",
            pa.list_(pa.float32()),
            "6 raw activations at the quantiles 0, .5, .9, .99, .999, 1 of a pilot sample",
        ),
        FileColumn(
            "anthropic_edges",
            pa.list_(pa.float32()),
            "13 raw activations: edges of 12 equal bins of the pilot sample's range",
        ),
        FileColumn(
            "openai_counts",
            pa.list_(pa.int64()),
            "5 counts of tokens: of each bin between `openai_edges`, the outer ones with values beyond; null or missing"
            " if unknown (imported neurons, older harvests)",
        ),
        FileColumn(
            "firing_threshold",
            pa.float32(),
            "lowest raw activation that counts as firing, the largest power of two that is at most a tenth of `maximum`; only"
            " at sites whose silent neurons are not exactly 0",
            optional=True,
        ),
        FileColumn(
            "opposite_maximum",
            pa.float32(),
            "`maximum` of the other end of the same neuron; only with `--polarity both`",
            optional=True,
        ),
    ),
)


def summary_schema(*, with_firing: bool, with_ends: bool) -> pa.Schema:
    """Return the schema of summaries with or without each of the optional columns."""
    schema = SUMMARIES.schema
    for name, wanted in (("firing_threshold", with_firing), ("opposite_maximum", with_ends)):
        schema = schema if wanted else schema.remove(schema.get_field_index(name))
    return schema


_FEW_VALUES = [column.name for column in EXCERPTS.columns if column.name != "activations"]
"""columns with few different values, of which Parquet writes a dictionary first; for activations it would take half the
time of writing, and a third of the space, for nothing"""
SUMMARIES_PER_GROUP = 256
"""neurons in a row group of summaries, which takes 1 ms to read"""
NEURONS_PER_GROUP = 16
"""neurons in a row group of excerpts, which takes about 1 MB in memory and 10 ms to read"""


def excerpts_path(folder: str | Path, split: Split) -> Path:
    """Return the path of the excerpts of a split in a harvest's folder."""
    return Path(folder) / f"excerpts-{split}.parquet"


def summaries_path(folder: str | Path, split: Split) -> Path:
    """Return the path of the summaries of a split in a harvest's folder."""
    return Path(folder) / f"summaries-{split}.parquet"


def excerpt_writer(folder: str | Path, split: Split) -> pq.ParquetWriter:
    """Return an open writer of the excerpts of a split."""
    path = excerpts_path(folder, split)
    dictionaries = [f"{n}.list.element" if n == "token_ids" else n for n in _FEW_VALUES]
    return pq.ParquetWriter(
        path,
        EXCERPTS.schema,
        compression="zstd",
        use_dictionary=dictionaries,  # pyright: ignore[reportArgumentType] (its stubs know only bool)
    )


def write_records(folder: str | Path, split: Split, records: Sequence[NeuronRecord]) -> None:
    """Write records, which must be sorted by layer and index, as one row group per file."""
    with (
        pq.ParquetWriter(
            summaries_path(folder, split), _schema_of([r.summary for r in records])
        ) as summaries,
        pq.ParquetWriter(excerpts_path(folder, split), EXCERPTS.schema) as excerpts,
    ):
        summaries.write_table(_summary_table([r.summary for r in records]))
        excerpts.write_table(_excerpt_table(records))


@checked_arguments()
def read_summaries(
    folder: str | Path, split: Split, layers: Sequence[int] | None = None
) -> list[NeuronSummary]:
    """Return the summaries of all neurons of a harvest, or of those of `layers`, by layer and index."""
    wanted = None if layers is None else [("layer", "in", list(layers))]
    return read_rows(_existing(summaries_path(folder, split)), _summary, wanted)


@checked_arguments()
def read_records(
    folder: str | Path,
    split: Split,
    layers: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[NeuronRecord]:
    """Yield the neurons of a harvest with their excerpts, by layer and index; memory: one row group.

    `layers` and `indices` restrict the neurons; row groups without any of them are not read.
    """
    indices_wanted = None if indices is None else set(indices)
    wanted = {
        s.neuron.key: s
        for s in read_summaries(folder, split, layers)
        if indices_wanted is None or s.neuron.index in indices_wanted
    }
    excerpts = ExcerptFile(folder, split)
    for group in excerpts.groups(layers):
        keys = excerpts.keys_in(group, wanted)
        if keys:
            rows = excerpts.read_group(group)
            with reading(excerpts.path, "the columns that docs/files.md lists"):
                by_key = _by_neuron(_rows_of(rows, keys))
            for key in sorted(by_key):
                yield NeuronRecord(wanted.pop(key), by_key[key])
    for summary in wanted.values():
        yield NeuronRecord(summary, ())


class NeuronFile:
    """A Parquet file with columns `layer` and `index`, from which one neuron's rows can be read.

    The footer, with the bounds of each row group, is read once. The file is opened for each read, so that
    threads do not share a file position. Raises `InputError` if the file does not exist.
    """

    def __init__(self, path: str | Path):
        self.path = _existing(Path(path))
        with reading(self.path, "a Parquet file by neuron"), pq.ParquetFile(self.path) as file:
            self._metadata = file.metadata
            bounds = [_bounds(file, group) for group in range(file.num_row_groups)]
        self.n_groups = len(bounds)
        self._bounds = np.array(bounds, np.int64).reshape(-1, 4)

    def groups(self, layers: Sequence[int] | None = None) -> list[int]:
        """Return the row groups, or those that may have neurons of `layers` according to their bounds."""
        if layers is None:
            return list(range(self.n_groups))
        low, high = self._bounds[:, 0, None], self._bounds[:, 1, None]
        wanted = np.array(list(layers), np.int64)
        return np.flatnonzero(((low <= wanted) & (wanted <= high)).any(axis=1)).tolist()

    def keys_in(self, group: int, wanted: Iterable[NeuronKey]) -> set[NeuronKey]:
        """Return the wanted neurons that may be in a row group, according to its bounds."""
        layer_low, layer_high, index_low, index_high = self._bounds[group].tolist()
        return {
            key
            for key in wanted
            if layer_low <= key.layer <= layer_high and index_low <= key.index <= index_high
        }

    def read_group(
        self, group: int, columns: Sequence[str] | None = None, threads: bool = False
    ) -> pa.Table:
        """Return a row group, or some of its columns."""
        with (
            reading(self.path, "the row groups that its footer lists"),
            pq.ParquetFile(self.path, metadata=self._metadata) as file,
        ):
            return file.read_row_group(group, columns=columns, use_threads=threads)

    def rows(self, layer: int, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of one neuron; `columns` must include `layer` and `index`."""
        low, high = self._bounds[:, [0, 2]], self._bounds[:, [1, 3]]
        inside = ((low <= (layer, index)) & ((layer, index) <= high)).all(1)
        tables = [self.read_group(g, columns) for g in np.flatnonzero(inside).tolist()]
        if not tables:
            return pa.table({})
        return pa.concat_tables([_one_neuron(table, layer, index) for table in tables])


class ExcerptFile(NeuronFile):
    """Excerpts of a split, by neuron."""

    def __init__(self, folder: str | Path, split: Split):
        super().__init__(excerpts_path(folder, split))

    def of(self, layer: int, index: int) -> Sequence[Excerpt]:
        """Return the excerpts of one neuron; an empty sequence if the file has none."""
        return _by_neuron(self.rows(layer, index)).get(NeuronKey(layer, index), ())


def _one_neuron(table: pa.Table, layer: int, index: int) -> pa.Table:
    """Return the rows of one neuron, without copying them if they follow one another."""
    is_wanted = (table["layer"].to_numpy() == layer) & (table["index"].to_numpy() == index)
    rows = np.flatnonzero(is_wanted)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return table.slice(rows[0], len(rows))
    return table.filter(pa.array(is_wanted))


def _existing(path: Path) -> Path:
    if not verified(path).is_file():
        raise InputError(f"{path} does not exist: type `cratelm harvest` for this model first")
    return path


def _bounds(file: pq.ParquetFile, group: int) -> tuple[int, int, int, int]:
    """Return lowest and highest layer, lowest and highest index of the neurons in a row group."""
    row_group = file.metadata.row_group(group)
    bounds = []
    for number, name in ((2, "layer"), (3, "index")):
        column = row_group.column(number)
        statistics = column.statistics
        if column.path_in_schema != name or statistics is None:
            raise ValueError(f"it has no column {name} with statistics")
        bounds += [statistics.min, statistics.max]
    return tuple(bounds)  # type: ignore[return-value]


def _packed_keys(table: pa.Table) -> NDArray[np.int64]:
    """Return layer and index of each row as one integer [n], which sorts by layer and index."""
    return table["layer"].to_numpy().astype(np.int64) << 32 | table["index"].to_numpy()


def _rows_of(table: pa.Table, keys: set[NeuronKey]) -> pa.Table:
    """Return the rows of some neurons."""
    # Layer and index in one integer need one `isin` over the table; a filter on pairs would need two
    # columns and a join.
    wanted = np.isin(_packed_keys(table), [key.layer << 32 | key.index for key in keys])
    return table if wanted.all() else table.filter(pa.array(wanted))


def _by_neuron(table: pa.Table) -> dict[NeuronKey, ExcerptTable]:
    """Return excerpts by neuron, which are slices of the columns of all: no Python object per excerpt."""
    if not len(table):
        return {}
    packed = _packed_keys(table)
    if (np.diff(packed) < 0).any():  # not written by `harvest`, which sorts
        order = np.argsort(packed, kind="stable")
        table, packed = table.take(pa.array(order)), packed[order]
    columns = {name: _array(table[name]) for name in table.column_names}
    kinds = columns["kind"]
    if not isinstance(kinds, pa.DictionaryArray):
        kinds = kinds.dictionary_encode()
    codes, names = kinds.indices.to_numpy(), kinds.dictionary.to_pylist()
    bins, ranks, peaks, documents, positions = (
        columns[name].to_numpy() for name in ("bin", "rank", "peak", "document", "position")
    )
    ids, values = columns["token_ids"], columns["activations"]
    bounds = ids.offsets.to_numpy()
    flat_ids, flat_values = ids.values.to_numpy(), values.values.to_numpy()
    edges = np.flatnonzero(np.diff(packed, prepend=-1, append=-1)).tolist()
    by_key = {}
    for low, high in pairwise(edges):
        first, last = bounds[low], bounds[high]
        by_key[NeuronKey(int(packed[low] >> 32), int(packed[low] & 0xFFFF_FFFF))] = ExcerptTable(
            kinds=codes[low:high],
            kind_names=names,
            bins=bins[low:high],
            ranks=ranks[low:high],
            peaks=peaks[low:high],
            documents=documents[low:high],
            positions=positions[low:high],
            bounds=bounds[low : high + 1] - first,
            token_ids=flat_ids[first:last],
            activations=flat_values[first:last],
        )
    return by_key


def _array(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _summary(row: dict[str, Any]) -> NeuronSummary:
    neuron = NeuronId(row["model"], row["site"], row["layer"], row["index"])
    values = {f.name: row[f.name] for f in fields(NeuronSummary) if f.name in row}
    if values.get("openai_counts") is not None:
        values["openai_counts"] = np.array(row["openai_counts"], np.int64)
    values["histogram"] = np.array(row["histogram"], np.int64)
    for edges in ("openai_edges", "anthropic_edges"):
        values[edges] = np.array(row[edges], np.float32)
    for moment in ("skew", "kurtosis"):
        values[moment] = float("nan") if row[moment] is None else row[moment]
    return NeuronSummary(neuron=neuron, **values)


def _summary_table(summaries: Sequence[NeuronSummary]) -> pa.Table:
    rows = [
        {
            **{f.name: getattr(s, f.name) for f in fields(NeuronSummary) if f.name != "neuron"},
            **vars(s.neuron),
        }
        for s in summaries
    ]
    return pa.Table.from_pylist(rows, schema=_schema_of(summaries))


def _schema_of(summaries: Sequence[NeuronSummary]) -> pa.Schema:
    return summary_schema(
        with_firing=any(s.firing_threshold is not None for s in summaries),
        with_ends=any(s.opposite_maximum is not None for s in summaries),
    )


def _excerpt_table(records: Sequence[NeuronRecord]) -> pa.Table:
    order = {kind: number for number, kind in enumerate(EXCERPT_KINDS)}
    rows = [
        {**vars(record.neuron), **vars(excerpt)}
        for record in records
        for excerpt in sorted(record.excerpts, key=lambda e: (order[e.kind], e.bin, e.rank))
    ]
    return pa.Table.from_pylist(rows, schema=EXCERPTS.schema)
