"""Hooks for tensors that are neither the input nor the output of a module.

    PATH:residual     the residual stream [B, T, D] after the output of the module has been added to it
    PATH:normalized   what a norm computes before it multiplies by its weight and adds its bias [B, T, D]

An edit of the residual stream changes all that the model computes from it afterwards, as an edit of TransformerLens'
`hook_resid_mid` does. (An edit of the input of the next norm would leave the stream itself as it is.)

Shape legend: B sequences, T tokens, D width of the residual stream.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cratelm.errors import InputError

Call = Callable[[torch.Tensor], torch.Tensor | None]
"""called with activations [B, T, D]; may return other ones instead"""
_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")


def residual_hooks(model: nn.Module, path: str, call: Call) -> list[Any]:
    """Register hooks that call `call` with the residual stream after the module at `path`; return their handles.

    Raises `InputError` if the module is not inside a numbered block, whose input is the stream before it.
    """
    match = _BLOCK.match(path)
    if match is None or match[0] == path:
        raise InputError(
            f"site {path}:residual is not inside a numbered block: name a module such as model.layers.*.self_attn"
        )
    before: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[:] = [args[0] if args else kwargs["hidden_states"]]

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        added, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = call(before[0] + added)
        if changed is None:
            return None
        changed = changed - before[0]
        return changed if others is None else (changed, *others)

    block = model.get_submodule(match[0])
    return [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        model.get_submodule(path).register_forward_hook(leave),
    ]


def normalized_hooks(model: nn.Module, path: str, call: Call) -> list[Any]:
    """Register a hook that calls `call` with what the norm at `path` has normalised; return its handle.

    Raises `InputError` if the module is neither a layer norm nor an RMS norm.
    """
    norm = model.get_submodule(path)
    weight = _weight(norm, path)

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        normalized = _normalized(module, args[0].float())
        changed = call(normalized.to(output.dtype))
        if changed is None:
            return None
        return output + ((changed.float() - normalized) * weight).to(output.dtype)

    return [norm.register_forward_hook(hook)]


def _normalized(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return x [..., D] minus its mean (not in an RMS norm), divided by its root mean square."""
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(module, "eps", None)
    eps = getattr(module, "variance_epsilon", 0.0) if eps is None else eps
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def _weight(module: nn.Module, path: str) -> torch.Tensor:
    """Return what the norm multiplies by [D]: its weight, or 1 plus its weight in Gemma.

    Which of them is decided by what the module returns for a random vector.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 1:
        bias = getattr(module, "bias", None)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, len(weight), generator=generator).to(weight)
        returned = module.forward(x).float()  # without hooks
        for by in (weight.float(), 1 + weight.float()):
            made = _normalized(module, x.float()) * by + (0 if bias is None else bias.float())
            if made.shape == returned.shape and torch.allclose(made, returned, 2e-2, 2e-2):
                return by
    raise InputError(
        f"site {path}:normalized is a {type(module).__name__}, which computes neither a layer norm nor an RMS norm:"
        " name the module itself"
    )
