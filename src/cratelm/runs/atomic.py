"""The one way to write a folder or a file: a lock, a unique temporary name, fsync, rename.

A process that is killed at any moment leaves the old or the new result, never a mixture:

```
.XXXXXXXX.NAME.tmp   draft; XXXXXXXX is random, so that two writers never share one
.NAME.partial        draft of a folder that resumes after an interruption: its name is fixed
.NAME.new            complete and on disk: from now on the new folder counts
.NAME.old            the folder that it replaces
.NAME.lock           locked while NAME is written; its content says who writes it
```
The next writer of NAME, or the next reader that does not find it, moves `.NAME.new` into place or
restores `.NAME.old`. The next writer also removes leftover drafts; `interrupted` and `clear` do so for
paths that nobody may ever write again.

Faults of the disk and of paths are raised as `StorageError`, which says in one line what is missing.

Who holds a lock. The operating system releases the lock of a dead process, so on one machine (and in
its containers) a lock that can be acquired is free. A file system that is shared by several machines may
not propagate locks between them. There, a lock file of another machine counts as held until it has not
been touched for `EXPIRES` seconds; a living holder touches it every `HEARTBEAT` seconds.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.runs.storage import storage_errors, temporary_name

HEARTBEAT, EXPIRES = 30.0, 150.0
"""seconds; file attributes on NFS may be 60 s old, so 2 heartbeats in a row can go unnoticed"""
_FILE_WAIT = 10.0
"""seconds that the writer of a file waits for another writer; writing a file takes milliseconds"""
_RANKS_WAIT = 0.5
"""seconds that a process waits for another one that only looks whether a lock is free"""
_SWAP_WAIT = 1.0
"""seconds that a reader waits for a folder that is being moved into place"""
_held: dict[tuple[Path, int], int] = {}
"""number of times that a thread of this process holds the lock of a path, by path and thread"""


# ---- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of `path` (which need not exist); the thread that holds it may acquire it again.

    Raises `InputError`, which says who holds the lock, if it is not free within `wait` seconds, and
    `StorageError` if the disk or the path cannot be written, also by what is done while it is held.
    """
    with storage_errors(path):
        path = path.resolve()
        key = path, threading.get_ident()
        if key not in _held:
            with _parents(path), _acquired(path, key, wait):
                yield
            return
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Create the folders above `path`; afterwards, remove those of them that are empty."""
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder is not empty
            for folder in new:
                folder.rmdir()


@contextlib.contextmanager
def _acquired(path: Path, key: tuple[Path, int], wait: float) -> Iterator[None]:
    """Hold the lock file of `path`, in a folder that exists."""
    from filelock import FileLock, SoftFileLock, Timeout  # on first use: `--help` needs none

    file = _lock_file(path)
    file_lock = FileLock(file, timeout=wait, poll_interval=0.01, thread_local=False)
    try:
        file_lock.acquire()
    except Timeout:
        raise _refusal(path) from None
    # Without flock (some network file systems), filelock falls back to a file in its own format.
    is_flock = not isinstance(file_lock, SoftFileLock)
    stop = threading.Event()
    try:
        if is_flock:
            if _is_held_elsewhere(file):
                raise _refusal(path)
            _write_holder(file)
            if not wait:
                threading.Thread(target=_beat, args=(file, stop), daemon=True).start()
        _held[key] = 1
        try:
            yield
        finally:
            del _held[key]
            if is_flock:
                # Before the release: a waiting process sees that the file is unlinked, and creates a
                # new one.
                file.unlink(missing_ok=True)
    finally:
        stop.set()
        file_lock.release()


def check_unlocked(path: Path) -> None:
    """Raise `InputError`, which says who the writer is, if another process is writing `path`."""
    path = path.resolve()
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes of a command: rank 0 writes for all, and may have begun already
    if (path, threading.get_ident()) not in _held and _lock_file(path).exists():
        # raises, unless a dead process left the file; another command may look at it at the same moment
        with lock(path, wait=_RANKS_WAIT):
            pass


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _write_holder(file: Path) -> None:
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with contextlib.suppress(OSError):  # Windows does not allow writing to a locked file
        file.write_text(json.dumps(holder) + "\n", encoding="utf-8")


def _read_holder(file: Path) -> dict[str, Any]:
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(path: Path) -> InputError:
    holder = _read_holder(_lock_file(path))
    who = "another process"
    if holder:
        who = f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
    if_stopped = ""
    if holder.get("machine", _machine()) != _machine():
        if_stopped = (
            f" (if that machine has stopped, it can be written again after {EXPIRES:.0f} seconds)"
        )
    return InputError(
        f"{path} is being written by {who}: wait until that process has finished, or stop it, and"
        f" type the same command again{if_stopped}"
    )


def _is_held_elsewhere(file: Path) -> bool:
    """Return whether the file was written on another machine whose process still touches it."""
    machine = _read_holder(file).get("machine")
    if machine is None or machine == _machine():
        return False
    return time.time() - file.stat().st_mtime < EXPIRES


def _machine() -> str:
    """Return an id of the running kernel: all containers on it share the id and the kernel's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


