"""Sites, where neurons live in cratelm's models or any of Hugging Face's: by name or by module path.

A site is one tensor [B, T, H] per layer: the output of a module, or its input. It is written `PATH`,
`PATH:output` or `PATH:input`, with `*` for the layer number, for instance
`gpt_neox.layers.*.mlp.dense_4h_to_h:input`. Two more sides are `PATH:residual` and `PATH:normalized`
(`site_hooks`). A name of TransformerLens, `blocks.*.hook_resid_mid`, is translated (`hook_names`). The usual
sites have names: `ista`, `mssa` and `heads` in CRATE, `mlp` (activations of the MLP, which its last projection
reads) in other models.

Neurons carry the numbers that the layers have in the model, also where only some layers have the site: in a
mixture of experts the first layer may be the only one with an MLP.

The latents of sparse autoencoders can be placed on top of a site (`cratelm.models.latents`). So can the two ends of
each activation: `mlp:both` or `PATH:input:both` is a site of 2 H neurons, max(a, 0) and max(-a, 0) of each activation
a, one after the other (`both_ends`).
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.hook_names import is_hook_name, path_of
from cratelm.models.site_hooks import normalized_hooks, residual_hooks
from cratelm.records import BOTH_ENDS, has_both_ends
from cratelm.runs.arguments import checked_arguments

Side = Literal["input", "output", "residual", "normalized"]
_SIDES: tuple[Side, ...] = ("input", "output", "residual", "normalized")

_NAMED: dict[str, tuple[str, ...]] = {
    "ista": ("model.layers.*.ista.code",),
    "mssa": ("model.layers.*.mssa.subspace",),
    "heads": ("model.layers.*.mssa.heads",),
    "mlp": (
        "transformer.h.*.mlp.c_proj:input",  # GPT-2
        "gpt_neox.layers.*.mlp.dense_4h_to_h:input",  # GPT-NeoX, Pythia
        "model.layers.*.mlp.down_proj:input",  # LLaMA, Mistral, Qwen, Gemma, OLMo
        "model.language_model.layers.*.mlp.down_proj:input",  # Gemma 3 and others that also read images
        "model.decoder.layers.*.fc2:input",  # OPT
        "model.layers.*.mlp.fc2:input",  # Phi
        "transformer.h.*.mlp.fc_out:input",  # GPT-J
        "transformer.h.*.mlp.dense_4h_to_h:input",  # Falcon, BLOOM
        "transformer.blocks.*.ffn.down_proj:input",  # MPT
    ),
}
_DEFAULTS = ("ista", "mlp", "mssa")


Hook = Callable[[int, torch.Tensor], torch.Tensor | None]
"""called with a place (number of a layer among those of the site, from 0) and its activations [B, T, H];
may return other activations instead"""


class Autoencoder(Protocol):
    """Map from activations [..., H] to latents [..., S] and back."""

    def encode(self, x: torch.Tensor, /) -> torch.Tensor:
        """Return latents [..., S] of activations [..., H]."""
        ...

    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        """Return activations [..., H] of latents [..., S]."""
        ...


class Ends:
    """Map from activations [..., H] to their ends [..., 2 H] and back, without loss."""

    def encode(self, x: torch.Tensor, /) -> torch.Tensor:
        """Return the ends [..., 2 H]: element 2 i is max(x_i, 0), element 2 i + 1 is max(-x_i, 0)."""
        # adding 0 turns the -0.0 of -x into 0.0; not finite values stay so, for whoever checks
        ends = torch.stack([x.clamp(min=0) + 0.0, (-x).clamp(min=0) + 0.0], -1)
        return ends.flatten(-2)

    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        """Return the activations [..., H] whose ends are `latents` [..., 2 H]."""
        return latents[..., 0::2] - latents[..., 1::2]


@dataclass(frozen=True)
class Site:
    """Where neurons live: one tensor per layer, for L layers."""

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
    """[L] the autoencoders whose latents are the neurons, or `Ends`; empty: the activations are the neurons"""
    is_flat: bool = False
    """whether the tensor is [B * T, H] in the model, as in OPT; hooks are called with [B, T, H] all the same"""

    @property
    def n_layers(self) -> int:
        """Return L, the number of layers that have the site."""
        return len(self.paths)

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Return the layer numbers [L] that the names of the neurons use."""
        return self.layers or tuple(range(self.n_layers))

    @property
    def has_both_ends(self) -> bool:
        """Return whether the neurons are ends of activations."""
        return bool(self.autoencoders) and isinstance(self.autoencoders[0], Ends)

    def place(self, layer: int) -> int:
        """Return the index [L] of the layer with this number. Raises `InputError` if the site lacks it."""
        if layer not in self.layer_numbers:
            raise InputError(
                f"layer {layer} does not exist: site {self.name} has the layers {layers_in_words(self.layer_numbers)}"
            )
        return self.layer_numbers.index(layer)

    def only(self, layers: tuple[int, ...]) -> "Site":
        """Return the site in some of its layers, in ascending order; empty: in all.

        Raises `InputError` if the site lacks one.
        """
        if not layers:
            return self
        missing = set(layers) - set(self.layer_numbers)
        if missing:
            raise InputError(
                f"--layers names {min(missing)}, but site {self.name} has layers {layers_in_words(self.layer_numbers)}"
            )
        places = [self.place(layer) for layer in sorted(layers)]
        of_places = (  # of what has a value per layer
            tuple(values[place] for place in places) if values else ()
            for values in (self.paths, self.n_neurons, self.layer_numbers, self.autoencoders)
        )
        paths, n_neurons, numbers, autoencoders = of_places
        return replace(
            self, paths=paths, n_neurons=n_neurons, layers=numbers, autoencoders=autoencoders
        )


