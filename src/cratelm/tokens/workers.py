"""Worker processes that write parts on one machine.

A worker takes one part at a time from a pipe (`cratelm.runs.worker_processes`). A kill leaves no process behind, and
Ctrl-C stops all of them at once: parts that are not complete are written again.
"""

import contextlib
import os
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from cratelm.runs.worker_processes import WorkerProcess, end_with_parent, n_cores, sendable
from cratelm.tokens.parts import PartError, Progress, Work


class WorkerKilledError(PartError):
    """A worker process that ended before its part was complete."""


def limit_threads(threads: int) -> None:
    """Make the encoder use so many threads in this process, unless the user has set a number; before its first use."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, threads)))


def write_parts(
    work: Work, indexes: Sequence[int], workers: int, progress: Progress
) -> Generator[int, None, None]:
    """Write parts in order of their indexes, in `workers` processes; yield the index of each when it is written.

    Raises `WorkerKilledError` if a worker ends early, and what a worker raises. All workers have ended when
    the iterator has ended or is closed.
    """
    workers = min(workers, len(indexes))
    waiting, threads = deque(indexes), n_cores() // max(1, workers)
    running: dict[Connection, _Worker] = {}
    try:
        for _ in range(workers):
            worker = _Worker.started(_run, work, threads)
            running[worker.pipe] = worker
            worker.give(waiting)
        while any(worker.index is not None for worker in running.values()):
            for pipe in connection.wait(list(running)):
                assert isinstance(pipe, Connection)
                worker = running[pipe]
                kind, value = worker.next_message()
                if kind == "progress":
                    progress(value)
                elif kind == "file":
                    worker.file = value
                elif kind == "error":
                    raise value
                else:
                    index, worker.index = worker.index, None
                    assert index is not None
                    yield index
                    worker.give(waiting)
    finally:
        for worker in running.values():
            worker.process.kill()
        for worker in running.values():
            worker.kill()


@dataclass
class _Worker(WorkerProcess):
    """A worker process, as this process sees it."""

    index: int | None = None
    """the part that it writes"""
    file: str = ""
    """the file that it reads"""

    def give(self, waiting: deque[int]) -> None:
        """Let the worker write the next part, if there is one."""
        if waiting:
            self.index = waiting.popleft()
            self.send(self.index)

    def next_message(self) -> tuple[str, Any]:
        """Return the next message of the worker. Raises `WorkerKilledError` if it has ended."""
        with contextlib.suppress(EOFError):
            return self.receive()
        at = f"at {self.file}" if self.file else "before its first file"
        raise WorkerKilledError(
            f"a worker {self.how_it_ended()}, {at}: type the same command again, which continues after the files"
            " that are finished; fewer --workers take less memory"
        )


# ---- in the worker --------------------------------------------------------------------------------


def _run(pipe: Connection, work: Work, threads: int) -> None:
    """Write the parts that come through a pipe until it is closed."""
    end_with_parent()
    limit_threads(threads)
    file = ""

    def announce(path: str) -> None:
        nonlocal file
        file = path
        pipe.send(("file", path))

    with contextlib.suppress(EOFError, OSError):  # of the pipe: the parent has ended
        while True:
            index = pipe.recv()
            try:
                work.write(index, lambda n: pipe.send(("progress", n)), announce)
                pipe.send(("done", index))
            except Exception as error:
                pipe.send(("error", sendable(error, file)))
