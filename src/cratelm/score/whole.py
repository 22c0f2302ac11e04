"""Explanations scored over all held-out tokens, and what the last token alone explains: `cratelm score` without an LLM.

Excerpts that were chosen for their peak cannot notice an explanation that is too broad (Oikarinen, Yan & Weng, ICML 2025,
arXiv 2506.05774). Look-ups, tries and formulas of concepts cost little to simulate, so here they predict every held-out token that the harvest
searched. The model runs over both splits again: over `fit` for what the last token predicts (`token_share`) and for the
thresholds, over `held_out` for the scores, which thus use no held-out figure.

A token is positive, in one of two ways:

    top    a_i is among the highest 1% of the neuron's activations above 0, by their value on the fit split
    tenth  a_i > max / 10, with the neuron's maximum on the fit split

Memory: 20 * V + 16 * 1% of the searched tokens, in bytes per neuron, and a quarter of a byte per token with formulas; layers that exceed `_BYTES` together are measured
one group after another, each with the model run again.

Shape legend: n tokens of a batch, H neurons of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.batches import Batch, SearchPlan
from cratelm.activations.open_harvest import HarvestContext
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.predict import is_concept_payload
from cratelm.explain.store import ExplanationSource
from cratelm.models.sites import hooked
from cratelm.records import Control, NeuronId, Split, Status
from cratelm.score.cells import CellSums, SplitFeatures
from cratelm.score.contexts import Nodes, NodeSums, Simulated, SortedContexts, Whole
from cratelm.score.controls import shuffled
from cratelm.score.simulators import SIMULATORS, TokenLists
from cratelm.score.token_share import Highest, ShrunkMeans, TokenMeans
from cratelm.score.whole_records import TokenShare, WholeScore

_BYTES = 2**30
TOP = 0.01
"""share of a neuron's activations above 0 that are positive as `top`"""
TENTH = 0.1
"""fraction of a neuron's maximum above which a token is positive as `tenth`"""
BATCH_TOKENS = 8_192
_ROLES: tuple[Control, ...] = ("none", "shuffled")
Float64 = NDArray[np.float64]


@dataclass(eq=False)
class _Layer:
    """One layer while it is measured."""

    neurons: list[NeuronId]
    """of its H columns"""
    means: TokenMeans
    highest: Highest
    shrunk: ShrunkMeans | None = None
    whole: Whole | None = None
    sums: dict[tuple[str, Control], NodeSums] = field(default_factory=dict)
    cells: dict[str, CellSums] = field(default_factory=dict)
    """by explainer; roles are those of `_ROLES`"""
    entropy: Float64 = field(default_factory=lambda: np.zeros(0))
    explained: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """columns of the neurons that have an explanation, ascending"""


