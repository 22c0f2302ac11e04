"""A model's predictions for each token of a text, and after the last.

Memory: the logits of one text, at most the model's longest sequence times its vocabulary.

Shape legend: n tokens of a text, k most likely next tokens, V vocabulary.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from cratelm.errors import InputError
from cratelm.models.open import Encoder, LoadedModel
from cratelm.models.partial_forward import next_logits
from cratelm.runs import check_memory

_CANDIDATE_BYTES = 200
"""bytes of one `Candidate` and its line on the page"""


@dataclass(frozen=True)
class Candidate:
    """A token that may come next."""

    token: str
    probability: float


@dataclass(frozen=True)
class PredictedToken:
    """One token of the text, and the model's predictions at its position."""

    token: str
    probability: float
    """probability that the model gave to the token"""
    rank: int
    """rank of its probability in the vocabulary, from 1"""
    expected: tuple[Candidate, ...]
    """[k] the most likely tokens at its position, most likely first"""
    text: str
    """what is shown of it in the text: of several tokens that make a character, the first has it, and the others
    are empty"""


@dataclass(frozen=True)
class Prediction:
    """Predictions of one model on the text."""

    model: str
    steps: tuple[PredictedToken, ...]
    """[n]"""
    after: tuple[Candidate, ...]
    """[k] the most likely tokens after the end of the text, most likely first"""
    loss: float
    """nats per token"""
    bits_per_byte: float


@dataclass(frozen=True)
class PredictedText:
    """A text to predict, and its origin."""

    text: str
    origin: str
    """in words"""
    continuation: str
    """what follows in the document; empty for the user's own text"""


@torch.no_grad()
def predict_text(
    subject: LoadedModel, encoder: Encoder, text: str, k: int, start: int | None = None
) -> Prediction:
    """Return a model's predictions for each token of a text, and after the last.

    `start` is the token that stands before the text; default: the end-of-text token.

    Raises `InputError` if the text has no token, or more tokens than the model accepts.
    """
    ids = encoder.encode(text)  # [n]
    most = subject.longest
    if not len(ids) or (most is not None and len(ids) >= most):
        raise InputError(
            f"the text has {len(ids)} tokens for {subject.name}, which accepts"
            f" {'1 or more' if most is None else f'1 to {most - 1}'}: give another --text"
        )
    shown = (len(ids) + 1) * min(k, subject.vocab_size)
    check_memory(SimpleNamespace(top=k), {"top": _CANDIDATE_BYTES * shown}, "the predictions")
    start = encoder.end if start is None else start
    tokens = torch.tensor([[start, *ids]], device=subject.model.device)
    logits = next_logits(subject.model, tokens, tokens.shape[1])[0].float()  # [n + 1, V]
    logs = logits.log_softmax(-1).cpu()
    targets = torch.from_numpy(ids)
    losses = -logs[:-1].gather(1, targets[:, None])[:, 0]  # [n]
    ranks = (logs[:-1] > -losses[:, None]).sum(-1) + 1  # [n]
    best, best_ids = logs.topk(min(k, logs.shape[1]))  # [n + 1, k] each
    expected = [
        tuple(Candidate(_token_text(encoder, i), math.exp(p)) for p, i in zip(*row, strict=True))
        for row in zip(best.tolist(), best_ids.tolist(), strict=True)
    ]
    texts = _shown_texts(encoder, ids.tolist())
    rows = zip(ids, losses.tolist(), ranks.tolist(), expected[:-1], texts, strict=True)
    return Prediction(
        model=subject.name,
        steps=tuple(
            PredictedToken(_token_text(encoder, i), math.exp(-x), rank, e, text)
            for i, x, rank, e, text in rows
        ),
        after=expected[-1],
        loss=float(losses.mean()),
        bits_per_byte=float(losses.sum()) / math.log(2) / len(text.encode()),
    )


def _token_text(encoder: Encoder, token: int) -> str:
    """Return the text of a token id; an embedding row beyond the vocabulary appears as its number."""
    return encoder.display[token] if token < len(encoder.display) else f"[{token}]"


def _shown_texts(encoder: Encoder, ids: list[int]) -> list[str]:
    """Return what is shown of each token, [n]: of several that make a unit of text, the first has it."""
    if any(token >= len(encoder.display) for token in ids):
        return [_token_text(encoder, token) for token in ids]
    texts = [""] * len(ids)
    for unit in encoder.display.units(ids):
        texts[unit.start] = unit.text
    return texts
