"""Compare files of finished stages with the hashes in their records.

A stage's record holds the sha256 of every file that the stage wrote. `problem_of` compares a file with it:

- a file below `LARGE` bytes is hashed once per process, and again whenever its size, time or inode change;
- a larger file is hashed when its size or modification time differ from those noted in `.verified`, next to
  the record, by whoever hashed it last (at first the stage itself). So a token shard or a file of weights
  costs a `stat`. What changes bits without changing the time, such as a failing disk, is found by
  `cratelm check`, which hashes everything.

Files without a recorded hash (curves, evaluations that a later verb adds, folders from elsewhere) count as
sound.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cratelm.errors import InputError
from cratelm.runs.atomic import write_text
from cratelm.runs.identity import hash_file

RECORD = "completed.json"
LARGE = 2**28
"""bytes; hashing that much takes 0.8 s (benchmarks/verify.py)"""
VERIFIED = ".verified"
"""size and modification time of the large files of a stage when they were last hashed, as JSON"""
MISSING = "the file is missing"
CHANGED = "its content is not what its stage wrote"
_DEEPEST = 3
"""folders from a stage's folder down to its files, at most: sae/MODEL@NAME/layer-0/cfg.json"""


class _Stamp(NamedTuple):
    size: int
    mtime_ns: int
    inode: int


class _Recorded(NamedTuple):
    """Where a file belongs."""

    folder: Path
    """of its stage"""
    name: str
    """of the file in the folder, as in the record"""
    sha256: str


_checked: dict[Path, tuple[_Stamp, str]] = {}
"""stamp and recorded hash of each file that this process has found to be sound"""
_records: dict[Path, tuple[_Stamp, dict[str, str]]] = {}
"""hashes in each record that was read"""


def problem_of(path: Path) -> str:
    """Return what is wrong with a file according to its stage's record; an empty string if nothing is."""
    # twice: the stage may have been replaced between reading its record and its file
    return _problem_of(path) and _problem_of(path)


def first_problem(folder: Path) -> tuple[Path, str] | None:
    """Return the first file of a stage's folder that is missing or changed, and which of both."""
    for name in recorded_files(folder):
        path = folder / name
        if problem := problem_of(path):
            return path, problem
    return None


def stage_folder(path: Path) -> Path | None:
    """Return the folder with a record that a file is in; None if there is none."""
    parents = path.absolute().parents[: _DEEPEST + 1]
    return next((folder for folder in parents if (folder / RECORD).is_file()), None)


def recorded_files(folder: Path) -> dict[str, str]:
    """Return the hash of each file in the record of a folder, by name; none without a readable record.

    A record that cannot be read is reported by `Stage.completion`, which every verb calls first.
    """
    record = folder / RECORD
    stamp = _stamp(record)
    if stamp is None:
        return {}
    known = _records.get(record)
    if known is None or known[0] != stamp:
        try:
            value = json.loads(record.read_text(encoding="utf-8"))
            outputs = {str(name): str(sha256) for name, sha256 in value["outputs"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}
        known = _records[record] = stamp, outputs
    return known[1]


def note_large_files(folder: Path, names: Iterable[str]) -> None:
    """Write `.verified` of a folder whose files have just been hashed, if one of them is large."""
    stamps = {name: _stamp(folder / name) for name in names}
    large = {name: stamp[:2] for name, stamp in stamps.items() if stamp and stamp.size >= LARGE}
    if large:
        write_text(folder / VERIFIED, json.dumps(large) + "\n")


def forget() -> None:
    """Forget which files this process has found to be sound."""
    _checked.clear()


def hash_again(path: Path) -> str:
    """Return what is wrong with a file, by hashing it even if it is known to be sound."""
    _checked.pop(path.absolute(), None)
    recorded = _recorded(path)
    if recorded is not None and (noted := _read_notes(recorded.folder)).pop(recorded.name, None):
        with contextlib.suppress(OSError, InputError):
            write_text(recorded.folder / VERIFIED, json.dumps(noted) + "\n")
    return problem_of(path)


def _problem_of(path: Path) -> str:
    recorded, stamp = _recorded(path), _stamp(path)
    if recorded is None:
        return ""
    if stamp is None:
        return MISSING
    key, is_large = path.absolute(), stamp.size >= LARGE
    if _checked.get(key) == (stamp, recorded.sha256):
        return ""
    if not (is_large and _read_notes(recorded.folder).get(recorded.name) == list(stamp[:2])):
        if hash_file(path) != recorded.sha256:
            return CHANGED
        if is_large:
            _note(recorded, stamp)
    _checked[key] = stamp, recorded.sha256
    return ""


def _recorded(path: Path) -> _Recorded | None:
    """Return the recorded hash of a file; None if no record mentions it."""
    path = path.absolute()
    folder = stage_folder(path)
    if folder is None:
        return None
    name = path.relative_to(folder).as_posix()
    sha256 = recorded_files(folder).get(name)
    return None if sha256 is None else _Recorded(folder, name, sha256)


def _read_notes(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        noted = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
        return noted if isinstance(noted, dict) else {}
    return {}


def _note(recorded: _Recorded, stamp: _Stamp) -> None:
    """Note a large file that was hashed, so that other processes need not; does nothing on a read-only disk."""
    noted = {**_read_notes(recorded.folder), recorded.name: stamp[:2]}
    with contextlib.suppress(OSError, InputError):
        write_text(recorded.folder / VERIFIED, json.dumps(noted) + "\n")


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Stamp(found.st_size, found.st_mtime_ns, found.st_ino)
