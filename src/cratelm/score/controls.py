"""Null controls and leakage audit: the explanation that each control uses, and the documents of both splits."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cratelm.explain.store import (
    ExplanationFailure,
    ExplanationSource,
    ListedExplanations,
    StoredExplanation,
)
from cratelm.records import (
    Control,
    Explanation,
    Metric,
    NeuronId,
    NeuronScore,
    Score,
    Status,
    evidence_for,
    has_both_ends,
)


@dataclass(frozen=True)
class Audit:
    """Documents explained from and documents scored on, over all neurons of a model."""

    n_explained: int
    """documents that any explanation was made from"""
    n_scored: int
    """documents that any score includes"""
    shared: tuple[int, ...]
    """ordinals of documents in both; empty if the splits are disjoint, as they should be"""


class DocumentAudit:
    """Collects the documents explained from and scored on.

    The whole model is compared, so that the audit covers the shuffled control, which uses another neuron's
    explanation. Memory: about 100 bytes per document.
    """

    def __init__(self, explained: Iterable[int] = ()):
        self._explained, self._scored = set(explained), set[int]()

    def explained(self, documents: Iterable[int]) -> None:
        """Add documents that an explanation was made from."""
        self._explained.update(documents)

    def watched(self, scores: Iterable[NeuronScore]) -> Iterator[NeuronScore]:
        """Yield the scores unchanged, and add the documents that they list as scored on."""
        for score in scores:
            self._scored.update(score.documents)
            yield score

    def result(self) -> Audit:
        """Return the audit of what was added."""
        shared = self._explained & self._scored
        return Audit(len(self._explained), len(self._scored), tuple(sorted(shared)))


def audit(explanations: Iterable[Explanation], scores: Iterable[NeuronScore]) -> Audit:
    """Return the documents explained from and scored on, as the explanations and scores list them."""
    documents = DocumentAudit(d for e in explanations for d in e.documents)
    for _ in documents.watched(scores):
        pass
    return documents.result()


def shuffled(neurons: Sequence[NeuronId], seed: int) -> dict[NeuronId, NeuronId]:
    """Return for each neuron another neuron of its layer, each used once: a seeded derangement.

    The neurons of a layer are put in random order and each gets the explanation of the next one, the last
    that of the first. A neuron that is alone in its layer is absent. An end of a neuron gets an explanation of another
    neuron, not of its other end, unless the layer has too few.
    """
    donors: dict[NeuronId, NeuronId] = {}
    for layer in sorted({n.layer for n in neurons}):
        members = sorted(n for n in neurons if n.layer == layer)
        order = np.random.default_rng([seed, layer]).permutation(len(members))
        if len(members) > 1:
            ring = _without_own_ends([members[i] for i in order])
            donors.update(zip(ring, ring[1:] + ring[:1], strict=True))
    return donors


def _without_own_ends(ring: list[NeuronId]) -> list[NeuronId]:
    """Return a ring in which no two ends of one neuron are next to each other; `ring` itself where neurons have one end.

    First one end of each neuron, then the other ends in the same order. This fails only if a single neuron has both
    ends and stands at the border of the two, so it is moved away from there.
    """
    if not has_both_ends(ring[0].site):
        return ring
    first: dict[int, NeuronId] = {}
    second = []
    for end in ring:
        second += [end] if end.index // 2 in first else []
        first.setdefault(end.index // 2, end)
    ends = list(first.values())
    if len(second) == 1:
        (own,) = (end for end in ends if end.index // 2 == second[0].index // 2)
        ends.remove(own)
        ends.insert(1, own)
    place = {number: i for i, number in enumerate(e.index // 2 for e in ends)}
    return ends + sorted(second, key=lambda end: place[end.index // 2])


def dead_score(split: str) -> Score:
    """Return the score of a neuron that never fired on the split `fit` or `held-out`."""
    return Score(None, Status.DEAD, f"never above 0 on the {split} split")


class ExplanationSet:
    """Explanations of one set, by explainer, kind of evidence and neuron, with donors for the shuffled control.

    A language model explains a neuron from several kinds of evidence, and each metric uses one of them;
    explainers without a language model make a single explanation for all metrics.

    Memory: the explanations of one layer, with payloads as they are stored. Neurons are best looked up by
    layer, since each change of layer reads another one.
    """

    def __init__(
        self,
        explanations: Sequence[Explanation] | ExplanationSource,
        failures: Sequence[ExplanationFailure] | None,
        seed: int,
    ):
        """`failures`: explanations that a language model failed to give; None if none was called."""
        listed = isinstance(explanations, Sequence)
        self._source = ListedExplanations(explanations) if listed else explanations
        self._kinds = self._source.kinds()
        self._seed = seed
        self._layer = -1
        self._explanations: dict[tuple[str, str], dict[NeuronId, StoredExplanation]] = {}
        self._donors: dict[tuple[str, str], dict[NeuronId, NeuronId]] = {}
        self._reasons = (
            None if failures is None else {(f.neuron, f.evidence): f.reason for f in failures}
        )

    def find(
        self, neuron: NeuronId, explainer: str, metric: Metric, control: Control
    ) -> Explanation | Score:
        """Return the explanation to score, or, if there is none, a score that says why."""
        if neuron.layer != self._layer:
            self._read(neuron.layer)
        evidence = evidence_for(metric)
        kind = (explainer, evidence)
        if kind not in self._kinds:
            kind = (explainer, "")  # made without a language model: one for all metrics
        of_kind = self._explanations.get(kind, {})
        if neuron not in of_kind:
            reason = f"no explanation by {explainer}"
            if self._reasons is not None:
                why = self._reasons.get((neuron, evidence), "none was requested for this evidence")
                reason = f"{reason}: {why}"
            return Score(None, Status.FAILED, reason)
        if control != "shuffled":
            return of_kind[neuron].read()
        donor = self._donors[kind].get(neuron)
        if donor is None:
            reason = "the layer has no other neuron with an explanation"
            return Score(None, Status.UNDEFINED, reason)
        return of_kind[donor].read()

    def _read(self, layer: int) -> None:
        self._explanations = {}
        for kind, stored in self._source.of_layer(layer):
            self._explanations.setdefault(kind, {})[stored.neuron] = stored
        self._donors = {
            kind: shuffled(list(of_kind), self._seed)
            for kind, of_kind in self._explanations.items()
        }
        self._layer = layer
