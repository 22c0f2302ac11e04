"""One pass over held-out text: sums by document over the effect of the two steps of each layer on tokens.

The first step of a layer is attention (MSSA in CRATE), the second is the sparse-coding step (ISTA, or the MLP).

Memory: the activations of one batch and layer; for each layer second moments, 8 G D^2 bytes before the first step
and as many after it (G = 20 groups of documents), and 8 H^2 bytes for the neurons: 264 MB per layer at D = 768,
H = 3,072.

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
from cratelm.analysis.groups import CorrelationSums
from cratelm.analysis.sparse_coding import objectives, sparsity
from cratelm.models import CrateForCausalLM, SparseGptForCausalLM
from cratelm.models.sites import Site, hooked
from cratelm.records import Estimate
from cratelm.runs.ranks import Share
from cratelm.stats.ratio import ratio

GROUPS = 20
"""number of groups of documents, of which the jackknife for the errors of coding rates omits one at a time"""
Quantity = tuple[str, str]
"""quantity and setting, such as ("nonzero", "after")"""
Array = NDArray[np.float64]
_ALL = Share()


@dataclass(frozen=True, eq=False)
class Steps:
    """The LayerNorms of the two steps of a layer."""

    first: nn.Module
    """LayerNorm before MSSA, or attention"""
    second: nn.Module
    """LayerNorm before ISTA, or the MLP"""
    sparse: Any = None
    """CRATE's sparse-coding step; None for other models"""


def steps_of(model: Any) -> list[Steps]:
    """Return the steps of the layers of cratelm's families; none for other models, whose blocks differ.

    None, too, for a CRATE without a second step.
    """
    if isinstance(model, CrateForCausalLM):
        layers: Any = model.model.layers
        if model.config.feedforward == "ista":
            return [Steps(b.norm_mssa, b.norm_ista, b.ista) for b in layers]
        return [Steps(b.norm_mssa, b.norm_mlp) for b in layers if hasattr(b, "norm_mlp")]
    if isinstance(model, GPT2LMHeadModel | SparseGptForCausalLM):
        return [Steps(b.ln_1, b.ln_2) for b in model.transformer.h]  # type: ignore[arg-type]
    return []


@dataclass(eq=False)
class LayerSums:
    """Sums for one layer."""

    correlation: CorrelationSums | None = None
    """sums for the correlations of neurons"""
    second_moments: torch.Tensor | None = None
    """[G, 2, D, D] sums of outer products of tokens before and after the first step, both after its LayerNorm"""
    fired: torch.Tensor | None = None
    """[H] bool, whether each neuron fired at any token"""
    totals: dict[Quantity, Array] = field(default_factory=dict)
    """[C] sums of each quantity over each document's tokens"""
    counts: dict[Quantity, Array] = field(default_factory=dict)
    """[C] number of tokens with a value, over which `totals` are summed"""

    def estimates(self) -> dict[Quantity, Estimate]:
        """Return the means over tokens, with their standard errors over documents."""
        estimates = {}
        for quantity, total in self.totals.items():
            used = self.counts[quantity] > 0
            estimates[quantity] = ratio(total[used], self.counts[quantity][used])
        return estimates


@dataclass(eq=False)
class TextSums:
    """Sums over the held-out text."""

    layers: dict[int, LayerSums]
    """by number of the layer"""
    tokens: int
    documents: int
    group_tokens: Array
    """[G] text tokens of each group of documents"""


@dataclass(frozen=True, eq=False)
class _TextTokens:
    """Which tokens of a batch are text, and the document of each."""

    text: torch.Tensor
    """bool for every token of the batch, N of them True"""
    document: NDArray[np.int64]
    """[N] index into the split's list of documents"""

    @classmethod
    def of(cls, batch: Batch, ordinals: NDArray[np.int64]) -> "_TextTokens":
        text = batch.is_text > 0
        segment = batch.segment_of[text]
        document = batch.document[segment].cpu().numpy()
        return cls(text, np.searchsorted(ordinals, document))


def sum_over_text(
    model: Any,
    site: Site,
    plan: SearchPlan,
    *,
    batch_tokens: int,
    ista_steps: int,
    progress: Callable[[int], Any],
    share: Share = _ALL,
) -> TextSums:
    """Run the model on the tokens of a plan, and return the sums over them.

    `ista_steps` is the number of ISTA steps at which the lasso objective is measured; `progress` is called
    with the number of tokens read. With a `share`, only its layers are summed, each over all tokens: the sums of a layer
    are too large to be kept for each of several blocks of tokens, as their last digits would need.
    """
    sums: dict[int, LayerSums] = defaultdict(LayerSums)
    ordinals = np.asarray(plan.split.ordinals)
    documents = len(ordinals)
    document_tokens, group_tokens = np.zeros(documents), np.zeros(GROUPS)
    # at other sites, the neurons are not computed from the input of the second step
    steps = steps_of(model) if site.name in ("ista", "mlp") else []
    of_share = {layer: step for layer, step in enumerate(steps) if share.takes(layer)}
    for batch in plan.batches(batch_tokens, model.device):
        tokens = _TextTokens.of(batch, ordinals)
        document_tokens += np.bincount(tokens.document, minlength=documents)
        group_tokens += np.bincount(tokens.document % GROUPS, minlength=GROUPS)

        def on_activation(
            site_layer: int, activations: torch.Tensor, tokens: _TextTokens = tokens
        ) -> None:
            layer = site.layer_numbers[site_layer]
            if not share.takes(layer):
                return
            neurons = activations.flatten(0, 1)[tokens.text]
            _add_neurons(sums[layer], neurons, tokens, documents)

        watched = _watched(of_share, sums, tokens, documents, ista_steps)
        with torch.no_grad(), hooked(model, site, on_activation), watched:
            model.base_model(input_ids=batch.input_ids, use_cache=False)
        progress(batch.input_ids.numel())
    return TextSums(
        dict(sums), int(document_tokens.sum()), int((document_tokens > 0).sum()), group_tokens
    )


