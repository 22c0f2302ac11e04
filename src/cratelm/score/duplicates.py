"""Find near-duplicate passages between excerpts explained from (fit) and excerpts scored on (held-out).

The documents of the two splits differ, but they may share text: licence headers, tables, copied code. A
passage is up to 64 tokens inside one document, on a grid of 32 tokens from the document's start. It is the
text around an excerpt, because 8 tokens alone match too often. Two passages are near-duplicates if the
Jaccard similarity of their 5-token shingles is at least `THRESHOLD`. MinHash (Broder 1997), from the
library datasketch, proposes pairs; the shingles themselves decide, so there are no false positives.

Cost: each passage is hashed once, however many neurons share it. The number of passages is at most the
number of tokens of the fit split / 32, and at most 3 times the number of excerpts explained from. A passage
takes 1 kB: hashes of its bands in one sorted array, and its shingles; 2 kB while that array is sorted.
(datasketch's own index takes 9 kB per passage, 2.3 GB for the default of 8.2 million tokens.)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cratelm.records import SIMULATION_METRICS, Excerpt, Metric, NeuronScore, Split
from cratelm.stats.score_table import ScoreTable
from cratelm.tokens.shards import TokenStore

PASSAGE = 64
"""tokens"""
GRID = 32
"""tokens between the beginnings of passages"""
SHINGLE = 5
"""tokens"""
THRESHOLD = 0.3
"""Smallest Jaccard similarity of near-duplicates. An exact copy is at most half the grid, 16 tokens, away
from the nearest passage: then 44 of 76 shingles are shared, 0.58. With one token in ten changed, 0.33 to
0.45 remain. In the demo's corpus two random passages share 0.0002 on average, and the random pairs above
0.3 (8 in 100,000) are tables and boilerplate; 8.8% of the held-out passages have a match at 0.6 and 11.6%
at 0.3, and those in between are edited copies."""
_BANDS = (32, 2)
"""Bands, and hashes in each: a pair of similarity 0.3 is proposed with probability 95%, 0.35 with 98.5%,
0.58 always. In the demo, 514 of the 515 scored passages with a match among those explained were found."""
_PERMUTATIONS = _BANDS[0] * _BANDS[1]
_SEED = 1
_AROUND = 1
"""passages before and after that of an explained excerpt that also count as explained from: those that
share half of their tokens with it"""
_EXAMPLES = 5
_REMEMBERED = 100_000
"""excerpts whose verdict is remembered, about 100 bytes each"""


@dataclass(frozen=True)
class DuplicatePair:
    """Two passages that are nearly the same."""

    fit_document: int
    """ordinal in the run's shards"""
    held_out_document: int
    similarity: float
    """Jaccard similarity of their shingles, 0..1"""


@dataclass(frozen=True)
class DuplicateEffect:
    """Scores of one explainer and metric with and without near-duplicates."""

    explainer: str
    metric: Metric
    n_neurons: int
    """neurons scored on at least one near-duplicate"""
    n_records: int
    """excerpts that are near-duplicates, over these neurons"""
    mean_with: float | None
    """x 100, mean score as reported, over those of these neurons that have both scores; None if none has"""
    mean_without: float | None
    """x 100, mean over the same neurons without near-duplicates"""


@dataclass(frozen=True)
class DuplicateAudit:
    """Near-duplicates between excerpts explained from and excerpts scored on, for one model.

    Stored in `summary.json` of the scores, and read by `results/scores.py`: a new field needs a default.
    """

    threshold: float
    n_passages_explained: int
    """distinct passages around excerpts that any explainer used"""
    n_passages_scored: int
    """distinct passages around excerpts that were scored on"""
    n_near_duplicates: int
    """of these, near-duplicates of one explained from"""
    examples: tuple[DuplicatePair, ...]
    """a few pairs, from different documents"""
    effects: tuple[DuplicateEffect, ...]


