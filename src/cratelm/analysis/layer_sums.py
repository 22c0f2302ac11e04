"""One pass over held-out text: what each layer's steps do to tokens, as sums by document.

Held at a time: the activations of one batch and layer; for each layer second moments, 8 G D^2 bytes before
and as many after (G = 20 groups of documents), and 8 H^2 of the neurons: 264 MB a layer at D = 768, H = 3,072.

Shape legend: N text tokens of a batch, D width, H neurons, C documents, G groups of documents.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GPT2LMHeadModel

from cratelm.activations.batches import Batch, SearchPlan
from cratelm.analysis.groups import Moments
from cratelm.analysis.sparse_coding import objectives, sparsity
from cratelm.models import CrateForCausalLM
from cratelm.models.sites import Site, hooked
from cratelm.records import Estimate
from cratelm.stats.ratio import ratio

GROUPS = 20
"""groups of documents, one of which is left out at a time for the errors of coding rates"""
Key = tuple[str, str]
"""quantity and setting, such as ("nonzero", "after")"""
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Block:
    """The two steps of a layer by their LayerNorms; `sparse` is CRATE's sparse-coding step."""

    first: nn.Module
    """in front of MSSA, or attention"""
    second: nn.Module
    """in front of ISTA, or the MLP"""
    sparse: Any = None


def blocks_of(model: Any) -> list[Block]:
    """The layers of a CRATE or a GPT-2; none of other models, whose blocks have other forms."""
    if isinstance(model, CrateForCausalLM):
        return [Block(b.norm_mssa, b.norm_ista, b.ista) for b in model.model.layers]  # type: ignore[arg-type]
    if isinstance(model, GPT2LMHeadModel):
        return [Block(b.ln_1, b.ln_2) for b in model.transformer.h]  # type: ignore[arg-type]
    return []


@dataclass(eq=False)
class LayerSums:
    """What is gathered of one layer."""

    moments: Moments | None = None
    """of the neurons"""
    second: torch.Tensor | None = None
    """[G, 2, D, D] second moments of tokens before and after the first step, both normalised alike"""
    fired: torch.Tensor | None = None
    """[H] bool, at any token"""
    totals: dict[Key, Array] = field(default_factory=dict)
    """[C] sums over each document's tokens"""
    counts: dict[Key, Array] = field(default_factory=dict)
    """[C] tokens that they are over"""

    def estimates(self) -> dict[Key, Estimate]:
        """Means over tokens, their errors over documents."""
        found = {}
        for key, total in self.totals.items():
            used = self.counts[key] > 0
            found[key] = ratio(total[used], self.counts[key][used])
        return found


@dataclass(eq=False)
class Gathered:
    """Sums of all layers, by number."""

    layers: dict[int, LayerSums]
    tokens: int
    documents: int
    group_tokens: Array
    """[G] text tokens of each group of documents"""


@dataclass(frozen=True, eq=False)
class _Where:
    """Which of a batch's tokens are text, and of which document each is."""

    text: torch.Tensor
    """[N + end marks] bool, of all tokens of the batch"""
    document: NDArray[np.int64]
    """[N]"""

    @classmethod
    def of(cls, batch: Batch, ordinals: NDArray[np.int64]) -> "_Where":
        text = batch.is_text > 0
        segment = batch.segment_of[text]
        document = batch.document[segment].cpu().numpy()
        return cls(text, np.searchsorted(ordinals, document))


def gather(
    model: Any,
    site: Site,
    plan: SearchPlan,
    *,
    batch_tokens: int,
    ista_steps: int,
    progress: Callable[[int], Any],
) -> Gathered:
    """Runs the pass. `progress` is told of the tokens read."""
    sums: dict[int, LayerSums] = defaultdict(LayerSums)
    ordinals = np.asarray(plan.split.ordinals)
    documents = len(ordinals)
    seen, group_tokens = np.zeros(documents), np.zeros(GROUPS)
    # of another site, what enters the second step is not what its neurons are made from
    blocks = blocks_of(model) if site.name in ("ista", "mlp") else []
    for batch in plan.batches(batch_tokens, model.device):
        where = _Where.of(batch, ordinals)
        seen += np.bincount(where.document, minlength=documents)
        group_tokens += np.bincount(where.document % GROUPS, minlength=GROUPS)

        def see(place: int, activations: torch.Tensor, where: _Where = where) -> None:
            number = site.layer_numbers[place]
            _add_neurons(sums[number], activations.flatten(0, 1)[where.text], where, documents)

        watched = _watched(blocks, sums, where, documents, ista_steps)
        with torch.no_grad(), hooked(model, site, see), watched:
            model.base_model(input_ids=batch.input_ids, use_cache=False)
        progress(batch.input_ids.numel())
    return Gathered(dict(sums), int(seen.sum()), int((seen > 0).sum()), group_tokens)


