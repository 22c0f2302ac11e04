"""Locate the file that an import reads: a local file, or a file fetched from the Hugging Face Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError, one_line

_HUB = re.compile(
    r"(?P<hub>hub:)?(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+))?"
)
_SECONDS = 20
"""timeout of requests to the Hub in seconds; without a timeout its client waits forever"""
FORMS = "a local path, or hub:OWNER/REPO[@REVISION][/FILE]"


@dataclass(frozen=True)
class SourceFile:
    """A file on this machine, with its name in model cards."""

    path: Path
    name: str
    """file name, or `hub:OWNER/REPO/FILE`; never a path of this machine"""
    revision: str = ""
    """commit of the Hub repository; empty for a local file"""

    def beside(self, name: str) -> Path | None:
        """Return the file `name` in the same folder, local or on the Hub; None if it does not exist."""
        if not self.revision:
            path = self.path.with_name(name)
            return path if path.is_file() else None
        repository, _, file = _parts(self.name)
        folder, slash, _ = (file or "").rpartition("/")
        files = _listed(repository, self.revision)
        wanted = f"{folder}{slash}{name}"
        return _fetched(repository, self.revision, wanted).path if wanted in files else None


def locate(reference: str, suffix: str = ".pt") -> SourceFile:
    """Return the file that `reference` names, fetching it if it is on the Hub.

    `OWNER/REPO` and `OWNER/REPO/FILE` refer to the Hub if there is no local file of that name. Without FILE, the
    file is the only one in the repository that ends in `suffix`. Raises `InputError` if there is no such file or
    more than one, or if the Hub cannot be reached.
    """
    path = Path(os.path.expanduser(reference))
    if os.path.isfile(path):  # os.path, because Path raises if a name is too long
        return SourceFile(path, path.name)
    match = _HUB.fullmatch(reference)
    only_local = match is None or (not match["hub"] and _looks_local(reference, suffix))
    if only_local or os.path.exists(path):
        raise InputError(f"{reference} is not a file: name {FORMS}")
    repository, revision, file = _parts(reference)
    if file is None:
        file = _only(repository, revision, suffix)
    return _fetched(repository, revision, file)


def _looks_local(reference: str, suffix: str) -> bool:
    """Return whether a reference is a path in an existing folder, or has a file name instead of a repository name."""
    first, _, rest = reference.partition("/")
    return (
        first in (".", "..") or os.path.isdir(first) or ("/" not in rest and rest.endswith(suffix))
    )


def _parts(reference: str) -> tuple[str, str | None, str | None]:
    """Return repository, revision and file of a reference to the Hub."""
    match = _HUB.fullmatch(reference)
    assert match is not None
    return match["repository"], match["revision"], match["file"]


def _only(repository: str, revision: str | None, suffix: str) -> str:
    files = [name for name in _listed(repository, revision) if name.endswith(suffix)]
    if len(files) != 1:
        names = ", ".join(files[:12]) + (" ..." if len(files) > 12 else "")
        has = f"{len(files)} {suffix} files ({names})" if files else f"no {suffix} file"
        raise InputError(f"hub:{repository} has {has}: name a file as hub:{repository}/FILE")
    return files[0]


def _listed(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
    except Exception as error:  # network libraries share no base exception
        raise _unreached(repository, revision, error) from None
    return sorted(file.rfilename for file in info.siblings or [])


def _fetched(repository: str, revision: str | None, file: str) -> SourceFile:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # as above
        raise _unreached(f"{repository}/{file}", revision, error) from None
    return SourceFile(path, f"hub:{repository}/{file}", hub_commit_of(path))


def hub_commit_of(path: Path) -> str:
    """Return the commit of a file in the Hub's cache, whose path contains `snapshots/COMMIT/`."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1]


def _unreached(name: str, revision: str | None, error: Exception) -> InputError:
    at = f"@{revision}" if revision else ""
    message = one_line(error, 160)
    return InputError(
        f"hub:{name}{at} cannot be fetched ({type(error).__name__}: {message}): check the name and the"
        " network, or name a local file"
    )
