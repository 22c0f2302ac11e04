"""Correlation over all held-out tokens, estimated from a few tokens of each quantile bin.

Excerpts chosen for their peak cannot notice an explanation that is too broad, and a language model cannot simulate all
tokens. The harvest counts the tokens of each quantile bin of a neuron and draws some of them uniformly; each drawn token
stands for its share of the bin (`stats.stratified`). Of an excerpt only the drawn token is scored: its other tokens are
there as context, and their activations were not drawn.

What cannot be estimated: a neuron that fires on fewer tokens than its top bin holds, 0.1%, may be silent at all drawn
tokens. Its truth is constant, and the score undefined.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cratelm.records import NeuronSummary, Score, Status
from cratelm.score.metrics import Sample, Truth
from cratelm.stats.intervals import RESAMPLES
from cratelm.stats.stratified import stratified_correlation

NOT_COUNTED = "the harvest has no counts of tokens per quantile bin"
"""reason of an undefined score"""


@dataclass(frozen=True, eq=False)
class StratifiedSample(Sample):
    """Excerpts drawn in the quantile bins of one neuron, each scored on its last token."""

    summary: NeuronSummary
    """statistics of the neuron over all held-out tokens"""
    resamples: int = RESAMPLES
    """bootstrap resamples for the interval"""

    @cached_property
    def classes(self) -> Sequence[Hashable]:
        """Return the bin of each excerpt."""
        return [e.bin for e in self.excerpts]

    @cached_property
    def _last(self) -> NDArray[np.int64]:
        """Return where the last token of each excerpt is among the tokens of all."""
        return np.cumsum([len(e) for e in self.excerpts], dtype=np.int64) - 1

    @cached_property
    def _last_truth(self) -> NDArray[np.float64]:
        return np.array([e.activations[-1] for e in self.excerpts], np.float64)

    def score_pooled(self, simulated: NDArray[np.float64]) -> Score:
        """Return the estimate for `simulated` [n], the values at all tokens of all excerpts, with its interval.

        `r2` and `absolute_deviation` are None. `without_duplicates` is None if a bin has near-duplicates alone.
        """
        last = simulated[self._last]
        score = self._estimated(np.ones(len(last), bool), last, self.resamples)
        if self._distinct.all():
            return score
        return replace(
            score,
            n_duplicates=int((~self._distinct).sum()),
            without_duplicates=self._estimated(self._distinct, last, 0).value,
        )

    def _estimated(
        self, chosen: NDArray[np.bool_], simulated: NDArray[np.float64], resamples: int
    ) -> Score:
        """Return the score of the chosen excerpts [n], from the simulation of their last tokens [n]."""
        a, s = self._last_truth[chosen], simulated[chosen]
        n = len(a)
        bins = np.array(self.classes, np.int64)[chosen]
        sizes = stratum_sizes(self.summary, bins)
        if sizes is None:
            return Score(None, Status.UNDEFINED, NOT_COUNTED, n_records=n)
        missing = np.setdiff1d(np.flatnonzero(sizes), bins)
        if len(missing):
            of = f"{len(missing)} of {np.count_nonzero(sizes)} quantile bins that have tokens"
            return Score(None, Status.UNDEFINED, f"no excerpts from {of}", n_records=n)
        # the reasons for which there is no value are those of any other correlation
        plain = replace(Truth([a]).score(s), r2=None, absolute_deviation=None, n_records=n)
        if plain.value is None:
            return plain
        found = stratified_correlation(a, s, bins, sizes, resamples=resamples)
        return replace(plain, value=found.value, low=found.low, high=found.high)


def stratum_sizes(summary: NeuronSummary, bins: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the number of tokens [5] that the draws from each quantile bin stand for; None if they were not counted.

    `bins` [n] are those of the draws. The lowest bin contains the tokens below its edge, which comes from a pilot sample.
    If it has no width, as where half of the activations or more are 0, nothing is drawn from it, and these tokens are
    counted with the lowest bin that was drawn from.
    """
    if summary.openai_counts is None:
        return None
    sizes = np.array(summary.openai_counts, np.int64)
    if len(bins) and summary.openai_edges[1] <= summary.openai_edges[0]:
        below, sizes[0] = sizes[0], 0
        sizes[bins.min()] += below
    return sizes
