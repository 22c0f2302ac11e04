"""Faults of the disk and of paths, said in one line that names the path and what is missing.

Full disk, quota, read-only mount, missing permission, name too long, loop of links, a file where a folder is
expected. `storage_error` recognises them in the exceptions of Python and of the libraries that write files
in C++ or Rust, which report the number of the system's error in their text only.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError, StorageError, in_one_line

NAME_RESERVE = len(".0123abcd..tmp")
"""bytes that `cratelm.runs.atomic` adds to a name while the file or folder is written"""
_IN_TEXT = re.compile(r"\[errno (\d+)\]|os error (\d+)", re.IGNORECASE)
_WRITE_FAILED = re.compile(
    # torch, libstdc++ below it, and SQLite; none gives a number
    r"PytorchStreamWriter failed|inline_container|iostream error|database or disk is full"
)
_NEARLY_FULL = 2**20
"""bytes: below this, a failed write without a number is taken for a full disk"""
_TEMPORARY = re.compile(
    r"\.[0-9a-f]{8}\.(?P<draft>.+)\.tmp|\.(?P<name>.+)\.(?P<kind>partial|new|old|lock)"
)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise `StorageError` in place of a fault of the disk or of a path while `path` is written."""
    try:
        yield
    except Exception as error:
        translated = storage_error(error, path)
        if translated is None:
            raise
        raise translated from error


def storage_error(error: Exception, written: Path | None = None) -> StorageError | None:
    """Return the error as one line for the user, or None if it is no fault of the disk or of a path.

    `written` is what was being written; without it the error is that of a path that could not be opened.
    """
    if isinstance(error, InputError):
        return None
    number = _number(error, written)
    if number is None or (written is not None and number == errno.ENOENT):
        return None
    path = _final_path(_path_in(error) or written)
    if path is None:
        return StorageError(number, f"a file cannot be opened or written: {os.strerror(number)}")
    in_written = written is not None and path.absolute().is_relative_to(written.absolute().parent)
    verb = "written" if in_written or number in _OF_WRITING else "opened"
    return StorageError(number, f"{_shown(path)} cannot be {verb}: {_reason(number, path)}")


def check_opens(path: Path) -> None:
    """Raise `StorageError` if `path`, which need not exist, has no valid name or lies where nothing can be."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        translated = storage_error(error)
        raise translated or error from None


def check_target(path: Path, option: str, kind: Literal["file", "folder"]) -> None:
    """Raise `StorageError` if `path` cannot be written as a file or folder; called before the work.

    `option` is the one that names the path. Nothing is written, so a full disk is not noticed.
    """
    number = 0
    try:
        if stat.S_ISDIR(os.stat(path).st_mode) and kind == "file":
            number = errno.EISDIR
    except FileNotFoundError:
        pass
    except OSError as error:
        number = error.errno or errno.EIO
    if not number:
        folder = _existing(
            Path(os.path.realpath(path)).parent
        )  # a draft is written next to the target
        if _long_name(path, folder):
            number = errno.ENAMETOOLONG
        elif not os.access(folder, os.W_OK | os.X_OK):
            number = errno.EROFS if _is_read_only(folder) else errno.EACCES
    if number:
        raise StorageError(
            number, f"{option} {_shown(path)} cannot be written: {_reason(number, path)}"
        )


# ---- recognising ----------------------------------------------------------------------------------


def _number(error: Exception, written: Path | None) -> int | None:
    """Return the system's error number of a fault that `_reason` explains, or None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _EXPLAINED else None
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # Path.resolve
        return errno.ELOOP
    if match := _IN_TEXT.search(text):
        number = int(match[1] or match[2])
        return number if number in _EXPLAINED else None
    if _WRITE_FAILED.search(text):
        free = None if written is None else _free(written)
        return errno.EIO if free is not None and free >= _NEARLY_FULL else errno.ENOSPC
    return None


def _path_in(error: Exception) -> Path | None:
    if isinstance(error, RuntimeError):
        name = str(error).partition("Symlink loop from ")[2].strip("'\"")
        return Path(name) if name else None
    # a rename has two names: the second is the one that the user knows
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None


def _final_path(path: Path | None) -> Path | None:
    """Return a path with the names of drafts and locks replaced by those of what is written."""
    if path is None:
        return None
    return Path(*(found[0] if (found := temporary_name(part)) else part for part in path.parts))


