"""Tokens cut into windows, each counted exactly once, and the loss and rank of each counted token.

Memory: 16 batches of windows; the logits of one forward pass, at most 2^28 of them (1 GiB at 32 bit) or
those of one window if these are more; twice those of one window; and a few numbers per document.

Shape legend: T tokens of a whole window, S stride in tokens, n input tokens of one window, m of its
targets that are counted, B windows, V vocabulary, C documents.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.models.partial_forward import next_logits
from cratelm.runs import check_memory

AHEAD = 16
"""number of batches of windows that are read ahead, to group windows of similar length"""
MOST_LOGITS = 2**28
"""most logits of one forward pass"""
TOP = 5
"""the second accuracy counts a token that is among this many most likely ones"""
FloatArray = NDArray[np.float64]


class Window(NamedTuple):
    """Input of a model, and which of its next tokens are counted."""

    tokens: NDArray[np.int64]
    """[n + 1] the input, followed by the last target; target i is token i + 1"""
    first: int
    """targets before this one are only context"""
    documents: NDArray[np.int64]
    """[m] number of the document of each counted target, m = n - first"""


def cut(n: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows over a stream of n + 1 tokens whose first is only context: start, stop, first target.

    The model reads tokens `start` to `stop` - 1 and predicts tokens `first` + 1 to `stop`. The first
    window has nothing before it: all its T targets are counted, with 1 to T tokens of context. Each later
    window begins S tokens later and counts its last S targets, with T - S + 1 to T tokens of context; the
    last one is shorter. With S = T nothing overlaps; with S = 1 every target has as much context as the
    window allows.
    """
    done = 0
    while done < n:
        start = max(0, done + stride - length) if done else 0
        stop = min(n, done + stride if done else length)
        yield start, stop, done
        done = stop


def batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Yield groups of at most `size` windows of similar length, which need little padding.

    Memory: 16 groups of windows.
    """
    remaining = iter(windows)
    while ahead := list(islice(remaining, AHEAD * size)):
        ahead.sort(key=lambda window: len(window.tokens), reverse=True)
        for first in range(0, len(ahead), size):
            yield ahead[first : first + size]


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the counted tokens of each document, by its number; 0 for a document without any."""

    tokens: FloatArray
    """[C]"""
    loss: FloatArray
    """[C] nats"""
    top_1: FloatArray
    """[C] tokens that were the model's top prediction"""
    top_5: FloatArray
    """[C] tokens among the model's five most likely"""


class TokenScores(NamedTuple):
    """Loss and rank of the counted targets of one window."""

    losses: torch.Tensor
    """[m] nats"""
    ranks: torch.Tensor
    """[m] number of tokens that the model considered more likely"""


def score(model: Any, name: str, windows: Iterable[Window], batch_size: int, bar: tqdm) -> Totals:
    """Return the totals over all windows. Raises `InputError` if a loss is not finite."""
    sums = np.zeros((4, 1024))
    for batch in batches(windows, batch_size):
        for part in _fitting(batch, model.config.get_text_config().vocab_size):
            scores = _forward(model, part)
            documents = np.concatenate([window.documents for window in part])
            losses = torch.cat([s.losses for s in scores]).double().cpu().numpy()
            ranks = torch.cat([s.ranks for s in scores]).cpu().numpy()
            if not np.isfinite(losses).all():
                raise InputError(
                    f"the loss of {name} is {losses[~np.isfinite(losses)][0]} at a token, not a"
                    " finite number: its weights are damaged, or its training diverged"
                )
            while documents.max() >= sums.shape[1]:
                sums = np.concatenate([sums, np.zeros_like(sums)], axis=1)
            figures = (np.ones_like(losses), losses, ranks < 1, ranks < TOP)
            for row, values in zip(sums, figures, strict=True):
                np.add.at(row, documents, values)
            bar.update(len(losses))
    last = np.flatnonzero(sums[0])
    return Totals(*sums[:, : last[-1] + 1 if len(last) else 0])


def _fitting(batch: list[Window], vocabulary: int) -> Iterable[list[Window]]:
    """Return the batch in parts whose logits fit into memory."""
    longest = max(len(window.tokens) - 1 for window in batch)
    counted = longest - min(window.first for window in batch)
    options = SimpleNamespace(sequence_length=longest)
    needed = {"sequence_length": 4 * counted * vocabulary}
    check_memory(options, needed, "the logits of one sequence")
    most = max(1, MOST_LOGITS // (counted * vocabulary))
    return [batch[i : i + most] for i in range(0, len(batch), most)]


@torch.no_grad()
def _forward(model: Any, batch: list[Window]) -> list[TokenScores]:
    """Return the scores of each window's counted targets.

    Shorter windows are padded at their end, which does not affect the earlier tokens of a causal model.

    """
    lengths = [len(window.tokens) - 1 for window in batch]
    longest = max(lengths)
    rows = np.zeros((len(batch), longest), np.int64)
    for row, window, length in zip(rows, batch, lengths, strict=True):
        row[:length] = window.tokens[:-1]
    skipped = min(window.first for window in batch)
    tokens = torch.from_numpy(rows).to(model.device)  # [B, n]
    logits = next_logits(model, tokens, longest - skipped)  # [B, n - skipped, V]
    return [
        token_scores(
            row[window.first - skipped : length - skipped].float(),
            torch.from_numpy(window.tokens[window.first + 1 :]).to(row.device),
        )
        for row, window, length in zip(logits, batch, lengths, strict=True)
    ]


def token_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Return the scores of targets [m] under logits [m, V]; of equal logits the lower id ranks first."""
    wanted = logits.gather(1, targets[:, None])  # [m, 1]
    ids = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > wanted) | ((logits == wanted) & (ids < targets[:, None]))
    return TokenScores(logits.logsumexp(-1) - wanted[:, 0], ahead.sum(-1))
