"""Worker processes of one command: started so that a kill, Ctrl-C or an error leaves none of them behind.

Workers are spawned, not forked, because threads of libraries do not survive a fork. A worker ends with the process
that started it, however that ends, because it waits for that in a thread. Ctrl-C does not reach workers: the process
that started them ends them.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

from cratelm.errors import InputError, one_line

_PATIENCE = 20.0
"""seconds that a worker has to end by itself"""


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class WorkerProcess:
    """A worker, as the process that started it sees it."""

    process: BaseProcess
    pipe: Connection

    @classmethod
    def started(cls, target: Callable[..., None], *arguments: Any) -> Self:
        """Return a worker that calls `target` with a pipe to this process and the arguments.

        `target` must call `end_with_parent` first.
        """
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        process = context.Process(target=target, args=(other, *arguments), daemon=True)
        with _blocked_interrupts():
            process.start()
        other.close()
        return cls(process, pipe)

    def send(self, message: Any) -> None:
        """Send a message, unless the worker has ended, which `receive` will find."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> Any:
        """Return the next message of the worker. Raises `EOFError` if it has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise EOFError from None

    def how_it_ended(self) -> str:
        """Return how a worker that has ended did so, as the end of a sentence about it."""
        code = self.process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        if code == -9:  # Windows has no signal.SIGKILL
            how += ", as the system does when memory is exhausted"
        return how

    def kill(self) -> None:
        """End the worker at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def end_all(workers: Iterable[WorkerProcess]) -> None:
    """Let workers remove what they have half written, and end them; kill those that take too long."""
    workers = list(workers)
    for worker in workers:
        if worker.process.is_alive():
            worker.process.terminate()
    for worker in workers:
        worker.process.join(_PATIENCE)
        worker.kill()


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


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has; a request to end first undoes what is half done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def sendable(error: Exception, place: str) -> Exception:
    """Return an error as the parent raises it: the user's mistakes as they are, others with the place."""
    if isinstance(error, InputError):
        with contextlib.suppress(Exception):
            return pickle.loads(pickle.dumps(error))
        return InputError(str(error))
    return RuntimeError(f"{place}: {type(error).__name__}: {one_line(error)}")
