"""Tokens cut into windows, each token counted exactly once.

Shape legend: T tokens of a whole window, S tokens that it moves on by, n input tokens of one window,
m of its targets that are counted.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AHEAD = 16
"""batches of windows read ahead, to put those of like length together"""


class Window(NamedTuple):
    """What a model reads in one go, and which of its next tokens are counted."""

    tokens: NDArray[np.int64]
    """[n + 1] the input, and after it the last target; target i is token i + 1"""
    first: int
    """targets before this one are context alone"""
    documents: NDArray[np.int64]
    """[m] number of the document of each counted target, m = n - first"""


def cut(n: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a stream of n + 1 tokens, whose first is only context: start, stop, first target.

    The model reads tokens `start` to `stop` - 1 and is asked for tokens `first` + 1 to `stop`. The
    first window has nothing before it: all its T targets are counted, from 1 to T tokens of context.
    Each later one moves on by S and counts its last S targets, from T - S + 1 to T tokens of context;
    the last one is shorter. With S = T nothing overlaps; with S = 1 every target has all the
    context that the model takes.
    """
    done = 0
    while done < n:
        start = max(0, done + stride - length) if done else 0
        stop = min(n, done + stride if done else length)
        yield start, stop, done
        done = stop


def batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Groups of at most `size` windows, those of like length together, so that little is padded.

    Memory: 16 groups of windows.
    """
    rest = iter(windows)
    while ahead := list(islice(rest, AHEAD * size)):
        ahead.sort(key=lambda window: len(window.tokens), reverse=True)
        for first in range(0, len(ahead), size):
            yield ahead[first : first + size]
