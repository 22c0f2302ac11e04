"""Explain every neuron of a model from a pass over fit tokens, ready to be simulated.

Stacked explanations need one pass for each part, because a part is made from what those before it leave. Layers whose
sums exceed `_BYTES` together are explained one group after another, each with the model run again.

Memory: 8 bytes per neuron of a group and context of the fit text, at most `_BYTES` or those of one layer; then the
explanations, 12 bytes per neuron and entry, or 4 per neuron and context without a limit of their size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.fit import FitFeatures, fit_features
from cratelm.explain.concepts.library import builtin_library
from cratelm.models.sites import hooked
from cratelm.replace.concepts import (
    CellSums,
    concepts_as_found,
    formulas,
    share_features,
)
from cratelm.replace.config import Part, ReplaceConfig, parts_of
from cratelm.replace.contexts import Contexts
from cratelm.replace.exact import quantum_of
from cratelm.replace.excerpts import explained_by_excerpts
from cratelm.replace.ngram import NGrams
from cratelm.replace.predictors import ByContext, Predictor, Stacked
from cratelm.replace.tables import ContextSums, FittedTables
from cratelm.replace.text import BatchText, successors
from cratelm.runs.ranks import Ranks

_BYTES = 2**30
Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FitText:
    """The fit tokens that explanations are made from."""

    plan: SearchPlan
    batch_tokens: int
    contexts: Contexts
    ngrams: NGrams
    n_tokens: int

    @classmethod
    def of(cls, plan: SearchPlan, batch_tokens: int, depth: int, vocabulary: int) -> "FitText":
        """Read the tokens of a plan. Memory: 8 * depth bytes per token."""
        cpu = torch.device("cpu")
        texts = [BatchText.of(batch) for batch in plan.batches(batch_tokens, cpu)]
        contexts = Contexts.of(np.concatenate([text.rows(text.contexts(depth)) for text in texts]))
        matched, following = zip(*(successors(text, contexts) for text in texts), strict=True)
        ngrams = NGrams.of(
            contexts, np.concatenate(matched, axis=1), np.concatenate(following), vocabulary
        )
        return cls(plan, batch_tokens, contexts, ngrams, plan.n_tokens())


@dataclass(eq=False)
class _Layer:
    """The explanations of a layer while they are made."""

    place: int
    n_neurons: int
    parts: dict[str, list[Predictor]] = field(default_factory=dict)
    """by explainer, the parts that are finished"""


class Fit:
    """Makes the explanations of all neurons."""

    def __init__(
        self,
        config: ReplaceConfig,
        opened: HarvestContext,
        text: FitText,
        largest: Sequence[float],
        ranks: Ranks,
    ):
        """`largest` is the highest activation of each layer on the fit split, by which sums are rounded."""
        self._config, self._opened, self._text, self._ranks = config, opened, text, ranks
        self._quanta = [quantum_of(text.n_tokens, 16 * max(1.0, abs(of))) for of in largest]

    def explain(self) -> dict[str, list[Predictor]]:
        """Return the explanations by explainer and place."""
        explained: dict[str, list[Predictor]] = {name: [] for name in self._config.explainers}
        for places in self._groups():
            layers = [_Layer(p, self._opened.site.n_neurons[p]) for p in places]
            for number in range(max(len(parts_of(name)) for name in explained)):
                self._pass(layers, number)
            for layer in layers:
                for name, parts in layer.parts.items():
                    whole = parts[0] if len(parts) == 1 else Stacked(parts)
                    explained[name].append(whole)
        return explained

    def _groups(self) -> list[list[int]]:
        """Return the places of the layers that are explained in one pass."""
        groups: list[list[int]] = [[]]
        n_bytes = 0
        for place, width in enumerate(self._opened.site.n_neurons):
            size = 8 * width * (len(self._text.contexts) + 1)
            if groups[-1] and n_bytes + size > _BYTES:
                groups.append([])
                n_bytes = 0
            groups[-1].append(place)
            n_bytes += size
        return groups

    def _pass(self, layers: Sequence[_Layer], number: int) -> None:
        """Make part `number` of every explainer that has one."""
        named = {n: of for n in self._config.explainers if len(of := parts_of(n)) > number}
        fitted = {n: of for n, of in named.items() if not of[number].of_excerpts}
        # parts that are made from the same activations share their sums
        wanted = {
            name: _Sums(of[:number], of[number].kind == "concepts") for name, of in fitted.items()
        }
        sums = {
            (layer.place, of): self._empty(layer, of)
            for layer in layers
            for of in dict.fromkeys(wanted.values())
        }
        if sums:
            self._add(layers, sums)
        for layer in layers:
            made: dict[_Sums, FittedTables | Predictor] = {}
            for of in dict.fromkeys(wanted.values()):
                own = sums.pop((layer.place, of))
                for other in self._ranks.collected(own):
                    if other is not own:
                        own.merge(other)  # type: ignore[arg-type]  (of the same kind)
                finish = own.explanations if isinstance(own, CellSums) else own.tables
                made[of] = self._ranks.by_first(finish)
            for name, parts in named.items():
                if name in fitted:
                    part = _of_sums(parts[number], made[wanted[name]])
                else:
                    part = self._of_excerpts(parts[number], layer.place)
                layer.parts.setdefault(name, []).append(part)

    def _empty(self, layer: _Layer, of: "_Sums") -> ContextSums | CellSums:
        place, quantum = layer.place, self._quanta[layer.place]
        if not of.are_of_cells:
            return ContextSums(self._text.contexts, layer.n_neurons, quantum)
        # the search knows formulas for activations, and for what a look-up leaves of them
        is_residual = tuple(part.kind for part in of.before) == ("lookup",)
        found = self._ranks.by_first(
            lambda: formulas(self._opened, place, self._features, of_residual=is_residual)
        )
        return CellSums(found, self._reader, quantum)

    @property
    def _has_concepts(self) -> bool:
        names = self._config.explainers
        return any(part.kind == "concepts" for name in names for part in parts_of(name))

    @cached_property
    def _features(self) -> FitFeatures:
        opened = self._opened
        of_sequences = opened.sequence_length, opened.beginning
        return fit_features(builtin_library(), opened.store, *of_sequences)

    @cached_property
    def _reader(self) -> ConceptReader:
        return ConceptReader(builtin_library(), self._opened.store.token_strings)

    def _of_excerpts(self, part: Part, place: int) -> Predictor:
        """Return the explanations that `cratelm explain` would make."""

        def made() -> Predictor:
            if part.kind == "concepts":
                found = formulas(self._opened, place, self._features, of_residual=False)
                return concepts_as_found(found, self._reader)
            return explained_by_excerpts(part.kind, self._opened, place, self._config.depth)

        return self._ranks.by_first(made)

    def _add(
        self,
        layers: Sequence[_Layer],
        sums: "Mapping[tuple[int, _Sums], ContextSums | CellSums]",
    ) -> None:
        """Run the model over this process's share of the fit tokens, and add the activations to the sums."""
        text, opened = self._text, self._opened
        model = opened.subject.model
        blocks = text.plan.blocks(text.batch_tokens)
        numbers = [n for i in self._ranks.share.between(len(blocks)) for n in blocks[i]]
        codes: dict[int, Float32] = {}

        def collect(place: int, activations: torch.Tensor) -> None:
            codes[place] = activations.flatten(0, 1).float().cpu().numpy()

        bar = tqdm(
            total=text.n_tokens // self._ranks.share.of,
            desc=f"explain {self._config.model}",
            unit="tok",
            unit_scale=True,
            disable=self._config.quiet or not self._ranks.is_first,
        )
        with torch.no_grad(), bar:
            for batch in text.plan.batches(text.batch_tokens, model.device, numbers):
                with hooked(model, opened.site, collect):
                    model.base_model(input_ids=batch.input_ids, use_cache=False)
                of_batch = BatchText.of(batch)
                matched = of_batch.matched(text.contexts)
                if self._has_concepts:
                    position = batch.position.cpu().numpy()
                    share_features(of_batch, position, self._reader, self._features)
                for layer in layers:
                    for (place, wanted), of in sums.items():
                        if place != layer.place:
                            continue
                        left = codes[place]
                        for done in self._finished(layer, wanted.before):
                            left = left - done.predict(of_batch)
                        if isinstance(of, CellSums):
                            of.add(left, of_batch)
                        else:
                            of.add(of_batch.rows(left), of_batch.rows(matched.T).T)
                bar.update(batch.input_ids.numel())

    def _finished(self, layer: _Layer, key: tuple[Part, ...]) -> list[Predictor]:
        """Return the parts that an explainer begins with."""
        if not key:
            return []
        name = next(n for n in layer.parts if parts_of(n)[: len(key)] == key)
        return layer.parts[name][: len(key)]


@dataclass(frozen=True)
class _Sums:
    """Which sums a part is made from."""

    before: tuple[Part, ...]
    """parts whose predictions are subtracted from the activations"""
    are_of_cells: bool
    """over the cells of formulas; otherwise over contexts"""


def _of_sums(part: Part, fitted: FittedTables | Predictor) -> Predictor:
    if not isinstance(fitted, FittedTables):
        return fitted
    if part.kind == "lookup":
        fitted = fitted.shallow(1)
    return ByContext(fitted.pruned(part.most, shared=part.shared) if part.most else fitted.tables)