@contextlib.contextmanager
def _watched(
    steps: dict[int, Steps],
    sums: dict[int, LayerSums],
    tokens: _TextTokens,
    documents: int,
    ista_steps: int,
) -> Iterator[None]:
    """While the context is open, add the inputs of both steps of each layer, by its number, to its sums."""
    handles = []
    before: dict[int, torch.Tensor] = {}  # by layer, the input of the first step
    try:
        for layer, step in steps.items():

            def first(module: nn.Module, args: Any, output: torch.Tensor, layer=layer) -> None:
                before[layer] = output.flatten(0, 1)[tokens.text].float()  # [N, D]

            def second(
                module: nn.Module, args: Any, output: torch.Tensor, layer=layer, step=step
            ) -> None:
                # The tokens after the first step pass through its LayerNorm, so that both sides have the same
                # normalisation. `forward` is called directly, since calling the module would run the hook above.
                after = step.first.forward(args[0]).flatten(0, 1)[tokens.text].float()
                _add_moments(sums[layer], before.pop(layer), after, tokens)
                inputs = output.flatten(0, 1)[tokens.text].float()
                _add_sparsity(sums[layer], inputs, "before", tokens, documents)
                if step.sparse is not None:
                    _add_objectives(sums[layer], inputs, step.sparse, ista_steps, tokens, documents)

            handles += [
                step.first.register_forward_hook(first),
                step.second.register_forward_hook(second),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_neurons(
    sums: LayerSums, neurons: torch.Tensor, tokens: _TextTokens, documents: int
) -> None:
    """Add the activations [N, H] of the neurons at the text tokens."""
    neurons = neurons.float()
    if sums.correlation is None or sums.fired is None:
        sums.correlation = CorrelationSums(neurons.shape[1])
        sums.fired = torch.zeros(neurons.shape[1], dtype=torch.bool)
    sums.correlation.add(neurons)
    sums.fired |= (neurons > 0).any(0).cpu()
    _add_sparsity(sums, neurons, "after", tokens, documents)


def _add_moments(
    sums: LayerSums, before: torch.Tensor, after: torch.Tensor, tokens: _TextTokens
) -> None:
    """Add the second moments of tokens [N, D] before and after the first step, by group of documents."""
    width = before.shape[1]
    if sums.second_moments is None:
        sums.second_moments = torch.zeros(GROUPS, 2, width, width, dtype=torch.float64)
    group = torch.from_numpy(tokens.document % GROUPS).to(before.device)
    for number in group.unique().tolist():
        of_group = group == number
        for side, vectors in enumerate((before[of_group], after[of_group])):
            # in float64: float32's rounding errors in the widest direction would exceed the narrow directions,
            # which matter at small distortions
            vectors = vectors.cpu().double()
            sums.second_moments[number, side] += vectors.T @ vectors


def _add_sparsity(
    sums: LayerSums, vectors: torch.Tensor, setting: str, tokens: _TextTokens, documents: int
) -> None:
    """Add the sparsity measures of vectors [N, D] before, or [N, H] after, the second step."""
    for name, values in sparsity(vectors).items():
        _add(sums, (name, setting), values, tokens, documents)


def _add_objectives(
    sums: LayerSums,
    inputs: torch.Tensor,
    sparse: Any,
    ista_steps: int,
    tokens: _TextTokens,
    documents: int,
) -> None:
    """Add the lasso objective after each step, and whether each step lowers it."""
    atoms = sparse.dictionary.float()
    n_steps = max(ista_steps, sparse.steps)
    values = objectives(inputs, atoms, sparse.step_size, sparse.threshold, n_steps)
    for step, of_step in enumerate(values):
        _add(sums, ("lasso", str(step)), of_step, tokens, documents)
        if step:
            falls = (of_step < values[step - 1]).float()
            _add(sums, ("lasso_falls", str(step)), falls, tokens, documents)


def _add(
    sums: LayerSums, quantity: Quantity, values: torch.Tensor, tokens: _TextTokens, documents: int
) -> None:
    """Add values [N] to the sums of their documents; a token with NaN counts as having no value."""
    array = values.double().cpu().numpy()
    has_value = ~np.isnan(array)
    document = tokens.document[has_value]
    total = np.bincount(document, array[has_value], documents).astype(np.float64)
    count: Array = np.bincount(document, minlength=documents).astype(np.float64)
    if quantity not in sums.totals:
        sums.totals[quantity], sums.counts[quantity] = total, count
    else:
        sums.totals[quantity] += total
        sums.counts[quantity] += count
