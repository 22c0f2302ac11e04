"""Losses on held-out text with the codes of layers replaced, by document.

Shape legend: B sequences of T tokens, n = B * T, H neurons of a layer, C documents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.batches import Batch, SearchPlan
from cratelm.models.partial_forward import Trace
from cratelm.replace.contexts import Contexts
from cratelm.replace.exact import quantum_of, rounded
from cratelm.replace.forward import Codes, ExplainedModel
from cratelm.replace.layers import ALL, LayerSet
from cratelm.replace.ngram import NGrams
from cratelm.replace.predictors import Constant, Predictor
from cratelm.replace.store import ReplacedBy
from cratelm.replace.text import BatchText, predicted, successors
from cratelm.runs.ranks import Ranks, Share

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_BYTES = 2**28
"""bytes of logits, or of predicted activations, of one batch"""
_LARGEST_LOSS = 1e4
"""nats: sums of losses up to this are exact (`cratelm.replace.exact`)"""


class Variant(NamedTuple):
    """What a loss is of."""

    replaced_by: ReplacedBy
    explainer: str = ""
    layers: str = ""
    depth: int = 0
    """tokens of context of an n-gram model"""


@dataclass(eq=False)
class Losses:
    """Sums of losses over the documents of the held-out split."""

    ordinals: NDArray[np.int64]
    """[C] ascending"""
    quantum: float
    n_tokens: NDArray[np.int64] = field(init=False)
    """[C] predicted tokens"""
    sums: dict[Variant, Float64] = field(default_factory=dict)
    """[C] by variant, nats"""

    def __post_init__(self) -> None:
        self.n_tokens = np.zeros(len(self.ordinals), np.int64)

    def columns(self, text: BatchText) -> NDArray[np.int64]:
        """Return the column of the document of each token that is predicted from, [m]."""
        documents = text.document.reshape(text.shape)[:, :-1][predicted(text)]
        return np.searchsorted(self.ordinals, documents)

    def count(self, columns: NDArray[np.int64]) -> None:
        """Count the predicted tokens of a batch."""
        self.n_tokens += np.bincount(columns, minlength=len(self.ordinals))

    def add(self, variant: Variant, columns: NDArray[np.int64], losses: Float64) -> None:
        """Add the losses [m] of a batch."""
        of_batch: Float64 = np.bincount(columns, losses, len(self.ordinals))  # type: ignore[assignment]
        before = self.sums.get(variant, 0.0)
        self.sums[variant] = before + rounded(of_batch, self.quantum)

    def merge(self, other: "Losses") -> None:
        """Add the losses of another share of the tokens."""
        self.n_tokens += other.n_tokens
        for variant, sums in other.sums.items():
            self.sums[variant] = self.sums.get(variant, 0.0) + sums


@dataclass(eq=False)
class Errors:
    """How well explanations predict the activations of each neuron of a layer, on two halves of the documents."""

    n_neurons: int
    quantum: float
    n: Float64 = field(init=False)
    """[2] tokens"""
    sums: Float64 = field(init=False)
    """[2, 2, H] activations and their squares, by half"""
    squares: dict[str, Float64] = field(default_factory=dict)
    """[2, H] squared errors by explainer"""

    def __post_init__(self) -> None:
        self.n = np.zeros(2)
        self.sums = np.zeros((2, 2, self.n_neurons))

    def begin(self, activations: Float32, halves: Sequence[NDArray[np.int64]]) -> None:
        """Add the activations [n, H] of a batch; `halves` are the rows of each half of the documents."""
        for half, rows in enumerate(halves):
            of = activations[rows]
            self.n[half] += len(rows)
            total = of.sum(0, dtype=np.float64)
            squares = np.einsum("nh,nh->h", of, of, dtype=np.float64)
            self.sums[half] += rounded(np.stack([total, squares]), self.quantum)

    def add(
        self,
        explainer: str,
        activations: Float32,
        simulated: Float32,
        halves: Sequence[NDArray[np.int64]],
    ) -> None:
        """Add the squared errors of what an explainer predicts [n, H]."""
        of_explainer = self.squares.setdefault(explainer, np.zeros((2, self.n_neurons)))
        for half, rows in enumerate(halves):
            error = activations[rows] - simulated[rows]
            squares = np.einsum("nh,nh->h", error, error, dtype=np.float64)
            of_explainer[half] += rounded(squares, self.quantum)

    def merge(self, other: "Errors") -> None:
        """Add the errors on another share of the tokens."""
        self.n += other.n
        self.sums += other.sums
        for explainer, squares in other.squares.items():
            self.squares[explainer] = self.squares.get(explainer, 0.0) + squares

    def explained(self, explainer: str, halves: Sequence[int] = (0, 1)) -> Float64:
        """Return 1 - squared error / variance [H] on some halves; NaN for neurons that are constant there."""
        chosen = list(halves)
        n, (total, squares) = self.n[chosen].sum(), self.sums[chosen].sum(0)
        spread = squares - total**2 / max(1.0, n)
        is_constant = spread <= 1e-9 * squares
        error = self.squares[explainer][chosen].sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(is_constant, np.nan, 1 - error / spread)


class HeldOut:
    """Measures a model on the held-out tokens of a plan."""

    def __init__(
        self,
        model: ExplainedModel,
        plan: SearchPlan,
        batch_tokens: int,
        vocabulary: int,
        quiet: bool,
    ):
        per_token = 4 * max(vocabulary, sum(model.site.n_neurons))
        self.model, self.plan, self.quiet = model, plan, quiet
        self.batch_tokens = max(1, min(batch_tokens, _BYTES // per_token))
        self.ordinals = np.sort(np.asarray(plan.split.ordinals, np.int64))

    def losses(self) -> Losses:
        """Return empty sums."""
        return Losses(self.ordinals, quantum_of(self.plan.n_tokens(), _LARGEST_LOSS))

    def halves(self, text: BatchText) -> list[NDArray[np.int64]]:
        """Return the text tokens of each half of the documents: every second document is in the other half."""
        column = np.searchsorted(self.ordinals, np.maximum(text.document, 0))
        half = np.where(text.document >= 0, column % 2, -1)
        return [np.flatnonzero(half == number) for number in (0, 1)]

    def batches(self, share: Share, label: str, most: int = 0) -> Iterator[tuple[Batch, BatchText]]:
        """Yield the batches of a share of the tokens, or of the first `most` of them, with their text."""
        blocks = self.plan.blocks(self.batch_tokens)
        if most:
            n_batches = -(-most // self.batch_tokens)
            n_all = sum(map(len, blocks))
            # evenly spread over the sample
            chosen = {i * n_all // n_batches for i in range(min(n_batches, n_all))}
            blocks = [[n for n in block if n in chosen] for block in blocks]
        numbers = [n for i in share.between(len(blocks)) for n in blocks[i]]
        device = self.model.model.device
        bar = tqdm(
            total=len(numbers),
            desc=label,
            unit="batch",
            disable=self.quiet or not share.is_first,
        )
        with bar:
            for batch in self.plan.batches(self.batch_tokens, device, numbers):
                yield batch, BatchText.of(batch)
                bar.update()

    def token_losses(
        self,
        trace: Trace,
        text: BatchText,
        codes: Codes,
        mixed: Mapping[int, torch.Tensor] | None = None,
        only: NDArray[np.bool_] | None = None,
    ) -> Float64:
        """Return the losses [m] of the predicted tokens of a batch, or of those of them that are in `only` [B, T - 1]."""
        at = predicted(text) if only is None else predicted(text) & only
        wanted = None if only is None else torch.from_numpy(at).to(trace.ids.device)
        return self.model.losses(trace, codes, mixed, wanted).cpu().double().numpy()[at]


def measure(
    held_out: HeldOut,
    explained: Mapping[str, Sequence[Predictor]],
    means: Sequence[Float32],
    sets: Sequence[LayerSet],
    ngrams: tuple[Contexts, NGrams],
    largest: Sequence[float],
    seed: int,
    ranks: Ranks,
) -> tuple[Losses, list[Errors]]:
    """Return the losses of all variants, and the errors by place, on rank 0; `means` [L][H] are those of the fit tokens."""
    model, site = held_out.model, held_out.model.site
    losses = held_out.losses()
    n_tokens = held_out.plan.n_tokens()
    errors = [
        Errors(width, quantum_of(n_tokens, 16 * max(1.0, top**2)))
        for width, top in zip(site.n_neurons, largest, strict=True)
    ]
    references: list[tuple[ReplacedBy, list[Float32]]] = [
        ("mean", list(means)), ("zero", [np.zeros_like(of) for of in means]),
    ]  # fmt: skip
    places = sorted({place for layer_set in sets for place in layer_set.places})
    everything = [s for s in sets if s.label == ALL]
    shuffled = [Shuffled.of(everything, of, seed, place) for place, of in enumerate(means)]
    contexts, counts = ngrams
    for batch, text in held_out.batches(ranks.share, "run on explanations"):
        columns = losses.columns(text)
        losses.count(columns)
        trace = model.trace(batch.input_ids)
        losses.add(Variant("none"), columns, held_out.token_losses(trace, text, {}))
        for depth, of_depth in enumerate(counts.losses(*successors(text, contexts))):
            losses.add(Variant("ngram", depth=depth), columns, of_depth)
        halves = held_out.halves(text)
        true = [of.flatten(0, 1).float().cpu().numpy() for of in trace.activations]
        for place, of in enumerate(true):
            errors[place].begin(of, halves)
        if site.autoencoders and not site.has_both_ends:
            rebuilt = {place: true[place] for place in places}
            losses.add(
                Variant("none", layers=ALL), columns, held_out.token_losses(trace, text, rebuilt)
            )
        for name, values in references:
            codes = [Constant(of).predict(text) for of in values]
            for label, of in _of_sets(held_out, trace, text, codes, sets):
                losses.add(Variant(name, layers=label), columns, of)
        for explainer, predictors in explained.items():
            codes = [predictor.predict(text) for predictor in predictors]
            for place, of in enumerate(codes):
                errors[place].add(explainer, true[place], of, halves)
            for label, of in _of_sets(held_out, trace, text, codes, sets):
                losses.add(Variant("own", explainer, label), columns, of)
            other = [by.codes(of) for of, by in zip(codes, shuffled, strict=True)]
            for label, of in _of_sets(held_out, trace, text, other, everything):
                losses.add(Variant("shuffled", explainer, label), columns, of)
    _merge_ranks(losses, errors, ranks)
    return losses, errors


def _merge_ranks(losses: Losses, errors: Sequence[Errors], ranks: Ranks) -> None:
    """Merge, on rank 0, what the other ranks measured into its own."""
    for its_losses, its_errors in ranks.collected((losses, errors)):
        if its_losses is not losses:
            losses.merge(its_losses)
            for mine, its in zip(errors, its_errors, strict=True):
                mine.merge(its)


def _of_sets(
    held_out: HeldOut,
    trace: Trace,
    text: BatchText,
    codes: Sequence[Float32],
    sets: Iterable[LayerSet],
) -> Iterator[tuple[str, Float64]]:
    """Yield the losses [m] of each set of layers by its label; sets that compute the same are run once."""
    done: dict[tuple[int, ...], Float64] = {}
    model = held_out.model
    for layer_set in sets:
        if layer_set.neurons is not None:
            of_set = {place: codes[place] for place in layer_set.places}
            masks = {
                place: torch.from_numpy(layer_set.neurons[place]).to(trace.ids.device)
                for place in layer_set.places
            }
            yield layer_set.label, held_out.token_losses(trace, text, of_set, masks)
            continue
        needed = model.needed(layer_set.places)
        if needed not in done:
            of_set = {place: codes[place] for place in needed}
            done[needed] = held_out.token_losses(trace, text, of_set)
        yield layer_set.label, done[needed]


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Which other neuron's explanation takes the place of each neuron's own in a layer."""

    order: NDArray[np.int64]
    """[H] other neuron, each once: the next one in a random circle; a neuron without others has itself"""
    means: Float32
    """[H] value of neurons without others"""

    @classmethod
    def of(cls, sets: Sequence[LayerSet], means: Float32, seed: int, place: int) -> "Shuffled":
        """Return the order of the neurons of a layer that `sets` replace; `means` [H] are those of the fit tokens."""
        chosen = np.arange(len(means))
        if sets and (neurons := sets[0].neurons) is not None:
            chosen = np.flatnonzero(neurons[place]) if place in neurons else chosen[:0]
        circle = chosen[np.random.default_rng((seed, place)).permutation(len(chosen))]
        order = np.arange(len(means))
        order[circle] = np.roll(circle, -1)
        return cls(order, means)

    def codes(self, predicted: Float32) -> Float32:
        """Return the codes [n, H] that the explanations of other neurons predict."""
        codes = np.take(predicted, self.order, axis=1)
        is_own = self.order == np.arange(len(self.order))
        codes[:, is_own] = self.means[is_own]
        return codes