# ---- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty draft that becomes the folder `path` if no error is raised.

    On an error the draft is removed and `path` stays as it was. Raises `InputError` if another process
    is writing `path`.
    """
    with storage_errors(Path(path)):
        path = Path(
            path
        ).resolve()  # so that `.` has a name, and the folder behind a link is replaced
    with lock(path):
        recover(path)
        remove_drafts(path)
        draft = new_draft(path)
        try:
            yield draft
            put_in_place(draft, path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def new_draft(path: Path) -> Path:
    """Create an empty folder next to `path`, under a unique name, and return it."""
    draft = _temporary(path)
    draft.mkdir(parents=True)
    return draft


def resumable_draft(path: Path) -> Path:
    """Return the path of the draft that resumes after an interruption.

    The name is fixed, so that it is found again; the lock of `path` limits it to one writer.
    """
    return path.with_name(f".{path.name}.partial")


def put_in_place(draft: Path, path: Path) -> None:
    """Make the folder `draft` the folder `path`, replacing any folder that is there.

    From the first rename on, the new folder counts: if the process is killed after it, `recover`
    completes the replacement. Two renames are needed because no system replaces a folder that is not
    empty. The working directory and the root of a mounted disk are emptied and filled instead of
    replaced: a shell would stay in the deleted folder, and a mount point cannot be renamed.
    """
    sync_folder(draft)
    if not path.exists():
        draft.rename(path)
        sync(path.parent)
        return
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    draft.rename(new)
    sync(path.parent)
    _swap(new, path)


def recover(path: Path) -> None:
    """Complete a `put_in_place` of `path` that was killed; the caller holds the lock of `path`."""
    new, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    if new.is_dir():
        _swap(new, path)
    elif old.is_dir() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_interrupted(path: Path) -> bool:
    """Return whether a `put_in_place` of `path` has begun and not ended."""
    return any(path.with_name(f".{path.name}.{kind}").is_dir() for kind in ("new", "old"))


def settle(path: Path) -> None:
    """Complete an interrupted `put_in_place` of `path`, if there is one and nobody is at work there."""
    path = path.resolve()
    if path.name and is_interrupted(path):  # the root of a file system has no name
        with contextlib.suppress(InputError, OSError), lock(path):
            recover(path)


def recover_missing(path: Path) -> None:
    """Restore, for a reader, a folder whose writer was killed while moving it into place.

    Waits briefly for an active writer. Does nothing if the folder cannot be written.
    """
    deadline = time.monotonic() + _SWAP_WAIT
    while is_interrupted(path) and not path.exists():
        try:
            with lock(path):
                recover(path)
        except OSError:
            return
        except InputError:  # another process is writing it
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def remove_drafts(path: Path, *, resumable: bool = True) -> None:
    """Remove drafts that killed writers of `path` left; the caller holds the lock of `path`.

    `resumable`: also remove the draft that could be resumed.
    """
    if not path.parent.is_dir():
        return
    name = re.escape(path.name)
    # the names that this version and version 0.1.0 give to drafts
    draft = re.compile(rf"\.[0-9a-f]{{8}}\.{name}\.tmp|\.{name}\.[0-9]+\.tmp")
    for entry in path.parent.iterdir():
        if draft.fullmatch(entry.name):
            _remove(entry)
    if resumable and os.path.lexists(resumable_draft(path)):
        # Renamed first: a draft that is removed in part must not be taken for one that can be resumed.
        _remove(resumable_draft(path).rename(_temporary(path)))


def remove_folder(path: Path) -> None:
    """Remove a folder, all of it or nothing; the caller holds its lock."""
    _remove(path.rename(_temporary(path)))


def remove_all_but(folder: Path, names: Collection[str]) -> None:
    """Remove everything directly in `folder` except what has one of the names."""
    for entry in folder.iterdir():
        if entry.name not in names:
            _remove(entry)


def interrupted(folder: Path, mark: str) -> list[Path]:
    """Return the paths in `folder` of which a killed writer may have left a draft, a lock or an old version.

    Those that another process is writing now are among them. `mark` is a file that every complete folder has:
    a folder that is only called `.NAME.old`, or a lock of another program, is none of ours.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = set()
    for left in names:
        name, kind = temporary_name(left) or ("", "")
        entry, target = folder / left, folder / name
        is_ours = kind == "tmp"
        if kind == "lock":
            is_ours = _is_our_lock(entry)
        elif kind in ("new", "old"):
            is_ours = any((f / mark).is_file() for f in (entry, target))
        if is_ours:
            found.add(target)
    return sorted(found)


