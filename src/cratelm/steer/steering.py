"""Neurons edited while a model runs, in any supported model, in `generate` and with its cache too.

Shape legend: B rows, T tokens of a pass, S tokens that the cache holds and T, H neurons of a layer.
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
from cratelm.models.sites import Site, hooked, site_of
from cratelm.steer.edits import Edit, Positions


@contextlib.contextmanager
def steering(
    model: PreTrainedModel, *edits: Edit, site: str | Site | None = None
) -> Iterator[None]:
    """While open, every pass of the model runs with the edits, in the order given.

    They act in `generate` as well, and with the cache as without it; gradients flow through them
    (run `backward` inside where the model checkpoints its gradients). Contexts nest. On leaving,
    however that happens, the model is as before.

    Raises `InputError` where the site, a layer or a neuron does not exist.
    """
    found = site if isinstance(site, Site) else site_of(model, site)
    by_place = _by_place(edits, found)
    text = _Text()

    def see(place: int, activations: torch.Tensor) -> torch.Tensor | None:
        mine = by_place.get(place)
        return edited(activations, mine, text) if mine else None

    with contextlib.ExitStack() as stack:
        if not all(edit.where.everywhere for edit in edits):
            stack.enter_context(_followed(model, text))
        stack.enter_context(hooked(model, found, see))
        yield


@dataclass
class _Text:
    """Where the tokens of the pass that is running stand."""

    position: torch.Tensor | None = None
    """[B, T] real tokens before each, -1 for padding"""
    prompt: torch.Tensor | None = None
    """[B, 1] real tokens of the prompt"""
    prompt_width: int | None = None
    """tokens of each row that `generate` was given, padding counted; None outside of it"""


def edited(activations: torch.Tensor, edits: Sequence[Edit], text: _Text) -> torch.Tensor:
    """A copy of [B, T, H] with the edits made."""
    changed = activations.clone()
    for edit in edits:
        indices = torch.tensor(edit.indices, device=changed.device)
        old = changed[..., indices]  # [B, T, n]
        new = _OPERATIONS[edit.operation[0]](old, edit.operation[1])
        if not edit.where.everywhere:
            assert text.position is not None
            assert text.prompt is not None
            here = chosen(edit.where, text.position, text.prompt).to(changed.device)
            new = torch.where(here[..., None], new, old)
        changed = changed.index_copy(-1, indices, new)
    return changed


_OPERATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "set": torch.full_like,
    "add": lambda old, value: old + value,
    "scale": lambda old, value: old * value,
    "zero": torch.full_like,
}


def chosen(where: Positions, position: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """[B, T] bool, from positions [B, T] (-1 for padding) and the prompts' lengths [B, 1]."""

    def at(number: int) -> torch.Tensor:
        return prompt + number if number < 0 else torch.full_like(prompt, number)

    real = position >= 0
    if where.listed is not None:
        return real & torch.stack([position == at(n) for n in where.listed]).any(0)
    start = prompt if where.generated else at(where.start)
    inside = real & (position >= start)
    return inside if where.stop is None else inside & (position < at(where.stop))


def _by_place(edits: Sequence[Edit], site: Site) -> dict[int, list[Edit]]:
    """Edits of each place of the site. Raises `InputError` for a layer or neuron that is not there."""
    numbers = site.layer_numbers
    found: dict[int, list[Edit]] = {}
    for edit in edits:
        if edit.layer not in numbers:
            raise InputError(
                f"layer {edit.layer}: site {site.name} has the layers"
                f" {', '.join(map(str, numbers))}"
            )
        place = numbers.index(edit.layer)
        wrong = [i for i in edit.indices if not 0 <= i < site.n_neurons[place]]
        if wrong:
            raise InputError(
                f"neuron {wrong[0]} of layer {edit.layer}: site {site.name} has neurons 0 to"
                f" {site.n_neurons[place] - 1} there"
            )
        if len(set(edit.indices)) < len(edit.indices):
            raise InputError(
                f"an edit of layer {edit.layer} names a neuron twice: once was expected"
            )
        found.setdefault(place, []).append(edit)
    return found


@contextlib.contextmanager
def _followed(model: PreTrainedModel, text: _Text) -> Iterator[None]:
    """While open, `text` tells of every pass where its tokens stand.

    A pass alone does not tell a prompt from what was generated after it, least of all without a
    cache, where each pass reads the whole text: so `generate` of this object is wrapped, too.
    """
    base = model.base_model
    signature = inspect.signature(base.forward)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _place(signature.bind_partial(*args, **kwargs).arguments, text)

    inner, own = getattr(model, "generate", None), model.__dict__.get("generate")
    handle = base.register_forward_pre_hook(before, with_kwargs=True)
    try:
        if inner is not None:
            model.__dict__["generate"] = _told(inner, text)
        yield
    finally:
        handle.remove()
        model.__dict__.pop("generate", None)
        if own is not None:
            model.__dict__["generate"] = own


def _told(generate: Callable[..., Any], text: _Text) -> Callable[..., Any]:
    """`generate` that tells `text` how wide its prompt is."""
    signature = inspect.signature(generate)

    def told(*args: Any, **kwargs: Any) -> Any:
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        inputs = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((tensor for tensor in inputs if tensor is not None), None)
        text.prompt_width = 1 if prompt is None else prompt.shape[1]
        try:
            return generate(*args, **kwargs)
        finally:
            text.prompt_width = None

    return told


def _place(given: Mapping[str, Any], text: _Text) -> None:
    """Fills `text` from the arguments of a pass. Raises `InputError` for a mask of another form."""
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    assert tokens is not None
    cache = given.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    rows, width = tokens.shape[0], past + tokens.shape[1]  # B, S
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, width, dtype=torch.long, device=tokens.device)
    if not isinstance(mask, torch.Tensor) or mask.shape != (rows, width):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"the attention mask is {shape}, ({rows}, {width}) was expected, which tells padding from"
            " text: give such a mask and the default cache, or steer all positions"
        )
    real = mask.bool()
    position = real.long().cumsum(1) - 1  # [B, S]
    text.position = position.masked_fill(~real, -1)[:, past:]
    text.prompt = real[:, : text.prompt_width or width].sum(1, keepdim=True)
