"""The folders that imports and exports write: complete or absent, and never over what others wrote."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.runs import atomic_folder, versions, write_json

PROVENANCE = "cratelm.json"
"""mark of a folder with a model or an autoencoder: what it was made of"""
EXPORT_MARK = ".cratelm-export"
"""mark of exported records: no .json, because `import records` would take it for one"""


def check_out(
    out: Path, sources: tuple[Path, ...] = (), *, force: bool, mark: str = PROVENANCE
) -> None:
    """Check that `out` can be written: called before the work, so that nobody works in vain.

    Raises `InputError` where `out` is a file, is not empty and lacks the `mark` of an earlier import or
    export, has it and `force` is not given, or where it holds one of `sources`, which replacing it
    would remove, or lies in one.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, a folder was expected: name another")
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {out} holds {source}, which is read: name another folder")
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--out {out} lies in {source}, which is read: name another folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / mark).is_file():
            raise InputError(
                f"--out {out} is not empty and was not written by an import or export:"
                " name another folder"
            )
        if not force:
            raise InputError(
                f"--out {out} was written before: add --force to replace it, or name another folder"
            )


@contextlib.contextmanager
def out_folder(out: Path, content: Mapping[str, Any], *, mark: str = PROVENANCE) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` if no error is raised.

    `content` and the versions of the packages are written into its `mark`. Raises `InputError` where
    another process writes `out`.
    """
    with atomic_folder(out) as draft:
        yield draft
        write_json(draft / mark, {**content, "versions": versions()})
