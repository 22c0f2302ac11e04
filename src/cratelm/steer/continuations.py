"""The same beginnings continued with a neuron steered, without, and with another neuron steered as strongly.

How strongly is measured by what the steering does to the next token: the mean over the tokens of the
beginnings of the Kullback-Leibler divergence of the steered distribution from the plain one.

Shape legend: B texts, T tokens of a beginning, G tokens of a continuation, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext
from cratelm.errors import InputError
from cratelm.models.partial_forward import next_logits
from cratelm.steer.config import Edit
from cratelm.steer.steer import continue_ids
from cratelm.steer.steering import steering
from cratelm.tokens.shards import TokenSplit

DOUBLINGS, HALVINGS = 12, 16
"""steps of the search for a strength: it is doubled until it is too strong, then closed in on"""
CLOSE = 0.05
"""relative difference of divergences at which the search ends"""


@dataclass(frozen=True)
class SteeringStrength:
    """One neuron set to a value at all positions, and how much that does."""

    index: int
    value: float
    """raw activation"""
    kl: float
    """nats a token"""


@dataclass(frozen=True, eq=False)
class Continuations:
    """Of one neuron. Token ids."""

    prompts: NDArray[np.int64]
    """[B, T]"""
    plain: NDArray[np.int64]
    """[B, G]"""
    steered: NDArray[np.int64]
    """[B, G]"""
    random: NDArray[np.int64] | None
    """[B, G] with another neuron steered; None where the layer has no other"""
    push: SteeringStrength
    other: SteeringStrength | None


def prompts(
    split: TokenSplit, eot: int, count: int, length: int, seed: int, layer: int, index: int
) -> NDArray[np.int64]:
    """Beginnings [B, T] inside documents, drawn by seed and place of the neuron: twins get the same.

    Raises `InputError` where the split has no document of that length.
    """
    plan = SearchPlan.of(split, "held_out", eot, max(2, split.n_tokens), split.n_tokens, 0)
    starts, stops = plan.text_spans()
    room = np.maximum(stops - starts - length + 1, 0)
    if not room.sum():
        raise InputError(
            f"the held-out split has no document of {length} tokens: give fewer --prompt-tokens"
        )
    rng = np.random.default_rng([seed, layer, index])
    ends = np.cumsum(room)
    drawn = rng.integers(0, ends[-1], count)
    span = np.searchsorted(ends, drawn, side="right")
    first = starts[span] + drawn - (ends[span] - room[span])
    return np.stack([split.read(int(at), int(at) + length) for at in first])


def continued(
    harvested: HarvestContext,
    layer: int,
    index: int,
    value: float,
    other: int | None,
    given: NDArray[np.int64],
    *,
    count: int,
    temperature: float,
    seed: int,
) -> Continuations:
    """The beginnings [B, T] continued by `count` tokens in three ways, with the same draws.

    `value` is what the neuron is set to; `other` is the neuron that is steered as strongly.
    """
    model = harvested.subject.model
    ids = torch.from_numpy(given).to(model.device)
    plain_logs = log_probs(harvested, ids, None)

    def made(push: SteeringStrength | None) -> NDArray[np.int64]:
        edits = [] if push is None else [Edit(layer, push.index, set=push.value)]
        with steering(model, *edits, site=harvested.site):
            padding = harvested.store.eot_id
            return continue_ids(model, ids, count, temperature, seed, padding).cpu().numpy()

    push = SteeringStrength(
        index, value, divergence(harvested, ids, layer, index, value, plain_logs)
    )
    match = None
    if other is not None:
        match = match_strength(harvested, ids, layer, other, value, push.kl, plain_logs)
    return Continuations(
        prompts=given,
        plain=made(None),
        steered=made(push),
        random=made(match) if match else None,
        push=push,
        other=match,
    )


@torch.no_grad()
def log_probs(harvested: HarvestContext, ids: torch.Tensor, edit: Edit | None) -> torch.Tensor:
    """[B, T, V] of the tokens that follow each of ids [B, T]."""
    model = harvested.subject.model
    with steering(model, *([edit] if edit else []), site=harvested.site):
        return next_logits(model, ids, ids.shape[1]).float().log_softmax(-1)


def divergence(
    harvested: HarvestContext,
    ids: torch.Tensor,
    layer: int,
    index: int,
    value: float,
    plain: torch.Tensor,
) -> float:
    """KL of the distribution with the neuron set from the plain one [B, T, V], nats, mean over tokens."""
    steered = log_probs(harvested, ids, Edit(layer, index, set=value))
    return float((steered.exp() * (steered - plain)).sum(-1).mean().clamp(min=0))


def match_strength(
    harvested: HarvestContext,
    ids: torch.Tensor,
    layer: int,
    index: int,
    first: float,
    target: float,
    plain: torch.Tensor,
) -> SteeringStrength:
    """The neuron set to the value, among those tried, whose divergence is nearest to `target`.

    Tried are doublings of `first` until the divergence is reached, then halvings of the interval.
    """

    def tried(value: float) -> SteeringStrength:
        return SteeringStrength(
            index, value, divergence(harvested, ids, layer, index, value, plain)
        )

    low, high = 0.0, tried(first)
    best = high
    for _ in range(DOUBLINGS):
        if high.kl >= target:
            break
        low, high = high.value, tried(2 * high.value)
        best = min(best, high, key=lambda p: abs(p.kl - target))
    top = high.value
    for _ in range(HALVINGS):
        if abs(best.kl - target) <= CLOSE * target:
            break
        middle = tried((low + top) / 2)
        low, top = (middle.value, top) if middle.kl < target else (low, middle.value)
        best = min(best, middle, key=lambda p: abs(p.kl - target))
    return best
