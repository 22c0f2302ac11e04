"""Worker processes that write parts on one machine.

Processes are spawned, not forked, because the encoder's threads do not survive a fork. A worker takes one part at a
time from a pipe. It ends with this process, however that ends, because it waits for that in a thread. So a kill
leaves no process behind, and Ctrl-C, which workers do not receive, stops all of them at once: parts that are not
complete are written again.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from cratelm.errors import InputError, one_line
from cratelm.tokens.parts import PartError, Progress, Work


class WorkerKilledError(PartError):
    """A worker process that ended before its part was complete."""


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
            worker = _started(work, threads)
            running[worker.pipe] = worker
            worker.give(waiting)
        while any(worker.index is not None for worker in running.values()):
            for pipe in connection.wait(list(running)):
                assert isinstance(pipe, Connection)
                worker = running[pipe]
                kind, value = worker.receive()
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
            worker.process.join()
            worker.pipe.close()


@dataclass
class _Worker:
    """A worker process, as this process sees it."""

    process: BaseProcess
    pipe: Connection
    index: int | None = None
    """the part that it writes"""
    file: str = ""
    """the file that it reads"""

    def give(self, waiting: deque[int]) -> None:
        """Let the worker write the next part, if there is one."""
        if waiting:
            self.index = waiting.popleft()
            with contextlib.suppress(OSError):  # it has ended, which `receive` will find
                self.pipe.send(self.index)

    def receive(self) -> tuple[str, Any]:
        """Return the next message of the worker. Raises `WorkerKilledError` if it has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        if code == -9:  # Windows has no signal.SIGKILL
            how += ", as the system does when memory is exhausted"
        at = f"at {self.file}" if self.file else "before its first file"
        raise WorkerKilledError(
            f"a worker {how}, {at}: type the same command again, which continues after the files that"
            " are finished; fewer --workers take less memory"
        )


def _started(work: Work, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_run, args=(work, other, threads), daemon=True)
    with _blocked_interrupts():
        process.start()
    other.close()
    return _Worker(process, pipe)


@contextlib.contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Start processes that never receive Ctrl-C, not even while they import; here it is only delayed."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signal when the first process starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in the worker --------------------------------------------------------------------------------


def _run(work: Work, pipe: Connection, threads: int) -> None:
    """Write the parts that come through a pipe until it is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
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
                pipe.send(("error", _sendable(error, file)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sendable(error: Exception, file: str) -> Exception:
    """Return an error as the parent raises it: the user's mistakes as they are, others with the file."""
    if isinstance(error, InputError):
        with contextlib.suppress(Exception):
            return pickle.loads(pickle.dumps(error))
        return InputError(str(error))
    return RuntimeError(f"{file}: {type(error).__name__}: {one_line(error)}")
