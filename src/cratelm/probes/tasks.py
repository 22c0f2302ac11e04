"""Synthetic tasks with known answers and known chance levels.

    binding      k1 v1 k2 v2 ... kn vn  ? k2 v2  ? kn vn  ...      which value was paired with this key?
    induction    s1 s2 ... sm  s5 s6 s7 ...                        which token followed this one before?

In both, the answer differs from the token that asks for it, and can only be found by what stood next to an earlier
occurrence of that token. Keys, values and the tokens s are drawn without replacement. A model is trained on every
answer of a sequence, and tested on the first one alone. Later answers could be found by elimination. The chance level
of the first is that of a guess among all tokens of the sequence that can be the answer: for `binding` its n values, 1/n;
for `induction` all of its m tokens but the first, which follows nothing, and the one that asks. In one of m - 1 sequences
these are the same token, so that the level is 1/(m-1) (1/(m-1) + (m-2)/(m-2)) = m / (m-1)^2.

Recall of pairs is the task of Zoology (Arora et al. 2023, arXiv 2312.04927), the repeated random sequence that of Olsson
et al. (2022, arXiv 2209.11895).

Shape legend: B sequences, T tokens of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
IGNORED = -100
"""target of a position that is not asked; PyTorch's cross-entropy leaves it out"""
N_KEYS = N_VALUES = 12
"""tokens that can be keys, and others that can be values"""
N_SYMBOLS = 24
"""tokens of the task `induction`"""
PAIRS = 4
"""n, pairs of a sequence of the task `binding`"""
LENGTH = 8
"""m, different tokens of a sequence of the task `induction`"""
REPEATED = 7
"""tokens that are repeated at most in the task `induction`, after the one that asks first"""


@dataclass(frozen=True)
class Task:
    """A synthetic task."""

    name: str
    vocabulary: int
    """tokens"""
    length: int
    """T, tokens of a sequence"""
    chance: float
    """accuracy of a guess among the possible answers of a sequence"""
    draw: Callable[[int, np.random.Generator], "Sequences"]
    """returns B sequences that are drawn with a generator"""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of a task, and what is asked in them."""

    tokens: Int64
    """[B, T]"""
    targets: Int64
    """[B, T] the next token where it is asked, `IGNORED` elsewhere"""
    first: int
    """position whose next token is the first answer, the same in all sequences"""

    @property
    def answers(self) -> Int64:
        """Return the first answers [B]."""
        return self.targets[:, self.first]


def draw_binding(n: int, generator: np.random.Generator) -> Sequences:
    """Return `n` sequences of pairs, followed by a question for each key, in random order."""
    keys = _without_replacement(n, PAIRS, N_KEYS, generator)
    values = N_KEYS + _without_replacement(n, PAIRS, N_VALUES, generator)
    asked = _without_replacement(n, PAIRS, PAIRS, generator)
    question = np.full((n, PAIRS), N_KEYS + N_VALUES)
    pairs = np.stack([keys, values], 2).reshape(n, -1)  # [B, 2n]
    of_asked = [np.take_along_axis(of, asked, 1) for of in (keys, values)]
    questions = np.stack([question, *of_asked], 2).reshape(n, -1)  # [B, 3n]
    tokens = np.concatenate([pairs, questions], 1)
    targets = np.full(tokens.shape, IGNORED)
    first = 2 * PAIRS + 1
    targets[:, first::3] = tokens[:, first + 1 :: 3]
    return Sequences(tokens, targets, first)


def draw_induction(n: int, generator: np.random.Generator) -> Sequences:
    """Return `n` sequences of different tokens, followed by a part of the same sequence that starts anywhere."""
    symbols = _without_replacement(n, LENGTH, N_SYMBOLS, generator)
    start = generator.integers(0, LENGTH - 1, (n, 1))  # the last token has no successor
    places = start + np.arange(REPEATED + 1)  # [B, 1 + repeated]
    repeated = np.take_along_axis(symbols, np.minimum(places, LENGTH - 1), 1)
    tokens = np.concatenate([symbols, repeated], 1)
    targets = np.full(tokens.shape, IGNORED)
    # What stands after the end of the sequence repeats its last token, which nothing predicts: it is not asked.
    targets[:, LENGTH:-1] = np.where(places[:, 1:] < LENGTH, repeated[:, 1:], IGNORED)
    return Sequences(tokens, targets, LENGTH)


def _without_replacement(n: int, k: int, of: int, generator: np.random.Generator) -> Int64:
    """Return `n` rows of `k` different numbers below `of`, in random order."""
    return generator.random((n, of)).argsort(1)[:, :k]


TASKS = {
    "binding": Task("binding", N_KEYS + N_VALUES + 1, 5 * PAIRS, 1 / PAIRS, draw_binding),
    "induction": Task(
        "induction", N_SYMBOLS, LENGTH + REPEATED + 1, LENGTH / (LENGTH - 1) ** 2, draw_induction
    ),
}
