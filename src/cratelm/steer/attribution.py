"""What each neuron does to the logits: exactly, at tokens where it fires, and by the first-order reading.

Exact: (logits with the neuron as it is) - (logits with it at 0 at this token alone), through all that
follows, less the mean over the vocabulary, which no probability depends on; averaged over tokens of the
fit split. In CRATE the blocks that follow are not near the identity (no residual around ISTA), so that
the first-order reading of all but the last layer leaves out what matters: how well it agrees is measured.

Shape legend: k neurons, n tokens (one row each), T tokens of an excerpt up to the one meant, D width,
V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.explain.lookup import token_table
from cratelm.models.partial_forward import PartialForward
from cratelm.records import Excerpt, ExcerptKind, NeuronId, NeuronRecord
from cratelm.stats.auc import roc_area_of_ranks
from cratelm.steer.ablation import MOST_LOGITS

KINDS: tuple[ExcerptKind, ...] = ("top", "random", "openai_bin")
"""excerpts that tokens are drawn from: those with most text before the token"""
NEURONS_A_TIME = 64
"""neurons whose effects on the whole vocabulary are held at a time"""
NAMED = 10
"""tokens that a look-up explanation names"""
_ENTRIES = 200
"""rows of the look-up's table, as `cratelm explain` has it"""


@dataclass(frozen=True, eq=False)
class Effect:
    """What one neuron does to the logits."""

    neuron: NeuronId
    exact: NDArray[np.float64]
    """[V] mean over the tokens, less the mean over the vocabulary"""
    first_order: NDArray[np.float64] | None
    """[V] of the same mean activation; None where the model has no first-order reading"""
    activation: float
    """mean over the tokens"""
    n_positions: int
    named: NDArray[np.int64]
    """ids of the tokens that it fires on most, by look-up"""

    @property
    def agreement(self) -> float | None:
        """Spearman's rank correlation of the two over the vocabulary; None where one is missing or constant."""
        return None if self.first_order is None else rank_correlation(self.exact, self.first_order)

    def overlap(self, top: int) -> float | None:
        """Part of the `top` tokens promoted most that the two have in common."""
        if self.first_order is None:
            return None
        sides = [set(best(side, top).tolist()) for side in (self.exact, self.first_order)]
        return len(sides[0] & sides[1]) / min(top, len(self.exact))

    def place_of(self, tokens: NDArray[np.int64]) -> float | None:
        """Chance that a token of `tokens` is promoted more than one drawn from the rest, 0..1 (ties
        half): the area under the ROC curve. None where there are none, or no others."""
        n, m = len(tokens), len(self.exact) - len(tokens)
        if not n or not m:
            return None
        return roc_area_of_ranks(rankdata(self.exact)[tokens], m)


def best(effect: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """Ids of the `top` tokens that gain most, in order."""
    return np.argsort(-effect, kind="stable")[:top]


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Spearman's; None where one is constant."""
    ranks = [rankdata(x) - (len(x) + 1) / 2 for x in (a, b)]
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / scale) if scale else None


def attribute(
    rest: PartialForward,
    place: int,
    records: Iterable[NeuronRecord],
    matrix: torch.Tensor | None,
    *,
    vocabulary: int,
    positions: int,
    seed: int,
) -> Iterator[Effect | NeuronId]:
    """Effects of neurons of one place, in order; the id alone of one that fires at no token drawn.

    `records` are of the fit split; `matrix` [V', D] is the first-order reading, of which, as of the
    logits, the first `vocabulary` tokens count. Memory: `NEURONS_A_TIME` times V numbers, and
    `MOST_LOGITS` logits twice over.
    """
    pending: list[NeuronRecord] = []
    for record in records:
        pending.append(record)
        if len(pending) == NEURONS_A_TIME:
            yield from _some(rest, place, pending, matrix, vocabulary, positions, seed)
            pending = []
    if pending:
        yield from _some(rest, place, pending, matrix, vocabulary, positions, seed)


