"""A short pass over a few tokens that sets bin edges, histogram range and centre of the moments.

Quantiles of all activations would need all of them in memory; those of a pilot sample are good enough as
bin edges, and every activation is then counted in its bin.

Shape legend: P tokens of the pilot sample, H neurons.
"""

import contextlib
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import SearchPlan
from cratelm.models.sites import Site, hooked
from cratelm.records import ANTHROPIC_BINS, OPENAI_QUANTILES

_PILOT_BYTES = 2**30
"""memory for the pilot sample; layers that do not fit together are processed one group after another, each with the model
run again: 256 MiB would cost 15 passes instead of 3 for both ends of SmolLM2-135M's 46,080 neurons"""


class _Collected(Exception):
    """All layers that are wanted have been seen: the rest of the model need not run."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Figures of one layer of H neurons on the pilot sample."""

    mean: torch.Tensor
    """[H]"""
    low: torch.Tensor
    """[H] lower end of the histogram: the minimum, at most 0"""
    high: torch.Tensor
    """[H] upper end of the histogram: the maximum, or low + 1 if the maximum is not above low"""
    openai_edges: torch.Tensor
    """[H, 6]"""
    anthropic_edges: torch.Tensor
    """[H, 13], all 0 if no activation was above 0"""
    openai_reach: torch.Tensor
    """[H, 5] estimated fraction of tokens at or above the lower edge of each bin; see `_reach`"""
    anthropic_reach: torch.Tensor
    """[H, 12]"""

    def to(self, device: torch.device) -> "Calibration":
        """Return the same figures on a device."""
        return Calibration(*(getattr(self, f.name).to(device) for f in fields(self)))

    def equals(self, other: "Calibration") -> bool:
        """Return whether all figures are the same."""
        return all(torch.equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    @classmethod
    def of(cls, activations: torch.Tensor) -> "Calibration":
        """Return the figures of activations [P, H] on the pilot sample."""
        ordered = _ascending(activations)
        ranks = [int(q * (len(activations) - 1)) for q in OPENAI_QUANTILES]
        low, high = ordered[:, 0].contiguous().clamp(max=0), ordered[:, -1].contiguous()
        steps = torch.arange(ANTHROPIC_BINS + 1, device=high.device) / ANTHROPIC_BINS
        openai_edges = ordered[:, ranks]
        anthropic_edges = high.clamp(min=0)[:, None] * steps
        return cls(
            mean=activations.mean(0),
            low=low,
            high=torch.where(high > low, high, low + 1),
            openai_edges=openai_edges,
            anthropic_edges=anthropic_edges,
            openai_reach=_reach(ordered, openai_edges),
            anthropic_reach=_reach(ordered, anthropic_edges),
        )


def _ascending(activations: torch.Tensor) -> torch.Tensor:
    """Return the activations [P, H] of each neuron in ascending order, [H, P]."""
    # NumPy sorts a row of floats in a fiftieth of the time that torch takes for a column (8,192 x 512, AVX-512). But it
    # leaves open which of -0.0 and 0.0, which are equal, comes first, and the edges are written as they are.
    minus_zero = torch.signbit(activations) & (activations == 0)
    if activations.is_cpu and not minus_zero.any():
        return torch.from_numpy(np.sort(activations.T.contiguous().numpy(), axis=1))
    return activations.sort(0).values.T.contiguous()


def _reach(ordered: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Return the fraction of the ascending activations [H, P] at or above each lower edge of [H, bins + 1].

    An estimate for speed alone: it says how many tokens `layer_harvest` has to look at before each bin is
    likely to be full, and never which bin a token is in. If a lower edge is 0 for all neurons of the layer,
    activations above 0 are counted, because most are exactly 0.
    """
    lower, n = edges[:, :-1].contiguous(), ordered.shape[1]
    below = torch.searchsorted(ordered, lower)  # [H, bins] activations below the edge
    at_most = torch.searchsorted(ordered, lower, right=True)
    return (n - torch.where((lower == 0).all(0), at_most, below)).float() / n


def pilot_of(plan: SearchPlan, tokens: int) -> SearchPlan:
    """Return a plan of about `tokens` tokens in sequences spread over `plan`."""
    wanted = min(len(plan.sequences), max(1, tokens // plan.room))
    chosen = plan.sequences[:: max(1, len(plan.sequences) // wanted)][:wanted]
    return replace(plan, sequences=chosen)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, site: Site, plan: SearchPlan, tokens: int, batch_tokens: int
) -> list[Calibration]:
    """Return a `Calibration` per layer, from about `tokens` tokens in sequences spread over the plan.

    Memory: the larger of 1 GiB and, for one layer, tokens * H * 4 bytes.
    """
    pilot = pilot_of(plan, tokens)
    calibrations: dict[int, Calibration] = {}
    for layers in _groups(site.n_neurons, pilot.n_tokens()):
        for layer, activations in _activations(model, site, pilot, layers, batch_tokens).items():
            calibrations[layer] = Calibration.of(torch.cat(activations))
    return [calibrations[layer] for layer in range(site.n_layers)]


def _groups(widths: tuple[int, ...], tokens: int) -> list[list[int]]:
    """Return the layers in groups that fit into the pilot's memory together."""
    groups: list[list[int]] = [[]]
    n_bytes = 0
    for layer, width in enumerate(widths):
        size = 4 * width * tokens
        if groups[-1] and n_bytes + size > _PILOT_BYTES:
            groups.append([])
            n_bytes = 0
        groups[-1].append(layer)
        n_bytes += size
    return groups


def _activations(
    model: PreTrainedModel, site: Site, plan: SearchPlan, layers: list[int], batch_tokens: int
) -> dict[int, list[torch.Tensor]]:
    """Return the activations [P, H] of text tokens of some layers, in one part per batch."""
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for batch in plan.batches(batch_tokens, model.device):
        missing = set(layers)

        def collect(
            layer: int,
            activations: torch.Tensor,
            text: torch.Tensor = batch.is_text,
            missing: set[int] = missing,
        ) -> None:
            if layer in missing:
                flat = activations.reshape(-1, activations.shape[-1]).float()
                parts[layer].append(flat[text > 0])
                missing.remove(layer)
            if not missing:
                raise _Collected

        with contextlib.suppress(_Collected), hooked(model, site, collect):
            model.base_model(input_ids=batch.input_ids, use_cache=False)
    return parts
