"""First-order effect of a change of the last block's output on the logits, ignoring the other blocks.

    logits = U norm(h),   norm(h) = gain * (h - mean h) / s(h) + bias
    effect of d on the logits, to first order, with 1 / s at its mean:   R d = U (gain * (d - mean d)) * mean(1 / s)

This is the "logit lens" (nostalgebraist 2020), applied to a neuron's column as in Dar et al. 2023 (arXiv
2209.02535). It ignores the change of s, and every block between the neuron and the head.

Shape legend: B sequences, T positions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from cratelm.models.partial_forward import PartialForward, Trace

TOLERANCE = 0.01
"""largest allowed difference between the formula and the norm's output, relative to its largest value"""


@torch.no_grad()
def direct_logit_attribution(partial: PartialForward, trace: Trace) -> torch.Tensor | None:
    """Return R [V, D], with 1 / s averaged over the trace.

    None if the model ends in something other than a norm and a linear head. Norms differ in two ways that
    no attribute reveals (LayerNorm subtracts the mean, RMSNorm does not; Gemma stores the gain minus 1), so
    each of the four forms is compared with the norm's output.
    """
    head = partial.model.get_output_embeddings()
    final = _final_norm(partial, trace)
    if not isinstance(head, nn.Linear) or final is None:
        return None
    norm, hidden = final
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    bias = getattr(norm, "bias", None)
    expected = norm(hidden).float()
    hidden = hidden.float()
    for centred in (True, False):
        numerator = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
        inverse = numerator.pow(2).mean(-1, keepdim=True).rsqrt()  # [B, T, 1]: 1 / s
        for gain in (weight, 1 + weight):
            normed = gain * numerator * inverse + (0 if bias is None else bias)
            if (normed - expected).abs().max() <= TOLERANCE * expected.abs().max():
                matrix = head.weight * gain * inverse.mean()
                # subtracting the mean from each row of R is the same as subtracting it from every d
                return matrix - matrix.mean(-1, keepdim=True) if centred else matrix
    return None


def _final_norm(partial: PartialForward, trace: Trace) -> tuple[nn.Module, torch.Tensor] | None:
    """Return the norm that reads the last block's output [B, T, D], and that output; None if there is none.

    Models use different names for it, so it is found as the last module outside of the blocks that has "Norm"
    in its class name and gets a tensor of that shape.
    """
    last = len(partial.blocks) - 1
    inside = {id(m) for block in partial.blocks for m in block.modules()}
    called: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shape = trace.outputs[last].shape
        if args and isinstance(args[0], torch.Tensor) and args[0].shape == shape:
            called.append(module)

    norms = [
        m
        for m in partial.model.base_model.modules()
        if "Norm" in type(m).__name__ and id(m) not in inside
    ]
    handles = [m.register_forward_hook(hook) for m in norms]
    try:
        partial.model.base_model(input_ids=trace.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (called[-1], trace.outputs[last]) if called else None
