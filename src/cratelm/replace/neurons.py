"""What single neurons cost if explanations take their place: one at a time, and the best-explained together.

Shape legend: B sequences of T tokens, H neurons of a layer, C documents.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.open_harvest import HarvestContext
from cratelm.errors import InputError
from cratelm.models.partial_forward import PartialForward
from cratelm.models.sites import Site
from cratelm.records import NeuronId
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.measure import Errors, HeldOut, Losses, Variant
from cratelm.replace.predictors import Predictor
from cratelm.replace.store import CurvePoint, NeuronReplacement, RunnableFraction
from cratelm.replace.text import BatchText, predicted
from cratelm.runs.ranks import Ranks
from cratelm.stats.documents import DocumentResamples
from cratelm.steer.ablation import Ablations, HeldOutText, ablate

RANKED_ON, MEASURED_ON = 0, 1
"""halves of the documents: neurons are ranked on one, and the curve is measured on the other"""
_HALVINGS = 7
"""the curve has points at all neurons, a half of them, a quarter, and so on"""
BUDGETS = (0.01, 0.1, 0.5)
"""nats per token, at which the fraction of the model that can run on explanations is read from the curve"""


def replaced_alone(
    config: ReplaceConfig, opened: HarvestContext, explained: Sequence[Predictor], ranks: Ranks
) -> Ablations | None:
    """Return the change of the loss if one neuron alone is replaced, of all neurons, on rank 0.

    None if it is not to be measured, if not one sequence has enough tokens, or if the site is not in numbered blocks, so
    that a whole pass would be needed for each neuron. For latents, what the autoencoder cannot reconstruct is kept here.
    """
    split, length = opened.store.split("held_out"), opened.sequence_length
    begin = opened.beginning
    if not config.neuron_tokens or split.n_sequences(begin.room(length)) < 1:
        return None
    try:
        partial = PartialForward(opened.subject.model, opened.site)
    except InputError:
        return None
    text = HeldOutText.of(split, length, config.neuron_tokens, config.seed, begin)
    neurons = [np.arange(width) for width in opened.site.n_neurons]

    def edits(tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> list[torch.Tensor]:
        document = split.documents_at(np.maximum(positions, 0).ravel()).reshape(positions.shape)
        is_text = (tokens != opened.store.eot_id) & (positions >= 0)
        of_batch = BatchText(tokens, np.where(is_text, document, -1))
        return [
            torch.from_numpy(np.ascontiguousarray(of.predict(of_batch))).view(*tokens.shape, -1)
            for of in explained
        ]

    with tqdm(
        total=sum(map(len, neurons)) // ranks.share.of,
        desc=f"one neuron at a time, {config.model}",
        unit="neuron and batch",
        disable=config.quiet or not ranks.is_first,
    ) as bar:
        ablations = ablate(partial, text, neurons, edits, text.n_tokens, bar, ranks.share)
    for of_rank in ranks.collected(ablations):
        ablations.add(of_rank)
    return ablations


def neuron_rows(
    model: str,
    site: Site,
    errors: Sequence[Errors],
    explainer: str,
    *,
    chosen: Mapping[int, NDArray[np.bool_]] | None = None,
    alone: Ablations | None = None,
) -> list[NeuronReplacement]:
    """Return the figures of all neurons, or of those `chosen` by place [H], for one explainer.

    `alone` has the losses with one neuron replaced; None if they were not measured on this explainer.
    """
    rows = []
    for place, layer in enumerate(site.layer_numbers):
        everything = errors[place].explained(explainer)
        if chosen is None:
            indices = np.arange(len(everything))
        else:
            indices = np.flatnonzero(chosen[place]) if place in chosen else ()
        for index in map(int, indices):
            explained = float(everything[index])
            ablation = None if alone is None else alone.neurons[place][index]
            rows.append(
                NeuronReplacement(
                    NeuronId(model, site.name, layer, index),
                    explainer,
                    explained if np.isfinite(explained) else None,
                    None if ablation is None else ablation.change,
                    0 if ablation is None else ablation.n_tokens,
                )
            )
    return rows


def ranking(errors: Sequence[Errors], explainer: str) -> list[NDArray[np.bool_]]:
    """Return [points][all neurons] which neurons are replaced at each point of the curve, ascending in number.

    Neurons of all layers are ranked together, by what an explainer explains of them on half of the documents; those that
    are constant come last.
    """
    scores = np.concatenate([of.explained(explainer, [RANKED_ON]) for of in errors])
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    sizes = sorted({-(-len(order) >> i) for i in range(_HALVINGS)} - {0})
    points = []
    for size in sizes:
        chosen = np.zeros(len(order), bool)
        chosen[order[:size]] = True
        points.append(chosen)
    return points


def best_explained(
    held_out: HeldOut,
    explained: tuple[str, Sequence[Predictor]],
    points: Sequence[NDArray[np.bool_]],
    tokens: int,
    ranks: Ranks,
) -> Losses:
    """Return the losses with the neurons of each point of the curve replaced, on rank 0.

    The variant has the number of neurons in place of the layers. They are measured on the documents on which the
    neurons were not ranked.
    """
    losses = held_out.losses()
    explainer, predictors = explained
    bounds = np.cumsum([0, *held_out.model.site.n_neurons])
    device = held_out.model.model.device
    for batch, text in held_out.batches(ranks.share, "best-explained neurons", tokens):
        columns = losses.columns(text)
        measured = columns % 2 == MEASURED_ON
        only = predicted(text)
        only[only] = measured
        columns = columns[measured]
        losses.count(columns)
        trace = held_out.model.trace(batch.input_ids)
        losses.add(Variant("none"), columns, held_out.token_losses(trace, text, {}, only=only))
        codes = {place: of.predict(text) for place, of in enumerate(predictors)}
        for chosen in points:
            masks = {
                place: torch.from_numpy(chosen[bounds[place] : bounds[place + 1]]).to(device)
                for place in codes
            }
            # a layer without a replaced neuron stays as it is
            used = {place: of for place, of in codes.items() if masks[place].any()}
            of_point = held_out.token_losses(trace, text, used, masks, only)
            losses.add(Variant("own", explainer, str(chosen.sum())), columns, of_point)
    for other in ranks.collected(losses):
        if other is not losses:
            losses.merge(other)
    return losses


def curve(losses: Losses, n_neurons: int, resamples: int, seed: int) -> list[CurvePoint]:
    """Return the points of all explainers."""
    used = losses.n_tokens > 0
    documents = DocumentResamples(losses.n_tokens[used], resamples, seed)
    true = losses.sums[Variant("none")][used]
    points = []
    for variant, sums in losses.sums.items():
        if variant.replaced_by == "own":
            lost = documents.figure(lambda a, b: a - b, sums[used], true)
            n = int(variant.layers)
            if lost is not None:
                points.append(CurvePoint(variant.explainer, n, n / n_neurons, lost))
    return points


def runnable(points: Sequence[CurvePoint]) -> list[RunnableFraction]:
    """Return the fraction of the neurons that can be replaced within each of `BUDGETS`, by explainer."""
    found = []
    for explainer in dict.fromkeys(p.explainer for p in points):
        of = sorted((p.fraction, p.nats_lost.value) for p in points if p.explainer == explainer)
        found += [RunnableFraction(explainer, nats, _within(of, nats)) for nats in BUDGETS]
    return found


def _within(curve: Sequence[tuple[float, float]], nats: float) -> float:
    """Return the fraction at which a curve of (fraction, nats lost), ascending, first exceeds `nats`; 1 if it never does."""
    before = (0.0, 0.0)
    for fraction, lost in curve:
        if lost > nats:
            share = max(0.0, nats - before[1]) / (lost - before[1])
            return before[0] + share * (fraction - before[0])
        before = (fraction, lost)
    return 1.0
