"""What guards a score: the shuffled null, and the audit that no document was both explained from and scored on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cratelm.records import Explanation, NeuronId, NeuronScore


@dataclass(frozen=True)
class Audit:
    """Documents explained from and scored on, over all neurons of a model."""

    n_explained: int
    """documents that any explainer saw"""
    n_scored: int
    """documents that any score pools"""
    shared: tuple[int, ...]
    """ordinals of those in both: none, where the splits are what they should be"""


def audit(explanations: Iterable[Explanation], scores: Iterable[NeuronScore]) -> Audit:
    """Compares the documents in the records themselves, over the whole model.

    So it also covers the shuffled control, whose explanation is another neuron's.
    """
    explained = {document for e in explanations for document in e.documents}
    scored = {document for s in scores for document in s.documents}
    return Audit(len(explained), len(scored), tuple(sorted(explained & scored)))


def shuffled(neurons: Sequence[NeuronId], seed: int) -> dict[NeuronId, NeuronId]:
    """For each neuron another one of its layer, each chosen once: a seeded derangement.

    The neurons of a layer are put in random order and each is given the next one's explanation, the
    last the first one's. A neuron alone in its layer has none and is left out.
    """
    donors: dict[NeuronId, NeuronId] = {}
    for layer in sorted({n.layer for n in neurons}):
        members = sorted(n for n in neurons if n.layer == layer)
        order = np.random.default_rng([seed, layer]).permutation(len(members))
        if len(members) > 1:
            ring = [members[place] for place in order]
            donors.update(zip(ring, ring[1:] + ring[:1], strict=True))
    return donors
