"""Read the files of a run: damage is one line with the file's name and the command that makes it again.

Every reader checks the file against the hash in its stage's record (see `cratelm.runs.verified`), and turns what
its library raises for a damaged file into an `InputError`. Files that no stage wrote are read with the
second half of this alone.
"""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.errors import InputError, one_line
from cratelm.runs.stage import Run, Stage
from cratelm.runs.verified import first_problem, problem_of, stage_folder

_T = TypeVar("_T")
_DAMAGE = (
    pa.ArrowException,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    RecursionError,
    zlib.error,
)
"""what the libraries raise for a damaged file"""


def verified(path: str | Path) -> Path:
    """Return `path`, whose content is what its stage wrote, as far as a hash of it is recorded.

    Raises `InputError` if the content differs from the recorded hash, or if the file is recorded and missing.
    """
    path = Path(path)
    if problem := problem_of(path):
        raise damaged(path, problem)
    return path


def verify_folder(folder: str | Path) -> None:
    """Check every file of a finished stage as `verified` does; a folder without a record is not checked.

    Raises `InputError` for the first file that is missing or differs.
    """
    if found := first_problem(Path(folder)):
        raise damaged(*found)


def damaged(path: str | Path, what: str) -> InputError:
    """Return the error for a damaged file: what was found, and the command that makes it again."""
    stage = stage_of(path)
    if stage is not None:
        remedy = f"type `{stage.command()}` to make it again"
    else:
        remedy = "make it again, or restore it from a copy"
    return InputError(f"{path} is damaged ({what}): {remedy}")


def stage_of(path: str | Path) -> Stage | None:
    """Return the finished stage that a file belongs to, by its place; None for other files."""
    folder = stage_folder(Path(path))
    if folder is None:
        return None
    for run, label in (
        (folder.parent, folder.name),
        (folder.parent.parent, f"{folder.parent.name}/{folder.name}"),
    ):
        with contextlib.suppress(InputError):
            return Run(run).labelled(label)
    return None


@contextlib.contextmanager
def reading(path: str | Path, expected: str) -> Iterator[Path]:
    """Yield the verified `path`; errors of libraries inside become an `InputError` that says what was expected.

    A fault of the system, such as a missing permission, stays an `OSError`; so does a missing file about
    which nothing is recorded.
    """
    with decoding(path := verified(path), expected):
        yield path


@contextlib.contextmanager
def decoding(path: str | Path, expected: str) -> Iterator[None]:
    """Do what `reading` does for content of `path` that has been read: the file is not verified again."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # of the system, not of the content
            raise
        raise damaged(path, f"expected {expected}; {_reason(error)}") from None


def read_parquet(
    path: str | Path, columns: Sequence[str] | None = None, filters: Any = None
) -> pa.Table:
    """Return a Parquet file, or some of its columns and rows, as `pyarrow.parquet.read_table` does.

    Raises `InputError` if the file is damaged or lacks a column.
    """
    with reading(path, "a Parquet file") as sound:
        if columns is not None:
            missing = [c for c in columns if c not in pq.read_schema(sound).names]
            if missing:
                raise ValueError(f"it has no column {missing[0]}")
        return pq.read_table(sound, columns=columns, filters=filters)


def read_rows(
    path: str | Path, make: Callable[[dict[str, Any]], _T], filters: Any = None
) -> list[_T]:
    """Return what `make` makes of each row of a Parquet file.

    Raises `InputError` if the file is damaged, or has rows of which `make` can make nothing.
    """
    table = read_parquet(path, filters=filters)
    with reading(path, "the columns that docs/files.md lists"):
        return [make(row) for row in table.to_pylist()]


def read_json(path: str | Path, make: Callable[[dict[str, Any]], _T] = dict) -> _T:
    """Return what `make` makes of the JSON object in a file.

    Raises `InputError` if the file has other content, or an object of which `make` can make nothing.
    """
    with reading(path, "a JSON object") as sound:
        content = json.loads(sound.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"found {_kind(content)}")
    with reading(path, "the keys that docs/files.md lists"):
        return make(content)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one per line, without an unfinished last line.

    Raises `InputError` with the number of the first line that is not a JSON object.
    """
    with reading(path, "a JSON object per line") as sound:
        lines = sound.read_text(encoding="utf-8").split("\n")[:-1]
        objects = []
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except ValueError:
                raise ValueError(f"line {number} is not JSON") from None
            if not isinstance(value, dict):
                raise TypeError(f"line {number} is {_kind(value)}")
            objects.append(value)
        return objects


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else one_line(error, 120)