class NearDuplicates:
    """Index that finds held-out excerpts that are near-duplicates of excerpts explained from."""

    def __init__(self, store: TokenStore):
        # On first use: it imports half of scipy, and `report` and `view`, which only read results, do without.
        from datasketch import MinHash

        self._store = store
        self._index = _BandIndex()
        self._explained: dict[int, NDArray[np.uint32]] = {}
        """shingles of each passage, by its first position"""
        self._scored: dict[int, bool] = {}
        """whether each passage is a near-duplicate, by its first position"""
        self._verdicts: dict[int, bool] = {}
        """the same by the position of the excerpt, since scoring looks up each one many times"""
        self._first = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int)
        self._pairs: dict[tuple[int, int], DuplicatePair] = {}
        """the first pairs found, by the ordinals of their documents"""

    def register(self, excerpts: Iterable[Excerpt]) -> None:
        """Register excerpts explained from. All of them must be registered before `is_duplicate` is called.

        A passage used to explain any neuron counts for all neurons.
        """
        positions = [e.position for e in excerpts if e.kind != "out_of_context"]
        self.register_positions(np.array(positions, dtype=np.int64))

    def register_positions(self, positions: NDArray[np.int64]) -> None:
        """Register excerpts explained from by their positions [n], which may repeat."""
        assert not self._scored
        passages = self._passages("fit", np.unique(positions))  # [n, 3]
        # Neighbouring passages count too: an excerpt may begin or end anywhere on the grid, so that a copy
        # of it may match a passage that shares half of its tokens with the excerpt's own.
        for step in range(-_AROUND, _AROUND + 1):
            starts = passages[:, 0] + step * GRID
            inside = (passages[:, 1] <= starts) & (starts <= _last(passages))
            stops = passages[inside, 2]
            for start, stop in zip(starts[inside].tolist(), stops.tolist(), strict=True):
                if start not in self._explained:
                    shingles = self._shingles("fit", start, min(stop, start + PASSAGE))
                    self._explained[start] = shingles
                    self._index.insert(start, self._hashed(shingles))

    def is_duplicate(self, excerpt: Excerpt) -> bool:
        """Return True if the passage around a held-out excerpt is a near-duplicate of one explained from."""
        if excerpt.position not in self._verdicts:
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            ((start, _, stop),) = self._passages("held_out", np.array([excerpt.position])).tolist()
            if start not in self._scored:
                stop = min(stop, start + PASSAGE)
                self._scored[start] = self._find(start, stop, excerpt.document)
            self._verdicts[excerpt.position] = self._scored[start]
        return self._verdicts[excerpt.position]

    def audit(self, scores: Iterable[NeuronScore]) -> DuplicateAudit:
        """Return counts of near-duplicates, and the means of `scores` with and without them, controls excluded."""
        groups = ScoreTable.of(scores).select(control="none").groups("explainer", "metric")
        return DuplicateAudit(
            threshold=THRESHOLD,
            n_passages_explained=len(self._explained),
            n_passages_scored=len(self._scored),
            n_near_duplicates=sum(self._scored.values()),
            examples=tuple(self._pairs.values()),
            effects=tuple(
                _effect(explainer, cast("Metric", metric), group)
                for (explainer, metric), group in groups.items()
                if metric in SIMULATION_METRICS
            ),
        )

    def _find(self, start: int, stop: int, document: int) -> bool:
        shingles = self._shingles("held_out", start, stop)
        proposed = self._index.query(self._hashed(shingles))
        near = ((_jaccard(shingles, self._explained[other]), other) for other in proposed)
        similarity, other = max(near, default=(0.0, -1))
        if similarity < THRESHOLD:
            return False
        if len(self._pairs) < _EXAMPLES:
            (ordinal,) = self._store.split("fit").documents_at(np.array([other])).tolist()
            pair = DuplicatePair(ordinal, document, round(similarity, 3))
            self._pairs.setdefault((ordinal, document), pair)
        return True

    def _passages(self, split: Split, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the start of the passage around each position [n], and start and end of its document, [n, 3]."""
        starts = self._store.split(split).starts
        document = np.searchsorted(starts, positions, side="right") - 1
        low, high = starts[document], starts[document + 1]
        # `position` is in the middle of the passage, unless the document begins or ends near it
        middle = np.maximum(low, np.minimum(positions - PASSAGE // 2, high - PASSAGE))
        return np.stack([low + _on_grid(middle - low), low, high], axis=1)

    def _shingles(self, split: Split, start: int, stop: int) -> NDArray[np.uint32]:
        return shingles_of(self._store.split(split).read(start, stop)).astype(np.uint32)

    def _hashed(self, shingles: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Return the hashes of the passage's bands, see `_band_hashes`."""
        hashed = self._first.copy()
        hashed.update_batch(shingles.tolist())
        return _band_hashes(hashed.hashvalues)


class _BandIndex:
    """Passages by the hashes of their bands (locality-sensitive hashing). Memory: 0.5 kB per passage."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._sorted: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def insert(self, start: int, hashes: NDArray[np.uint64]) -> None:
        """Add the passage that begins at `start`, with the hashes of its bands; before any `query`."""
        assert self._sorted is None
        self._starts.append(start)
        self._hashes.append(hashes)

    def query(self, hashes: NDArray[np.uint64]) -> list[int]:
        """Return the beginnings of the passages that share a band with `hashes`."""
        if self._sorted is None:
            flat = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
            order = np.argsort(flat)
            self._sorted = (
                flat[order],
                np.repeat(np.array(self._starts, np.int64), _BANDS[0])[order],
            )
            self._hashes.clear()
        keys, starts = self._sorted
        low, high = (np.searchsorted(keys, hashes, side) for side in ("left", "right"))
        near = [starts[i:j] for i, j in zip(low.tolist(), high.tolist(), strict=True) if i < j]
        return np.unique(np.concatenate(near)).tolist() if near else []


def _band_hashes(hashes: NDArray) -> NDArray[np.uint64]:
    """Return one hash for each band, with the number of the band in its upper bits.

    Two hashes of a band fill 64 bits, of which a product keeps 59: that different bands get the same
    number is so rare that it costs nothing, and the shingles decide anyway.
    """
    first, second = hashes.astype(np.uint64).reshape(_BANDS).T
    mixed = (first << np.uint64(32) | second) * np.uint64(0x9E37_79B9_7F4A_7C15)
    return np.arange(_BANDS[0], dtype=np.uint64) << np.uint64(59) | mixed >> np.uint64(5)


def _on_grid(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the nearest multiples of `GRID`, [n]."""
    return (offsets + GRID // 2) // GRID * GRID


def _last(passages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the start of the last passage of the document of each of `passages` [n, 3], [n]."""
    low, high = passages[:, 1], passages[:, 2]
    return low + _on_grid(np.maximum(0, high - low - PASSAGE))


def _jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Return the Jaccard similarity of two sets, given as arrays without repeats."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def shingles_of(tokens: NDArray) -> NDArray[np.int64]:
    """Return a sorted 32-bit hash of each distinct run of `SHINGLE` tokens in a passage.

    A passage with fewer tokens is one run.
    """
    length = max(1, min(SHINGLE, len(tokens)))
    mixed = np.zeros(max(0, len(tokens) - length + 1), dtype=np.uint64)
    for offset in range(length):
        # FNV-1a over tokens, for all runs at once, in 64 bits that wrap around. MinHash takes 32 of these
        # bits, but not the lowest, which are mixed least.
        part = tokens[offset : len(tokens) - length + 1 + offset].astype(np.uint64)
        mixed = (mixed ^ (part + np.uint64(1))) * np.uint64(1_099_511_628_211)
    return np.unique(mixed >> np.uint64(16) & np.uint64(0xFFFF_FFFF)).astype(np.int64)


def _effect(explainer: str, metric: Metric, scores: ScoreTable) -> DuplicateEffect:
    n_duplicates = scores.numbers("n_duplicates")
    both = (n_duplicates > 0) & scores.has("value") & scores.has("without_duplicates")
    means = [
        100 * float(np.mean(scores.numbers(name)[both])) if both.any() else None
        for name in ("value", "without_duplicates")
    ]
    return DuplicateEffect(
        explainer=explainer,
        metric=metric,
        n_neurons=int((n_duplicates > 0).sum()),
        n_records=int(n_duplicates.sum()),
        mean_with=means[0],
        mean_without=means[1],
    )
