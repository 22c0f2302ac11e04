"""Find near-duplicate passages between excerpts explained from (fit) and excerpts scored on (held-out).

The documents of the two splits differ, but they may share text: licence headers, tables, copied code. A
passage is up to 64 tokens inside one document, on a grid of 32 tokens from the document's start. It is the
text around an excerpt, because 8 tokens alone match too often. Two passages are near-duplicates if the
Jaccard similarity of their 5-token shingles is at least `THRESHOLD`. MinHash (Broder 1997) proposes pairs;
the shingles themselves decide, so there are no false positives.

Cost: each passage is hashed once, however many neurons share it, and many at a time. (The library datasketch,
whose hashes these are, takes one passage at a time.) The number of passages is at most the number of tokens of
the fit split / 32, and at most 3 times the number of excerpts explained from. A passage takes 1 kB: hashes of
its bands in one sorted array, and its shingles; 2 kB while that array is sorted.

Shapes: n passages, R runs of tokens in a passage (60), P permutations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cratelm.records import CORRELATIONS, Excerpt, Metric, NeuronScore, Split
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
_DRAW = np.random.RandomState(1)
_FACTORS = _DRAW.randint(0, 2**31, _PERMUTATIONS, np.uint32) * np.uint32(2) + np.uint32(1)
"""[P] odd, so that a product with them is a permutation of 32 bits"""
_SHIFTS = _DRAW.randint(0, 2**32, _PERMUTATIONS, np.uint32)
"""[P]"""
_AROUND = 1
"""passages before and after that of an explained excerpt that also count as explained from: those that
share half of their tokens with it"""
_EXAMPLES = 5
_BATCH = 1024
"""passages read at a time"""
_BLOCK = 16
"""passages hashed at a time: 0.25 MB, so that the numbers stay in the cache"""


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
        self._store = store
        self._index = _BandIndex()
        self._explained: dict[int, NDArray[np.uint32]] = {}
        """shingles of each passage, by its first position"""
        self._scored: dict[int, bool] = {}
        """whether each passage is a near-duplicate, by its first position"""
        self._pairs: dict[tuple[int, int], DuplicatePair] = {}
        """the first pairs found, by the ordinals of their documents"""

    def register(self, excerpts: Iterable[Excerpt]) -> None:
        """Register excerpts explained from. All of them must be registered before any is searched for.

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
            new = [start not in self._explained for start in starts[inside].tolist()]
            self._register(starts[inside][new], passages[inside, 2][new])

    def is_duplicate(self, excerpt: Excerpt) -> bool:
        """Return True if the passage around a held-out excerpt is a near-duplicate of one explained from."""
        return bool(self.are_duplicates([excerpt])[0])

    def are_duplicates(self, excerpts: Sequence[Excerpt]) -> NDArray[np.bool_]:
        """Return whether the passage around each held-out excerpt is a near-duplicate of one explained from, [n]."""
        passages = self._passages("held_out", np.array([e.position for e in excerpts], np.int64))
        starts = passages[:, 0].tolist()
        new = {
            start: (stop, e.document)
            for start, stop, e in zip(starts, passages[:, 2].tolist(), excerpts, strict=True)
            if start not in self._scored
        }
        if new:
            self._search(np.array(list(new)), *np.array(list(new.values())).T)
        return np.array([self._scored[start] for start in starts], bool)

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
                if metric in CORRELATIONS
            ),
        )

    def _register(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        """Add passages [n] that begin at `starts` in documents that end at `stops`."""
        starts, first = np.unique(starts, return_index=True)
        for at in range(0, len(starts), _BATCH):
            some = starts[at : at + _BATCH]
            shingles = self._shingles("fit", some, stops[first[at : at + _BATCH]])
            self._explained.update(zip(some.tolist(), shingles, strict=True))
            self._index.insert(some, _band_hashes(min_hashes(shingles)))

    def _search(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64], documents: NDArray[np.int64]
    ) -> None:
        """Note for each passage [n] of a held-out document whether it is a near-duplicate."""
        shingles = self._shingles("held_out", starts, stops)
        proposals = self._index.query(_band_hashes(min_hashes(shingles)))
        for start, document, own, proposed in zip(
            starts.tolist(), documents.tolist(), shingles, proposals, strict=True
        ):
            near = ((_jaccard(own, self._explained[other]), other) for other in proposed)
            similarity, other = max(near, default=(0.0, -1))
            self._scored[start] = similarity >= THRESHOLD
            if self._scored[start] and len(self._pairs) < _EXAMPLES:
                (ordinal,) = self._store.split("fit").documents_at(np.array([other])).tolist()
                pair = DuplicatePair(ordinal, document, round(similarity, 3))
                self._pairs.setdefault((ordinal, document), pair)

    def _passages(self, split: Split, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the start of the passage around each position [n], and start and end of its document, [n, 3]."""
        starts = self._store.split(split).starts
        document = np.searchsorted(starts, positions, side="right") - 1
        low, high = starts[document], starts[document + 1]
        # `position` is in the middle of the passage, unless the document begins or ends near it
        middle = np.maximum(low, np.minimum(positions - PASSAGE // 2, high - PASSAGE))
        return np.stack([low + _on_grid(middle - low), low, high], axis=1)

    def _shingles(
        self, split: Split, starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        """Return the shingles of passages [n, R] that begin at `starts` [n] in documents that end at `stops` [n]."""
        lengths = np.minimum(stops - starts, PASSAGE)
        positions = starts[:, None] + np.minimum(np.arange(PASSAGE), lengths[:, None] - 1)
        return shingles_of(self._store.split(split).read_at(positions), lengths)


class _BandIndex:
    """Passages by the hashes of their bands (locality-sensitive hashing). Memory: 0.5 kB per passage."""

    def __init__(self) -> None:
        self._starts: list[NDArray[np.int64]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._sorted: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def insert(self, starts: NDArray[np.int64], hashes: NDArray[np.uint64]) -> None:
        """Add passages [n] with the hashes of their bands [n, bands]; before any `query`."""
        assert self._sorted is None
        self._starts.append(np.repeat(starts, _BANDS[0]))
        self._hashes.append(hashes.ravel())

    def query(self, hashes: NDArray[np.uint64]) -> list[list[int]]:
        """Return for each row of `hashes` [n, bands] the beginnings of the passages that share a band with it."""
        if self._sorted is None:
            flat = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
            self._hashes.clear()
            order = np.argsort(flat)
            starts = np.concatenate([*self._starts, np.zeros(0, np.int64)])
            self._starts.clear()
            self._sorted = flat[order], starts[order]
        keys, starts = self._sorted
        low, high = (np.searchsorted(keys, hashes, side) for side in ("left", "right"))
        proposals: list[list[int]] = [[] for _ in hashes]
        for row in np.flatnonzero((low < high).any(axis=1)).tolist():
            near = [starts[i:j] for i, j in zip(low[row], high[row], strict=True)]
            proposals[row] = np.unique(np.concatenate(near)).tolist()
        return proposals


def min_hashes(shingles: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the MinHash of passages [n, P] from their shingles [n, R].

    Each is the smallest value of a permutation a h + b mod 2^32 over the shingles, which are mixed first
    (the finalizer of MurmurHash3): the hashes of `datasketch.MinHash`, version 2.
    """
    mixed = shingles ^ (shingles >> np.uint32(16))
    mixed = mixed * np.uint32(0x85EB_CA6B)
    mixed = mixed ^ (mixed >> np.uint32(13))
    mixed = mixed * np.uint32(0xC2B2_AE35)
    mixed = mixed ^ (mixed >> np.uint32(16))
    blocks = np.array_split(mixed, max(1, len(mixed) // _BLOCK))
    permuted = ((b[:, :, None] * _FACTORS + _SHIFTS).min(axis=1) for b in blocks)  # [n, R, P]
    return np.concatenate(list(permuted))


def _band_hashes(hashes: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return one hash for each band [n, bands] of `hashes` [n, P], with the number of the band in its upper bits.

    Two hashes of a band fill 64 bits, of which a product keeps 59: that different bands get the same
    number is so rare that it costs nothing, and the shingles decide anyway.
    """
    bands = hashes.astype(np.uint64).reshape(-1, *_BANDS)
    mixed = (bands[:, :, 0] << np.uint64(32) | bands[:, :, 1]) * np.uint64(0x9E37_79B9_7F4A_7C15)
    return np.arange(_BANDS[0], dtype=np.uint64) << np.uint64(59) | mixed >> np.uint64(5)


def _on_grid(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the nearest multiples of `GRID`, [n]."""
    return (offsets + GRID // 2) // GRID * GRID


def _last(passages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the start of the last passage of the document of each of `passages` [n, 3], [n]."""
    low, high = passages[:, 1], passages[:, 2]
    return low + _on_grid(np.maximum(0, high - low - PASSAGE))


def _jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Return the Jaccard similarity of two sets, given as arrays that may have repeats."""
    a, b = np.unique(a), np.unique(b)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def shingles_of(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return a 32-bit hash of each run of `SHINGLE` tokens in passages, [n, R]; repeats fill the row of a short one.

    `tokens` is [n, PASSAGE], of which `lengths` [n] are the passage's. A passage with fewer tokens than
    `SHINGLE` is one run.
    """
    n_runs = np.maximum(1, lengths - SHINGLE + 1)
    first = np.minimum(np.arange(PASSAGE - SHINGLE + 1), n_runs[:, None] - 1)  # [n, R]
    rows = np.arange(len(tokens))[:, None]
    mixed = np.zeros(first.shape, np.uint64)
    for offset in range(SHINGLE):
        # FNV-1a over tokens, for all runs at once, in 64 bits that wrap around. MinHash takes 32 of these
        # bits, but not the lowest, which are mixed least.
        token = tokens[rows, first + offset].astype(np.uint64)
        longer = (mixed ^ (token + np.uint64(1))) * np.uint64(1_099_511_628_211)
        mixed = np.where(offset < lengths[:, None], longer, mixed)
    return (mixed >> np.uint64(16) & np.uint64(0xFFFF_FFFF)).astype(np.uint32)


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
