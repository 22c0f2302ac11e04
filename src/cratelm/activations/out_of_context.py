"""Top tokens out of their context: the model sees 3 tokens alone, and says what the neuron does.

The Anthropic metric scores on them (Bricken et al. 2023; arXiv 2410.16443, section 4): an
explanation that rests on the context must not be rewarded for the token, so the activations are
those of the short text and not the ones the token had in its excerpt.
"""

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import SearchPlan
from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.tables import Rows, excerpt_rows, tokens_at
from cratelm.models.sites import Site, hooked

N_TOKENS = 10
"""top tokens of a neuron, the peaks of its highest excerpts"""
_CONTEXT = 1
"""tokens on each side of the peak"""
_SEQUENCES = 2_048
"""short texts a forward pass"""


@torch.no_grad()
def out_of_context_rows(
    model: PreTrainedModel, site: Site, plan: SearchPlan, layers: list[LayerHarvest]
) -> list[Rows]:
    """For each layer the peaks of the highest excerpts of each neuron, run alone."""
    tops = [_peaks(kept) for kept in layers]
    spans = np.concatenate([np.stack([t.start, t.stop], 1) for t in tops])
    texts, which = _unique_texts(plan, spans)
    for length in sorted({len(t) for t in texts}):
        numbers = np.array([i for i, t in enumerate(texts) if len(t) == length])
        _run(model, site, [texts[i] for i in numbers], numbers, which, tops)
    return tops


def _peaks(kept: LayerHarvest) -> Rows:
    """The highest excerpts cut to a token on each side, their activations still to be found."""
    top = excerpt_rows(kept, 0, kept.n_neurons)[0]
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
    """Distinct token strings of the spans [n, 2], and which of them each span is [n]."""
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
    """Runs texts of one length and writes the activations into the windows of the rows they belong to."""
    ends = np.cumsum([0] + [len(t.neuron) for t in tops])
    for first in range(0, len(texts), _SEQUENCES):
        some = numbers[first : first + _SEQUENCES]
        place = np.full(which.max() + 1, -1)
        place[some] = np.arange(len(some))
        ids = torch.tensor(texts[first : first + _SEQUENCES], device=model.device)

        def see(layer: int, activations: torch.Tensor, place: np.ndarray = place) -> None:
            rows = tops[layer]
            row_place = place[which[ends[layer] : ends[layer + 1]]]
            chosen = np.flatnonzero(row_place >= 0)
            found = activations.float().cpu().numpy()[row_place[chosen], :, rows.neuron[chosen]]
            # the window's column 2 is the peak: a text that begins at the peak starts there
            column = _CONTEXT + 1 - (rows.position[chosen] - rows.start[chosen])
            for offset in range(found.shape[1]):
                rows.window[chosen, column + offset] = found[:, offset]

        with hooked(model, site, see):
            model.base_model(input_ids=ids, use_cache=False)
