"""Scores of many neurons by columns: a sequence of `NeuronScore` whose items are made when they are read.

A score takes about 60 bytes as columns, and 0.7 kB as an object. Columns have the names of the
fields of `NeuronId`, `NeuronScore` and `Score`; words are dictionary-encoded. A table may lack columns:
a missing field has the default of its record.

Shapes: n scores.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from operator import attrgetter
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cratelm.records import NeuronId, NeuronKey, NeuronScore, Score, Status

_PATHS = {
    **{f.name: f"neuron.{f.name}" for f in fields(NeuronId)},
    **{f.name: f.name for f in fields(NeuronScore) if f.name not in ("neuron", "score")},
    **{f.name: f"score.{f.name}" for f in fields(Score)},
}
"""attribute of a `NeuronScore` for each column"""
_DEFAULTS = {f.name: f.default for kind in (NeuronScore, Score) for f in fields(kind)}
_WORDS = pa.dictionary(pa.int32(), pa.string())
_ITEMS = 4096
"""scores made at a time when a table is iterated"""
_PLAIN: dict[Any, pa.DataType] = {
    int: pa.int64(),
    float | None: pa.float64(),
    tuple[int, ...]: pa.list_(pa.int64()),
}
_SCHEMA = pa.schema(
    [
        (f.name, _PLAIN.get(f.type, _WORDS))
        for kind in (NeuronId, NeuronScore, Score)
        for f in fields(kind)
        if f.name in _PATHS
    ]
)
"""all columns; those of types that are not in `_PLAIN` hold words"""


def score_columns(scores: Iterable[NeuronScore], schema: pa.Schema) -> pa.Table:
    """Return scores as a table with the columns of `schema`, in the order given."""
    values = map(attrgetter(*(_PATHS[name] for name in schema.names)), scores)
    columns = list(zip(*values, strict=True)) or [()] * len(schema.names)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


class ScoreTable(Sequence[NeuronScore]):
    """Scores as columns. Behaves as a sequence of `NeuronScore`; `select` and `numbers` make no objects."""

    def __init__(self, table: pa.Table):
        """`table` has columns with the names of the records' fields; words may be plain strings."""
        for number, field in enumerate(table.schema):
            if pa.types.is_string(field.type):
                words = table.column(number).dictionary_encode()
                table = table.set_column(number, field.name, words)
        self._table = table.unify_dictionaries().combine_chunks()

    @classmethod
    def of(cls, scores: Iterable[NeuronScore]) -> "ScoreTable":
        """Return the scores as a table; a table is returned as it is."""
        return scores if isinstance(scores, cls) else cls(score_columns(scores, _SCHEMA))

    @classmethod
    def concatenated(cls, tables: Sequence["ScoreTable"]) -> "ScoreTable":
        """Return the scores of several tables, in order."""
        if not tables:
            return cls.of([])
        # permissive: layers are 32 bits wide in files, and 64 in tables of objects
        return cls(pa.concat_tables([t._table for t in tables], promote_options="permissive"))

    # ---- a sequence of scores ---------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[NeuronScore]:
        for start in range(0, len(self), _ITEMS):
            yield from map(_score, self._table.slice(start, _ITEMS).to_pylist())

    @overload
    def __getitem__(self, at: int) -> NeuronScore: ...
    @overload
    def __getitem__(self, at: slice) -> "ScoreTable": ...
    def __getitem__(self, at: int | slice) -> "NeuronScore | ScoreTable":
        rows = range(len(self))[at]
        if isinstance(rows, range):
            return self.taken(np.array(rows, np.int64))
        return _score(self._table.slice(rows, 1).to_pylist()[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  (as for a list)

    def __repr__(self) -> str:
        return f"ScoreTable of {len(self):,} scores"

    # ---- columns ----------------------------------------------------------------------------------

    def numbers(self, name: str) -> NDArray[Any]:
        """Return a column of numbers [n]; NaN where a score has none."""
        return self._column(name).to_numpy(zero_copy_only=False)

    def has(self, name: str) -> NDArray[np.bool_]:
        """Return [n] whether the column has a number."""
        return self._column(name).is_valid().to_numpy(zero_copy_only=False)

    def words(self, name: str) -> tuple[NDArray[np.int64], list[str]]:
        """Return a column of words as [n] positions in a list of distinct words, and the list."""
        column = self._column(name)
        return column.indices.to_numpy().astype(np.int64), column.dictionary.to_pylist()

    def places(self) -> NDArray[np.int64]:
        """Return layer and index of each neuron as one integer [n], which sorts by layer and index."""
        return _packed(self.numbers("layer"), self.numbers("index"))

    def neurons(self) -> frozenset[NeuronKey]:
        """Return the neurons that have a score, or a reason for having none."""
        places = np.unique(self.places())
        layers, indices = (places >> 32).tolist(), (places & 0xFFFF_FFFF).tolist()
        return frozenset(map(NeuronKey, layers, indices))

    # ---- parts ------------------------------------------------------------------------------------

    def where(self, mask: NDArray[np.bool_]) -> "ScoreTable":
        """Return the scores at which `mask` [n] is True."""
        return self.taken(np.flatnonzero(mask))

    def select(self, **wanted: str | int) -> "ScoreTable":
        """Return the scores with these values, such as `explainer="trie", control="none", layer=2`."""
        mask = np.ones(len(self), bool)
        for name, value in wanted.items():
            if isinstance(value, str):
                codes, words = self.words(name)
                mask &= codes == (words.index(value) if value in words else -1)
            else:
                mask &= self.numbers(name) == value
        return self.where(mask)

    def of_neurons(self, neurons: Collection[NeuronKey]) -> "ScoreTable":
        """Return the scores of these neurons."""
        wanted = np.array(sorted(neurons), np.int64).reshape(-1, 2)
        return self.where(np.isin(self.places(), _packed(wanted[:, 0], wanted[:, 1])))

    def groups(self, *names: str) -> dict[tuple[str, ...], "ScoreTable"]:
        """Return the scores by the values of some columns of words, in the order of their first score."""
        keys, which = self._grouped(names)
        return {key: self.where(which == number) for number, key in enumerate(keys)}

    def counts(self, *names: str) -> dict[tuple[str, ...], int]:
        """Return the number of scores by the values of some columns of words."""
        keys, which = self._grouped(names)
        return dict(zip(keys, np.bincount(which, minlength=len(keys)).tolist(), strict=True))

    def _grouped(self, names: Sequence[str]) -> tuple[list[tuple[str, ...]], NDArray[np.int64]]:
        """Return the distinct values in the order of their first score, and [n] which each score has."""
        columns = [self.words(name) for name in names]
        packed = np.zeros(len(self), np.int64)
        for codes, words in columns:
            packed = packed * len(words) + codes
        _, first, which = np.unique(packed, return_index=True, return_inverse=True)
        order = np.argsort(first)
        keys = [tuple(words[codes[row]] for codes, words in columns) for row in first[order]]
        return keys, np.argsort(order)[which]

    def replaced(self, name: str, words: pa.Array) -> "ScoreTable":
        """Return a copy with another column of words [n]."""
        at = self._table.schema.get_field_index(name)
        if at < 0:
            return ScoreTable(self._table.append_column(name, words))
        return ScoreTable(self._table.set_column(at, name, words))

    def labelled(self, suffix: str) -> "ScoreTable":
        """Return a copy with `suffix` appended to the labels of the explainers."""
        column = self._column("explainer")
        labels = pa.array([word + suffix for word in column.dictionary.to_pylist()], pa.string())
        return self.replaced("explainer", pa.DictionaryArray.from_arrays(column.indices, labels))

    def relabelled(self, label: str) -> "ScoreTable":
        """Return a copy with one label for all explainers."""
        return self.replaced("explainer", pa.array([label] * len(self), pa.string()))

    def taken(self, rows: NDArray[np.int64]) -> "ScoreTable":
        """Return the scores in these rows, in this order."""
        return ScoreTable(self._table.take(pa.array(rows)))

    def _column(self, name: str) -> Any:
        if name in self._table.column_names:
            column = self._table[name]
            return column.chunk(0) if column.num_chunks else column.combine_chunks()
        default = _DEFAULTS.get(name, MISSING)
        if default is MISSING:
            raise KeyError(name)
        kind = _SCHEMA.field(name).type
        values = pa.array([default], kind.value_type if kind == _WORDS else kind)
        column = values.take(pa.array(np.zeros(len(self), np.int64)))
        return column.dictionary_encode() if kind == _WORDS else column


def _packed(layers: NDArray[Any], indices: NDArray[Any]) -> NDArray[np.int64]:
    return layers.astype(np.int64) << 32 | indices.astype(np.int64)


def _score(row: dict[str, Any]) -> NeuronScore:
    """Return the score in a row; fields without a column have their default."""
    neuron = NeuronId(*(row.pop(f.name) for f in fields(NeuronId)))
    parts = {f.name: row.pop(f.name) for f in fields(Score) if f.name in row}
    parts["status"] = Status(parts["status"])
    row["documents"] = tuple(row.get("documents") or ())
    return NeuronScore(neuron=neuron, score=Score(**parts), **row)
