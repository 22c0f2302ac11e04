"""Continue held-out prompts in three ways: unedited, with a neuron steered, and with another steered as strongly.

"As strongly" means that the next-token distribution changes by as much, measured by the Kullback-Leibler
divergence from the unedited model, averaged over the tokens of the prompts. The activation of the other neuron
that achieves this is found by a search.

Shape legend: B prompts, T tokens of each, G tokens of a continuation, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext
from cratelm.errors import InputError
from cratelm.models.partial_forward import next_logits
from cratelm.records import NeuronId
from cratelm.steer.edits import Edit
from cratelm.steer.next_tokens import continue_ids, token_string
from cratelm.steer.steering import steering
from cratelm.steer.store import ContinuationTexts
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.tokens.shards import TokenSplit

DOUBLINGS, HALVINGS = 12, 16
"""maximum steps of the search for a strength: doubled until it is too strong, then the interval is halved"""
CLOSE = 0.05
"""relative difference of divergences at which the search stops"""


@dataclass(frozen=True)
class SteeringStrength:
    """One neuron set to a value at all positions, and the size of its effect."""

    index: int
    value: float
    """raw activation"""
    kl: float
    """divergence of the next-token distribution from the unedited one, nats per token"""


@dataclass(frozen=True, eq=False)
class Continuations:
    """The prompts and continuations for one neuron, as token ids."""

    prompts: NDArray[np.int64]
    """[B, T]"""
    plain: NDArray[np.int64]
    """[B, G]"""
    steered: NDArray[np.int64]
    """[B, G]"""
    random: NDArray[np.int64] | None
    """[B, G] with another neuron steered; None if the layer has no other"""
    strength: SteeringStrength
    other_strength: SteeringStrength | None
    """strength of that other neuron; None if there is none"""

    def texts(self, neuron: NeuronId, strings: Sequence[str]) -> list[ContinuationTexts]:
        """Return prompts and continuations as text; `strings` [V] is the text of each token id."""

        def text(ids: NDArray[np.int64]) -> str:
            return "".join(token_string(strings, int(i)) for i in ids)

        return [
            ContinuationTexts(
                neuron=neuron,
                prompt=text(prompt),
                plain=text(self.plain[row]),
                steered=text(self.steered[row]),
                random="" if self.random is None else text(self.random[row]),
            )
            for row, prompt in enumerate(self.prompts)
        ]


def draw_prompts(
    split: TokenSplit,
    eot: int,
    count: int,
    length: int,
    seed: int,
    layer: int,
    index: int,
    beginning: Beginning = PLAIN,
) -> NDArray[np.int64]:
    """Return prompts [B, T] from inside documents, drawn by seed, layer and index: twins get the same prompts.

    Every span of `length` tokens inside a document is equally likely. They are without begin tokens. Raises `InputError` if the split has no
    document of that length.
    """
    whole, begin = max(2, split.n_tokens) + beginning.extra, Beginning(beginning.token)
    plan = SearchPlan.of(split, "held_out", eot, whole, split.n_tokens, 0, begin)
    starts, stops = plan.text_spans()
    room = np.maximum(stops - starts - length + 1, 0)  # possible first tokens in each document
    if not room.sum():
        raise InputError(
            f"the held-out split has no document of {length} tokens: give fewer --prompt-tokens"
        )
    rng = np.random.default_rng([seed, layer, index])
    # All possible first tokens are numbered consecutively, document after document, and `ends` [documents] is
    # one past each document's last number. A drawn number belongs to the first document whose end is above
    # it, and its offset in that document is its distance from the end of the previous document.
    ends = np.cumsum(room)
    drawn = rng.integers(0, ends[-1], count)
    span = np.searchsorted(ends, drawn, side="right")
    first = starts[span] + drawn - (ends[span] - room[span])
    return np.stack([split.read(int(at), int(at) + length) for at in first])


def continue_prompts(
    harvested: HarvestContext,
    layer: int,
    index: int,
    value: float,
    other: int | None,
    prompts: NDArray[np.int64],
    *,
    count: int,
    temperature: float,
    seed: int,
) -> Continuations:
    """Return three continuations of the prompts [B, T] by `count` tokens, with the same random numbers.

    The neuron `index` is set to `value`; the neuron `other` is steered as strongly, unless it is None.
    """
    model = harvested.subject.model
    prefix = np.array(harvested.beginning.prefix(harvested.store.eot_id), np.int64)
    before = np.tile(prefix, (len(prompts), 1))
    ids = torch.from_numpy(np.concatenate([before, prompts], axis=1)).to(model.device)
    plain_logs = log_probs(harvested, ids, None)

    def generate(strength: SteeringStrength | None) -> NDArray[np.int64]:
        edits = (
            [] if strength is None else [_edit(harvested, layer, strength.index, strength.value)]
        )
        with steering(model, *edits, site=harvested.site):
            padding = harvested.store.eot_id
            return continue_ids(model, ids, count, temperature, seed, padding).cpu().numpy()

    strength = SteeringStrength(
        index, value, divergence(harvested, ids, layer, index, value, plain_logs)
    )
    other_strength = None
    if other is not None:
        other_strength = match_strength(
            harvested, ids, layer, other, value, strength.kl, plain_logs
        )
    return Continuations(
        prompts=prompts,
        plain=generate(None),
        steered=generate(strength),
        random=generate(other_strength) if other_strength else None,
        strength=strength,
        other_strength=other_strength,
    )


@torch.no_grad()
def log_probs(harvested: HarvestContext, ids: torch.Tensor, edit: Edit | None) -> torch.Tensor:
    """Return the log-probabilities [B, T, V] of the token after each of ids [B, T], with an edit or without."""
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
    """Return KL(steered | plain) in nats per token, with the neuron set to `value` at all tokens of the prompts.

    `plain` are the log-probabilities [B, T, V] of the unedited model. What stands before the prompts, such as a begin
    token, is neither edited nor counted.
    """
    n_before = len(harvested.beginning.prefix(harvested.store.eot_id))
    steered = log_probs(harvested, ids, _edit(harvested, layer, index, value))[:, n_before:]
    plain = plain[:, n_before:]
    # at least 0 by definition; rounding can leave a small negative sum
    return float((steered.exp() * (steered - plain)).sum(-1).mean().clamp(min=0))


def _edit(harvested: HarvestContext, layer: int, index: int, value: float) -> Edit:
    """Return the edit that sets a neuron at all tokens but those that stand before a prompt."""
    n_before = len(harvested.beginning.prefix(harvested.store.eot_id))
    return Edit(layer, index, set=value).from_position(n_before)


def match_strength(
    harvested: HarvestContext,
    ids: torch.Tensor,
    layer: int,
    index: int,
    first: float,
    target: float,
    plain: torch.Tensor,
) -> SteeringStrength:
    """Return the value of a neuron, among those tried, whose divergence is closest to `target`.

    The search tries `first`, doubles it until the target is reached, and then bisects the interval. The
    divergence need not increase with the value and may never reach the target, so the closest value tried is
    returned.
    """

    def at(value: float) -> SteeringStrength:
        kl = divergence(harvested, ids, layer, index, value, plain)
        return SteeringStrength(index, value, kl)

    low, high = 0.0, at(first)
    best = high
    for _ in range(DOUBLINGS):
        if high.kl >= target:
            break
        low, high = high.value, at(2 * high.value)
        best = min(best, high, key=lambda s: abs(s.kl - target))
    top = high.value
    for _ in range(HALVINGS):
        if abs(best.kl - target) <= CLOSE * target:
            break
        middle = at((low + top) / 2)
        low, top = (middle.value, top) if middle.kl < target else (low, middle.value)
        best = min(best, middle, key=lambda s: abs(s.kl - target))
    return best
