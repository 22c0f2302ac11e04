"""Run the stages of several models at the same time, those of one model one after another.

Imports nothing heavy: each process imports what its steps need.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from cratelm.errors import InputError
from cratelm.runs.worker_processes import WorkerProcess, end_all, end_with_parent, sendable

_Config = TypeVar("_Config")
_THREADS = "OMP_NUM_THREADS"


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


Place = tuple[int, int]
"""number of a chain, and of a step in it"""
Chains = Callable[[_Config], Sequence[Sequence[Step]]]
"""from options to the steps of each model; a function of a module, which other processes import"""


def run_models(chains: Chains[_Config], config: _Config, jobs: int) -> Generator[Step, None, None]:
    """Run the steps of all chains, `jobs` chains at a time; yield each step when it begins.

    `config` has a field `quiet`. Several jobs are processes that divide the threads of this one.
    """
    if jobs > 1:
        import torch

        # Progress bars of several processes would overwrite one another: those of the first are shown.
        configs = [config, *[replace(config, quiet=True)] * (jobs - 1)]  # type: ignore[type-var]
        yield from run_chains(chains, configs, max(1, torch.get_num_threads() // jobs))
        return
    for step in chain.from_iterable(chains(config)):
        yield step
        step.work()


def run_chains(
    chains: Chains[_Config], configs: Sequence[_Config], threads: int
) -> Generator[Step, None, None]:
    """Run the steps of all chains, each chain in order, in a process for each of `configs`; yield the steps that begin.

    Each process makes the steps from its config, which differ only in what they print, and libraries use `threads`
    threads in it. Raises what a step raises, and `InputError` if a process is killed; the steps that the other
    processes run are then stopped, and remove what they have half written.
    """
    made = chains(configs[0])
    waiting = deque(
        deque((number, i) for i in range(len(chain))) for number, chain in enumerate(made)
    )
    running: dict[Connection, _Worker] = {}
    try:
        with _limited(threads):
            for config in configs[: len(waiting)]:
                worker = _Worker.started(_run, chains, config)
                running[worker.pipe] = worker
        idle, busy = list(running.values()), set[Connection]()
        while idle or busy:
            for worker in idle:
                if place := worker.next_place(waiting):
                    yield made[place[0]][place[1]]
                    worker.send(place)
                    busy.add(worker.pipe)
            ended = connection.wait(list(busy)) if busy else []
            busy.difference_update(ended)
            idle = [worker for pipe, worker in running.items() if pipe in ended]
            for worker in idle:
                worker.finish_step()
    finally:
        end_all(running.values())


@dataclass
class _Worker(WorkerProcess):
    """A process that runs steps."""

    chain: deque[Place] = field(default_factory=deque)
    """what it will run next"""

    def next_place(self, waiting: deque[deque[Place]]) -> Place | None:
        """Return the next step of its chain, or of the next chain that waits; None if there is none."""
        if not self.chain and waiting:
            self.chain = waiting.popleft()
        return self.chain.popleft() if self.chain else None

    def finish_step(self) -> None:
        """Take the message that a step has ended. Raises what the step raised."""
        try:
            error = self.receive()
        except EOFError:
            raise InputError(
                f"a process of the demo {self.how_it_ended()}: type the same command again, which continues after the"
                " stages that are finished; --jobs 1 takes less memory"
            ) from None
        if error is not None:
            raise error


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
