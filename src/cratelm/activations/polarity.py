"""Whether neurons of a site fire one way or both ways, and when they are silent.

The activations of a ReLU, and the code of CRATE, are 0 or above: a neuron fires or is exactly 0. GELU and SiLU fall
slightly below 0, never further than a fixed bound, so only what is above 0 counts. But where an activation is multiplied
by another projection (the gated MLPs of LLaMA, Qwen, Gemma), in attention and in the residual stream, a neuron goes as
far below 0 as above it, and both ends mean something.

The function that the model applies decides where it is known; otherwise a pilot sample is measured.

Shape legend: N tokens of the pilot sample, H neurons of a layer.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cratelm.activations.batches import SearchPlan
from cratelm.models.crate import Ista
from cratelm.models.sites import Site, both_ends, hooked, without_ends

Polarity = Literal["positive", "both"]
PolarityOption = Literal["auto", "positive", "both"]
FAR = 0.1
"""a neuron goes both ways if its lowest activation is further below 0 than this fraction of its highest"""
_MOST = 0.5
"""fraction of neurons that go both ways from which the site has both ends"""
_SPARSE = 0.25
"""fraction of activations that are exactly 0 from which a neuron is taken to fire wherever it is not 0: GELU and SiLU
underflow to 0 far less often, and a ReLU gives 0 for about half or more"""
_EXACT = ("ReLU", "ReLU6", "ReLUSquaredActivation")
"""activation functions that are exactly 0 where a neuron is silent, by class name"""
_BOUNDED = (
    *("GELU", "GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation"),
    *(
        "PytorchGELUTanh",
        "GELUTanh",
        "AccurateGELUActivation",
        "BloomGelu",
        "ClippedGELUActivation",
    ),
    *("SiLU", "SiLUActivation", "Mish", "MishActivation", "Sigmoid"),
)
"""activation functions that fall below 0 by a fixed small amount at most, by class name"""
_LAST_PROJECTIONS = ("c_proj", "dense_4h_to_h", "down_proj", "fc2", "fc_out")
"""names of the projection that reads the activations of an MLP"""


@dataclass(frozen=True)
class Signs:
    """How the activations of a site are read."""

    polarity: Polarity
    """`both`: each neuron is two, one for each end"""
    polarity_reason: str
    """why, in words"""
    exact_zeros: bool
    """True if a silent neuron is exactly 0, so that it fires wherever it is above 0; False if a neuron is hardly ever 0,
    so that it fires where it reaches a fraction of its maximum"""

    def of(self, site: Site) -> Site:
        """Return the site as it is harvested."""
        return both_ends(site) if self.polarity == "both" else site

    def in_words(self) -> str:
        """Return the line that `cratelm harvest` prints."""
        fires = "above 0" if self.exact_zeros else "from a tenth of its maximum on, or less"
        return f"polarity {self.polarity} ({self.polarity_reason}); a neuron fires {fires}"

    def as_results(self) -> dict[str, Any]:
        """Return the entries of a completion record, which `read` takes."""
        return asdict(self)

    @classmethod
    def read(cls, results: Mapping[str, Any]) -> "Signs":
        """Return the signs from a completion record; those of older versions are positive, and fire above 0."""
        return cls(
            results.get("polarity", "positive"),
            results.get("polarity_reason", ""),
            results.get("exact_zeros", True),
        )


ABOVE_0 = Signs("positive", "", exact_zeros=True)
"""how older versions read all activations"""


@dataclass(frozen=True)
class _Measured:
    """What a pilot sample says about a site."""

    both_ways: float
    """fraction of neurons that go both ways"""
    zeros: float
    """fraction of activations that are exactly 0"""
    lowest: float

    @property
    def exact_zeros(self) -> bool:
        return self.zeros >= _SPARSE or (self.lowest >= 0 and self.zeros > 0)


def signs_of(
    option: PolarityOption, model: PreTrainedModel, site: Site, pilot: SearchPlan, batch_tokens: int
) -> Signs:
    """Return how the activations of `site` are read, as the option of `cratelm harvest` says.

    The `pilot` tokens are run only if the model does not say how its activations are made. `site` is without ends,
    unless its name asks for both.
    """
    if site.has_both_ends:
        option = "both"
    function = activation_function(model, site)
    if function:
        exact = not function.startswith(_BOUNDED)
        asked = "" if option == "auto" else "; as asked for"
        reason = f"{function} is never below 0" if exact else f"{function} is never far below 0"
        return Signs("positive" if option == "auto" else option, reason + asked, exact)
    measured = _measure(model, site, pilot, batch_tokens)
    share = f"{measured.both_ways:.0%} of the neurons go further below 0 than {FAR:.0%} of their maximum"
    reason = f"in a pilot sample {share}"
    if option != "auto":
        return Signs(option, f"{reason}; as asked for", measured.exact_zeros)
    return Signs(
        "both" if measured.both_ways >= _MOST else "positive", reason, measured.exact_zeros
    )


def activation_function(model: nn.Module, site: Site) -> str:
    """Return the name of the function whose results the neurons of a site are; empty if it is not known.

    It is known for latents and CRATE's code, for the output of an activation function, and for what the last
    projection of an MLP without a gate reads.
    """
    if site.autoencoders and not site.has_both_ends:
        return "the encoder of the autoencoders"
    names = {_function_of(model, path, site.side) for path in site.paths}
    return names.pop() if len(names) == 1 else ""


def _function_of(model: nn.Module, path: str, side: str) -> str:
    module, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, Ista) and module is parent.code:
        return "ReLU"
    if side == "output":
        return _name_of(module)
    children = dict(parent.named_children())
    is_last = (
        side == "input"
        and path.endswith(_LAST_PROJECTIONS)
        and isinstance(module, nn.Linear | Conv1D)
    )
    if not is_last or any("gate" in name for name in children):
        return ""
    functions = [name for child in children.values() if (name := _name_of(child))]
    return functions[0] if len(functions) == 1 else ""


def _name_of(module: nn.Module) -> str:
    name = type(module).__name__
    return name if name in (*_EXACT, *_BOUNDED) else ""


@torch.no_grad()
def _measure(model: PreTrainedModel, site: Site, pilot: SearchPlan, batch_tokens: int) -> _Measured:
    """Return the figures of the pilot sample. Memory: two numbers per neuron."""
    extremes: dict[int, torch.Tensor] = {}
    zeros = counted = 0
    for batch in pilot.batches(batch_tokens, model.device):

        def collect(
            place: int, activations: torch.Tensor, text: torch.Tensor = batch.is_text
        ) -> None:
            nonlocal zeros, counted
            rows = activations.reshape(-1, activations.shape[-1]).float()[text > 0]  # [N, H]
            if not len(rows):
                return
            found = torch.stack([rows.amin(0), rows.amax(0)])  # [2, H]
            before = extremes.get(place, found)
            extremes[place] = torch.stack(
                [torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])]
            )
            zeros += int((rows == 0).sum())
            counted += rows.numel()

        # the activations themselves, not their ends
        with hooked(model, without_ends(site), collect):
            model.base_model(input_ids=batch.input_ids, use_cache=False)
    low, high = torch.cat([extremes[place] for place in sorted(extremes)], 1)
    both_ways = (low < 0) & (-low > FAR * high)
    return _Measured(float(both_ways.float().mean()), zeros / counted, float(low.min()))