def _some(
    rest: PartialForward,
    place: int,
    records: Sequence[NeuronRecord],
    matrix: torch.Tensor | None,
    vocabulary: int,
    positions: int,
    seed: int,
) -> Iterator[Effect | NeuronId]:
    sums = torch.zeros(len(records), vocabulary, dtype=torch.double)
    activation, count = np.zeros(len(records)), np.zeros(len(records), np.int64)
    drawn = [(j, e) for j, r in enumerate(records) for e in firing(r, positions, seed)]
    neurons = np.array([r.neuron.index for r in records])
    for some in _of_one_length(drawn, rest):
        which = np.array([j for j, _ in some])
        ids = np.stack([e.token_ids[: e.peak + 1] for _, e in some]).astype(np.int64)
        effects, values = _effects(rest, place, ids, neurons[which], vocabulary)
        fires = values != 0  # with less text before it a neuron may be silent
        sums.index_add_(0, torch.from_numpy(which[fires]), effects[torch.from_numpy(fires)])
        np.add.at(activation, which[fires], values[fires])
        np.add.at(count, which[fires], 1)
    for j, record in enumerate(records):
        if not count[j]:
            yield record.neuron
            continue
        mean = float(activation[j] / count[j])
        yield Effect(
            neuron=record.neuron,
            exact=(sums[j] / count[j]).numpy(),
            first_order=_first_order(rest, place, record.neuron.index, mean, matrix, vocabulary),
            activation=mean,
            n_positions=int(count[j]),
            named=_named(record, vocabulary),
        )


def firing(record: NeuronRecord, count: int, seed: int) -> list[Excerpt]:
    """At most `count` excerpts in whose chosen token the neuron fires, drawn by seed and neuron."""
    found = {
        e.position: e
        for e in sorted(
            record.excerpts, key=lambda e: e.peak
        )  # of one token the one with most before
        if e.kind in KINDS and e.activations[e.peak] > 0
    }
    places = sorted(found)
    rng = np.random.default_rng([seed, record.neuron.layer, record.neuron.index])
    return [found[places[i]] for i in np.sort(rng.permutation(len(places))[:count])]


def _of_one_length(
    drawn: Sequence[tuple[int, Excerpt]], rest: PartialForward
) -> Iterator[list[tuple[int, Excerpt]]]:
    """Rows with as many tokens up to the one meant, as many at a time as fit."""
    most = max(1, MOST_LOGITS // rest.model.config.get_text_config().vocab_size)
    lengths: dict[int, list[tuple[int, Excerpt]]] = {}
    for j, excerpt in drawn:
        lengths.setdefault(excerpt.peak, []).append((j, excerpt))
    for _, rows in sorted(lengths.items()):
        for first in range(0, len(rows), most):
            yield rows[first : first + most]


def _effects(
    rest: PartialForward,
    place: int,
    ids: NDArray[np.int64],
    neurons: NDArray[np.int64],
    vocabulary: int,
) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Effects [n, V] of neurons [n] at the last token of ids [n, T], and their activations there [n]."""
    trace = rest.trace(torch.from_numpy(ids).to(rest.model.device))
    rows = torch.arange(len(ids), device=trace.ids.device)
    which = torch.from_numpy(neurons).to(rows.device)
    own = trace.activations[place][rows, -1, which]  # [n]
    delta = torch.zeros(trace.ids.shape, device=own.device, dtype=own.dtype)
    delta[:, -1] = -own
    with_it = rest.plain(trace, 1)[:, 0, :vocabulary]
    without = rest.edited(trace, place, rows, which, delta, 1)[:, 0, :vocabulary]
    effect = (with_it - without).double()
    return (effect - effect.mean(1, keepdim=True)).cpu(), own.double().cpu().numpy()


def _first_order(
    rest: PartialForward,
    place: int,
    index: int,
    activation: float,
    matrix: torch.Tensor | None,
    vocabulary: int,
) -> NDArray[np.float64] | None:
    """[V] less its mean, of a neuron at this activation."""
    writes = rest.writes[place]
    if matrix is None or writes is None:
        return None
    effect = (matrix[:vocabulary] @ writes[index].to(matrix)).double() * activation
    return (effect - effect.mean()).cpu().numpy()


def _named(record: NeuronRecord, vocabulary: int) -> NDArray[np.int64]:
    """The tokens with the highest values in the look-up's table, above the neuron's mean."""
    evidence = collect_evidence(record, depth=1, weight=WEIGHT)
    table = token_table(evidence, record.summary.mean, _ENTRIES)
    tokens = table.tokens[table.values > record.summary.mean][:NAMED]
    return tokens[tokens < vocabulary]
