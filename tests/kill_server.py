"""A process that has imported cratelm, and forks a child for every command, which it can kill.

A kill costs the time of the command, not that of a new interpreter with torch. Nothing runs in the server
itself: threads would not survive the fork. The child counts its file operations below the working folder, and
dies by SIGKILL in place of the one with a given number:

- every file opened for writing, rename, removal, folder made or removed (audit events of Python), and fsync;
- once more after a file was opened, when it is empty;
- around the writers in C++ and Rust, which Python does not see: before, after, and when half of the file is there.

Requests and answers are lines of JSON on standard input and output; `KillServer` is the other end.
"""

import builtins
import importlib
import io
import json
import mmap
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 120.0
"""seconds after which a command counts as hanging"""
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


# ---- the tests' end -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    """exit status; -9 after a kill"""
    operations: int
    """file operations that it began"""
    seconds: float
    output: str
    """standard output and standard error"""
    labels: list[str] = field(default_factory=list)
    """the operations in words, if the command came to its end"""


class KillServer:
    """Client of a server with a hash seed of its own, for some verbs; `close` ends the server."""

    def __init__(self, verbs: Sequence[str], hash_seed: int = 0, *, draw: bool = False):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "PYTHONHASHSEED": str(hash_seed),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "draw" if draw else "", *verbs],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        kill_at: int = 0,
        kill_after: float = 0.0,
        largest_file: int = 0,
    ) -> Outcome:
        """Run `cratelm ARGUMENTS` in a folder; kill it at an operation (from 1), or after some seconds.

        `largest_file`: bytes that the command may write into one file (`ulimit -f`); 0: no limit.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "kill_at": kill_at,
            "kill_after": kill_after,
            "largest_file": largest_file,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        line = self._process.stdout.readline()
        assert line, "the server of the kill tests has died"
        outcome = Outcome(**json.loads(line))
        assert outcome.status != -signal.SIGALRM, f"it hangs: {arguments}\n{outcome.output}"
        return outcome

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


# ---- in the child ---------------------------------------------------------------------------------


class KillSwitch:
    """Counts the file operations below a folder, and kills the process in place of number `at`."""

    def __init__(self, folder: str, at: int, shared: mmap.mmap):
        self.folder, self.at, self.shared = folder, at, shared
        self.labels: list[str] = []
        self._lock = threading.RLock()  # the last words are an operation, too

    def operation(self, label: str, path: Any = "", last_words: Callable[[], None] | None = None):
        """Count an operation; at the fatal one, call `last_words` and die."""
        try:
            name = os.fsdecode(path)
        except TypeError:  # a descriptor
            return
        if os.path.isabs(name) and not name.startswith(self.folder):
            return
        with self._lock:
            self.labels.append(f"{label} {name.removeprefix(self.folder)}")
            self.shared[:8] = struct.pack("<q", len(self.labels))
            if len(self.labels) == self.at:
                if last_words is not None:
                    last_words()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(LIMIT)

    def install(self) -> None:
        """Watch Python's file operations and the writers that it does not see."""
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                if isinstance(flags, int) and flags & writing:
                    self.operation("open", path)
            elif event in EVENTS:
                self.operation(event, arguments[0])

        sys.addaudithook(hook)
        self._watch_open()
        self._watch_writers()

    def _watch_open(self) -> None:
        real_open, real_fsync = io.open, os.fsync

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            stream = real_open(file, mode, *arguments, **options)
            if set(mode) & set("wax+"):
                self.operation("opened", file)
            return stream

        def fsync(descriptor: int) -> None:
            self.operation("fsync")
            real_fsync(descriptor)

        builtins.open = io.open = opened  # type: ignore[assignment]
        os.fsync = fsync  # type: ignore[assignment]

    def _watch_writers(self) -> None:
        import pyarrow.parquet as pq
        import safetensors.torch
        import torch

        def watched(owner: Any, name: str, position: int) -> None:
            real = getattr(owner, name)

            def write(*arguments: Any, **options: Any) -> Any:
                path = arguments[position]
                if not isinstance(path, str | Path):
                    return real(*arguments, **options)
                self.operation(name, path)
                result = real(*arguments, **options)
                self.operation(
                    f"half {name}", path, lambda: os.truncate(path, os.stat(path).st_size // 2)
                )
                self.operation(f"done {name}", path)
                return result

            setattr(owner, name, write)

        watched(safetensors.torch, "serialize_file", 1)
        watched(torch, "save", 1)
        watched(pq, "write_table", 1)
        for name in ("write_table", "close"):
            self._watch_method(pq.ParquetWriter, name)

    def _watch_method(self, owner: type, name: str) -> None:
        real = getattr(owner, name)

        def write(writer: Any, *arguments: Any, **options: Any) -> Any:
            self.operation(f"Parquet {name}")
            return real(writer, *arguments, **options)

        setattr(owner, name, write)


def child(request: dict[str, Any], shared: mmap.mmap, result: Path) -> None:
    """Run a command to its end, or to the kill."""
    with result.with_suffix(".out").open("wb") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    os.chdir(request["folder"])
    before = set(sys.modules)
    from cratelm.cli import main

    switch = KillSwitch(request["folder"] + os.sep, request["kill_at"], shared)
    switch.install()
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    status = 1
    try:
        status = main(request["arguments"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.stdout.flush()
        sys.stderr.flush()
        report = {"labels": switch.labels, "modules": sorted(set(sys.modules) - before)}
        with result.open("w", encoding="utf-8") as file:
            json.dump(report, file)
        os._exit(status)


# ---- the server -----------------------------------------------------------------------------------


def run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a request in a child and return its outcome."""
    shared, result, began = mmap.mmap(-1, 8), folder / "result.json", time.monotonic()
    result.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        child(request, shared, result)
    descriptor = os.pidfd_open(process)
    if not select.select([descriptor], [], [], request["kill_after"] or LIMIT)[0]:
        os.kill(process, signal.SIGKILL if request["kill_after"] else signal.SIGALRM)
    os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seconds = time.monotonic() - began
    report = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    for name in report.get("modules", []):  # once, for all later children
        import_quietly(name)
    return {
        "status": status,
        "operations": struct.unpack("<q", shared[:8])[0],
        "seconds": seconds,
        "output": result.with_suffix(".out").read_text(encoding="utf-8", errors="replace"),
        "labels": report.get("labels", []),
    }


def import_quietly(name: str) -> None:
    """Import a module if it can be imported by itself."""
    try:
        importlib.import_module(name)
    except Exception:
        return


def serve(verbs: Sequence[str], *, draw: bool) -> None:
    """Answer requests until standard input is closed."""
    import tempfile

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever imports print is no answer
    from cratelm.cli import VERBS

    for verb in verbs:
        import_quietly(VERBS[verb].module)
    import torch
    from markupsafe import Markup

    torch.set_num_threads(1)
    if not draw:  # most of a report's time is drawing
        from cratelm.report.drawing import Figure, Panel

        def write(self: Figure, folder: Path) -> None:
            for kind in ("png", "pdf"):
                (folder / f"{self.name}.{kind}").write_bytes(b"")

        Figure.write = write
        Panel.svg = lambda *_: Markup("")
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            answers.write(json.dumps(run(json.loads(line), Path(folder))) + "\n")
            answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(sys.argv[2:], draw=sys.argv[1] == "draw")
