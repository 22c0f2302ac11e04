"""The inner loops of a harvest as compiled code, for the CPU (extra `fast`, which installs numba).

`LayerHarvest` works with torch's operations, each of which is a pass over memory. Here each row of a tile of
neurons is read once, and all that is wanted from it is computed while it is in the L1 cache. The loops over
neurons have no branches and no dependence between neurons, so that the compiler turns them into vector
instructions; only the counting of histograms is scalar. It dominates: hence the activations that are exactly
0, most of those of a sparse code, are counted together.

Excerpts and all whole numbers equal those of `LayerHarvest`, which is the reference in tests. Moments differ in
the last digits: they are sums in float32 over 32 tokens, and in float64 beyond. Nothing depends on the number
of threads.

Shape legend: N tokens of a batch, H neurons, C buffers of K slots, W tokens of a window, P pieces (`batches.Pieces`), D
documents of a batch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from cratelm.activations.batches import NEVER, Batch
from cratelm.activations.layer_harvest import Binning, LayerHarvest
from cratelm.activations.topk import EMPTY, TopKBuffers
from cratelm.records import HISTOGRAM_BINS

_TILE = 512
"""most neurons of a tile: their counters take 128 KiB; narrower tiles cost more per row"""
_IN_FLOAT32 = 32
"""number of tokens whose sums are in float32"""
_SPARSE = 0.5
"""below this fraction of activations above 0, none negative, zeros are counted together"""

# ---- what the compiled functions get ----------------------------------------------------------------


class _Tokens(NamedTuple):
    """A batch."""

    flat: np.ndarray
    """[N, H]"""
    position: np.ndarray
    """[N]"""
    key: np.ndarray
    """[N]"""
    segment_of: np.ndarray
    """[N] -1 for end marks"""
    start: np.ndarray
    """[segments] first position"""
    stop: np.ndarray
    document: np.ndarray
    piece_of: np.ndarray
    """[N] number of the piece, -1 for end marks"""
    first_row: np.ndarray
    """[P] first row of each piece"""
    first_piece: np.ndarray
    """[D + 1] first piece of each document"""

    @classmethod
    def of(cls, flat: torch.Tensor, batch: Batch) -> "_Tokens":
        pieces = batch.pieces
        return cls(
            flat=flat.contiguous().numpy(),
            position=batch.position.numpy(),
            key=batch.key.numpy(),
            segment_of=batch.segment_of.numpy(),
            start=batch.start.numpy(),
            stop=batch.stop.numpy(),
            document=batch.document.numpy(),
            piece_of=pieces.piece_of,
            first_row=pieces.first_token,
            first_piece=pieces.first_piece,
        )


class _Buffers(NamedTuple):
    """The arrays of `TopKBuffers`."""

    key: np.ndarray
    position: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    document: np.ndarray
    window: np.ndarray
    threshold: np.ndarray

    @classmethod
    def of(cls, buffers: TopKBuffers) -> "_Buffers":
        return cls(*(getattr(buffers, name).numpy() for name in cls._fields))


class _Bins(NamedTuple):
    """A `Binning`."""

    lower: np.ndarray
    """[H, bins]"""
    samples: _Buffers

    @classmethod
    def of(cls, binning: Binning) -> "_Bins":
        return cls(binning.lower.numpy(), _Buffers.of(binning.samples))


class _Statistics(NamedTuple):
    """What a sweep needs about neurons, and what it adds to."""

    mean: np.ndarray
    low: np.ndarray
    scale: np.ndarray
    """[H] float32 histogram bins per unit"""
    powers: np.ndarray
    fired: np.ndarray
    maximum: np.ndarray
    histogram: np.ndarray


class FusedLayerHarvest(LayerHarvest):
    """A `LayerHarvest` on the CPU with compiled inner loops, on as many threads as torch uses.

    The first batch compiles them, or loads what an earlier process compiled.
    """

    def _search(self, flat: torch.Tensor, batch: Batch, cut: torch.Tensor, last_key: int) -> None:
        calibration = self.calibration
        low, high = calibration.low.numpy(), calibration.high.numpy()
        statistics = _Statistics(
            calibration.mean.numpy(),
            low,
            np.float32(HISTOGRAM_BINS) / (high - low),
            *(x.numpy() for x in (self._block, self.fired, self.maximum, self.histogram)),
        )
        tokens = _Tokens.of(flat, batch)
        is_sparse = bool(
            (calibration.low == 0).all() and calibration.anthropic_reach[:, 0].mean() < _SPARSE
        )
        bins = _Bins.of(self.openai), _Bins.of(self.anthropic)
        top = _Buffers.of(self.top)
        self._by_tile(
            lambda first, last: _sweep_tile(
                tokens, statistics, cut.numpy(), is_sparse, last_key, *bins, top, first, last
            )
        )
        self._check_finite()

    def _offer_rows(self, flat: torch.Tensor, batch: Batch, rows: torch.Tensor) -> None:
        tokens = _Tokens.of(flat, batch)
        for bins in (_Bins.of(self.openai), _Bins.of(self.anthropic)):
            self._by_tile(
                lambda first, last, b=bins: _offer_rows(tokens, b, rows.numpy(), first, last)
            )

    def _by_tile(self, work: Callable[[int, int], Any]) -> None:
        """Do the work for each tile of neurons, from the first to one past the last."""
        n_threads = torch.get_num_threads()
        n_tiles = max(n_threads, -(-self.n_neurons // _TILE))
        edges = [i * self.n_neurons // n_tiles for i in range(n_tiles + 1)]
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(lambda edge: work(*edge), pairwise(edges)))


# ---- compiled functions -----------------------------------------------------------------------------


def _compiled(function: Any) -> Any:
    """Compile a function at its first call, without the interpreter's lock; keep the code for later processes."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for compiled code can be written
        return numba.njit(**options)(function)