@contextlib.contextmanager
def _watched(
    blocks: list[Block], sums: dict[int, LayerSums], where: _Where, documents: int, steps: int
) -> Iterator[None]:
    """While open, what enters both steps of each layer is added to its sums."""
    handles = []
    before: dict[int, torch.Tensor] = {}
    try:
        for layer, block in enumerate(blocks):

            def first(module: nn.Module, args: Any, output: torch.Tensor, layer=layer) -> None:
                before[layer] = output.flatten(0, 1)[where.text].float()  # [N, D]

            def second(
                module: nn.Module, args: Any, output: torch.Tensor, layer=layer, block=block
            ) -> None:
                # the module's own `forward`: its hook above is not called again
                after = block.first.forward(args[0]).flatten(0, 1)[where.text].float()
                _add_moments(sums[layer], before.pop(layer), after, where)
                inputs = output.flatten(0, 1)[where.text].float()
                _add_sparsity(sums[layer], inputs, "before", where, documents)
                if block.sparse is not None:
                    _add_objectives(sums[layer], inputs, block.sparse, steps, where, documents)

            handles += [
                block.first.register_forward_hook(first),
                block.second.register_forward_hook(second),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_neurons(sums: LayerSums, neurons: torch.Tensor, where: _Where, documents: int) -> None:
    """Neurons [N, H]."""
    neurons = neurons.float()
    if sums.moments is None or sums.fired is None:
        sums.moments = Moments(neurons.shape[1])
        sums.fired = torch.zeros(neurons.shape[1], dtype=torch.bool)
    sums.moments.add(neurons)
    sums.fired |= (neurons > 0).any(0).cpu()
    _add_sparsity(sums, neurons, "after", where, documents)


def _add_moments(sums: LayerSums, before: torch.Tensor, after: torch.Tensor, where: _Where) -> None:
    """Tokens [N, D] before and after the first step."""
    width = before.shape[1]
    if sums.second is None:
        sums.second = torch.zeros(GROUPS, 2, width, width, dtype=torch.float64)
    group = torch.from_numpy(where.document % GROUPS).to(before.device)
    for number in group.unique().tolist():
        mine = group == number
        for place, tokens in enumerate((before[mine], after[mine])):
            # in float32 rounding of the widest direction would drown the narrow ones, which small
            # distortions count
            tokens = tokens.cpu().double()
            sums.second[number, place] += tokens.T @ tokens


def _add_sparsity(
    sums: LayerSums, vectors: torch.Tensor, setting: str, where: _Where, documents: int
) -> None:
    for name, values in sparsity(vectors).items():
        _add(sums, (name, setting), values, where, documents)


def _add_objectives(
    sums: LayerSums, inputs: torch.Tensor, sparse: Any, steps: int, where: _Where, documents: int
) -> None:
    """The lasso objective along the steps, and whether each step lowers it."""
    atoms = sparse.dictionary.float()
    found = objectives(inputs, atoms, sparse.step_size, sparse.threshold, max(steps, sparse.steps))
    for step, values in enumerate(found):
        _add(sums, ("lasso", str(step)), values, where, documents)
        if step:
            falls = (values < found[step - 1]).float()
            _add(sums, ("lasso_falls", str(step)), falls, where, documents)


def _add(sums: LayerSums, key: Key, values: torch.Tensor, where: _Where, documents: int) -> None:
    """Adds [N] values to their documents; NaN is no value."""
    array = values.double().cpu().numpy()
    there = ~np.isnan(array)
    index = where.document[there]
    total = np.bincount(index, array[there], documents).astype(np.float64)
    count: Array = np.bincount(index, minlength=documents).astype(np.float64)
    if key not in sums.totals:
        sums.totals[key], sums.counts[key] = total, count
    else:
        sums.totals[key] += total
        sums.counts[key] += count
