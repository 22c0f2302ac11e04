"""Write the folder of an import or export atomically; never overwrite a folder that cratelm did not write."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.runs import atomic_folder, versions, write_json
from cratelm.runs.atomic import settle
from cratelm.runs.storage import check_target

PROVENANCE = "cratelm.json"
"""mark of a folder with a model or an autoencoder, which records its provenance"""
EXPORT_MARK = ".cratelm-export"
"""mark of exported records; not a .json file, because `import records` would read it as a record"""


def check_out(
    out: Path, sources: tuple[Path, ...] = (), *, force: bool, mark: str = PROVENANCE
) -> None:
    """Check that `out` can be written. Called before the work, so that no work is wasted.

    Raises `InputError` if `out` is a file; if it contains one of `sources` (which replacing it would remove) or
    is inside one of them; if it is not empty and lacks the `mark` of an earlier import or export; or if it has
    the `mark` and `force` is false. Raises `StorageError` if the path cannot be written.
    """
    check_target(out, "--out", "folder")
    settle(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, not a folder: name another folder")
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {out} contains the input {source}: name another folder")
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--out {out} is inside the input {source}: name another folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / mark).is_file():
            raise InputError(
                f"--out {out} is not empty and was not written by an import or export:"
                " name another folder"
            )
        if not force:
            raise InputError(
                f"--out {out} already exists: add --force to replace it, or name another folder"
            )


@contextlib.contextmanager
def out_folder(out: Path, content: Mapping[str, Any], *, mark: str = PROVENANCE) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` if no error is raised.

    Its `mark` file holds `content` and the versions of the packages. Raises `InputError` if another process is
    writing `out`.
    """
    with atomic_folder(out) as draft:
        yield draft
        write_json(draft / mark, {**content, "versions": versions()})
