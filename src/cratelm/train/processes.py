"""What a process of a training on several says when another one ends."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException

from cratelm.errors import InputError
from cratelm.runs import Draft
from cratelm.runs.ranks import Stopped
from cratelm.train.resume import found, step_of

ENDED = "ended"
"""file in the draft of the process that reports it first; the next attempt removes it"""


@contextlib.contextmanager
def reported_loss(accelerator: Accelerator, draft: Draft) -> Iterator[None]:
    """Report in one line, from one of the remaining processes, that another process of this training has ended.

    The others notice it in their next exchange of gradients, or are stopped by `torchrun` with SIGTERM,
    whichever comes first. Raises `InputError` in the process that reports, and `SystemExit` in the others.
    """
    if accelerator.num_processes == 1:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        # no OSError: that would be taken for a fault of the disk while a checkpoint is written
        raise Stopped(f"signal {number}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (Exception, Stopped, CheckpointException) as error:
        if not _is_of_lost_process(error):
            raise
        with contextlib.suppress(OSError):  # the file exists, or its folder no longer does
            os.close(os.open(draft.path / ENDED, os.O_CREAT | os.O_EXCL))
            raise InputError(_lost(draft)) from error
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_of_lost_process(error: BaseException) -> bool:
    """Return whether an error is what a process sees when another one ends.

    While a checkpoint is written, `torch.distributed.checkpoint` wraps the errors of all processes in one.
    """
    if isinstance(error, Stopped | torch.distributed.DistError):
        return True
    if isinstance(error, CheckpointException):
        return all(_is_of_lost_process(failure) for failure, _ in error.failures.values())
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _lost(draft: Draft) -> str:
    saved = found(draft.path)
    resumes = f"it resumes from step {step_of(saved[-1])}" if saved else "it starts again"
    return f"another process of this training has ended: type the command again, {resumes}"
