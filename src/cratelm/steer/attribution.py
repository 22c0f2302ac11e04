"""Effect of each neuron on the logits: exact, at tokens where it fires, and to first order.

Exact effect: (logits of the unedited model) - (logits with the neuron at 0 at this token only), through all
later blocks, minus the mean over the vocabulary, which affects no probability; averaged over tokens of the fit
split. In CRATE the later blocks are not close to the identity (there is no residual connection around ISTA), so
that the first-order effect of all layers but the last ignores something that matters; the agreement of the two
is measured.

Shape legend: k neurons, n tokens (one row each), T tokens of an excerpt up to the one at which the effect is
measured, D width, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.explain.lookup import token_table
from cratelm.models.partial_forward import PartialForward
from cratelm.records import Excerpt, ExcerptKind, NeuronId, NeuronRecord
from cratelm.runs.ranks import Share
from cratelm.stats.auc import roc_area_of_ranks
from cratelm.steer.ablation import MOST_LOGITS

KINDS: tuple[ExcerptKind, ...] = ("top", "random", "openai_bin")
"""kinds of excerpts that tokens are drawn from: those with the most text before the token"""
NEURONS_A_TIME = 64
"""number of neurons whose effects on the whole vocabulary are in memory at a time"""
NAMED = 10
"""number of tokens that a look-up explanation names"""
_MAX_ENTRIES = ExplainConfig.max_entries
"""size of the look-up table: the default of `cratelm explain`"""
_ALL = Share()


@dataclass(frozen=True, eq=False)
class VocabularyEffect:
    """Effect of one neuron on the logits of all tokens."""

    neuron: NeuronId
    exact: NDArray[np.float64]
    """[V] mean over the tokens where the effect is measured, minus the mean over the vocabulary"""
    first_order: NDArray[np.float64] | None
    """[V] at the same mean activation; None if the model has no first-order effect"""
    activation: float
    """mean activation over the tokens"""
    n_positions: int
    """number of these tokens"""
    named: NDArray[np.int64]
    """ids of the tokens that the neuron fires on most, by look-up"""

    @property
    def agreement(self) -> float | None:
        """Spearman's rank correlation of the two effects over the vocabulary; None if one is missing or constant."""
        return None if self.first_order is None else rank_correlation(self.exact, self.first_order)

    def overlap(self, top: int) -> float | None:
        """Return the fraction of the `top` most promoted tokens that the two effects share; None without two."""
        if self.first_order is None:
            return None
        sides = [set(best(side, top).tolist()) for side in (self.exact, self.first_order)]
        return len(sides[0] & sides[1]) / min(top, len(self.exact))

    def promotes(self, tokens: NDArray[np.int64]) -> float | None:
        """Return the probability that one of `tokens` is promoted more than another token, 0..1; ties count half.

        This is the area under the ROC curve. None if `tokens` is empty, or the whole vocabulary.
        """
        n, m = len(tokens), len(self.exact) - len(tokens)
        if not n or not m:
            return None
        return roc_area_of_ranks(rankdata(self.exact)[tokens], m)


