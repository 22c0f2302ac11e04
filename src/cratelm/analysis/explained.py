"""Consistency and distinctiveness of the neurons that a run has explained, on held-out tokens.

Activations of as many neurons as fit into a bound are held at a time, 4 bytes a token and neuron, and
beside them which tokens each explanation covers, a byte a token, neuron and share.

Shape legend: N text tokens, n neurons.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cratelm.activations.batches import SearchPlan
from cratelm.analysis.consistency import Observed, covered, others, read
from cratelm.analysis.store import SHARES, CoverageControl, NeuronCoverage
from cratelm.models.sites import Site, hooked
from cratelm.records import Explanation
from cratelm.score.simulators import simulate

Place = tuple[int, int]
"""layer and index"""


@dataclass(frozen=True, eq=False)
class Subject:
    """The model, where its neurons live, and what it reads."""

    model: Any
    site: Site
    plan: SearchPlan
    batch_tokens: int


def readings(
    subject: Subject,
    explanations: Sequence[Explanation],
    fit_maximum: Mapping[Place, float],
    *,
    memory_bytes: int,
    seed: int,
    progress: Callable[[int], Any],
) -> Iterator[NeuronCoverage]:
    """Of every neuron explained, against its own explanation and against another one's of its layer.

    Neurons of a layer are read together where they fit into `memory_bytes`; the null takes another
    neuron of the same lot, and is left out of lots of one.
    """
    segments = _segments(subject)
    n_tokens = sum(map(len, segments))
    lot_size = max(1, memory_bytes // (n_tokens * (4 + len(SHARES))))
    for lot in _lots(explanations, lot_size):
        places = [(e.neuron.layer, e.neuron.index) for e in lot]
        activations = _activations(subject, places, progress)  # [n, N]
        masks = [_masks(e, segments) for e in lot]
        partner = others(len(lot), seed) if len(lot) > 1 else None
        for i, explanation in enumerate(lot):
            observed = Observed.of(activations[i], fit_maximum[places[i]])
            controls: list[tuple[CoverageControl, int]] = [("none", i)]
            if partner is not None:
                controls.append(("shuffled", int(partner[i])))
            for control, whose in controls:
                for share, mask in zip(SHARES, masks[whose], strict=True):
                    found = read(observed, mask)
                    yield NeuronCoverage(
                        explanation.neuron, explanation.explainer, control, share, found
                    )


def _lots(explanations: Sequence[Explanation], size: int) -> Iterator[list[Explanation]]:
    """Explanations of one layer, at most `size` at a time."""
    for layer in sorted({e.neuron.layer for e in explanations}):
        mine = [e for e in explanations if e.neuron.layer == layer]
        for low in range(0, len(mine), size):
            yield mine[low : low + size]


def _segments(subject: Subject) -> list[NDArray[np.int64]]:
    """Text of each document inside each sequence, in the order in which batches hold it."""
    found = []
    for batch in subject.plan.batches(subject.batch_tokens, torch.device("cpu")):
        tokens = batch.input_ids.flatten().numpy()
        found += [tokens[start:stop] for start, stop in batch.segments]
    return found


def _masks(explanation: Explanation, segments: list[NDArray[np.int64]]) -> list[NDArray[np.bool_]]:
    """[N] tokens covered, for each share."""
    simulated = np.concatenate(simulate(explanation.explainer, explanation.payload, segments))
    return [covered(explanation.payload, simulated, share) for share in SHARES]


def _activations(
    subject: Subject, places: Sequence[Place], progress: Callable[[int], Any]
) -> NDArray[np.float32]:
    """[n, N] of neurons of one layer on all text tokens, from one pass."""
    layer = places[0][0]
    index = torch.tensor([i for _, i in places])
    kept: list[NDArray[np.float32]] = []
    for batch in subject.plan.batches(subject.batch_tokens, subject.model.device):
        text = batch.is_text > 0

        def see(place: int, activations: torch.Tensor, text: torch.Tensor = text) -> None:
            if subject.site.layer_numbers[place] == layer:
                chosen = activations.flatten(0, 1)[text][:, index.to(text.device)]
                kept.append(chosen.float().T.cpu().numpy())

        with torch.no_grad(), hooked(subject.model, subject.site, see):
            subject.model.base_model(input_ids=batch.input_ids, use_cache=False)
        progress(batch.input_ids.numel())
    return np.concatenate(kept, axis=1)