class WholeSplit:
    """Measures the neurons of a harvest over all tokens that it searched."""

    def __init__(
        self,
        opened: HarvestContext,
        plan: Callable[[Split], SearchPlan],
        explanations: ExplanationSource,
        explainers: Sequence[str],
        model: str,
        seed: int,
        quiet: bool = False,
        concepts: ConceptReader | None = None,
    ):
        """`plan` returns what is searched of a split, `seed` is that of the shuffled control.

        `concepts` evaluates formulas; None if no explanation has one.
        """
        self._concepts = concepts
        self._opened, self._explanations, self._seed = opened, explanations, seed
        self._plans = {split: plan(split) for split in ("fit", "held_out")}
        self._explainers = [e for e in explainers if e in SIMULATORS]
        self._model, self._quiet = model, quiet

    def measure(self) -> Iterator[tuple[list[TokenShare], list[WholeScore]]]:
        """Yield the figures of each layer, of all its neurons that can be measured."""
        site = self._opened.site
        n_fit = self._plans["fit"].n_tokens()
        vocabulary = self._opened.store.vocab_size
        per_neuron = 20 * vocabulary + 16 * int(TOP * n_fit)
        per_neuron += self._plans["held_out"].n_tokens() // 4 if self._concepts else 0
        group: list[int] = []
        groups, n_bytes = [group], 0
        for place, width in enumerate(site.n_neurons):
            if group and n_bytes + width * per_neuron > _BYTES:
                group, n_bytes = [], 0
                groups.append(group)
            group.append(place)
            n_bytes += width * per_neuron
        for places in groups:
            layers = {place: self._begin(place, vocabulary, n_fit) for place in places}
            self._read_fit(layers)
            depth = self._prepare(layers)
            features = self._read_held_out(layers, depth)
            for layer in layers.values():
                yield (
                    self._shares(layer),
                    [*self._scores(layer), *self._cell_scores(layer, features)],
                )

    def _begin(self, place: int, vocabulary: int, n_fit: int) -> _Layer:
        site = self._opened.site
        width, number = site.n_neurons[place], site.layer_numbers[place]
        neurons = [NeuronId(self._model, site.name, number, i) for i in range(width)]
        return _Layer(neurons, TokenMeans(vocabulary, width), Highest(width, n_fit, TOP))

    def _read_fit(self, layers: Mapping[int, _Layer]) -> None:
        for batch, of_layer in self._activations("fit", layers):
            tokens = batch.input_ids.flatten().numpy()[_text(batch)]
            for place, activations in of_layer.items():
                layers[place].means.add(activations, tokens)
                layers[place].highest.add(activations)

    def _prepare(self, layers: Mapping[int, _Layer]) -> int:
        """Prepare the layers for the held-out tokens; return the depth of the deepest explanation, at least 1."""
        depth = 1
        for layer in layers.values():
            layer.entropy, layer.shrunk = layer.means.entropy(), layer.means.shrunk()
            maximum = layer.highest.maximum()
            tenth = np.nextafter(np.float32(TENTH) * maximum, np.float32(np.inf))
            thresholds = np.stack([layer.highest.threshold(), np.where(maximum > 0, tenth, np.inf)])
            payloads = self._payloads(layer.neurons[0].layer)
            layer.explained = np.unique([n.index for of in payloads.values() for n in of]).astype(
                np.int64
            )
            for explainer in self._explainers:
                of = payloads.get(explainer, {})
                donors = shuffled(list(of), self._seed)
                receivers = {donor: neuron for neuron, donor in donors.items()}
                place = {int(index): at for at, index in enumerate(layer.explained)}
                own = [place[neuron.index] for neuron in of]
                other = [place[receivers[n].index] if n in receivers else -1 for n in of]
                roles = np.array([own, other], np.int64).reshape(len(_ROLES), len(of))
                if any(map(is_concept_payload, of.values())):
                    kept = thresholds[:, layer.explained]
                    layer.cells[explainer] = CellSums(list(of.values()), roles, kept)
                    continue
                nodes = Nodes.of(list(of.values()))
                depth = max(depth, len(nodes.levels))
                for control, neurons in zip(_ROLES, roles, strict=True):
                    layer.sums[explainer, control] = NodeSums(nodes, neurons)
            vocabulary = self._opened.store.vocab_size
            layer.whole = Whole(
                vocabulary, thresholds[:, layer.explained], list(layer.sums.values())
            )
        return depth

    def _payloads(self, layer: int) -> dict[str, dict[NeuronId, Mapping[str, Any]]]:
        """Return the payload of each explanation of a layer, by explainer and neuron."""
        found: dict[str, dict[NeuronId, Mapping[str, Any]]] = {}
        for (explainer, _), stored in self._explanations.of_layer(layer):
            if explainer in self._explainers:
                found.setdefault(explainer, {})[stored.neuron] = stored.read().payload
        return found

    def _read_held_out(self, layers: Mapping[int, _Layer], depth: int) -> SplitFeatures:
        cells = [c for layer in layers.values() for c in layer.cells.values()]
        kept = SplitFeatures([name for c in cells for p in c.payloads for name in p["terms"]])
        for batch, of_layer in self._activations("held_out", layers):
            ids = batch.input_ids.flatten().numpy()
            lists = TokenLists([ids[low:high] for low, high in batch.segments], self._concepts)
            contexts = SortedContexts(lists.contexts(depth))
            if cells:
                kept.add(lists.features)
            for place, activations in of_layer.items():
                whole, shrunk = layers[place].whole, layers[place].shrunk
                assert whole is not None
                assert shrunk is not None
                of_explained = activations[:, layers[place].explained]
                whole.add(of_explained, contexts)
                shrunk.add(activations, lists.flat)
                for sums in layers[place].cells.values():
                    sums.add(of_explained, lists.features)
        return kept

    def _activations(
        self, split: Split, layers: Mapping[int, _Layer]
    ) -> Iterator[tuple[Batch, dict[int, NDArray[np.float32]]]]:
        """Yield the batches of a split that have text, and the activations [n, H] of their text by layer."""
        model, plan = self._opened.subject.model, self._plans[split]
        found: dict[int, NDArray[np.float32]] = {}
        text = np.zeros(0, bool)

        def collect(place: int, activations: torch.Tensor) -> None:
            if place in layers:
                flat = activations.reshape(-1, activations.shape[-1]).float().cpu().numpy()
                found[place] = flat if text.all() else flat[text]

        with (
            torch.no_grad(),
            tqdm(
                total=plan.n_tokens(),
                desc=f"{self._model}, all of {split}",
                unit="tok",
                unit_scale=True,
                disable=self._quiet,
            ) as bar,
        ):
            for batch in plan.batches(BATCH_TOKENS, torch.device("cpu")):
                bar.update(batch.input_ids.numel())
                text = _text(batch)
                if not text.any():
                    continue
                with hooked(model, self._opened.site, collect):
                    model.base_model(input_ids=batch.input_ids.to(model.device), use_cache=False)
                yield batch, found
                found.clear()

    def _shares(self, layer: _Layer) -> list[TokenShare]:
        assert layer.shrunk is not None
        assert layer.whole is not None
        share, n = layer.shrunk.share(), layer.whole.n
        columns = zip(layer.neurons, share.tolist(), layer.entropy.tolist(), strict=True)
        return [TokenShare(neuron, _number(r2), _number(h), n) for neuron, r2, h in columns]

    def _scores(self, layer: _Layer) -> Iterator[WholeScore]:
        assert layer.whole is not None
        for (explainer, control), sums in layer.sums.items():
            for simulated in sums.groups(layer.whole):
                if simulated is not None:
                    yield _score(layer, explainer, control, simulated)

    def _cell_scores(self, layer: _Layer, kept: SplitFeatures) -> Iterator[WholeScore]:
        assert layer.whole is not None
        ids, columns = (kept.ids(), kept.columns()) if layer.cells else (None, None)
        for explainer, sums in layer.cells.items():
            assert ids is not None
            assert columns is not None
            for role, simulated in sums.simulated(layer.whole, ids, columns):
                yield _score(layer, explainer, _ROLES[role], simulated)


