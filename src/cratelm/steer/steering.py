"""Edit neurons while a model runs: any supported model, also in `generate` and with its cache.

Shape legend: B rows, T tokens of a pass, S cached tokens plus T, H neurons of a layer, n neurons of an edit.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models.sites import Site, entrances, hooked, site_of
from cratelm.records import neuron_name
from cratelm.runs.arguments import checked_arguments
from cratelm.steer.edits import Edit, Operation, Positions


@checked_arguments(model=nn.Module)
@contextlib.contextmanager
def steering(
    model: PreTrainedModel, *edits: Edit, site: str | Site | None = None
) -> Iterator[None]:
    """Apply the edits, in the order given, in every pass of the model while the context is open.

    At a site with both ends, `set` sets one end and, if the number is not 0, clears the other, so that the activation
    itself is the number, or minus the number for an end `-`; `zero` removes one end and leaves the other.

    The edits also apply in `generate`, with or without the cache. Gradients flow through them (run
    `backward` inside the context if the model uses gradient checkpointing). Contexts can be nested. On exit,
    also after an exception, the model is as before.

    Raises `InputError` if the site, a layer or a neuron does not exist, and for an argument of a wrong type.
    """
    edited_site = site if isinstance(site, Site) else site_of(model, site)
    by_site_layer = _by_site_layer(edits, edited_site)
    positions = _TokenPositions()

    def on_activation(site_layer: int, activations: torch.Tensor) -> torch.Tensor | None:
        of_layer = by_site_layer.get(site_layer)
        ends = edited_site.has_both_ends
        return edited(activations, of_layer, positions, ends=ends) if of_layer else None

    with contextlib.ExitStack() as stack:
        # tracking positions costs a mask and a cumulative sum per pass, so it is done only if an edit needs it
        if not all(edit.where.everywhere for edit in edits):
            stack.enter_context(_followed(model, positions))
        stack.enter_context(hooked(model, edited_site, on_activation))
        yield


@dataclass
class _TokenPositions:
    """Positions of the tokens of the current pass; each pass overwrites them."""

    position: torch.Tensor | None = None
    """[B, T] number of real tokens before each token, -1 for padding"""
    prompt: torch.Tensor | None = None
    """[B, 1] real tokens of the prompt"""
    prompt_width: int | None = None
    """tokens per row in the input of `generate`, including padding; None outside of `generate`"""


def edited(
    activations: torch.Tensor,
    edits: Sequence[Edit],
    positions: _TokenPositions,
    *,
    ends: bool = False,
) -> torch.Tensor:
    """Return a copy of activations [B, T, H] with the edits applied one after the other; H are `ends` or neurons."""
    changed = activations.clone()
    for edit in edits:
        operation, number = edit.operation
        cleared = ()
        if ends and operation == "set" and number:
            cleared = tuple(i ^ 1 for i in edit.indices if i ^ 1 not in edit.indices)
        indices = torch.tensor(edit.indices + cleared, device=changed.device)
        old = changed[..., indices]  # [B, T, n]
        new = _OPERATIONS[operation](old, number)
        if cleared:
            new[..., len(edit.indices) :] = 0
        if not edit.where.everywhere:
            assert positions.position is not None
            assert positions.prompt is not None
            at = chosen(edit.where, positions.position, positions.prompt).to(changed.device)
            new = torch.where(at[..., None], new, old)
        # not in place: autograd needs the old values if gradients flow through an edit
        changed = changed.index_copy(-1, indices, new)
    return changed


_OPERATIONS: dict[Operation, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "set": torch.full_like,
    "add": lambda old, value: old + value,
    "scale": lambda old, value: old * value,
    "zero": torch.full_like,  # its number is 0
}


def chosen(where: Positions, position: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Return which tokens are edited, [B, T] bool.

    `position` are positions [B, T], -1 for padding; `prompt` are the lengths [B, 1] of the prompts.
    """

    def at(number: int) -> torch.Tensor:
        return prompt + number if number < 0 else torch.full_like(prompt, number)

    real = position >= 0
    if where.listed is not None:
        return real & torch.stack([position == at(n) for n in where.listed]).any(0)
    start = prompt if where.generated else at(where.start)
    inside = real & (position >= start)
    return inside if where.stop is None else inside & (position < at(where.stop))


