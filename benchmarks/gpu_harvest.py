"""Part of `gpu.sh`: the harvest of crate-12l as a fraction of its forward pass, eager and compiled.

Model, tokens and harvest are those of `harvest.py`. Compiled, the forward pass with the harvest is one graph that also
returns the neurons of every layer, to which `LayerHarvest` is then applied as in the eager form; it is compared with
a compiled forward pass that returns no neurons.

Shape legend: B sequences, T tokens of a sequence, H neurons of a layer, L layers.
"""

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import timed
from gpu_part import Figures, PartOptions, free_memory
from harvest import Setting

from cratelm.activations.batches import Batch
from cratelm.models.sites import hooked


class CompiledSetting(Setting):
    """The same setting with compiled forward passes."""

    def __init__(self, size: str, arguments: argparse.Namespace, backend: str):
        super().__init__(size, arguments)
        self.codes: list[torch.Tensor] = []
        # A copy with hooks that stay, since torch.compile traces the hooks once and does not look for them again;
        # and a function for each, since it keeps one cache per function.
        self.hooked_model = copy.deepcopy(self.model)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(hooked(self.hooked_model, self.site, self._collect))
        self.compiled_forward = torch.compile(self._forward, backend=backend)
        self.compiled_codes = torch.compile(self._forward_with_codes, backend=backend)

    def _collect(self, layer: int, activations: torch.Tensor) -> None:
        self.codes.append(activations)

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _forward_with_codes(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return the neurons [B, T, H] of the L layers, which the hooks collect."""
        self.hooked_model.base_model(input_ids=input_ids, use_cache=False)
        return list(self.codes)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> None:
        """Run only the compiled forward passes of the batches."""
        for batch in batches:
            self.compiled_forward(batch.input_ids)

    @torch.no_grad()
    def harvest(self, batches: Sequence[Batch]) -> None:
        """Harvest the batches. Raises `RuntimeError` if the graph lacks a layer's neurons."""
        for batch in batches:
            codes = self.compiled_codes(batch.input_ids)
            self.codes.clear()  # here, since a list that is not empty at the start would need another graph
            if len(codes) != len(self.layers):
                raise RuntimeError(f"the graph returns {len(codes)} of {len(self.layers)} layers")
            for layer, code in zip(self.layers, codes, strict=True):
                layer.add(code, batch)


def measure(options: PartOptions, figures: Figures) -> None:
    """Record the eager and the compiled fraction; one that fails leaves its error."""
    size = "crate-2l" if options.tiny else "crate-12l"
    setting = argparse.Namespace(
        device=options.device,
        dtype="bfloat16",
        kind="torch",
        sequence_length=32 if options.tiny else 1024,
        batch_tokens=64 if options.tiny else 32_768,
        tokens=192 if options.tiny else 2_097_152,
    )
    makers: dict[str, Callable[[], Setting]] = {
        "eager": lambda: Setting(size, setting),
        "compiled": lambda: CompiledSetting(size, setting, options.backend),
    }
    figures.record("model", size)
    figures.record("batch_tokens", setting.batch_tokens)
    for number, (how, make) in enumerate(makers.items()):
        free_memory(options.device)
        share = options.left() / (len(makers) - number)
        try:
            figures.record(how, fraction(make(), 0.5 * share))
        except Exception as error:
            figures.record(how, {"error": f"{type(error).__name__}: {error}"[:500]})


def fraction(setting: Setting, seconds: float) -> dict[str, Any]:
    """Return the speed of the harvest as a fraction of the forward pass, over turns of both, for some seconds.

    The first batches fill the excerpts and are slower, so the last third of the turns is given apart.
    """
    batches = list(setting.plan.batches(setting.batch_tokens, setting.device))
    setting.forward(batches[:1])  # compiles
    setting.harvest(batches[:1])
    width = max(1, len(batches) // 16)
    forward, harvest = [], []
    for first in range(1, len(batches), width):
        turn = batches[first : first + width]
        forward.append(timed(lambda b=turn: setting.forward(b), setting.device))
        harvest.append(timed(lambda b=turn: setting.harvest(b), setting.device))
        if sum(forward) + sum(harvest) > seconds:
            break
    n_tokens = sum(b.input_ids.numel() for b in batches[1 : 1 + width * len(forward)])
    late = -max(1, len(forward) // 3)
    fractions = [f / h for f, h in zip(forward, harvest, strict=True)]
    return {
        "tokens": n_tokens,
        "forward_tokens_per_s": n_tokens / sum(forward),
        "harvest_tokens_per_s": n_tokens / sum(harvest),
        "fraction": sum(forward) / sum(harvest),
        "fraction_of_last_third": sum(forward[late:]) / sum(harvest[late:]),
        "fraction_by_turn_median": statistics.median(fractions),
        "turns": len(forward),
    }
