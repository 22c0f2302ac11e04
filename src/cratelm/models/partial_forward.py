"""What follows a layer, computed by the model's own code: earlier blocks are passed over.

A model that is run again for every neuron repeats all that comes before the neuron. Here the blocks
up to it return what they returned in one plain pass, so that masks, position codes, norms and head
are the model's, whatever its kind.

Where what a neuron writes is a row of a matrix that is added to the block's output (D in CRATE, the
MLP's last projection elsewhere), the edited block output is a rank-one change of the plain one, and
the block itself is passed over, too. That this is so is tried on each layer, not assumed: where a
norm follows the projection, as in Gemma 2, or an attention site is meant, the block is run with a hook.

Shape legend: B sequences, T positions, D width, H neurons, V vocabulary, n rows (a row is one sequence
with one neuron edited).
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cratelm.errors import InputError
from cratelm.models.crate import Ista
from cratelm.models.sites import Site, hooked

TOLERANCE = 1e-3
"""largest difference between the rank-one change and the hook, relative to what the edit changes"""


def next_logits(model: Any, tokens: torch.Tensor, last: int) -> torch.Tensor:
    """Return logits [B, last, V] after each of the last `last` tokens of [B, n].

    The others are not computed where the model takes `logits_to_keep`.
    """
    takes_it = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": last} if takes_it else {}
    return model(input_ids=tokens, use_cache=False, **keep).logits[:, -last:]


@dataclass(frozen=True, eq=False)
class Trace:
    """One plain pass."""

    ids: torch.Tensor
    """[B, T]"""
    outputs: dict[int, torch.Tensor]
    """[B, T, D] of each block, by its number"""
    activations: list[torch.Tensor]
    """[B, T, H] at each place of the site"""

    def by_token(self, block: int) -> "Trace":
        """The last block's output as sequences of one token: what follows treats each by itself."""
        flat = self.outputs[block].flatten(0, 1)[:, None]  # [B * T, 1, D]
        return Trace(self.ids.reshape(-1, 1), {block: flat}, [])


class PartialForward:
    """A model from each layer of a site on. Raises `InputError` where the site is in no block."""

    def __init__(self, model: Any, site: Site):
        self.model, self.site = model, site
        found = [re.match(r"(.*?)\.(\d+)(?=\.|$)", path) for path in site.paths]
        parents = {m[1] for m in found if m}
        if None in found or len(parents) != 1:
            raise InputError(
                f"site {site.name} lies in no numbered block: a path with * for the layer was expected"
            )
        self.blocks: list[nn.Module] = list(model.get_submodule(parents.pop()).children())
        self.numbers = [int(m[2]) for m in found if m]
        """block of each place"""
        self._tuples: dict[int, bool] = {}
        self.writes: list[torch.Tensor | None] = [None] * len(site.paths)
        """[H, D] what each neuron adds to its block's output, a unit of activation; None where that is
        no constant"""
        for place, path in enumerate(site.paths):
            self.writes[place] = self._tried(place, written(model, site, path))

    def is_last(self, place: int) -> bool:
        return self.numbers[place] == len(self.blocks) - 1

    @torch.no_grad()
    def trace(self, ids: torch.Tensor) -> Trace:
        """One plain pass over ids [B, T], the head left out."""
        outputs: dict[int, torch.Tensor] = {}
        activations: dict[int, torch.Tensor] = {}

        def keep(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._tuples[number] = isinstance(output, tuple)
                outputs[number] = output[0] if isinstance(output, tuple) else output

            return hook

        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(keep(number)).remove)
            stack.enter_context(hooked(self.model, self.site, activations.__setitem__))
            self.model.base_model(input_ids=ids, use_cache=False)
        return Trace(ids, outputs, [activations[place] for place in range(self.site.n_layers)])

    def plain(self, trace: Trace, last: int | None = None) -> torch.Tensor:
        """Logits [B, last, V] of the last positions (all where None) without an edit."""
        block = max(trace.outputs)
        return self._logits(trace.ids, block, trace.outputs[block], last)

    def edited(
        self,
        trace: Trace,
        place: int,
        rows: torch.Tensor,
        neurons: torch.Tensor,
        delta: torch.Tensor,
        last: int | None = None,
    ) -> torch.Tensor:
        """Logits [n, last, V] with `delta` [n, T] added to one neuron in each row.

        Row i is sequence `rows[i]` with neuron `neurons[i]` changed; both [n].
        """
        block, ids, writes = self.numbers[place], trace.ids[rows], self.writes[place]
        if writes is not None:
            hidden = trace.outputs[block][rows] + delta[..., None] * writes[neurons][:, None]
            return self._logits(ids, block, hidden, last)
        return self._hooked(trace, place, rows, neurons, delta, last)

    @torch.no_grad()
    def _hooked(
        self,
        trace: Trace,
        place: int,
        rows: torch.Tensor,
        neurons: torch.Tensor,
        delta: torch.Tensor,
        last: int | None,
    ) -> torch.Tensor:
        """The same with the block run: from what the one before it put out."""
        row = torch.arange(len(rows), device=rows.device)

        def see(at: int, activations: torch.Tensor) -> torch.Tensor | None:
            if at != place:
                return None
            changed = activations.clone()
            changed[row, :, neurons] += delta
            return changed

        before = self.numbers[place] - 1
        hidden = trace.outputs[before][rows] if before >= 0 else None
        with hooked(self.model, self.site, see):
            return self._logits(trace.ids[rows], before, hidden, last)

    @torch.no_grad()
    def _logits(
        self, ids: torch.Tensor, block: int, hidden: torch.Tensor | None, last: int | None
    ) -> torch.Tensor:
        """Logits [n, last, V] where `block` puts out `hidden` [n, T, D]; block -1: a plain pass."""
        with self._passed_over(block, hidden):
            return next_logits(self.model, ids, last or ids.shape[1]).float()

    @contextlib.contextmanager
    def _passed_over(self, block: int, hidden: torch.Tensor | None) -> Iterator[None]:
        """While open, `block` puts out `hidden`, and those before it what they are given."""
        patched = self.blocks[: block + 1]
        try:
            for number, module in enumerate(patched):
                given = hidden if number == block else None
                module.__dict__["forward"] = _returning(given, self._tuples[number])
            yield
        finally:
            for module in patched:
                module.__dict__.pop("forward", None)

    def _tried(self, place: int, writes: torch.Tensor | None) -> torch.Tensor | None:
        """`writes`, where a change of a neuron by it gives the logits that the hook gives; else None."""
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
        wanted = self._hooked(trace, place, rows, neurons, delta, None)
        hidden = trace.outputs[self.numbers[place]][rows]
        hidden = hidden + delta[..., None] * writes[neurons][:, None]
        found = self._logits(ids[rows], self.numbers[place], hidden, None)
        change = (wanted - self.plain(trace)).abs().max()
        return writes if (found - wanted).abs().max() <= TOLERANCE * change + 1e-6 else None


def _returning(given: torch.Tensor | None, as_tuple: bool) -> Callable[..., Any]:
    """The `forward` of a block that returns `given`, or its own input where that is None."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        own = args[0] if args else kwargs["hidden_states"]
        hidden = own if given is None else given
        return (hidden,) if as_tuple else hidden

    return forward


@torch.no_grad()
def written(model: nn.Module, site: Site, path: str) -> torch.Tensor | None:
    """[H, D] row i is what a unit of neuron i puts into the linear map that follows the site.

    D^T of CRATE (its decoder where that is another), the weights of the linear module whose input the
    site is; None where there is neither.
    """
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
