"""The text of a batch, as explanations read it: token ids and contexts, and no activation.

Shape legend: B sequences of T tokens, n = B * T tokens, D depth of contexts, C documents.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.batches import Batch
from cratelm.replace.contexts import NO_TOKEN, START, Contexts

Int64 = NDArray[np.int64]
_T = TypeVar("_T")


class BatchText:
    """The tokens of a batch, with what several explanations of them share."""

    def __init__(self, ids: Int64, document: Int64, is_left_out: NDArray[np.bool_] | None = None):
        """`ids` [B, T] are tokens, `document` [B, T] the ordinals of their documents, -1 at what is not text.

        `is_left_out` [B, T]: the begin tokens and first tokens that no explanation is made from; None for none.
        """
        self.shape = ids.shape
        self.ids = ids.ravel()
        """[n]"""
        self.document = document.ravel()
        """[n]"""
        self.counted = None if is_left_out is None else ~is_left_out.ravel()
        """[n] which tokens explanations are made from: text and end marks; None for all"""
        self._columns = [self.ids]
        """by j, the j-th token before each token, `START` just before its document or sequence, `NO_TOKEN` further away, [n] each"""
        self._offset = _offsets(document).ravel()
        self._shared: dict[int, tuple[Any, Any]] = {}

    @classmethod
    def of(cls, batch: Batch) -> "BatchText":
        """Return the text of a batch of a harvest's plan."""
        ordinals = np.append(batch.document.cpu().numpy(), -1)
        document = ordinals[batch.segment_of.cpu().numpy()]  # end marks are segment -1
        ids = batch.input_ids.cpu().numpy()
        left_out = batch.is_left_out
        of_ids = None if left_out is None else left_out.cpu().numpy().reshape(ids.shape)
        return cls(ids, document.reshape(ids.shape), of_ids)

    @property
    def n_tokens(self) -> int:
        """Return n."""
        return len(self.ids)

    def contexts(self, depth: int) -> Int64:
        """Return the last `depth` tokens at each token, [n, depth]: column 0 the token, column j the j-th before it.

        A context does not reach beyond the beginning of its document or of its sequence.
        """
        for back in range(len(self._columns), depth):
            column = np.full(len(self.ids), NO_TOKEN)
            column[self._offset == back - 1] = START
            inside = np.flatnonzero(self._offset >= back)
            column[inside] = self.ids[inside - back]
            self._columns.append(column)
        return np.stack(self._columns[:depth], axis=1)

    def rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the rows of values [n, ...] that explanations are made from."""
        return values if self.counted is None else values[self.counted]

    def matched(self, contexts: Contexts) -> Int64:
        """Return `contexts.match` of this text, [D, n]."""
        return self.shared(contexts, lambda: contexts.match(self.contexts(contexts.depth)))

    def shared(self, key: object, make: Callable[[], _T]) -> _T:
        """Return what `make` returns for `key`; made once for the text, however many explanations ask for it."""
        if id(key) not in self._shared:
            self._shared[id(key)] = key, make()  # the key stays, so that its number stays its own
        return self._shared[id(key)][1]

    def segments(self) -> list[tuple[int, int]]:
        """Return where the text of each document in each sequence begins in the batch, and one past its end."""
        is_text = self.document >= 0
        ends = np.append(self._offset[1:] == 0, True)  # the last token of a document or sequence
        ends = np.flatnonzero((ends & is_text) | np.append(is_text[:-1] & ~is_text[1:], False)) + 1
        first = np.flatnonzero(is_text & (self._offset == 0))
        return list(zip(first.tolist(), ends.tolist(), strict=True))


def successors(text: BatchText, contexts: Contexts) -> tuple[Int64, Int64]:
    """Return the contexts [D, m] of the tokens whose next token is predicted, and the next tokens [m]."""
    at = predicted(text).ravel()
    matched = text.matched(contexts).reshape(contexts.depth, *text.shape)[:, :, :-1]
    following = text.ids.reshape(text.shape)[:, 1:].ravel()
    return matched.reshape(contexts.depth, -1)[:, at], following[at]


def predicted(text: BatchText) -> NDArray[np.bool_]:
    """Return where the next token is predicted, [B, T - 1]: at text, not at end marks, except the last of a sequence."""
    return text.document.reshape(text.shape)[:, :-1] >= 0


def _offsets(document: Int64) -> Int64:
    """Return how many tokens of its document precede each token in its sequence [B, T]; an end mark ends its document."""
    at = np.broadcast_to(np.arange(document.shape[1]), document.shape)
    begins = np.ones(document.shape, bool)
    begins[:, 1:] = document[:, :-1] < 0
    return at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
