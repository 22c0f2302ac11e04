"""The plain first-order reading: what a change of the last block's output does to the logits.

    logits = U norm(h),   norm(h) = gain * (h - mean h) / s(h) + bias
    effect of d on the logits, first order, s held at its average:   R d = U (gain * (d - mean d)) * mean(1 / s)

(the "logit lens" of nostalgebraist, 2020, applied to a neuron's column as in Dar et al. 2023, arXiv
2209.02535). It leaves out the change of s, and every block between the neuron and the end.

Shape legend: B sequences, T positions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from cratelm.models.partial_forward import PartialForward, Trace

TOLERANCE = 0.01
"""largest difference between the formula and the norm itself, relative to the norm's largest value"""


@torch.no_grad()
def direct_logit_attribution(rest: PartialForward, trace: Trace) -> torch.Tensor | None:
    """R [V, D], s averaged over the trace; None where the model ends otherwise than in a norm and a head."""
    head = rest.model.get_output_embeddings()
    found = _final_norm(rest, trace)
    if not isinstance(head, nn.Linear) or found is None:
        return None
    norm, hidden = found
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    bias = getattr(norm, "bias", None)
    wanted = norm(hidden).float()
    hidden = hidden.float()
    for centred in (True, False):
        middle = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
        inverse = middle.pow(2).mean(-1, keepdim=True).rsqrt()  # [B, T, 1] 1 / s
        for gain in (weight, 1 + weight):  # Gemma's norms keep the gain less 1
            told = gain * middle * inverse + (0 if bias is None else bias)
            if (told - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
                matrix = head.weight * gain * inverse.mean()
                return matrix - matrix.mean(-1, keepdim=True) if centred else matrix
    return None


def _final_norm(rest: PartialForward, trace: Trace) -> tuple[nn.Module, torch.Tensor] | None:
    """The norm that reads the last block's output [B, T, D], and that; None where there is none."""
    last = len(rest.blocks) - 1
    inside = {id(m) for block in rest.blocks for m in block.modules()}
    seen: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (
            args
            and isinstance(args[0], torch.Tensor)
            and args[0].shape == trace.outputs[last].shape
        ):
            seen.append(module)

    norms = [
        m
        for m in rest.model.base_model.modules()
        if "Norm" in type(m).__name__ and id(m) not in inside
    ]
    handles = [m.register_forward_hook(hook) for m in norms]
    try:
        rest.model.base_model(input_ids=trace.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (seen[-1], trace.outputs[last]) if seen else None