def _by_site_layer(edits: Sequence[Edit], site: Site) -> dict[int, list[Edit]]:
    """Return the edits by index into the layers of the site.

    Raises `InputError` for a layer or neuron that does not exist, and for a neuron named twice in an edit.
    """
    by_site_layer: dict[int, list[Edit]] = {}
    for edit in edits:
        site_layer = site.place(edit.layer)
        wrong = [i for i in edit.indices if not 0 <= i < site.n_neurons[site_layer]]
        if wrong:
            ends = 2 if site.has_both_ends else 1
            raise InputError(
                f"neuron {neuron_name(wrong[0], site.name)} of layer {edit.layer} does not exist: site {site.name} has"
                f" neurons 0 to {site.n_neurons[site_layer] // ends - 1} in this layer"
            )
        if len(set(edit.indices)) < len(edit.indices):
            raise InputError(f"an edit of layer {edit.layer} names a neuron twice: name it once")
        by_site_layer.setdefault(site_layer, []).append(edit)
    return by_site_layer


@contextlib.contextmanager
def _followed(model: PreTrainedModel, positions: _TokenPositions) -> Iterator[None]:
    """While the context is open, make every pass of the model first write its positions into `positions`.

    A single pass cannot distinguish the prompt from the tokens generated after it, least of all without a
    cache, where each pass reads the whole text again. So `generate` of this object is also wrapped, and
    records the width of its prompt.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(module.forward)
        _follow(signature.bind_partial(*args, **kwargs).arguments, positions)

    # on the object, not the class, so that other models of the class are unaffected; an earlier attribute of
    # the object is restored
    generate, replaced = getattr(model, "generate", None), model.__dict__.get("generate")
    handles = [
        entrance.register_forward_pre_hook(before, with_kwargs=True)
        for entrance in entrances(model)
    ]
    try:
        if generate is not None:
            model.__dict__["generate"] = _with_prompt_width(generate, positions)
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.__dict__.pop("generate", None)
        if replaced is not None:
            model.__dict__["generate"] = replaced


def _with_prompt_width(
    generate: Callable[..., Any], positions: _TokenPositions
) -> Callable[..., Any]:
    """Return a wrapped `generate` that writes the width of its prompt into `positions` while it runs."""
    signature = inspect.signature(generate)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        arguments = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        inputs = (arguments.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((tensor for tensor in inputs if tensor is not None), None)
        positions.prompt_width = 1 if prompt is None else prompt.shape[1]  # none: a begin token
        try:
            return generate(*args, **kwargs)
        finally:
            positions.prompt_width = None

    return wrapped


def _follow(arguments: Mapping[str, Any], positions: _TokenPositions) -> None:
    """Fill `positions` from the arguments of a pass; raise `InputError` for a mask that is not [B, S]."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    assert tokens is not None
    cache = arguments.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    rows, width = tokens.shape[0], past + tokens.shape[1]  # B, S
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, width, dtype=torch.long, device=tokens.device)
    if not isinstance(mask, torch.Tensor) or mask.shape != (rows, width):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"the attention mask is {shape}, but ({rows}, {width}) is needed to distinguish padding from"
            " text: give such a mask and use the default cache, or steer all positions"
        )
    real = mask.bool()
    # the n-th real token of a row, including cached ones, has position n - 1; only the T of this pass are kept
    position = real.long().cumsum(1) - 1  # [B, S]
    positions.position = position.masked_fill(~real, -1)[:, past:]
    positions.prompt = real[:, : positions.prompt_width or width].sum(1, keepdim=True)
