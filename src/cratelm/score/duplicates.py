"""Near-duplicate passages between what was explained from (fit) and what is scored on (held-out).

Documents of the two splits differ, but their text may not: licence headers, tables, copied code. A
passage is up to 64 tokens inside one document, on a grid of 16 tokens from the document's start: the
text around an excerpt, since 8 tokens alone are alike too often. Two passages are near-duplicates where
the Jaccard similarity of their 5-token shingles is `THRESHOLD` or more, as MinHash (Broder 1997)
estimates it, by the library datasketch.

Why 0.6: a text copied to another offset of the grid is compared with a passage that is at most 8
tokens off, so that 52 of 68 shingles are shared: 0.76. One token in ten changed leaves about 0.4:
such looser copies are not called duplicates.

Bound: a passage is hashed once, however many neurons were shown it: 1 kB for each, and there are at
most as many as tokens of the split / 16, or 5 times the excerpts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from cratelm.records import METRICS, Excerpt, Metric, NeuronScore, Split
from cratelm.tokens.shards import TokenStore

PASSAGE = 64
"""tokens"""
GRID = 16
"""tokens between the beginnings of passages"""
SHINGLE = 5
"""tokens"""
THRESHOLD = 0.6
_PERMUTATIONS = 64
_SEED = 1
_AROUND = 2
"""passages before and after an explained excerpt's own that count as explained from: all that share
half their tokens with it"""
_EXAMPLES = 5


@dataclass(frozen=True)
class DuplicatePair:
    """Two passages that are nearly the same."""

    fit_document: int
    """ordinal in the run's shards"""
    held_out_document: int
    similarity: float
    """estimated Jaccard similarity, 0..1"""


@dataclass(frozen=True)
class DuplicateEffect:
    """What leaving near-duplicates out does to the scores of one explainer and metric."""

    explainer: str
    metric: Metric
    n_neurons: int
    """neurons scored on at least one near-duplicate"""
    n_records: int
    """excerpts that are near-duplicates, over these neurons"""
    mean_with: float | None
    """x 100, mean over these neurons that have both scores, as reported; None for none"""
    mean_without: float | None
    """x 100, mean over the same neurons, near-duplicates left out"""


@dataclass(frozen=True)
class DuplicateAudit:
    """Near-duplicates between what was explained from and what was scored on, for one model."""

    threshold: float
    n_passages_explained: int
    """distinct passages around what any explainer was shown"""
    n_passages_scored: int
    """distinct passages around what was scored on"""
    n_near_duplicates: int
    """of these, near-duplicates of one explained from"""
    examples: tuple[DuplicatePair, ...]
    effects: tuple[DuplicateEffect, ...]


