"""Where neurons live in a model, ours or any of Hugging Face's: a name, or a module path.

A site is one tensor [B, T, H] a layer: what a module puts out, or what it takes in. It is written
`PATH`, `PATH:output` or `PATH:input`, with `*` in the place of the layer number, for instance
`gpt_neox.layers.*.mlp.dense_4h_to_h:input`. Names stand for the usual ones: `ista`, `mssa` and
`heads` in CRATE, `mlp` (activations of the MLP, what its last projection takes in) in the rest.

On top of a site can stand the latents of sparse autoencoders (`cratelm.models.latents`).
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError

Side = Literal["input", "output"]

_NAMED: dict[str, tuple[str, ...]] = {
    "ista": ("model.layers.*.ista.code",),
    "mssa": ("model.layers.*.mssa.subspace",),
    "heads": ("model.layers.*.mssa.heads",),
    "mlp": (
        "transformer.h.*.mlp.c_proj:input",  # GPT-2
        "gpt_neox.layers.*.mlp.dense_4h_to_h:input",  # GPT-NeoX, Pythia
        "model.layers.*.mlp.down_proj:input",  # LLaMA, Mistral, Qwen, Gemma, OLMo
        "model.decoder.layers.*.fc2:input",  # OPT
        "model.layers.*.mlp.fc2:input",  # Phi
        "transformer.h.*.mlp.fc_out:input",  # GPT-J
        "transformer.h.*.mlp.dense_4h_to_h:input",  # Falcon, BLOOM
    ),
}
_DEFAULTS = ("ista", "mlp")


Hook = Callable[[int, torch.Tensor], torch.Tensor | None]
"""what is called with the number of a place and its activations [B, T, H], and may return others"""


class Autoencoder(Protocol):
    """What stands between activations [..., H] and latents [..., S]."""

    def encode(self, x: torch.Tensor, /) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Site:
    """One place a layer where neurons live."""

    name: str
    """as the user wrote it"""
    paths: tuple[str, ...]
    """[L] module of each layer"""
    side: Side
    n_neurons: tuple[int, ...]
    """[L] H of each layer"""
    layers: tuple[int, ...] = ()
    """[L] numbers of the layers in the model; empty: 0, 1, 2 ..."""
    autoencoders: tuple[Autoencoder, ...] = field(default=(), repr=False, compare=False)
    """[L] those whose latents are the neurons; empty: the activations themselves are"""

    @property
    def n_layers(self) -> int:
        return len(self.paths)

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """[L] as the neurons are named by."""
        return self.layers or tuple(range(self.n_layers))


def site_of(model: PreTrainedModel, name: str | None = None) -> Site:
    """The site called `name` in `model`; without a name `ista` for CRATE, `mlp` for others.

    Runs the model once on one token to learn H. Raises `InputError` where no module is of that
    name or where what it carries is not [B, T, H].
    """
    candidates = _DEFAULTS if name is None else (name,)
    for candidate in candidates:
        for pattern in _NAMED.get(candidate, (candidate,)):
            path, side = _parse(pattern)
            paths = _expand(model, path)
            if paths:
                return Site(candidate, paths, side, _widths(model, paths, side))
    raise InputError(
        f"{type(model).__name__} has no site {name or 'ista or mlp'!r}: name one of"
        f" {', '.join(_NAMED)} or a module path with * for the layer, such as"
        f" {_example(model)!r}"
    )


@contextlib.contextmanager
def hooked(model: nn.Module, site: Site, see: Hook) -> Iterator[None]:
    """While open, `see(place, activations [B, T, H])` is called in every forward pass.

    `place` counts the places of the site, which are its layers where it has them all. What `see`
    returns, where not None, takes the place of the activations; of latents, their change is decoded
    and added, so that what the autoencoder cannot rebuild stays as it is. Hooks are removed whatever
    happens inside.
    """
    if site.autoencoders:
        see = _through(site.autoencoders, see)
    handles = []
    try:
        for layer, path in enumerate(site.paths):
            module = model.get_submodule(path)
            if site.side == "output":
                hook = _output_hook(layer, see)
                handles.append(module.register_forward_hook(hook))
            else:
                handles.append(module.register_forward_pre_hook(_input_hook(layer, see)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _through(autoencoders: tuple[Autoencoder, ...], see: Hook) -> Hook:
    """`see` of latents as one of the activations below them."""

    def see_below(place: int, activations: torch.Tensor) -> torch.Tensor | None:
        autoencoder = autoencoders[place]
        latents = autoencoder.encode(activations)  # [B, T, S]
        changed = see(place, latents)
        if changed is None:
            return None
        return activations + autoencoder.decode(changed) - autoencoder.decode(latents)

    return see_below


def _output_hook(layer: int, see: Hook):
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tensor, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = see(layer, tensor)
        if changed is None or rest is None:
            return changed
        return (changed, *rest)

    return hook


def _input_hook(layer: int, see: Hook):
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = see(layer, args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


@torch.no_grad()
def capture(
    model: PreTrainedModel, site: Site | str, input_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Activations [B, T, H] of every layer on input_ids [B, T], the head left out; all kept in memory.

    `site`: a site, or its name as `site_of` takes it.
    """
    site = site_of(model, site) if isinstance(site, str) else site
    found: list[torch.Tensor] = []
    with hooked(model, site, lambda layer, a: found.append(a.detach().clone())):
        model.base_model(input_ids=input_ids, use_cache=False)
    return found


def _parse(pattern: str) -> tuple[str, Side]:
    path, _, side = pattern.partition(":")
    if side not in ("", "input", "output"):
        raise InputError(f"site {pattern!r} ends in {side!r}: 'input' or 'output' was expected")
    return path, "input" if side == "input" else "output"


def _expand(model: nn.Module, path: str) -> tuple[str, ...]:
    """Modules that `path` names, by layer number; empty where there is none."""
    pattern = re.compile(re.escape(path).replace(r"\*", r"(\d+)"))
    if path.count("*") > 1:
        raise InputError(f"site {path!r} has more than one *: only the layer number varies")
    found = []
    for name, _ in model.named_modules():
        match = pattern.fullmatch(name)
        if match:
            found.append((int(match.group(1)) if match.groups() else 0, name))
    return tuple(name for _, name in sorted(found))


def _widths(model: PreTrainedModel, paths: tuple[str, ...], side: Side) -> tuple[int, ...]:
    site = Site("", paths, side, ())
    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    tensors = capture(model, site, token)
    if len(tensors) != len(paths) or any(t.dim() != 3 for t in tensors):
        shapes = sorted({tuple(t.shape) for t in tensors})
        raise InputError(
            f"site {paths[0]!r} carries shapes {shapes} on one token, [1, 1, neurons] was expected:"
            " name a module that puts out one vector a token"
        )
    return tuple(t.shape[-1] for t in tensors)


def _example(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name):
            return re.sub(r"\.\d+\.", ".*.", name, count=1) + ":input"
    return "layers.*.mlp"
