"""Activations of top tokens in a context of 3 tokens.

The Anthropic metric scores on them (Bricken et al. 2023; arXiv 2410.16443, section 4): an explanation
that relies on the context must not be rewarded for the token, so the activations are those in the
short text and not those that the token had in its excerpt.

Neurons share many of these short texts, so each distinct one is run once. If the harvest sets a begin token or leaves
out first tokens, it stands before each of them, with end-of-text tokens in place of those that are left out.
"""

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import SearchPlan
from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.tables import Rows, tokens_at, top_rows
from cratelm.models.sites import Site, hooked
from cratelm.runs.ranks import Ranks

N_TOKENS = 10
"""number of top tokens of a neuron: the peaks of its highest excerpts"""
_CONTEXT = 1
"""tokens on each side of the peak"""
_SEQUENCES = 2_048
"""short texts per forward pass"""
_ALONE = Ranks()


@torch.no_grad()
def out_of_context_rows(
    model: PreTrainedModel,
    site: Site,
    plan: SearchPlan,
    layers: list[LayerHarvest],
    ranks: Ranks = _ALONE,
) -> list[Rows]:
    """Return for each layer the peaks of the highest excerpts of each neuron, run out of context.

    Rank 0 has the merged `layers`, and the result; each rank runs its share of the batches of texts.
    """
    tops = ranks.by_first(lambda: [_peaks(layer) for layer in layers])
    spans = np.concatenate([np.stack([t.start, t.stop], 1) for t in tops])
    texts, which = _unique_texts(plan, spans)
    prefix = plan.beginning.prefix(plan.eot_id)
    rank_of = np.zeros(len(texts), np.int64)  # which rank runs each text
    for number, batch in enumerate(_batches(texts)):
        rank_of[batch] = number % ranks.share.of
        if ranks.share.takes(number):
            _run(model, site, texts, prefix, batch, which, tops)
    ends = _ends(tops)
    for number, windows in enumerate(ranks.collected([rows.window for rows in tops])):
        for layer, (rows, window) in enumerate(zip(tops, windows, strict=True)):
            chosen = rank_of[which[ends[layer] : ends[layer + 1]]] == number
            rows.window[chosen] = window[chosen]
    return tops


def _batches(texts: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Return the numbers of the texts of each forward pass; the texts of a pass have the same length."""
    lengths = np.array([len(text) for text in texts], np.int64)
    batches = []
    for length in np.unique(lengths):
        numbers = np.flatnonzero(lengths == length)
        batches += [numbers[i : i + _SEQUENCES] for i in range(0, len(numbers), _SEQUENCES)]
    return batches


def _ends(tops: list[Rows]) -> np.ndarray:
    """Return the first row of each layer among the rows of all layers, and one past the last."""
    return np.cumsum([0] + [len(t.neuron) for t in tops])


def _peaks(layer: LayerHarvest) -> Rows:
    """Return the highest excerpts, cut to a token on each side, with activations yet to be measured."""
    top = top_rows(layer, 0, layer.n_neurons)
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
    prefix: tuple[int, ...],
    batch: np.ndarray,
    which: np.ndarray,
    tops: list[Rows],
) -> None:
    """Run the texts of a batch after `prefix`, and write their activations into the windows of the rows with these texts."""
    ends = _ends(tops)
    row_of = np.full(len(texts), -1)  # of each text in this batch
    row_of[batch] = np.arange(len(batch))
    ids = torch.tensor([(*prefix, *texts[i]) for i in batch], device=model.device)

    def write_windows(layer: int, activations: torch.Tensor) -> None:
        rows = tops[layer]
        text = row_of[which[ends[layer] : ends[layer + 1]]]
        chosen = np.flatnonzero(text >= 0)
        of_texts = activations[:, len(prefix) :].float().cpu().numpy()
        values = of_texts[text[chosen], :, rows.neuron[chosen]]
        # Column 2 of the window is the peak, so a text that begins at the peak starts there.
        column = _CONTEXT + 1 - (rows.position[chosen] - rows.start[chosen])
        for offset in range(values.shape[1]):
            rows.window[chosen, column + offset] = values[:, offset]

    with hooked(model, site, write_windows):
        model.base_model(input_ids=ids, use_cache=False)
