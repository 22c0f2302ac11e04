"""Loss and rank of each counted token, and their totals by document.

Memory: the logits of one forward pass, at most 2^28 of them (1 GiB at 32 bit) or those of one window
where these are more, twice those of one window, and a few numbers a document.

Shape legend: B windows, n tokens of the longest of them, m counted targets of one window, V
vocabulary, C documents.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.evaluate.windows import Window, batches

MOST_LOGITS = 2**28
TOP = 5
"""the second accuracy: the token is among so many likeliest"""
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the counted tokens of each document, by its number; one without a token has 0 in all."""

    tokens: FloatArray
    """[C]"""
    loss: FloatArray
    """[C] nats"""
    top_1: FloatArray
    """[C] tokens that the model held for likeliest"""
    top_5: FloatArray
    """[C] tokens among the model's five likeliest"""


class TokenScores(NamedTuple):
    losses: torch.Tensor
    """[m] nats"""
    ranks: torch.Tensor
    """[m] tokens that the model held for likelier"""


def score(model: Any, name: str, windows: Iterable[Window], batch_size: int, bar: tqdm) -> Totals:
    """Totals over all windows. Raises `InputError` where a loss is not a finite number."""
    sums = np.zeros((4, 1024))
    for batch in batches(windows, batch_size):
        for part in _fitting(batch, model.config.get_text_config().vocab_size):
            scores = _forward(model, part)
            documents = np.concatenate([window.documents for window in part])
            losses = torch.cat([s.losses for s in scores]).double().cpu().numpy()
            ranks = torch.cat([s.ranks for s in scores]).cpu().numpy()
            if not np.isfinite(losses).all():
                raise InputError(
                    f"the loss of {name} is {losses[~np.isfinite(losses)][0]} at a token, a number"
                    " was expected: its weights are damaged, or its training diverged"
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
    """The batch in parts whose logits fit."""
    longest = max(len(window.tokens) - 1 for window in batch)
    counted = longest - min(window.first for window in batch)
    most = max(1, MOST_LOGITS // (counted * vocabulary))
    return [batch[i : i + most] for i in range(0, len(batch), most)]


@torch.no_grad()
def _forward(model: Any, batch: list[Window]) -> list[TokenScores]:
    """Scores of each window's counted targets.

    Shorter windows are filled up at their end, which a causal model does not see before it.
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


def next_logits(model: Any, tokens: torch.Tensor, last: int) -> torch.Tensor:
    """Logits [B, last, V] after each of the `last` tokens of [B, n]; the others are not computed where
    the model can be told so."""
    told = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": last} if told else {}
    return model(input_ids=tokens, use_cache=False, **keep).logits[:, -last:]


def token_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Scores of targets [m] under logits [m, V]; of equal logits the one of the lower id goes first."""
    wanted = logits.gather(1, targets[:, None])  # [m, 1]
    ids = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > wanted) | ((logits == wanted) & (ids < targets[:, None]))
    return TokenScores(logits.logsumexp(-1) - wanted[:, 0], ahead.sum(-1))
