"""What every part of `gpu.sh` gets, and the figures that it leaves even if it is killed."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cratelm.runs import write_json


@dataclass(frozen=True)
class PartOptions:
    """Options of one part."""

    device: str
    """`cuda` or `cpu`"""
    tiny: bool
    """tiny models, to try the script; the figures mean nothing"""
    out: Path
    """folder of the results"""
    deadline: float
    """value of `time.monotonic()` at which the part is killed; one clock for all processes"""
    tokens: Path | None = None
    """file of tokens that `gpu_tokens.py` wrote; None for generated tokens"""
    twins: tuple[str, ...] = ("1l", "2l", "3l")
    """sizes of the twins, in the order of their training"""

    @property
    def backend(self) -> str:
        """Return the backend of `torch.compile`; that of a tiny run traces the same code, but compiles nothing."""
        return "eager" if self.tiny else "inductor"

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


class Figures:
    """Figures of a part by name. Each is written at once, so that a part that is killed leaves what it had."""

    def __init__(self, path: Path):
        self.path, self.values = path, {}

    def record(self, name: str, value: Any) -> None:
        """Record a JSON value under a name."""
        self.values[name] = value
        write_json(self.path, self.values)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device has too little memory: libraries raise several kinds."""
    text = str(error).lower()
    return "out of memory" in text or "alloc_failed" in text


def free_memory(device: str) -> None:
    """Forget what was compiled, and return unused memory to the device.

    Without the first, torch.compile takes another batch size in the next model for a dynamic shape, whose kernels
    are slower, and keeps the last model alive.
    """
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def count_memory(device: str) -> None:
    """Start a new count of the peak of allocated memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> int | None:
    """Return the bytes allocated at the peak since `count_memory`; None on a CPU, where torch does not count them."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
