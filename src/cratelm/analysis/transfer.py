"""Explanations of the neurons of one model, scored on neurons of another: look-up tables and tries over all tokens read.

Each explanation is scored on its own neuron, on the match of that neuron, and on a random neuron of the match's layer.

Memory: 16 V H bytes for a layer of two models; layers that exceed `_BYTES` together are measured one group after
another, each with both models run again.

Shape legend: V vocabulary, H neurons of a layer, E explanations of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.batches import SearchPlan
from cratelm.analysis.matching import read_activations
from cratelm.explain.store import ExplanationSource
from cratelm.models.sites import Site
from cratelm.score.contexts import Nodes, NodeSums, SortedContexts, Whole
from cratelm.score.simulators import TOKEN_EXPLAINERS, TokenLists
from cratelm.stats.seeds import Matching

_BYTES = 2**30
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Transferred:
    """Correlations of one explanation with three neurons; None if the simulation or the neuron is constant."""

    side: int
    """0 if it explains a neuron of the first model, 1 for the second"""
    layer: int
    explainer: str
    index: int
    match: int
    random: int
    own: float | None
    on_match: float | None
    on_random: float | None


@dataclass(frozen=True, eq=False)
class _Explained:
    """The explanations of a layer of one model by one explainer, and the sums from which they are scored."""

    side: int
    explainer: str
    index: Int64
    """[E] neurons explained"""
    match: Int64
    """[E] neurons of the other model"""
    random: Int64
    """[E] others of that model"""
    own: NodeSums
    on_match: NodeSums
    on_random: NodeSums

    @classmethod
    def of(
        cls,
        side: int,
        explainer: str,
        payloads: Mapping[int, Mapping[str, Any]],
        match: Int64,
        random: Int64,
    ) -> "_Explained":
        """`match` and `random` [H] are the neurons of the other model that belong to each neuron, -1 for none."""
        index = np.array(list(payloads), np.int64)
        nodes = Nodes.of(list(payloads.values()))
        others = match[index], random[index]
        sums = [NodeSums(nodes, neurons) for neurons in (index, *others)]
        return cls(side, explainer, index, *others, *sums)


def measure_transfer(
    models: tuple[Any, Any],
    site: Site,
    plan: SearchPlan,
    explanations: tuple[ExplanationSource | None, ExplanationSource | None],
    matched: Sequence[Matching],
    *,
    vocabulary: int,
    seed: Sequence[int],
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> Iterator[Transferred]:
    """Yield the scores of the explanations of both models on each other's neurons, by layer, model and explainer.

    `matched` [L] are the pairs of neurons of each layer, `seed` that of the random neurons. `progress` is called with the
    number of tokens read.
    """
    for places in _groups(site, vocabulary):
        layers = {
            place: list(_explained(site, place, explanations, matched[place], seed))
            for place in places
        }
        if not any(layers.values()):
            progress(plan.n_tokens() * len(places) // site.n_layers)
            continue
        wholes = {
            place: [_whole(site.n_neurons[place], vocabulary, of, side) for side in (0, 1)]
            for place, of in layers.items()
        }
        depths = [len(e.own.nodes.levels) for of in layers.values() for e in of]
        for batch, found in read_activations(models, site, plan, batch_tokens, progress):
            ids = batch.input_ids.flatten().numpy()
            lists = TokenLists([ids[low:high] for low, high in batch.segments])
            contexts = SortedContexts(lists.contexts(max(1, *depths)))
            for place in places:
                for side in (0, 1):
                    wholes[place][side].add(found[side][place].cpu().numpy(), contexts)
        for place, of in layers.items():
            for explained in of:
                yield from _scores(site.layer_numbers[place], explained, wholes[place])


def _groups(site: Site, vocabulary: int) -> Iterator[list[int]]:
    """Yield the places of layers that are measured together."""
    group: list[int] = []
    n_bytes = 0
    for place, width in enumerate(site.n_neurons):
        if group and n_bytes + 16 * vocabulary * width > _BYTES:
            yield group
            group, n_bytes = [], 0
        group.append(place)
        n_bytes += 16 * vocabulary * width
    yield group


def _explained(
    site: Site,
    place: int,
    explanations: tuple[ExplanationSource | None, ExplanationSource | None],
    matched: Matching,
    seed: Sequence[int],
) -> Iterator[_Explained]:
    layer, width = site.layer_numbers[place], site.n_neurons[place]
    for side, source in enumerate(explanations):
        own, other = (matched.a, matched.b) if side == 0 else (matched.b, matched.a)
        match = np.full(width, -1, np.int64)
        match[own] = other
        random = np.random.default_rng([*seed, place, side]).integers(0, width, width)
        payloads: dict[str, dict[int, Mapping[str, Any]]] = {}
        for (explainer, _), stored in source.of_layer(layer) if source else ():
            if explainer in TOKEN_EXPLAINERS:
                payloads.setdefault(explainer, {})[stored.neuron.index] = stored.read().payload
        for explainer, of in payloads.items():
            yield _Explained.of(side, explainer, of, match, random)


def _whole(width: int, vocabulary: int, of: Sequence[_Explained], side: int) -> Whole:
    """Return the sums over all tokens of one model, with those of the explanations that are scored on its neurons."""
    none_is_positive = np.full((2, width), np.inf, np.float32)  # only correlations are computed
    own = [e.own for e in of if e.side == side]
    others = [sums for e in of if e.side != side for sums in (e.on_match, e.on_random)]
    return Whole(vocabulary, none_is_positive, [*own, *others])


def _scores(layer: int, of: _Explained, wholes: Sequence[Whole]) -> Iterator[Transferred]:
    own, other = wholes[of.side], wholes[1 - of.side]
    scores = [
        [None if found is None else found.groups.correlation() for found in sums.groups(whole)]
        for sums, whole in ((of.own, own), (of.on_match, other), (of.on_random, other))
    ]
    places = zip(of.index.tolist(), of.match.tolist(), of.random.tolist(), strict=True)
    for indices, *values in zip(places, *scores, strict=True):
        yield Transferred(of.side, layer, of.explainer, *indices, *values)
