"""The file that an import reads: a local one, or one fetched from the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError

_HUB = re.compile(
    r"(?P<hub>hub:)?(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+))?"
)
_SECONDS = 20
"""seconds that the Hub may take to answer; without a limit its client waits for ever"""
FORMS = "a local path, or hub:OWNER/REPO[@REVISION][/FILE]"


@dataclass(frozen=True)
class SourceFile:
    """A file on this machine, and how a model card names it."""

    path: Path
    name: str
    """file name, or `hub:OWNER/REPO/FILE`; no path of this machine"""
    revision: str = ""
    """commit of the Hub's repository, empty for a local file"""

    def beside(self, name: str) -> Path | None:
        """Return the file `name` of the same folder, local or on the Hub; None where there is none."""
        if not self.revision:
            path = self.path.with_name(name)
            return path if path.is_file() else None
        repository, _, file = _parts(self.name)
        folder, slash, _ = (file or "").rpartition("/")
        found = _listed(repository, self.revision)
        wanted = f"{folder}{slash}{name}"
        return _fetched(repository, self.revision, wanted).path if wanted in found else None


def locate(reference: str, suffix: str = ".pt") -> SourceFile:
    """Return the file that `reference` names, fetched from the Hub if it is one of the Hub.

    `OWNER/REPO` and `OWNER/REPO/FILE` are of the Hub if no local file has that name. Without FILE it is
    the repository's only file that ends in `suffix`. Raises `InputError`
    where nothing is found, or several, or the Hub cannot be reached.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return SourceFile(path, path.name)
    match = _HUB.fullmatch(reference)
    only_local = match is None or (not match["hub"] and _looks_local(reference, suffix))
    if only_local or path.exists():
        raise InputError(f"{reference} is not a file: name {FORMS}")
    repository, revision, file = _parts(reference)
    if file is None:
        file = _only(repository, revision, suffix)
    return _fetched(repository, revision, file)


def _looks_local(reference: str, suffix: str) -> bool:
    """A path in a folder that is here, or of a file where a repository's name would stand."""
    first, _, rest = reference.partition("/")
    return (
        first in (".", "..") or Path(first).is_dir() or ("/" not in rest and rest.endswith(suffix))
    )


def _parts(reference: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and file of a reference to the Hub."""
    match = _HUB.fullmatch(reference)
    assert match is not None
    return match["repository"], match["revision"], match["file"]


def _only(repository: str, revision: str | None, suffix: str) -> str:
    found = [name for name in _listed(repository, revision) if name.endswith(suffix)]
    if len(found) != 1:
        named = ", ".join(found[:12]) + (" ..." if len(found) > 12 else "")
        has = f"{len(found)} files {suffix} ({named})" if found else f"no file {suffix}"
        raise InputError(f"hub:{repository} has {has}: name one as hub:{repository}/FILE")
    return found[0]


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
    """Return the commit of a file in the Hub's cache, which lies in `.../snapshots/COMMIT/`."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1]


def _unreached(what: str, revision: str | None, error: Exception) -> InputError:
    at = f"@{revision}" if revision else ""
    message = " ".join(str(error).split())
    message = message if len(message) <= 160 else f"{message[:159]}…"
    return InputError(
        f"hub:{what}{at} cannot be fetched ({type(error).__name__}: {message}): check the name and the"
        " network, or name a local file"
    )
