"""What a result is and what made it: hashes, versions, the commit of cratelm's own repository."""

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
_VERSIONED = ("cratelm", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


def hash_json(value: Any) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys.

    Every identity in a run is such a hash: another spelling of the JSON would make all runs stale.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """Return the sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python, of cratelm and of the libraries that matter for results."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def git_commit() -> str:
    """Return the commit of the source tree that runs; see `commit_of`.

    It is read once a process: the code that runs was loaded then, whatever is committed later.
    """
    return commit_of(
        Path(__file__).resolve().parents[1]
    )  # src/cratelm, two folders above this file


def commit_of(package: Path) -> str:
    """Return the commit of the repository whose `src/cratelm` is `package`, or an empty string.

    The commit ends in `+dirty` where a tracked file of the repository was changed, or the package
    has a file that is not tracked. A package that is installed, even inside somebody's repository,
    is in none of its own and has no commit.
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
    """Return what git prints; empty where it fails or is not installed.

    GIT_DIR and its like, which hooks set, would name another repository than that of the folder.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
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
    return done.stdout if done.returncode == 0 else ""
