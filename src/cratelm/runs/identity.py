"""Identity and provenance of results: hashes, versions, the commit of cratelm's own repository."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

# recorded with every stage for the reader; no identity depends on them
_VERSIONED = ("cratelm", "torch", "transformers", "tokenizers", "numpy", "numba", "pyarrow")


def hash_json(value: Any) -> str:
    """Return the sha256 of a JSON value; the order of its keys does not matter.

    Every identity in a run is such a hash: another spelling of the JSON would make all runs stale.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """Return the sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python, of cratelm and of the libraries that matter for results."""
    by_name = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            by_name[name] = metadata.version(name)
    return by_name


@functools.cache
def git_commit() -> str:
    """Return the commit of the running source tree; see `commit_of`.

    It is read once per process, because later commits do not change the code that was loaded.
    """
    return commit_of(
        Path(__file__).resolve().parents[1]
    )  # src/cratelm, two folders above this file


def commit_of(package: Path) -> str:
    """Return the commit of the repository whose `src/cratelm` is `package`, or an empty string.

    The commit ends in `+dirty` if a tracked file of the repository was changed, or if the package
    has a file that is not tracked. An installed package has no commit, even if it is installed inside
    another repository.
    """
    top = _git(package, "rev-parse", "--show-toplevel").strip()
    if not top or (Path(top) / "src" / "cratelm").resolve() != package.resolve():
        return ""
    if not _git(package, "ls-files", "--", "__init__.py").strip():
        return ""
    commit = _git(package, "rev-parse", "--verify", "--quiet", "HEAD").strip()
    changed = _git(Path(top), "status", "--porcelain", "--untracked-files=no")
    new = _git(package, "ls-files", "--others", "--exclude-standard")
    return f"{commit}+dirty" if commit and (changed or new) else commit


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints; an empty string if it fails or is not installed.

    GIT_DIR and similar variables, which hooks set, are removed: they would name another repository than
    the folder's.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