def _score(layer: _Layer, explainer: str, control: Control, simulated: Simulated) -> WholeScore:
    whole = layer.whole
    assert whole is not None
    top, tenth = (simulated.groups.ordered(of) for of in simulated.positive)
    f1, iou = tenth.overlap() or (None, None)
    correlation, status, reason = simulated.groups.correlation(), Status.DEFINED, ""
    if whole.maximum[simulated.neuron] <= 0:
        status, reason = Status.DEAD, "never above 0 on the held-out split"
    elif correlation is None:
        status, reason = Status.UNDEFINED, "the truth or the simulation is constant"
    return WholeScore(
        layer.neurons[layer.explained[simulated.neuron]],
        explainer,
        control,
        status,
        reason,
        correlation=correlation,
        cosine=simulated.groups.cosine(),
        precision_top=top.average_precision(),
        chance_top=top.base_rate,
        precision_tenth=tenth.average_precision(),
        chance_tenth=tenth.base_rate,
        f1=f1,
        iou=iou,
        auc=simulated.against(simulated.silent).roc_area(),
        auc_hard=simulated.against(simulated.hard).roc_area(),
        n_tokens=whole.n,
    )


def _text(batch: Batch) -> NDArray[np.bool_]:
    """Return which tokens of a batch are text and not end marks, [N]."""
    return batch.segment_of.numpy() >= 0


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