@_compiled
def _insert(tokens, buffers, buffer, key, row, neuron, is_unique):
    """Keep a token in a buffer if it is among the best K: see `TopKBuffers`.

    With `is_unique` the buffer keeps one token per document.
    """
    keys, positions = buffers.key[buffer], buffers.position[buffer]
    segment, position = tokens.segment_of[row], tokens.position[row]
    document = tokens.document[segment]
    # the slot of the same document, or that of the worst: the largest key, of these the largest position
    slot = -1
    if is_unique:
        for k in range(len(keys)):
            if buffers.document[buffer, k] == document and keys[k] < EMPTY:
                slot = k
    if slot < 0:
        slot = 0
        for k in range(1, len(keys)):
            if keys[k] > keys[slot] or (keys[k] == keys[slot] and positions[k] > positions[slot]):
                slot = k
    if key > keys[slot] or (key == keys[slot] and position >= positions[slot]):
        return
    window = buffers.window[buffer, slot]
    context = len(window) // 2
    keys[slot], positions[slot] = key, position
    buffers.start[buffer, slot] = max(tokens.start[segment], position - context)
    buffers.stop[buffer, slot] = min(tokens.stop[segment], position + context)
    buffers.document[buffer, slot] = document
    for k in range(len(window)):
        near = row + k - context
        is_inside = 0 <= near < len(tokens.flat) and tokens.segment_of[near] == segment
        window[k] = tokens.flat[near, neuron] if is_inside else np.float32(0)
    largest = keys[0]
    for k in range(1, len(keys)):
        largest = max(largest, keys[k])
    buffers.threshold[buffer] = largest


@_compiled
def _bin_of(lower, neuron, value):
    """Return the number of the last bin whose lower edge in [H, bins] a value reaches, -1 if there is none."""
    number = -1
    while number + 1 < lower.shape[1] and value >= lower[neuron, number + 1]:
        number += 1
    return number


@_compiled
def _offer_rows(tokens, bins, rows, first, last):
    """Offer neurons `first` to `last` of rows [n] as samples."""
    # To hand all arrays to another function takes longer than to look up a bin, so only `_insert` gets them.
    flat, lower, threshold = tokens.flat, bins.lower, bins.samples.threshold
    for row in rows:
        key = tokens.key[row]
        for neuron in range(first, last):
            number = _bin_of(lower, neuron, flat[row, neuron])
            buffer = neuron * lower.shape[1] + number
            if number >= 0 and key < threshold[buffer]:
                _insert(tokens, bins.samples, buffer, key, row, neuron, False)


@_compiled
def _offer_top(tokens, best, top, first, last):
    """Offer the maximum of each document from those of its pieces, best [P, W], to the top excerpts."""
    # ties with the worst that was held before the batch are dropped, whatever their position
    threshold = top.threshold[first:last].copy()
    bits = best.view(np.int32)  # of non-negative floats: they have the order of the floats
    for number in range(len(tokens.first_piece) - 1):
        low, high = tokens.first_piece[number], tokens.first_piece[number + 1]
        for j in range(last - first):
            piece = low
            for other in range(low + 1, high):
                if best[other, j] > best[piece, j]:
                    piece = other
            key = -np.int64(bits[piece, j])
            if best[piece, j] > 0 and key < threshold[j]:
                row = tokens.first_row[piece]
                while tokens.flat[row, first + j] != best[piece, j]:
                    row += 1
                _insert(tokens, top, first + j, key, row, first + j, True)


