"""The one way to write a folder or a file: a lock, a unique temporary name, fsync, rename.

A process that is killed at any moment leaves the old or the new result, never a mixture:

```
.XXXXXXXX.NAME.tmp   draft, XXXXXXXX drawn at random: two writers never share one
.NAME.partial        draft of a folder that an interrupted writer resumes: its name is fixed
.NAME.new            whole and on disk: from here on the new folder stands
.NAME.old            the folder that it replaces
.NAME.lock           locked while NAME is written; holds who writes it
```
The next writer of NAME, or the next reader that misses it, puts `.NAME.new` in its place, or brings
`.NAME.old` back; drafts that are left are removed by the next writer.

Who holds a lock. The operating system releases the lock of a dead process, so on one machine (and in
its containers) a lock that can be taken is free. A file system that is shared by several machines may
not pass locks on between them. There, a lock file of another machine counts as held until it has not
been touched for `EXPIRES` seconds; a living holder touches it every `HEARTBEAT` seconds.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cratelm.errors import InputError

HEARTBEAT, EXPIRES = 30.0, 150.0
"""seconds; attributes of files on NFS may be 60 s old, so that 2 heartbeats in a row can go unseen"""
_FILE_WAIT = 10.0
"""seconds that the writer of a file waits for another one; a file is written in milliseconds"""
_SWAP_WAIT = 1.0
"""seconds that a reader waits for a folder that is just being put in place"""
_DRAFT = re.compile(r"\.[0-9a-f]{8}\..+\.tmp")
_held: dict[tuple[Path, int], int] = {}
"""locks of this process, by path and thread: how many times over"""


# ---- locks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of `path` (which need not exist); the thread that holds it may take it again.

    Raises `InputError`, saying who holds it, where it is not free within `wait` seconds.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # on first use: `--help` needs none

    path = path.resolve()
    key = path, threading.get_ident()
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock_file(path)
    held = FileLock(file, timeout=wait, poll_interval=0.01, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise _refusal(path) from None
    # Without flock (some network file systems), filelock falls back to a file of its own format.
    ours = not isinstance(held, SoftFileLock)
    stop = threading.Event()
    try:
        if ours:
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
            if ours:
                # Before it is released: whoever waits sees that the file has no name any more, and
                # makes a new one.
                file.unlink(missing_ok=True)
    finally:
        stop.set()
        held.release()


def check_unlocked(path: Path) -> None:
    """Raise `InputError`, saying who, where another process writes `path` now."""
    path = path.resolve()
    if (path, threading.get_ident()) not in _held and _lock_file(path).exists():
        with lock(path):  # a dead process left it, or this raises
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
    with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
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
    later = ""
    if holder.get("machine", _machine()) != _machine():
        later = (
            f" (if that machine has stopped, it can be written again after {EXPIRES:.0f} seconds)"
        )
    return InputError(
        f"{path} is being written by {who}: wait until that process has finished, or stop it, and"
        f" type the same command again{later}"
    )


def _is_held_elsewhere(file: Path) -> bool:
    """True where the file was written on another machine whose process still touches it."""
    machine = _read_holder(file).get("machine")
    if machine is None or machine == _machine():
        return False
    return time.time() - file.stat().st_mtime < EXPIRES


def _machine() -> str:
    """One kernel since its start: all containers on it share it, and the locks it keeps."""
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
    """Yield an empty draft that becomes the folder `path` where no error is raised.

    On an error the draft is removed and `path` stays as it was. Raises `InputError` where another
    process writes `path`.
    """
    path = Path(path).resolve()  # so that `.` has a name, and a link's own folder is replaced
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
    """Make an empty folder next to `path`, under a name that nobody else has."""
    draft = _temporary(path)
    draft.mkdir(parents=True)
    return draft


def resumable_draft(path: Path) -> Path:
    """Return the name of the draft that is resumed after an interruption.

    Fixed, so that it is found again; the lock of `path` keeps it to one writer.
    """
    return path.with_name(f".{path.name}.partial")


def put_in_place(draft: Path, path: Path) -> None:
    """Make the folder `draft` the folder `path`, replacing one that is there.

    From the first rename on the new folder stands: whatever kills the process then, `recover` ends
    what was begun. Two renames are needed because no system replaces a folder that is not empty. The
    working directory and the root of a mounted disk are emptied and filled, not replaced: a shell
    would stay in the folder that is gone, and a mounted one cannot be renamed.
    """
    sync_folder(draft)
    if path.is_dir() and (path == Path.cwd() or path.is_mount()):
        _fill(draft, path)
        return
    if not path.exists():
        draft.rename(path)
        _sync(path.parent)
        return
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    draft.rename(new)
    _sync(path.parent)
    _swap(new, path)


def recover(path: Path) -> None:
    """End what a killed `put_in_place` of `path` had begun; the caller holds the lock of `path`."""
    new, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    if new.is_dir():
        _swap(new, path)
    elif old.is_dir() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_interrupted(path: Path) -> bool:
    """True where a `put_in_place` of `path` was begun and has not ended."""
    return any(path.with_name(f".{path.name}.{kind}").is_dir() for kind in ("new", "old"))


def recover_missing(path: Path) -> None:
    """For readers: bring back a folder whose writer was killed while it was put in place.

    A writer at work is given a moment. Nothing is done where the folder cannot be written.
    """
    deadline = time.monotonic() + _SWAP_WAIT
    while is_interrupted(path) and not path.exists():
        try:
            with lock(path):
                recover(path)
        except InputError:  # somebody is at it
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        except OSError:
            return


def remove_drafts(path: Path, *, resumable: bool = True) -> None:
    """Remove what killed writers of `path` left; the caller holds the lock of `path`.

    `resumable`: the draft that could be resumed, too.
    """
    if not path.parent.is_dir():
        return
    name = re.escape(path.name)
    left = re.compile(
        rf"\.[0-9a-f]{{8}}\.{name}\.tmp|\.{name}\.[0-9]+\.tmp"
    )  # ours, version 0.1.0's
    for found in path.parent.iterdir():
        if left.fullmatch(found.name):
            _remove(found)
    if resumable:
        _remove(resumable_draft(path))


def sync_folder(folder: Path) -> None:
    """Have the operating system write a folder with all that is in it to the disk."""
    found = [p for p in folder.rglob("*") if not p.is_symlink()]
    # At once, so that the file system writes them in few commits: 60 files took 0.15 to 0.3 s one
    # after another and 0.02 to 0.06 s together, on ext4 on a virtual disk.
    with ThreadPoolExecutor(min(16, len(found) + 1)) as pool:
        list(pool.map(_sync, found))
    _sync(folder)


def _swap(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(draft: Path, path: Path) -> None:
    for old in path.iterdir():
        _remove(old)
    for new in draft.iterdir():
        shutil.move(new, path / new.name)
    draft.rmdir()
    _sync(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(4)}.{path.name}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """fsync; nothing where the system cannot do it to a folder (Windows) or on this file system."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ---- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a name next to `path`; the file written there becomes `path`, or nothing does on an error.

    Writers of one file wait for each other. Use it for files that are written at once: a writer
    that takes longer than 10 seconds has the others give up with an `InputError`.
    """
    path = Path(path).resolve()
    # A draft has one writer, and is synced as a whole when it is put in place.
    in_draft = any(_DRAFT.fullmatch(part) for part in path.parts)
    with contextlib.nullcontext() if in_draft else lock(path, wait=_FILE_WAIT):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(path, resumable=False)
        temporary = _temporary(path)
        try:
            yield temporary
            if not in_draft:
                _sync(temporary)
            temporary.replace(path)
            if not in_draft:
                _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file: it is the old or the new one, whenever the process is killed."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON that every reader takes, atomically.

    JSON has no NaN and no infinity: they become `null`, which says that there is no such number. Text
    that is not valid Unicode is written as `valid_text` gives it.
    """
    text = json.dumps(_strict(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def valid_text(text: str) -> str:
    r"""Return `text` with every byte of a file name that is not UTF-8 as `\xNN`.

    Python reads such a byte as half of a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # half a pair that stands for no byte
            return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {valid_text(k) if isinstance(k, str) else k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value
