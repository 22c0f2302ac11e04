"""Activations of top tokens in a context of 3 tokens.

The Anthropic metric scores on them (Bricken et al. 2023; arXiv 2410.16443, section 4): an explanation
that relies on the context must not be rewarded for the token, so the activations are those in the
short text and not those that the token had in its excerpt.

Neurons share many of these short texts, so each distinct one is run once.
"""

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import SearchPlan
from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.tables import Rows, excerpt_rows, tokens_at
from cratelm.models.sites import Site, hooked

N_TOKENS = 10
"""number of top tokens of a neuron: the peaks of its highest excerpts"""
_CONTEXT = 1
"""tokens on each side of the peak"""
_SEQUENCES = 2_048
"""short texts per forward pass"""


@torch.no_grad()
def out_of_context_rows(
    model: PreTrainedModel, site: Site, plan: SearchPlan, layers: list[LayerHarvest]
) -> list[Rows]:
    """Return for each layer the peaks of the highest excerpts of each neuron, run out of context."""
    tops = [_peaks(layer) for layer in layers]
    spans = np.concatenate([np.stack([t.start, t.stop], 1) for t in tops])
    texts, which = _unique_texts(plan, spans)
    for length in sorted({len(t) for t in texts}):
        numbers = np.array([i for i, t in enumerate(texts) if len(t) == length])
        _run(model, site, [texts[i] for i in numbers], numbers, which, tops)
    return tops


def _peaks(layer: LayerHarvest) -> Rows:
    """Return the highest excerpts, cut to a token on each side, with activations yet to be measured."""
    top = excerpt_rows(layer, 0, layer.n_neurons)[0]
    chosen = top.rank < N_TOKENS
    position = top.position[chosen]
    return Rows(
        kind="out_of_context",
        neuron=top.neuron[chosen],
        bin=np.full(int(chosen.sum()), -1),
        rank=top.rank[chosen],
        start=np.maximum(top.start[chosen], position - _CONTEXT),
        stop=np.minimum(top.stop[chosen], position + _CONTEXT + 1),
        position=position,
        document=top.document[chosen],
        window=np.zeros((len(position), 2 * _CONTEXT + 2), np.float32),
    )


def _unique_texts(plan: SearchPlan, spans: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Return the distinct token sequences of the spans [n, 2], and the number of each span's sequence [n]."""
    lengths = spans[:, 1] - spans[:, 0]
    positions = spans[:, :1] + np.arange(2 * _CONTEXT + 1)
    inside = np.arange(2 * _CONTEXT + 1) < lengths[:, None]
    tokens = np.full(positions.shape, -1, np.int64)
    tokens[inside] = tokens_at(plan.split, positions[inside])
    unique, which = np.unique(tokens, axis=0, return_inverse=True)
    return [tuple(int(t) for t in row if t >= 0) for row in unique], which.ravel()


def _run(
    model: PreTrainedModel,
    site: Site,
    texts: list[tuple[int, ...]],
    numbers: np.ndarray,
    which: np.ndarray,
    tops: list[Rows],
) -> None:
    """Run texts of one length, and write their activations into the windows of the rows with these texts."""
    ends = np.cumsum([0] + [len(t.neuron) for t in tops])
    for first in range(0, len(texts), _SEQUENCES):
        batch = numbers[first : first + _SEQUENCES]
        row_of = np.full(which.max() + 1, -1)  # of each text in this batch
        row_of[batch] = np.arange(len(batch))
        ids = torch.tensor(texts[first : first + _SEQUENCES], device=model.device)

        def write_windows(
            layer: int, activations: torch.Tensor, row_of: np.ndarray = row_of
        ) -> None:
            rows = tops[layer]
            text = row_of[which[ends[layer] : ends[layer + 1]]]
            chosen = np.flatnonzero(text >= 0)
            values = activations.float().cpu().numpy()[text[chosen], :, rows.neuron[chosen]]
            # Column 2 of the window is the peak, so a text that begins at the peak starts there.
            column = _CONTEXT + 1 - (rows.position[chosen] - rows.start[chosen])
            for offset in range(values.shape[1]):
                rows.window[chosen, column + offset] = values[:, offset]

        with hooked(model, site, write_windows):
            model.base_model(input_ids=ids, use_cache=False)
