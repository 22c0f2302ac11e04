"""What a block computes before a site, which need not be computed again if codes at the site are replaced.

In the first block with replaced codes, the modules before the one with the site read what one plain pass gave them, so
they return what they returned there: norms and attention, where the site is in an MLP. In any block, the modules that
compute the activations of a site whose codes are all replaced need not run: the hidden projection of an MLP. Together
they are 40% of the blocks of a GPT-2 of two layers.

Which modules these are is read from a pass over 6 random tokens, by the order of their calls, and checked on others.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cratelm.models.partial_forward import returning
from cratelm.models.sites import Site


@dataclass(frozen=True, eq=False)
class Prefix:
    """The modules of a block that run before a site."""

    before: tuple[nn.Module, ...] = ()
    """children of the block that have returned before the child with the site is called"""
    feeds: tuple[nn.Module, ...] = ()
    """siblings of the module with the site that have returned tensors as large as its input before it is called"""
    width: int = 0
    """H of the module's input"""

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: Any, site: Site, place: int, block: nn.Module, ids: torch.Tensor
    ) -> "Prefix":
        """Return the prefix of a place of a site in its block, read from a pass over `ids` [1, T]."""
        module = model.get_submodule(site.paths[place])
        if site.is_flat or site.side not in ("input", "output"):
            return cls()
        child = next((m for m in block.children() if module in list(m.modules())), None)
        parent = model.get_submodule(site.paths[place].rpartition(".")[0])
        calls: list[tuple[str, nn.Module, Any]] = []
        with contextlib.ExitStack() as stack:
            for each in {*block.children(), *parent.children(), module}:
                enter = each.register_forward_pre_hook(
                    lambda m, inputs: calls.append(("begin", m, inputs[0] if inputs else None))
                )
                leave = each.register_forward_hook(lambda m, _, out: calls.append(("end", m, out)))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            model.base_model(input_ids=ids, use_cache=False)
        before = _returned_before(calls, child)
        is_input = site.side == "input" and module is not child
        of_site = next((of for what, m, of in calls if m is module and what == "begin"), None)
        feeds = [
            m
            for m, output in (_returned_before(calls, module) if is_input else [])
            if m in set(parent.children())
            and isinstance(of_site, torch.Tensor)
            and isinstance(output, torch.Tensor)
            and output.shape == of_site.shape
        ]
        children = set(block.children())
        width = of_site.shape[-1] if isinstance(of_site, torch.Tensor) else 0
        return cls(tuple(m for m, _ in before if m in children), tuple(feeds), width)

    @contextlib.contextmanager
    def recorded(self, outputs: list[Any]) -> Iterator[None]:
        """Append what the modules of `before` return while open, without attention weights."""

        def append(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):
                weights = (None if isinstance(of, torch.Tensor) else of for of in output[1:])
                output = (output[0], *weights)
            outputs.append(output)

        handles = [m.register_forward_hook(append) for m in self.before]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def replayed(self, outputs: Sequence[Any]) -> Iterator[None]:
        """Let the modules of `before` return `outputs` while open."""
        with returning(self.before, outputs):
            yield

    @contextlib.contextmanager
    def skipped(self, hidden: torch.Tensor) -> Iterator[None]:
        """Let the modules of `feeds` return zeros [B, T, H] of the type of `hidden` [B, T, D] while open."""
        zeros = hidden.new_zeros(1).expand(*hidden.shape[:2], self.width)
        with returning(self.feeds, [zeros] * len(self.feeds)):
            yield


def _returned_before(
    calls: Sequence[tuple[str, nn.Module, Any]], last: nn.Module | None
) -> list[tuple[nn.Module, Any]]:
    """Return the modules that are called once, and have returned before `last` is called, with their outputs."""
    order = [(what, module) for what, module, _ in calls]
    if last is None or ("begin", last) not in order:
        return []
    n_before = order.index(("begin", last))
    return [
        (module, output)
        for what, module, output in calls[:n_before]
        if what == "end" and order.count(("end", module)) == 1
    ]