def best(effect: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """Return the ids of the `top` tokens with the largest effect [V], in descending order; ties by id."""
    return np.argsort(-effect, kind="stable")[:top]


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation; None if one side is constant."""
    ranks = [rankdata(x) - (len(x) + 1) / 2 for x in (a, b)]
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / scale) if scale else None


def attribute(
    partial: PartialForward,
    site_layer: int,
    records: Iterable[NeuronRecord],
    matrix: torch.Tensor | None,
    *,
    vocabulary: int,
    positions: int,
    seed: int,
    share: Share = _ALL,
    prefix: tuple[int, ...] = (),
) -> Iterator[VocabularyEffect | NeuronId]:
    """Yield the effects of the neurons of one layer, in order, or only the id if a neuron fires at no drawn token.

    With a `share`, only those of its batches of `NEURONS_A_TIME` neurons; in the next layer, the next share begins.

    `site_layer` is the index into the layers of the site; `records` are of the fit split; `matrix` [V', D] is
    that of `direct_logit_attribution`. A head can have more rows than there are tokens, so only the first
    `vocabulary` rows and logits are used. At most `positions` tokens per neuron are drawn. `prefix` are the tokens that
    stand before every excerpt: the begin token, and what takes the place of the first tokens that are left out.

    Memory: `NEURONS_A_TIME` times V numbers, and twice `MOST_LOGITS` logits.
    """
    unread = iter(records)
    number = site_layer
    while batch := list(itertools.islice(unread, NEURONS_A_TIME)):
        if share.takes(number):
            yield from _attribute(
                partial, site_layer, batch, matrix, vocabulary, positions, seed, prefix
            )
        number += 1


def _attribute(
    partial: PartialForward,
    site_layer: int,
    records: Sequence[NeuronRecord],
    matrix: torch.Tensor | None,
    vocabulary: int,
    positions: int,
    seed: int,
    prefix: tuple[int, ...],
) -> Iterator[VocabularyEffect | NeuronId]:
    """Yield the results of `attribute` for one batch of neurons."""
    sums = torch.zeros(len(records), vocabulary, dtype=torch.double)
    activation, count = np.zeros(len(records)), np.zeros(len(records), np.int64)
    drawn = [(j, e) for j, r in enumerate(records) for e in firing(r, positions, seed)]
    indices = np.array([r.neuron.index for r in records])
    for rows in _of_one_length(drawn, partial):
        of_row = np.array([j for j, _ in rows])  # [n] index of each row's record
        ids = np.stack([[*prefix, *e.token_ids[: e.peak + 1]] for _, e in rows]).astype(np.int64)
        effects, values = _effects(partial, site_layer, ids, indices[of_row], vocabulary)
        fires = values != 0  # with less text before it than in the harvest, a neuron may be silent
        sums.index_add_(0, torch.from_numpy(of_row[fires]), effects[torch.from_numpy(fires)])
        np.add.at(activation, of_row[fires], values[fires])
        np.add.at(count, of_row[fires], 1)
    for j, record in enumerate(records):
        if not count[j]:
            yield record.neuron
            continue
        mean = float(activation[j] / count[j])
        yield VocabularyEffect(
            neuron=record.neuron,
            exact=(sums[j] / count[j]).numpy(),
            first_order=_first_order(
                partial, site_layer, record.neuron.index, mean, matrix, vocabulary
            ),
            activation=mean,
            n_positions=int(count[j]),
            named=_named(record, vocabulary),
        )


def firing(record: NeuronRecord, count: int, seed: int) -> list[Excerpt]:
    """Return at most `count` excerpts at whose peak the neuron fires, drawn by seed and neuron.

    Each token of the split counts once, in the excerpt with the most text before it.
    """
    longest_last = sorted(record.excerpts, key=lambda e: e.peak)  # later ones replace earlier ones
    by_position = {
        e.position: e for e in longest_last if e.kind in KINDS and e.activations[e.peak] > 0
    }
    positions = sorted(by_position)
    rng = np.random.default_rng([seed, record.neuron.layer, record.neuron.index])
    return [by_position[positions[i]] for i in np.sort(rng.permutation(len(positions))[:count])]


def _of_one_length(
    drawn: Sequence[tuple[int, Excerpt]], partial: PartialForward
) -> Iterator[list[tuple[int, Excerpt]]]:
    """Yield rows with the same number of tokens up to the peak, so that none is padded, as many as fit."""
    most = max(1, MOST_LOGITS // partial.model.config.get_text_config().vocab_size)
    lengths: dict[int, list[tuple[int, Excerpt]]] = {}
    for j, excerpt in drawn:
        lengths.setdefault(excerpt.peak, []).append((j, excerpt))
    for _, rows in sorted(lengths.items()):
        for first in range(0, len(rows), most):
            yield rows[first : first + most]


def _effects(
    partial: PartialForward,
    site_layer: int,
    ids: NDArray[np.int64],
    neurons: NDArray[np.int64],
    vocabulary: int,
) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Return the effects [n, V] of neurons [n] at the last token of ids [n, T], and their activations [n] there."""
    trace = partial.trace(torch.from_numpy(ids).to(partial.model.device))
    rows = torch.arange(len(ids), device=trace.ids.device)
    indices = torch.from_numpy(neurons).to(rows.device)
    activations = trace.activations[site_layer][rows, -1, indices]  # [n]
    delta = torch.zeros(trace.ids.shape, device=activations.device, dtype=activations.dtype)
    delta[:, -1] = -activations  # 0 at the last token, unchanged before it
    plain = partial.plain(trace, 1)[:, 0, :vocabulary]
    without = partial.edited(trace, site_layer, rows, indices, delta, 1)[:, 0, :vocabulary]
    effect = (plain - without).double()
    return (effect - effect.mean(1, keepdim=True)).cpu(), activations.double().cpu().numpy()


def _first_order(
    partial: PartialForward,
    site_layer: int,
    index: int,
    activation: float,
    matrix: torch.Tensor | None,
    vocabulary: int,
) -> NDArray[np.float64] | None:
    """Return the first-order effect [V], minus its mean, of a neuron at this activation; None if there is none."""
    writes = partial.writes[site_layer]
    if matrix is None or writes is None:
        return None
    effect = (matrix[:vocabulary] @ writes[index].to(matrix)).double() * activation
    return (effect - effect.mean()).cpu().numpy()


def _named(record: NeuronRecord, vocabulary: int) -> NDArray[np.int64]:
    """Return the ids of the tokens with the highest values in the look-up table, above the neuron's mean."""
    evidence = collect_evidence(record, depth=1, weight=WEIGHT)
    table = token_table(evidence, record.summary.mean, _MAX_ENTRIES)
    tokens = table.tokens[table.values > record.summary.mean][:NAMED]
    return tokens[tokens < vocabulary]
