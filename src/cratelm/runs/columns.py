"""Parquet files of a run directory: their columns, with types and meanings.

A stage declares each Parquet file that it writes once, as a `TableFile`. The schema of the file and the
table in the documentation (docs/files.md) are both made from it.
"""

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa


@dataclass(frozen=True)
class FileColumn:
    """A column of a Parquet file."""

    name: str
    type: pa.DataType
    meaning: str
    """with unit and range, and when the value is null; Markdown, without a full stop"""
    optional: bool = False
    """True if the file has it only with an option that the meaning names"""


@dataclass(frozen=True)
class TableFile:
    """A Parquet file that a stage writes."""

    path: str
    """path in the run directory, with MODEL and SPLIT as placeholders"""
    columns: tuple[FileColumn, ...]

    @cached_property
    def schema(self) -> pa.Schema:
        """Return the Arrow schema of the file with all columns."""
        # The meanings are not written into the files as metadata: a reworded sentence would change the
        # hash of a file and with it the identity of the stage.
        return pa.schema([(column.name, column.type) for column in self.columns])

    @cached_property
    def least(self) -> pa.Schema:
        """Return the schema of the file without its optional columns."""
        return pa.schema([(c.name, c.type) for c in self.columns if not c.optional])


NEURON_COLUMNS = (
    FileColumn("model", pa.string(), "name of the model in the run"),
    FileColumn(
        "site", pa.string(), "where its neurons live; it ends in `:both` if they have both ends"
    ),
    FileColumn("layer", pa.int32(), "from 0"),
    FileColumn(
        "index",
        pa.int32(),
        "neuron in its layer, from 0; with both ends, 2 i is the end `i+` and 2 i + 1 the end `i-`",
    ),
)
"""the columns that identify a neuron, first in every file that has a row per neuron"""
