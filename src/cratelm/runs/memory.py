"""Memory: what is available, and the refusal of what cannot fit, before anything is allocated.

An estimate is a lower bound: what is allocated for certain, without temporary copies. So nothing is
refused that would fit, and an absurd number ends in one line instead of an allocator's message, a swapping
machine or a killed process.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from cratelm.errors import InputError

NEVER_REFUSED = 256 * 2**20
"""bytes: estimates below are never refused, because what is available changes with other processes"""
MemoryParts = Mapping[str, float] | Mapping[str | tuple[str, ...], float]
"""bytes by the option, or the options, that decide them"""
_CGROUP = Path("/sys/fs/cgroup")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def check_memory(
    config: object,
    parts: MemoryParts,
    purpose: str,
    *,
    available: int | None = None,
) -> None:
    """Raise `InputError` if what the options ask for does not fit into memory.

    `config` has the options as attributes. `parts` are bytes by the field, or the fields, that decide them;
    the message names those of the largest part. `purpose` says what the memory holds. `available` is in
    bytes, by default what this process can still allocate.
    """
    needed = sum(parts.values())
    if needed < NEVER_REFUSED:
        return
    free = available_memory() if available is None else available
    if free is None or needed <= free:
        return
    largest = max(parts.items(), key=lambda part: part[1])[0]
    fields = (largest,) if isinstance(largest, str) else largest
    options = {f"--{field.replace('_', '-')}": getattr(config, field) for field in fields}
    given = " ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    raise InputError(
        f"{given}: {purpose} would take at least {size_in_words(needed)} of memory, but"
        f" {size_in_words(free)} are available: lower {' or '.join(options)}"
    )


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate without swapping; None if that is unknown.

    This is what the machine has, or what is left of the limit of the container or of the process.
    """
    limits = (_of_machine(), _of_container(), _of_process())
    return min((limit for limit in limits if limit is not None), default=None)


def size_in_words(size: float) -> str:
    """Return a number of bytes with three digits and a unit, such as `1.82 TiB`."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:,.3g} {_UNITS[unit]}" if size < 1e6 else f"{size:.2g} {_UNITS[unit]}"


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # not Linux: all of the memory, an upper bound
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _of_container() -> int | None:
    """Return what is left of the limit of this process's control group (version 2)."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        cached = dict(
            line.split()
            for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        # Pages of files that were read count as used, but make room for what is allocated.
        reclaimable = int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0))
        return None if limit == "max" else max(0, int(limit) - used + reclaimable)
    except (OSError, ValueError):
        return None


def _of_process() -> int | None:
    """Return what is left of the limit on the address space (`ulimit -v`)."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))
    except (ImportError, OSError, ValueError, IndexError):
        return None
