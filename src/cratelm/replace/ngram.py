"""N-gram models of the fit text: what the contexts of the explanations predict without any network.

Probabilities of the next token w after the context c of l tokens are interpolated with those after c without its
earliest token, c' (Witten & Bell 1991, in the form of Chen & Goodman 1999, section 2.4):

    p(w | c) = (n_cw + t_c p(w | c')) / (n_c + t_c)

with n_cw, how often w follows c; n_c, how often anything does; and t_c, how many different tokens do. Below all contexts
are the frequencies of the tokens, of which each counts one more than it occurs.

Shape legend: n tokens, D levels, C contexts, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cratelm.replace.contexts import ROOT, Contexts

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NGrams:
    """Counts of the tokens that follow each context."""

    unigram: Float64
    """[V] probability of each token without a context"""
    _pairs: Int64
    """[pairs] context * V + next token, ascending"""
    _counts: Int64
    """[pairs] how often"""
    _total: Int64
    """[C] n_c"""
    _types: Int64
    """[C] t_c"""

    @classmethod
    def of(cls, contexts: Contexts, matched: Int64, following: Int64, vocabulary: int) -> "NGrams":
        """Return the counts of a text: `matched` [D, n] are the contexts of its tokens, `following` [n] the next ones."""
        unigram = np.bincount(following, minlength=vocabulary) + 1.0
        at = [of_level != ROOT for of_level in matched]
        keys = np.concatenate(
            [
                of_level[inside] * vocabulary + following[inside]
                for of_level, inside in zip(matched, at, strict=True)
            ]
        )
        pairs, counts = np.unique(keys, return_counts=True)
        owner = pairs // vocabulary
        total = np.bincount(owner, counts, len(contexts)).astype(np.int64)
        types = np.bincount(owner, minlength=len(contexts))
        return cls(unigram / unigram.sum(), pairs, counts, total, types)

    def losses(self, matched: Int64, following: Int64) -> Float64:
        """Return the loss in nats of the next tokens [n] by number of tokens of context, 0 to D, [D + 1, n]."""
        probability = self.unigram[following]
        losses = [-np.log(probability)]
        for of_level in matched:
            rows = np.flatnonzero(of_level != ROOT)
            context = of_level[rows]
            wanted = context * len(self.unigram) + following[rows]
            at = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
            count = np.where(self._pairs[at] == wanted, self._counts[at], 0)
            total, types = self._total[context], self._types[context]
            # a context that was always the last of its document has no successor
            above, below = count + types * probability[rows], total + types
            probability = probability.copy()
            probability[rows] = np.where(below > 0, above / np.maximum(1, below), probability[rows])
            losses.append(-np.log(probability))
        return np.stack(losses)
