"""The features of the fit split at positions, evaluated once for all neurons.

Excerpts of neurons overlap, and begin in the middle of a line. So features are those of whole segments, the runs of one
document inside a sequence, which are all that the model saw; each segment is evaluated when an excerpt first touches it.

Memory: P / 8 bytes per token of the split that is touched: 30 bytes for the built-in library.

Shape legend: N positions, P predicates.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.concepts.features import ConceptFeatures
from cratelm.explain.concepts.library import Library
from cratelm.explain.evidence import Evidence
from cratelm.runs.verified import RECORD
from cratelm.tokens.beginning import PLAIN, Beginning

if TYPE_CHECKING:
    from cratelm.tokens.shards import TokenSplit, TokenStore

_TOGETHER = 16_384
"""about how many tokens are evaluated at a time"""
_last: "list[tuple[tuple[object, ...], FitFeatures]]" = []
"""features that were made last in this process, with what they are of"""


def fit_features(
    library: Library, store: "TokenStore", sequence_length: int, beginning: Beginning = PLAIN
) -> "FitFeatures":
    """Return the features of the fit split of a store, in segments of sequences of that many tokens.

    Evaluating them takes longer than any use of them, and all models of a run have the same tokens. So those of the last
    call are kept, for the next stage or model in this process, if the store was finished by a command, whose record says
    what it contains.
    """
    record = store.path / RECORD
    if not record.is_file():
        return FitFeatures(
            library, store.token_strings, store.split("fit"), sequence_length, beginning
        )
    of_sequences = sequence_length, beginning
    key = record.read_bytes(), str(record.resolve()), of_sequences, library.predicates
    if not _last or _last[0][0] != key:
        split = store.split("fit")
        features = FitFeatures(library, store.token_strings, split, *of_sequences)
        _last[:] = [(key, features)]
    return _last[0][1]


class FitFeatures:
    """Features of the evidence of neurons."""

    def __init__(
        self,
        library: Library,
        token_strings: Sequence[str],
        split: "TokenSplit | None" = None,
        sequence_length: int = 0,
        beginning: Beginning = PLAIN,
    ):
        """`split` is the fit split, `sequence_length` and `beginning` are those of the harvest.

        Without a split, contexts alone are known.
        """
        self.library, self.strings = library, token_strings
        self._split = split
        if split is not None:
            length = sequence_length or split.n_tokens  # of imported records it is not known
            sequences = np.arange(0, split.n_tokens, beginning.room(length))
            edges = [split.starts, split.starts[1:] - 1, sequences, sequences + beginning.skip]
            if beginning.token is not None:
                firsts = np.unique(np.concatenate([split.starts[:-1], sequences]))
                own = firsts[split.read_at(firsts) == beginning.token]
                edges += [own + 1, own + 1 + beginning.skip]  # after begin tokens of the text
            edges = np.unique(np.concatenate([*edges, [split.n_tokens]]))
            self._edges = edges[edges <= split.n_tokens]
            self._evaluated = np.zeros(len(self._edges), bool)
            self._tokens = np.zeros(split.n_tokens, np.int32)
            self._packed = np.zeros((split.n_tokens, -(-len(library) // 8)), np.uint8)

    def of(self, evidence: Evidence) -> NDArray[np.float32]:
        """Return where each predicate holds at the tokens of the evidence, 1 or 0, [N, P].

        Where the evidence is not of the split, as for imported records, a token's context in the evidence is its text.
        """
        if self._split is None or not self._matches(evidence):
            return self._from_contexts(evidence).astype(np.float32)
        rows = self._packed[evidence.positions]
        return np.unpackbits(rows, axis=1, count=len(self.library)).astype(np.float32)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return where each predicate holds at positions of the split [N], [N, P]. There must be a split."""
        segments = np.unique(np.searchsorted(self._edges, positions, side="right") - 1)
        self._evaluate(segments[~self._evaluated[segments]])
        return np.unpackbits(self._packed[positions], axis=1, count=len(self.library)).view(
            np.bool_
        )

    def _matches(self, evidence: Evidence) -> bool:
        """Evaluate the segments of the evidence; return whether it has the tokens of the split at its positions."""
        at = evidence.positions
        if (
            len(at) != len(evidence.activations)
            or not len(at)
            or at.min() < 0
            or at.max() >= len(self._tokens)
        ):
            return False
        segments = np.unique(np.searchsorted(self._edges, at, side="right") - 1)
        self._evaluate(segments[~self._evaluated[segments]])
        return bool((self._tokens[at] == evidence.contexts[:, 0]).all())

    def _evaluate(self, segments: NDArray[np.int64]) -> None:
        assert self._split is not None
        spans = [(int(self._edges[s]), int(self._edges[s + 1])) for s in segments.tolist()]
        while spans:
            taken, n = [], 0
            while spans and n < _TOGETHER:
                taken.append(spans.pop())
                n += taken[-1][1] - taken[-1][0]
            lists = [self._split.read(low, high) for low, high in taken]
            matrix = ConceptFeatures.of(lists, self.library, self.strings).matrix
            packed, first = np.packbits(matrix, axis=1), 0
            for (low, high), ids in zip(taken, lists, strict=True):
                self._tokens[low:high] = ids
                self._packed[low:high] = packed[first : first + high - low]
                first += high - low
        self._evaluated[segments] = True

    def _from_contexts(self, evidence: Evidence) -> NDArray[np.bool_]:
        """Return the features of the last token of each context, [N, P]."""
        lists = [row[row >= 0][::-1] for row in evidence.contexts]
        features = ConceptFeatures.of(lists, self.library, self.strings)
        last = np.cumsum([len(ids) for ids in lists]) - 1
        return features.matrix[last]
