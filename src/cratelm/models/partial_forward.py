"""Run only the blocks after a layer, replaying stored outputs of the earlier ones.

Running the whole model again for every neuron repeats all computation that precedes the neuron. Here the
blocks before the edit return what they returned in one plain pass, and the model's own code runs the
others.

Why replaying outputs works: a block of a decoder reads the residual stream that the previous block
returned, and nothing else from earlier blocks (without a key-value cache, as here). So if a block returns
its stored output, the outputs of the blocks before it are never used; they return their own input, which
costs nothing. The model computes masks, position encodings, norms and head as always, whatever its
architecture. A loop over blocks, written here, would have to know each architecture.

If a neuron writes a row of a matrix that is added to the block's output (D in CRATE, the MLP's last
projection elsewhere), the edited output of the block is a rank-one change of the stored output, and the
neuron's own block need not run either. This is checked on each layer, not assumed: if a norm follows the
projection, as in Gemma 2, or if the site is in the attention, the block runs with a hook.

Measured on the demo's models of two layers, it is 1.8 (CRATE) and 1.9 (GPT-2) times as fast as a whole
pass per neuron (`benchmarks/effects.py`). The gain grows with the number of blocks before the neuron.

Shape legend: B sequences, T positions, D width, H neurons, V vocabulary, n rows (a row is one sequence
with one neuron edited). A place is the number of a layer among the layers of the site, from 0.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cratelm.errors import InputError
from cratelm.models.crate import Ista
from cratelm.models.sites import Site, hooked

_Run = Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor]
"""runs the model on ids [n, T] if a block returns these hidden states, and returns logits or hidden states"""
TOLERANCE = 1e-3
"""largest difference between the rank-one change and the hook, relative to what the edit changes"""


def next_logits(model: Any, tokens: torch.Tensor, last: int) -> torch.Tensor:
    """Return logits [B, last, V] after each of the last `last` tokens of [B, n].

    The others are not computed if the model supports `logits_to_keep`.
    """
    is_supported = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": last} if is_supported else {}
    return model(input_ids=tokens, use_cache=False, **keep).logits[:, -last:]


@torch.no_grad()
def plain_head(model: Any) -> torch.Tensor | None:
    """Return the weights [V, D] by which the model makes logits of its hidden states; None if it does more than that.

    This is checked on 6 random tokens.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 6), generator=generator).to(head.weight.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = next_logits(model, ids, 6).float()
    weight = head.weight.detach().float()
    is_plain = torch.allclose(hidden.float() @ weight.T, logits, rtol=1e-3, atol=1e-3)
    return weight if is_plain else None


@dataclass(frozen=True, eq=False)
class Trace:
    """Stored results of one plain pass."""

    ids: torch.Tensor
    """[B, T]"""
    outputs: dict[int, torch.Tensor]
    """[B, T, D] of each block, by its number"""
    activations: list[torch.Tensor]
    """[B, T, H] at each place of the site"""
    before: dict[int, list[Any]] = field(default_factory=dict)
    """by place: outputs of modules that run before the site (`cratelm.replace.prefix`)"""

    def by_token(self, block: int) -> "Trace":
        """Return the trace with the output of `block` as sequences of one token.

        It is meant for the last block, after which the model treats each token separately.
        """
        flat = self.outputs[block].flatten(0, 1)[:, None]  # [B * T, 1, D]
        return Trace(self.ids.reshape(-1, 1), {block: flat}, [])


class PartialForward:
    """Forward passes that begin at a layer of a site.

    Raises `InputError` if the site is not in a numbered block.
    """

    def __init__(self, model: Any, site: Site):
        self.model, self.site = model, site
        matches = [re.match(r"(.*?)\.(\d+)(?=\.|$)", path) for path in site.paths]
        parents = {m[1] for m in matches if m}
        if None in matches or len(parents) != 1:
            raise InputError(
                f"site {site.name} is not in a numbered block: name a path with * for the layer"
            )
        self.blocks: list[nn.Module] = list(model.get_submodule(parents.pop()).children())
        self.block_numbers = [int(m[2]) for m in matches if m]
        """block of each place of the site"""
        self._returns_tuple: dict[int, bool] = {}
        """by block: blocks of some architectures return a tuple, and so must their replacements"""
        self.writes: list[torch.Tensor | None] = [None] * len(site.paths)
        """[H, D] by place: what each neuron adds to its block's output per unit of activation; None if
        that is not constant"""
        for place, path in enumerate(site.paths):
            self.writes[place] = self._checked(place, write_directions(model, site, path))

    @cached_property
    def head(self) -> torch.Tensor | None:
        """Return the weights [V, D] that make logits of hidden states, see `plain_head`."""
        return plain_head(self.model)

    def is_last(self, place: int) -> bool:
        """Return whether the block of a place is the last one."""
        return self.block_numbers[place] == len(self.blocks) - 1

    @torch.no_grad()
    def trace(self, ids: torch.Tensor) -> Trace:
        """Run one plain pass over ids [B, T], without the head, and return what it stored."""
        outputs: dict[int, torch.Tensor] = {}
        activations: dict[int, torch.Tensor] = {}

        def store(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._returns_tuple[number] = isinstance(output, tuple)
                outputs[number] = output[0] if isinstance(output, tuple) else output

            return hook

        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(store(number)).remove)
            stack.enter_context(hooked(self.model, self.site, activations.__setitem__))
            self.model.base_model(input_ids=ids, use_cache=False)
        return Trace(ids, outputs, [activations[place] for place in range(self.site.n_layers)])

    def plain(self, trace: Trace, last: int | None = None) -> torch.Tensor:
        """Return logits [B, last, V] of the last positions (None: all) without an edit."""
        block = max(trace.outputs)
        return self._logits(trace.ids, block, trace.outputs[block], last)

    def plain_hidden(self, trace: Trace) -> torch.Tensor:
        """Return the hidden states [B, T, D] that the head reads, without an edit."""
        block = max(trace.outputs)
        return self._hidden(trace.ids, block, trace.outputs[block])

    def edited(
        self,
        trace: Trace,
        place: int,
        rows: torch.Tensor,
        neurons: torch.Tensor,
        delta: torch.Tensor,
        last: int | None = None,
    ) -> torch.Tensor:
        """Return logits [n, last, V] with `delta` [n, T] added to one neuron in each row.

        Row i is sequence `rows[i]` with neuron `neurons[i]` changed; both [n].
        """
        return self._edited(trace, place, rows, neurons, delta, partial(self._logits, last=last))

    def edited_hidden(
        self,
        trace: Trace,
        place: int,
        rows: torch.Tensor,
        neurons: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor:
        """Return the hidden states [n, T, D] that the head reads, with the edits of `edited`."""
        return self._edited(trace, place, rows, neurons, delta, self._hidden)

    def _edited(
        self,
        trace: Trace,
        place: int,
        rows: torch.Tensor,
        neurons: torch.Tensor,
        delta: torch.Tensor,
        run: _Run,
    ) -> torch.Tensor:
        block, ids, writes = self.block_numbers[place], trace.ids[rows], self.writes[place]
        if writes is not None:
            hidden = trace.outputs[block][rows] + delta[..., None] * writes[neurons][:, None]
            return run(ids, block, hidden)
        return self._edited_by_hook(trace, place, rows, neurons, delta, run)

    @torch.no_grad()
    def _edited_by_hook(
        self,
        trace: Trace,
        place: int,
        rows: torch.Tensor,
        neurons: torch.Tensor,
        delta: torch.Tensor,
        run: _Run,
    ) -> torch.Tensor:
        """Return the same by running the block of the place on the stored output of the previous block."""
        row = torch.arange(len(rows), device=rows.device)

        def add(hooked_place: int, activations: torch.Tensor) -> torch.Tensor | None:
            if hooked_place != place:
                return None
            changed = activations.clone()
            changed[row, :, neurons] += delta
            return changed

        before = self.block_numbers[place] - 1
        hidden = trace.outputs[before][rows] if before >= 0 else None
        with hooked(self.model, self.site, add):
            return run(trace.ids[rows], before, hidden)

    @torch.no_grad()
    def _logits(
        self, ids: torch.Tensor, block: int, hidden: torch.Tensor | None, last: int | None = None
    ) -> torch.Tensor:
        """Return logits [n, last, V] if `block` returns `hidden` [n, T, D]; block -1 is a plain pass."""
        with self.replayed(block, hidden):
            return next_logits(self.model, ids, last or ids.shape[1]).float()

    @torch.no_grad()
    def _hidden(self, ids: torch.Tensor, block: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """Return the hidden states [n, T, D] after all blocks if `block` returns `hidden`."""
        with self.replayed(block, hidden):
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()

    @contextlib.contextmanager
    def replayed(self, block: int, hidden: torch.Tensor | None) -> Iterator[None]:
        """Make `block` return `hidden`, and the blocks before it their own input, while open; block -1 changes nothing."""
        patched = self.blocks[: block + 1]
        outputs = (hidden if number == block else None for number in range(len(patched)))
        forwards = [_block(of, self._returns_tuple[i]) for i, of in enumerate(outputs)]
        with _patched(patched, forwards):
            yield

    def _checked(self, place: int, writes: torch.Tensor | None) -> torch.Tensor | None:
        """Return `writes` if changing a neuron by it gives the logits that the hook gives, else None.

        This is checked on 6 random tokens and 2 random neurons, with steps of both signs that are larger
        than any activation.
        """
        if writes is None:
            return None
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, 6), generator=generator).to(writes.device)
        trace = self.trace(ids)
        size = trace.activations[place].abs().max() + 1
        neurons = torch.randint(len(writes), (2,), generator=generator).to(writes.device)
        rows = torch.zeros(2, dtype=torch.long, device=writes.device)
        delta = size * torch.linspace(-1, 1, 6, device=writes.device).expand(2, 6)
        by_hook = self._edited_by_hook(trace, place, rows, neurons, delta, self._logits)
        hidden = trace.outputs[self.block_numbers[place]][rows]
        hidden = hidden + delta[..., None] * writes[neurons][:, None]
        rank_one = self._logits(ids[rows], self.block_numbers[place], hidden)
        change = (by_hook - self.plain(trace)).abs().max()
        return writes if (rank_one - by_hook).abs().max() <= TOLERANCE * change + 1e-6 else None


@contextlib.contextmanager
def returning(modules: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Make modules return these outputs while open, whatever they are called with."""
    with _patched(modules, [lambda *_, output=output, **__: output for output in outputs]):
        yield


@contextlib.contextmanager
def _patched(
    modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Let modules call these functions as their `forward` while open."""
    # `forward` is set on the instance, not `__call__`, which Python looks up on the class. So hooks
    # of the modules still run. A module may have its own already, as those that accelerate places on devices do.
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _block(output: torch.Tensor | None, as_tuple: bool) -> Callable[..., Any]:
    """Return a `forward` for a block that returns `output`, or its own input if that is None."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        block_input = args[0] if args else kwargs["hidden_states"]
        hidden = block_input if output is None else output
        return (hidden,) if as_tuple else hidden

    return forward


@torch.no_grad()
def write_directions(model: nn.Module, site: Site, path: str) -> torch.Tensor | None:
    """Return [H, D]: row i is what a unit of neuron i adds to the output of the map that follows the site.

    This is D^T in CRATE (the decoder, if that is separate), or the weights of the linear module whose
    input is the site; None if there is neither.
    """
    if site.has_both_ends:
        below = write_directions(model, replace(site, autoencoders=()), path)
        return None if below is None else torch.stack([below, -below], 1).flatten(0, 1)
    if site.autoencoders:
        return None
    module = model.get_submodule(path)
    if site.side == "input" and isinstance(module, Conv1D):
        return module.weight.detach()
    if site.side == "input" and isinstance(module, nn.Linear):
        return module.weight.detach().T
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, Ista) and module is parent.code:
        return (parent.dictionary if parent.decoder is None else parent.decoder).detach()
    return None