def _is_our_lock(file: Path) -> bool:
    """Return whether a file is a lock of this module: empty until its holder has written who it is."""
    try:
        return not file.read_bytes() or "machine" in _read_holder(file)
    except OSError:
        return False


def clear(path: Path) -> None:
    """Complete or remove what killed writers of `path` left, except the draft that resumes.

    Raises `InputError` if another process is writing `path`, or if nothing can be written there.
    """
    with lock(path):  # which removes a lock file that was left
        recover(path)
        remove_drafts(path, resumable=False)


def clear_interrupted(folder: Path, mark: str) -> None:
    """Clear what killed writers left directly in a folder, where that is possible. `mark`: see `interrupted`."""
    for path in interrupted(folder, mark):
        with contextlib.suppress(InputError, OSError):
            clear(path)


def sync_folder(folder: Path) -> None:
    """Make the operating system write a folder and everything in it to disk."""
    from concurrent.futures import ThreadPoolExecutor  # on first use: `--help` needs none

    paths = [p for p in folder.rglob("*") if not p.is_symlink()]
    # In parallel, so that the file system groups them into few commits: 60 files took 0.15 to 0.3 s
    # one after another and 0.02 to 0.06 s together, on ext4 on a virtual disk.
    with ThreadPoolExecutor(min(16, len(paths) + 1)) as pool:
        list(pool.map(sync, paths))
    sync(folder)


def _swap(new: Path, path: Path) -> None:
    if path.is_dir() and (path == Path.cwd() or path.is_mount()):
        _fill(new, path)
        return
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(new: Path, path: Path) -> None:
    """Replace the content of the folder `path`; `new` stays whole until it is there, in case of a kill."""
    for entry in path.iterdir():
        _remove(entry)
    for entry in new.iterdir():
        if entry.is_dir():
            shutil.copytree(entry, path / entry.name, copy_function=_link)
        else:
            _link(entry, path / entry.name)
    sync_folder(path)
    _remove(new.rename(_temporary(path)))  # a part of it must not be taken for the new folder


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(4)}.{path.name}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Call fsync; do nothing if folders (Windows) or the file system do not support it.

    Raises `OSError` if the disk is full or fails: network file systems report that only now.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows, or one that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


_SYNC_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EPERM,
    errno.EROFS,
}


# ---- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a name next to `path`; the file written there becomes `path` if no error is raised.

    Writers of one file wait for each other. Use it for files that are written quickly: if a writer
    takes longer than 10 seconds, the others give up with an `InputError`.
    """
    with storage_errors(Path(path)):
        path = Path(path).resolve()
    # A draft has one writer, and is synced as a whole when it is moved into place. One that resumes must
    # also survive a failing machine, but no lock file in it may count as one of its files.
    kinds = {found[1] for part in path.parts if (found := temporary_name(part))}
    in_draft, has_lock = "tmp" in kinds, bool(kinds & {"tmp", "partial"})
    with contextlib.nullcontext() if has_lock else lock(path, wait=_FILE_WAIT):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(path, resumable=False)
        temporary = _temporary(path)
        try:
            yield temporary
            if not in_draft:
                sync(temporary)
            temporary.replace(path)
            if not in_draft:
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file: whenever the process is killed, the file is either the old or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON that every reader accepts, atomically.

    JSON has no NaN and no infinity: they become `null`, which means that there is no such number. Text
    that is not valid Unicode is written as `valid_text` returns it.
    """
    text = json.dumps(strict(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def valid_text(text: str) -> str:
    r"""Return `text` with each byte that is not UTF-8, as in some file names, written as `\xNN`.

    Python represents such a byte by a lone surrogate, which a UTF-8 file cannot hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # a surrogate that represents no byte
            return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


def strict(value: Any) -> Any:
    """Return a value as `write_json` writes it: NaN and infinity as None, all text valid Unicode."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {valid_text(k) if isinstance(k, str) else k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value