def temporary_name(name: str) -> tuple[str, str] | None:
    """Return which file or folder a name that `cratelm.runs.atomic` gives while writing stands for, and its kind.

    The kind is `tmp`, `partial`, `new`, `old` or `lock`. None for any other name.
    """
    match = _TEMPORARY.fullmatch(name)
    return None if match is None else (match["draft"] or match["name"], match["kind"] or "tmp")


# ---- explaining -----------------------------------------------------------------------------------


def _reason(number: int, path: Path) -> str:
    """Return what is wrong, as found on the disk now, and what to do."""
    above = _existing(path)
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full" if number == errno.ENOSPC else "the quota of this disk is used up"
        return (
            f"{what} ({_mount(above)} has {_free_words(above)} free, and more is needed): free some"
            " space, or name a folder on another disk, and type the same command again"
        )
    if number == errno.EROFS:
        return f"{_mount(above)} is mounted read-only: name a folder on a disk that can be written"
    if number in (errno.EACCES, errno.EPERM):
        return (
            f"permission denied ({_owner(above)}; this process runs as {_user(os.geteuid())}):"
            " change the permissions, or name another path"
        )
    if number == errno.ENAMETOOLONG:
        return f"{_long_name(path, above) or 'its name is too long'}: name a shorter one"
    if number == errno.ELOOP:
        link = next((p for p in (path, *path.parents) if os.path.islink(p)), path)
        target = f", which points to {_shown(os.readlink(link))}," if os.path.islink(link) else ""
        return f"the symbolic link {_shown(link)}{target} leads back to itself: remove or correct the link"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        if not above.is_dir():
            return f"{_shown(above)} is a file, not a folder: name another path"
        return f"{_shown(path)} is a folder, and a file is expected: name another path"
    return f"{_OTHER[number]}: {os.strerror(number)}"


_OTHER = {
    errno.EFBIG: "the file would be larger than this process may write (`ulimit -f` prints the limit)",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "this process has too many open files (`ulimit -n` prints the limit)",
    errno.ENFILE: "the system has too many open files",
    errno.ENOENT: "it does not exist",
    errno.ESTALE: "the network file system has lost it",
}
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_EXPLAINED = {
    *_OTHER,
    *_OF_WRITING,
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
}


def _shown(path: str | Path) -> str:
    """Return a path as part of one line: without control characters, its middle omitted if it is very long."""
    text = str(path)
    text = f"{text[:120]}...{text[-40:]}" if len(text) > 300 else text
    return in_one_line(text)


def _existing(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest folder or file above it that does."""
    for candidate in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            os.stat(candidate)
            return candidate
    return Path(path.anchor or ".")


def _mount(path: Path) -> Path:
    """Return the mount point of the disk that an existing path lies on."""
    real = Path(os.path.realpath(path))
    return next((p for p in (real, *real.parents) if os.path.ismount(p)), real)


def _free(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(_existing(path)).free
    return None


def _free_words(path: Path) -> str:
    free = _free(path)
    if free is None:
        return "an unknown number of bytes"
    return f"{free / 1e9:,.1f} GB" if free >= 1e9 else f"{free / 1e6:,.2f} MB"


def _owner(path: Path) -> str:
    """Return whose an existing path is and who may do what with it, such as `/x belongs to ann, drwxr-xr-x`."""
    status = os.stat(path)
    return f"{_shown(path)} belongs to {_user(status.st_uid)}, {stat.filemode(status.st_mode)}"


def _user(number: int) -> str:
    try:
        import pwd  # not on Windows

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"


def _long_name(path: Path, above: Path) -> str:
    """Return which name is longer than its folder allows, or that the whole path is; else an empty string."""
    folder = above if above.is_dir() else above.parent
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX") - NAME_RESERVE
        longest_path = os.pathconf(folder, "PC_PATH_MAX") - 1
    except (OSError, ValueError, AttributeError):
        return ""
    for part in path.parts:
        n_bytes = len(os.fsencode(part))
        if n_bytes > longest:
            name = _shown(part[:20])
            return f"the name {name}... has {n_bytes} bytes, and at most {longest} are possible"
    n_bytes = len(os.fsencode(path.absolute()))
    if n_bytes > longest_path:
        return f"the path has {n_bytes} bytes, and at most {longest_path} are possible"
    return ""


def _is_read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
