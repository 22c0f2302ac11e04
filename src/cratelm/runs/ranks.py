"""The processes of one command that `torchrun` started: which share of the work each takes, and how they meet.

Work is cut into units, such as batches of tokens or groups of neurons, whose results do not depend on the process
that computes them. Rank 0 collects the results, in an order that does not depend on the number of processes, and
writes the files; the others compute and wait. A command that was not started by `torchrun` has one process, rank 0.

What ranks exchange is small next to what they compute, so it passes through the memory of the CPU (gloo), also on
GPUs. torch is imported on first use: `--help` needs none.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from cratelm.errors import InputError
from cratelm.runs.config import Settings
from cratelm.runs.stage import Draft, Inputs, Stage

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)
"""how long a rank waits for another: one that has ended is noticed by its closed connection, not by this limit"""
REPORTS_AFTER = 5.0
"""seconds that a rank other than 0 waits before it reports an error: if rank 0 has the same one, `torchrun` ends
the other ranks meanwhile, and the message is printed once"""


class Stopped(KeyboardInterrupt):
    """`torchrun` ends this process, because another one of the same command has ended."""


@dataclass(frozen=True)
class Share:
    """Share `number` (from 0) of work that is divided among `of` processes or parts."""

    number: int = 0
    of: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether it is the first share."""
        return self.number == 0

    def takes(self, unit: int) -> bool:
        """Return whether the unit with this number belongs to the share, if units are dealt out in turn."""
        return unit % self.of == self.number

    def between(self, units: int) -> range:
        """Return the units of the share if each gets units that follow one another, of `units` in total."""
        return range(self.number * units // self.of, (self.number + 1) * units // self.of)


def rank() -> int:
    """Return the rank of this process in its command; 0 if `torchrun` did not start it."""
    return _variable("RANK", 0) if n_ranks() > 1 else 0


def n_ranks() -> int:
    """Return the number of processes of this command; 1 if `torchrun` did not start it."""
    told = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return _variable("WORLD_SIZE", 1) if told else 1


def n_ranks_here() -> int:
    """Return how many processes of this command share the memory of this machine."""
    return max(1, _variable("LOCAL_WORLD_SIZE", 1)) if n_ranks() > 1 else 1


def _variable(name: str, otherwise: int) -> int:
    """Return the number in a variable of the environment."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those of its command. Every rank calls the same methods in the same order."""

    share: Share = Share()
    """the share of the work that this process takes"""
    _group: Any = None
    """process group; None if there is one process"""

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, which writes and prints."""
        return self.share.is_first

    def by_first(self, work: Callable[[], _T]) -> _T:
        """Return, on every rank, what `work` returns on rank 0, where alone it is called."""
        if self._group is None:
            return work()
        import torch.distributed as dist

        values: list[Any] = [work() if self.is_first else None]
        with _meeting():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def collected(self, value: _T) -> Iterator[_T]:
        """Yield the values of all ranks in their order, on rank 0; the other ranks send theirs and get none.

        Memory: the values of rank 0 and of one other rank.
        """
        if self.is_first:
            yield value
            yield from (self.receive(number) for number in range(1, self.share.of))
        else:
            self.send(value)

    def send(self, value: Any) -> None:
        """Send a value to rank 0, which has to `receive` it."""
        import torch.distributed as dist

        with _meeting():
            dist.send_object_list([value], dst=0, group=self._group)

    def receive(self, number: int) -> Any:
        """Return, on rank 0, the value that the rank `number` sends."""
        import torch.distributed as dist

        values: list[Any] = [None]
        with _meeting():
            dist.recv_object_list(values, src=number, group=self._group)
        return values[0]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self._group is not None:
            import torch.distributed as dist

            with _meeting():
                dist.barrier(group=self._group)

    @contextlib.contextmanager
    def write(self, stage: Stage, config: Any | Settings, inputs: Inputs) -> Iterator[Draft | None]:
        """Yield the draft of a stage on rank 0, which finishes it, and None on the others, which wait for that."""
        # another rank that still looks whether the stage is locked would itself hold the lock for a moment
        self.wait()
        if self.is_first:
            with stage.write(config, inputs) as draft:
                yield draft
        else:
            yield None
        self.wait()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Yield this process among those of its command, which are connected meanwhile.

    Each process of a machine with several GPUs uses its own. Raises `InputError` where another rank has ended, and
    `Stopped` on rank 0 where `torchrun` ends it.
    """
    if n_ranks() == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    _choose_gpu()
    began = not dist.is_initialized()
    with _stopped_by_signal(), _ended(began):
        with _meeting():
            if began:
                dist.init_process_group("gloo", timeout=_PATIENCE)
            group = dist.group.WORLD if began else dist.new_group(timeout=_PATIENCE, backend="gloo")
        yield Ranks(Share(dist.get_rank(), dist.get_world_size()), group)


def _choose_gpu() -> None:
    import torch

    if torch.accelerator.is_available():
        local = _variable("LOCAL_RANK", rank())
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Report an error of the connection as one line, after the rank that has ended could report its own."""
    try:
        yield
    except (
        RuntimeError
    ):  # torch raises several classes; what they say is where in gloo it was noticed
        if rank() == 0:
            time.sleep(2 * REPORTS_AFTER)
        raise InputError(
            "another process of this command has ended, and with it the connection: see its message, or"
            " whether it was killed; the same command does the work again"
        ) from None


@contextlib.contextmanager
def _ended(began: bool) -> Iterator[None]:
    """Leave the process group at the end, if this command began it."""
    import torch.distributed as dist

    try:
        yield
    finally:
        if began and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """On rank 0, raise `Stopped` where `torchrun` ends the process, so that its draft is removed."""
    if rank() != 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(
            "stopped, because another process of this command has ended (see its message, or whether it was"
            " killed) or all of them were stopped; the same command does the work again"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
