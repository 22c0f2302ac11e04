"""Files and tables that stay in memory between pages, until the run has changed."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

_KEPT = 64
"""open files and tables that are kept at a time, for all runs together"""
_T = TypeVar("_T")


class Kept:
    """The latest `_KEPT` things that were read. Safe for several threads; two may read the same at once."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: tuple, state: Any, read: Callable[[], _T]) -> _T:
        """What was read before under `name`, if it was in the same `state`; else what `read` gives."""
        with self._lock:
            held = self._held.get(name)
            if held is not None and held[0] == state:
                self._held.move_to_end(name)
                return held[1]
        made = read()
        with self._lock:
            self._held[name] = (state, made)
            self._held.move_to_end(name)
            while len(self._held) > _KEPT:
                self._held.popitem(last=False)
        return made