def both_ends(site: Site) -> Site:
    """Return the site of both ends of the activations of `site`; a site that has both is returned as it is.

    Raises `InputError` for latents of autoencoders.
    """
    if site.has_both_ends:
        return site
    if site.autoencoders:
        raise InputError("latents of autoencoders have one end: use --polarity positive, or auto")
    return replace(
        site,
        name=f"{site.name}{BOTH_ENDS}",
        n_neurons=tuple(2 * h for h in site.n_neurons),
        autoencoders=(Ends(),) * site.n_layers,
    )


def without_ends(site: Site) -> Site:
    """Return the site whose ends `site` has: that of the activations; a site without ends is returned as it is."""
    if not site.has_both_ends:
        return site
    n_neurons = tuple(h // 2 for h in site.n_neurons)
    name = site.name.removesuffix(BOTH_ENDS)
    return replace(site, name=name, n_neurons=n_neurons, autoencoders=())


@checked_arguments(model=nn.Module)
def site_of(model: PreTrainedModel, name: str | None = None, layers: tuple[int, ...] = ()) -> Site:
    """Return the site called `name` in `model`; without a name `ista` for CRATE, `mlp` for others, else `mssa`.

    A name that ends in `:both` is that of both ends of a site. `layers` are numbers of the model's layers; empty: all that have the site. Runs the model once on a few tokens
    to determine H. Raises `InputError` if no module has that name, if its tensor is not [B, T, H], or if a layer
    lacks the site.
    """
    if name is not None and has_both_ends(name):
        return both_ends(site_of(model, name.removesuffix(BOTH_ENDS), layers))
    candidates = _DEFAULTS if name is None else (name,)
    for candidate in candidates:
        for pattern in _NAMED.get(candidate, (candidate,)):
            path, side = _parse(_path(model, pattern))
            numbered = _expand(model, path)
            if numbered:
                return _measured(model, candidate, numbered, side).only(layers)
    fused = _fused_experts(model)
    if fused and (name is None or name in _NAMED):
        raise InputError(
            f"{type(model).__name__} has no site {name or 'ista or mlp'!r}: {fused} holds all experts in one tensor,"
            " so that no module reads the neurons of one expert; name a module path with * for the layer, such as"
            f" {re.sub(r'[.][0-9]+[.]', '.*.', fused.rpartition('.')[0], count=1)!r}, the output of all experts"
        )
    raise InputError(
        f"{type(model).__name__} has no site {name or 'ista, mlp or mssa'!r}: name one of"
        f" {', '.join(_NAMED)} or a module path with * for the layer, such as"
        f" {_example(model)!r}"
    )


def partial_note(model: nn.Module, site: Site) -> str:
    """Return a sentence that says which layers have the site; empty if all layers of the model have it."""
    match = _BLOCK.match(site.paths[0])
    total = len(list(model.get_submodule(match[1]).children())) if match else site.n_layers
    if site.n_layers == total:
        return ""
    return f"site {site.name} is in {site.n_layers} of {total} layers: {layers_in_words(site.layer_numbers)}"


_BLOCK = re.compile(r"(.*?)\.(\d+)(?=\.|$)")
"""path of the list of blocks, and number of the block"""


def layers_in_words(numbers: tuple[int, ...]) -> str:
    """Return ascending numbers with runs shortened, such as `0, 2 to 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _fused_experts(model: nn.Module) -> str:
    """Return the name of the first module that holds the weights of all experts in one tensor; empty: none."""
    for name, module in model.named_modules():
        fused = any(p.dim() == 3 for p in module.parameters(recurse=False))
        if fused and name.endswith("experts"):
            return name
    return ""


@contextlib.contextmanager
def hooked(model: nn.Module, site: Site | str, on_activation: Hook) -> Iterator[None]:
    """Call `on_activation(place, activations [B, T, H])` in every forward pass while open.

    `site`: a site, or a name for `site_of`.

    `place` counts the tensors of the site; it equals the layer number only if the site has all layers. If
    `on_activation` returns a tensor, this replaces the activations. For latents, their change is decoded
    and added to the activations, so that what the autoencoder cannot reconstruct stays as it is. Hooks
    are removed even after an error.
    """
    site = site_of(cast(PreTrainedModel, model), site) if isinstance(site, str) else site
    if site.autoencoders:
        on_activation = _through(site.autoencoders, on_activation)
    handles = []
    if site.is_flat:
        on_activation, follow = _unflattened(on_activation, site)
        for entrance in entrances(model):
            handles.append(entrance.register_forward_pre_hook(follow, with_kwargs=True))
    try:
        for layer, path in enumerate(site.paths):
            module = model.get_submodule(path)
            if site.side == "output":
                hook = _output_hook(layer, on_activation)
                handles.append(module.register_forward_hook(hook))
            elif site.side != "input":
                register = residual_hooks if site.side == "residual" else normalized_hooks
                handles += register(model, path, partial(on_activation, layer))
            else:
                handles.append(module.register_forward_pre_hook(_input_hook(layer, on_activation)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _through(autoencoders: tuple[Autoencoder, ...], on_latents: Hook) -> Hook:
    """Return a hook for activations that calls a hook for their latents."""

    def on_activation(place: int, activations: torch.Tensor) -> torch.Tensor | None:
        autoencoder = autoencoders[place]
        latents = autoencoder.encode(activations)  # [B, T, S]
        changed = on_latents(place, latents)
        if changed is None:
            return None
        if isinstance(autoencoder, Ends):  # nothing is lost: the ends decode exactly
            return autoencoder.decode(changed)
        change = autoencoder.decode(changed) - autoencoder.decode(latents)
        return activations + change.to(activations.dtype)

    return on_activation


def entrances(model: nn.Module) -> list[nn.Module]:
    """Return the modules that may be called with token ids: the model, and its base model.

    OPT with a head calls the decoder in its base model, and never the base model itself.
    """
    base = getattr(model, "base_model", model)
    return [model] if base is model else [model, base]


def _unflattened(on_activation: Hook, site: Site) -> tuple[Hook, Callable[..., None]]:
    """Return a hook for activations [B * T, H], and one for the model's inputs, which tell it B and T."""
    shape = torch.Size([0, 0])

    def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        shape = next(x.shape[:2] for x in inputs if isinstance(x, torch.Tensor))

    def on_flat(place: int, activations: torch.Tensor) -> torch.Tensor | None:
        if len(activations) != shape.numel():
            raise InputError(
                f"site {site.name} has {len(activations)} vectors for {shape.numel()} tokens: name a module that"
                " returns one vector per token"
            )
        changed = on_activation(place, activations.unflatten(0, shape))
        return None if changed is None else changed.flatten(0, 1)

    return on_flat, follow


def _output_hook(layer: int, on_activation: Hook):
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tensor, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = on_activation(layer, tensor)
        if changed is None or others is None:
            return changed
        return (changed, *others)

    return hook


def _input_hook(layer: int, on_activation: Hook):
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = on_activation(layer, args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


@checked_arguments(model=nn.Module)
@torch.no_grad()
def capture(
    model: PreTrainedModel, site: Site | str, input_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Return activations [B, T, H] of every layer on input_ids [B, T], all in memory, without the head.

    `site`: a site, or a name for `site_of`.
    """
    site = site_of(model, site) if isinstance(site, str) else site
    captured: list[torch.Tensor] = []
    with hooked(model, site, lambda layer, a: captured.append(a.detach().clone())):
        model.base_model(input_ids=input_ids, use_cache=False)
    return captured


def _path(model: nn.Module, pattern: str) -> str:
    """Return the path that a name of TransformerLens stands for, any other pattern as it is."""
    if not is_hook_name(pattern):
        return pattern
    path, layer = path_of(model, pattern)
    return path if ".*." in pattern else path.replace("*", str(layer))


def _parse(pattern: str) -> tuple[str, Side]:
    path, _, named = pattern.partition(":")
    sides: list[Side] = [side for side in _SIDES if side == (named or "output")]
    if not sides:
        raise InputError(
            f"site {pattern!r} ends in {named!r}: it must end in one of {', '.join(_SIDES)}"
        )
    return path, sides[0]


def _expand(model: nn.Module, path: str) -> list[tuple[int, str]]:
    """Return the numbers of the layers and the modules that `path` names, in order; empty if there is none.

    Without `*`, the first number in the path is that of the layer.
    """
    pattern = re.compile(re.escape(path).replace(r"\*", r"(\d+)"))
    if path.count("*") > 1:
        raise InputError(f"site {path!r} has more than one *: only the layer number varies")
    numbered = []
    for name, _ in model.named_modules():
        match = pattern.fullmatch(name)
        if match:
            number = _BLOCK.match(name)
            layer = match.group(1) if match.groups() else number[2] if number else 0
            numbered.append((int(layer), name))
    return sorted(numbered)


def _measured(
    model: PreTrainedModel, name: str, numbered: list[tuple[int, str]], side: Side
) -> Site:
    """Return the site of these layers and modules, with the widths and shape that they have on a few tokens."""
    numbers, paths = zip(*numbered, strict=True)
    every = numbers == tuple(range(len(numbers)))
    site = Site(name, paths, side, (), () if every else numbers)
    device = next(model.parameters()).device
    # More than one token, so that a vector for some of the tokens is not taken for one per token.
    tokens = torch.arange(_TRIAL[0] * _TRIAL[1], device=device).view(_TRIAL)
    tensors = capture(model, site, tokens % model.config.get_text_config().vocab_size)
    if len(tensors) < len(paths):
        raise InputError(
            f"{len(paths) - len(tensors)} of {len(paths)} modules of site {paths[0]!r} did not run on a few tokens, such"
            " as experts that these are not sent to: name a module that runs on every token"
        )
    shapes = sorted({tuple(t.shape[:-1]) for t in tensors})
    flat = (_TRIAL[0] * _TRIAL[1],)
    if len(tensors) != len(paths) or shapes not in ([_TRIAL], [flat]):
        found = sorted({tuple(t.shape) for t in tensors})
        raise InputError(
            f"site {paths[0]!r} has shapes {found} on tokens {list(_TRIAL)} and not {[*_TRIAL, 'neurons']}:"
            " name a module that returns one vector per token"
        )
    widths = tuple(t.shape[-1] for t in tensors)
    return replace(site, n_neurons=widths, is_flat=shapes == [flat])


_TRIAL = (2, 3)
"""sequences and tokens of the pass that determines the shape of a site"""


def _example(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name):
            return re.sub(r"\.\d+\.", ".*.", name, count=1) + ":input"
    return "layers.*.mlp"
