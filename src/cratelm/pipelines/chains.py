"""Run the stages of several models at the same time, those of one model one after another.

Imports nothing heavy: each process imports what its steps need.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from cratelm.errors import InputError
from cratelm.runs.worker_processes import WorkerProcess, end_all, end_with_parent, sendable

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline."""

    stage: str
    model: str
    """name of the model; empty for a stage of the whole run"""
    work: Callable[[], Any]
    """runs the stage"""

    @property
    def label(self) -> str:
        """Return the stage and its model, as printed."""
        return f"{self.stage} {self.model}".strip()


_THREADS = "OMP_NUM_THREADS"
Place = tuple[int, int]
"""number of a chain, and of a step in it"""
Chains = Callable[[_Config], Sequence[Sequence[Step]]]
"""from options to the steps of each model; a function of a module, which other processes import"""


def run_chains(
    chains: Chains[_Config], configs: Sequence[_Config], threads: int
) -> Generator[Step, None, None]:
    """Run the steps of all chains, each chain in order, in a process for each of `configs`; yield the steps that begin.

    Each process makes the steps from its config, which differ only in what they print, and libraries use `threads`
    threads in it. Raises what a step raises, and `InputError` if a process is killed; the steps that the other processes run are
    then stopped, and remove what they have half written.
    """
    made = chains(configs[0])
    waiting = deque(
        deque((number, i) for i in range(len(chain))) for number, chain in enumerate(made)
    )
    running: dict[Connection, _Worker] = {}
    try:
        for config in configs[: len(waiting)]:
            with _limited(threads):
                worker = _Worker.started(_run, chains, config)
            running[worker.pipe] = worker
            for number, i in worker.give(waiting):
                yield made[number][i]
        while busy := [pipe for pipe, worker in running.items() if worker.is_busy]:
            for pipe in connection.wait(busy):
                assert isinstance(pipe, Connection)
                for number, i in running[pipe].proceed(waiting):
                    yield made[number][i]
    finally:
        end_all(running.values())


@dataclass
class _Worker(WorkerProcess):
    """A process that runs steps."""

    chain: deque[Place] = field(default_factory=deque)
    """what it will run next"""
    is_busy: bool = False

    def give(self, waiting: deque[deque[Place]]) -> Generator[Place, None, None]:
        """Let the process run the next step of its chain, or of the next chain; yield its place."""
        if not self.chain and waiting:
            self.chain = waiting.popleft()
        self.is_busy = bool(self.chain)
        if self.chain:
            yield self.chain[0]
            self.send(self.chain.popleft())

    def proceed(self, waiting: deque[deque[Place]]) -> Generator[Place, None, None]:
        """Take the message that a step has ended, and let the process run the next one."""
        try:
            error = self.receive()
        except EOFError:
            raise InputError(
                f"a process of the demo {self.how_it_ended()}: type the same command again, which continues after the"
                " stages that are finished; --jobs 1 takes less memory"
            ) from None
        if error is not None:
            raise error
        yield from self.give(waiting)


@contextlib.contextmanager
def _limited(threads: int) -> Iterator[None]:
    """Let processes that are started here use so many threads in torch and NumPy, which read it when imported."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _run(pipe: Connection, chains: Chains[_Config], config: _Config) -> None:
    """Run the steps whose places come through a pipe until it is closed."""
    end_with_parent()
    made = chains(config)
    with contextlib.suppress(EOFError, OSError):  # of the pipe: the parent has ended
        while True:
            number, i = pipe.recv()
            pipe.send(_error_of(made[number][i]))


def _error_of(step: Step) -> Exception | None:
    try:
        step.work()
    except Exception as error:
        return sendable(error, step.label)
    return None
