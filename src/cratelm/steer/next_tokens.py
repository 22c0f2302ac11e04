"""The next token and the continuation of a text, by a model as it is or with edits in place.

Everything that steers compares two of these: `steer`, `intervene` and the live page of the browser.

Shape legend: B sequences, n tokens of a text, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from cratelm.models.open import Encoder
from cratelm.models.partial_forward import next_logits
from cratelm.text.units import Unit, units_in


@dataclass(frozen=True)
class TokenChange:
    """Change of the probability that a token comes next."""

    token: str
    id: int
    before: float
    after: float
    log_ratio: float
    """ln(after / before), nats"""

    @property
    def difference(self) -> float:
        """Probability after minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class NextTokenChange:
    """Change of the next-token distribution after a text, with the edits versus without."""

    gains: tuple[TokenChange, ...]
    """tokens with the largest differences, in order; only positive ones"""
    losses: tuple[TokenChange, ...]
    """tokens with the most negative differences, in order; only negative ones"""
    total_variation: float
    """half of the sum of absolute differences, 0..1"""
    kl: float
    """Kullback-Leibler divergence of the edited distribution from the plain one, nats"""


@torch.no_grad()
def next_log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [V] of the token after ids [1, n], in double precision."""
    logits = next_logits(model, ids, 1)[0, 0]
    return logits.double().log_softmax(-1).cpu()


def compare_next_tokens(
    before: torch.Tensor, after: torch.Tensor, display: list[str], top: int
) -> NextTokenChange:
    """Return the change of the next-token distribution, with the `top` tokens that rise and fall most.

    `before` and `after` are log-probabilities [V] without and with the edits; `display` has a string for
    each token id.
    """
    p, q = before.exp(), after.exp()
    difference = q - p
    order = difference.argsort(descending=True, stable=True).tolist()

    def change(token: int) -> TokenChange:
        log_ratio = float(after[token] - before[token])
        return TokenChange(
            token_string(display, token), token, float(p[token]), float(q[token]), log_ratio
        )

    return NextTokenChange(
        gains=tuple(change(i) for i in order[:top] if difference[i] > 0),
        losses=tuple(change(i) for i in order[::-1][:top] if difference[i] < 0),
        total_variation=float(difference.abs().sum() / 2),
        kl=float((q * (after - before)).sum().clamp(min=0)),
    )


def token_string(strings: Sequence[str], token: int) -> str:
    """Return the text of a token id, or `[id]` if it has none: a head can have more rows than there are tokens."""
    return strings[token] if token < len(strings) else f"[{token}]"


def shown_units(strings: Sequence[str], ids: Sequence[int]) -> tuple[Unit, ...]:
    """Return the units of text that token ids [T] make; ids without a text are units as `token_string` has them."""
    if all(token < len(strings) for token in ids):
        return tuple(units_in(ids, strings))
    return tuple(Unit(at, at + 1, token_string(strings, token)) for at, token in enumerate(ids))


def continue_text(
    model: torch.nn.Module,
    encoder: Encoder,
    ids: torch.Tensor,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return the text of the `count` tokens that the model generates after ids [1, n]; see `continue_ids`."""
    if not count:
        return ""
    made = continue_ids(model, ids, count, temperature, seed, encoder.end)
    return encoder.tokenizer.decode(made[0].tolist(), skip_special_tokens=False)


@torch.no_grad()
def continue_ids(
    model: torch.nn.Module,
    ids: torch.Tensor,
    count: int,
    temperature: float,
    seed: int,
    padding: int,
) -> torch.Tensor:
    """Return the `count` tokens [B, count] that the model generates after ids [B, n].

    The same seed uses the same random numbers, whatever the model or its edits; the global random state is
    restored. `padding` is the id that `generate` needs for padding; nothing is padded here.
    """
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    # min_new_tokens: an end-of-text token does not end a continuation, so that all are equally long
    settings = GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, pad_token_id=padding, **sampled
    )
    mask = torch.ones_like(ids)
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _plain_generation(model):
        torch.manual_seed(seed)
        made = model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    return made[:, ids.shape[1] :]


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Suspend the model's own generation settings, such as a repetition penalty, while the context is open.

    `generate` would use them for every setting that it is not given. The special tokens stay.
    """
    before = model.generation_config
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(before, name) for name in special})
    try:
        yield
    finally:
        model.generation_config = before