@_compiled
def _add_sums(statistics, sums, best, counts, n_text, first):
    """Add moments and firing counts [5, W], maxima [P, W] and histograms [W * 64] to those of neurons from `first` on."""
    last_bin = np.float32(HISTOGRAM_BINS - 1)
    for j in range(sums.shape[1]):
        neuron = first + j
        for k in range(4):
            statistics.powers[k, neuron] += sums[k, j]
        statistics.fired[neuron] += sums[4, j]
        for piece in range(len(best)):
            statistics.maximum[neuron] = max(statistics.maximum[neuron], best[piece, j])
        counted, place = np.int64(0), HISTOGRAM_BINS * neuron
        for k in range(HISTOGRAM_BINS):
            counted += counts[HISTOGRAM_BINS * j + k]
            statistics.histogram[place + k] += counts[HISTOGRAM_BINS * j + k]
        zero = (np.float32(0) - statistics.low[neuron]) * statistics.scale[neuron]
        of_zero = min(max(zero, np.float32(0)), last_bin)
        statistics.histogram[place + np.int64(of_zero)] += n_text - counted  # 0 if all were counted


@_compiled
def _sweep_tile(tokens, statistics, cut, is_sparse, last_key, openai, anthropic, top, first, last):
    """Add neurons `first` to `last` of a batch to their statistics and excerpts.

    Samples are taken of tokens with a key above `last_key`, of activations that reach the cut. If numbers
    are not finite, the sums are not either, and no excerpts are taken.
    """
    width, n_pieces = last - first, len(tokens.first_row)
    mean, low = statistics.mean[first:last], statistics.low[first:last]
    scale, cuts = statistics.scale[first:last], cut[first:last]
    best = np.full((n_pieces, width), -np.inf, np.float32)
    # of the last few tokens: moments 1 to 4, then firing counts, in float32; and of all before, in float64
    recent, before = np.zeros((5, width), np.float32), np.zeros((5, width), np.float64)
    m1, m2, m3, m4, firings = recent[0], recent[1], recent[2], recent[3], recent[4]
    counts = np.zeros(width * HISTOGRAM_BINS, np.uint32)
    offset = np.arange(width).astype(np.uint32) * np.uint32(HISTOGRAM_BINS)
    last_bin = np.float32(HISTOGRAM_BINS - 1)
    bins, of_others = np.empty(width, np.uint32), np.empty(width, np.uint32)
    reached = np.zeros(-(-width // 8) * 8, np.uint8)  # read eight at a time: nearly all are 0
    words = reached.view(np.uint64)
    lower, threshold = openai.lower, openai.samples.threshold
    lower2, threshold2 = anthropic.lower, anthropic.samples.threshold
    n_recent, n_text = 0, 0
    for number in range(len(tokens.flat)):
        if tokens.piece_of[number] < 0:  # an end mark
            continue
        n_text += 1
        row, maxima = tokens.flat[number, first:last], best[tokens.piece_of[number]]
        for j in range(width):
            centred = row[j] - mean[j]
            square = centred * centred
            m1[j] += centred
            m2[j] += square
            m3[j] += square * centred
            m4[j] += square * square
        reaches = np.int32(0)
        for j in range(width):
            value = row[j]
            maxima[j] = value if value > maxima[j] else maxima[j]
            reached[j] = value >= cuts[j]
            reaches |= np.int32(value >= cuts[j])
        # Written out for both binnings: as a function, inlined by numba, the whole sweep takes twice as long.
        if reaches and last_key < tokens.key[number] < NEVER:
            for word in range(len(words)):
                if words[word]:
                    for j in range(8 * word, 8 * word + 8):
                        if reached[j] and row[j] < np.inf:
                            neuron, value, key = first + j, row[j], tokens.key[number]
                            at = _bin_of(lower, neuron, value)
                            buffer = neuron * lower.shape[1] + at
                            if at >= 0 and key < threshold[buffer]:
                                _insert(tokens, openai.samples, buffer, key, number, neuron, False)
                            at = _bin_of(lower2, neuron, value)
                            buffer = neuron * lower2.shape[1] + at
                            if at >= 0 and key < threshold2[buffer]:
                                _insert(
                                    tokens, anthropic.samples, buffer, key, number, neuron, False
                                )
        for j in range(width):
            value = row[j]
            firings[j] += np.float32(1) if value > np.float32(0) else np.float32(0)
            # NaN gives bin 0: the comparisons are false
            scaled = (value - low[j]) * scale[j]
            scaled = scaled if scaled > np.float32(0) else np.float32(0)
            scaled = scaled if scaled < last_bin else last_bin
            bins[j] = np.uint32(np.int32(scaled)) + offset[j]
        if is_sparse:
            n_others = np.uint32(0)
            for j in range(width):
                of_others[n_others] = bins[j]
                n_others += np.uint32(row[j] != np.float32(0))
            for j in range(n_others):
                counts[of_others[j]] += np.uint32(1)
        else:
            for j in range(width):
                counts[bins[j]] += np.uint32(1)
        n_recent += 1
        if n_recent == _IN_FLOAT32:
            n_recent = 0
            for k in range(5):
                for j in range(width):
                    before[k, j] += recent[k, j]
                    recent[k, j] = np.float32(0)
    before += recent
    _add_sums(statistics, before, best, counts, n_text, first)
    if np.isfinite(before[0]).all():
        _offer_top(tokens, best, top, first, last)