class NearDuplicates:
    """Which held-out excerpts are near-duplicates of what explainers were shown."""

    def __init__(self, store: TokenStore):
        self._store = store
        self._documents: dict[Split, tuple[NDArray, NDArray]] = {}
        self._index = MinHashLSH(threshold=THRESHOLD, num_perm=_PERMUTATIONS)
        self._explained: dict[int, MinHash] = {}
        self._scored: dict[int, bool] = {}
        self._first = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int)
        self.examples: list[DuplicatePair] = []

    def explained(self, excerpts: Iterable[Excerpt]) -> None:
        """Registers what was explained from; all of it before the first `is_duplicate`.

        A passage explained from for any neuron counts for all of them.
        """
        assert not self._scored
        for excerpt in excerpts:
            if excerpt.kind == "out_of_context":
                continue
            start, low, high = self._passage("fit", excerpt)
            for step in range(-_AROUND, _AROUND + 1):
                other = start + step * GRID
                if low <= other < high and other not in self._explained:
                    hashed = self._hashed("fit", other, min(high, other + PASSAGE))
                    self._explained[other] = hashed
                    self._index.insert(other, hashed)

    def is_duplicate(self, excerpt: Excerpt) -> bool:
        """True where the passage around a held-out excerpt is a near-duplicate of one explained from."""
        start, _, high = self._passage("held_out", excerpt)
        if start not in self._scored:
            self._scored[start] = self._find(start, min(high, start + PASSAGE), excerpt.document)
        return self._scored[start]

    def audit(self, scores: Sequence[NeuronScore]) -> DuplicateAudit:
        """What was found, and what leaving it out does to `scores` (own explanations alone)."""
        own = [s for s in scores if s.control == "none" and s.metric in METRICS]
        groups: dict[tuple[str, Metric], list[NeuronScore]] = {}
        for s in own:
            groups.setdefault((s.explainer, s.metric), []).append(s)
        return DuplicateAudit(
            threshold=THRESHOLD,
            n_passages_explained=len(self._explained),
            n_passages_scored=len(self._scored),
            n_near_duplicates=sum(self._scored.values()),
            examples=tuple(self.examples),
            effects=tuple(_effect(*kind, group) for kind, group in groups.items()),
        )

    def _find(self, start: int, stop: int, document: int) -> bool:
        hashed = self._hashed("held_out", start, stop)
        # the index proposes; the estimate decides
        found = [int(str(other)) for other in self._index.query(hashed)]
        near = [(hashed.jaccard(self._explained[other]), other) for other in found]
        similarity, other = max(near, default=(0.0, -1))
        if similarity < THRESHOLD:
            return False
        if len(self.examples) < _EXAMPLES:
            place = self._document("fit", other)
            ordinal = int(self._store.split("fit").ordinals[place])
            self.examples.append(DuplicatePair(ordinal, document, round(similarity, 3)))
        return True

    def _passage(self, split: Split, excerpt: Excerpt) -> tuple[int, int, int]:
        """Begin of the passage around an excerpt, begin and end of its document: token positions."""
        starts = self._starts(split)
        place = self._document(split, excerpt.position)
        low, high = int(starts[place]), int(starts[place + 1])
        middle = max(low, min(excerpt.position - PASSAGE // 2, high - PASSAGE))
        return low + (middle - low + GRID // 2) // GRID * GRID, low, high

    def _document(self, split: Split, position: int) -> int:
        return int(np.searchsorted(self._starts(split), position, side="right")) - 1

    def _starts(self, split: Split) -> NDArray[np.int64]:
        if split not in self._documents:
            source = self._store.split(split)
            self._documents[split] = (source.starts, source.ordinals)
        return self._documents[split][0]

    def _hashed(self, split: Split, start: int, stop: int) -> MinHash:
        tokens = self._store.split(split).read(start, stop)
        hashed = self._first.copy()
        hashed.update_batch(_shingles(tokens).tolist())
        return hashed


def _shingles(tokens: NDArray) -> NDArray[np.int64]:
    """A 32-bit number for each run of `SHINGLE` tokens of a passage; of all of it where it is shorter."""
    length = max(1, min(SHINGLE, len(tokens)))
    mixed = np.zeros(max(0, len(tokens) - length + 1), dtype=np.uint64)
    for place in range(length):
        # FNV-1a over tokens, 64 bits, wrapping
        part = tokens[place : len(tokens) - length + 1 + place].astype(np.uint64)
        mixed = (mixed ^ (part + np.uint64(1))) * np.uint64(1_099_511_628_211)
    return (mixed >> np.uint64(16) & np.uint64(0xFFFF_FFFF)).astype(np.int64)


def _effect(explainer: str, metric: Metric, scores: Sequence[NeuronScore]) -> DuplicateEffect:
    affected = [s.score for s in scores if s.score.n_duplicates]
    both = [
        (s.value, s.without_duplicates)
        for s in affected
        if s.value is not None and s.without_duplicates is not None
    ]
    means = [100 * float(np.mean(side)) for side in zip(*both, strict=True)] or [None, None]
    return DuplicateEffect(
        explainer=explainer,
        metric=metric,
        n_neurons=len(affected),
        n_records=sum(s.n_duplicates for s in affected),
        mean_with=means[0],
        mean_without=means[1],
    )
