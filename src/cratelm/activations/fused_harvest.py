"""The inner loops of a harvest as compiled code, for the CPU (extra `fast`, which installs numba).

`LayerHarvest` works with torch's operations, each of which is a pass over memory. Here four rows of a tile of
neurons are read at a time, and all that is wanted from them is computed while they are in the L1 cache. The
loops over neurons have no branches and no dependence between neurons, so that the compiler turns them into
vector instructions; only the counting of histograms is scalar. Activations that may become excerpts are few:
they are gathered in lists, and offered many at a time.

Excerpts and all whole numbers equal those of `LayerHarvest`, which is the reference in tests. Moments differ in
the last digits: they are sums in float32 over some 32 tokens, and in float64 beyond. Nothing depends on the number
of threads.

Shape legend: N tokens of a batch, H neurons, C buffers of K slots, W tokens of a window, P pieces (`batches.Pieces`), D
documents of a batch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from cratelm.activations.batches import Batch
from cratelm.activations.layer_harvest import LOWEST_OCTAVE, OCTAVES, Binning, LayerHarvest
from cratelm.activations.topk import EMPTY, TopKBuffers
from cratelm.records import HISTOGRAM_BINS

_TILE = 192
"""about this many neurons are a tile: their counters take 12 of the 32 KiB of an L1 cache; 128 and 256 are slower"""
_IN_FLOAT32 = 32
"""number of tokens, or up to 3 more, whose sums are in float32"""
_IN_6_BITS = 60
"""number of tokens, or up to 3 more, whose activations above edges are counted in 6 bits, which hold 63"""
_IN_UINT8 = 252
"""number of tokens, or up to 3 more, whose histograms are counted in bytes, which hold 255"""
_OFFERED = 4096
"""number of tokens that are gathered before they are offered to buffers"""

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
    first_row: np.ndarray
    """[P] first row of each piece"""
    end_row: np.ndarray
    """[P] one past its last row"""
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
            first_row=pieces.first_token,
            end_row=pieces.end_token,
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
    edges: np.ndarray
    """[bins, H] the same"""
    samples: _Buffers

    @classmethod
    def of(cls, binning: Binning) -> "_Bins":
        return cls(binning.lower.numpy(), binning.edges.numpy(), _Buffers.of(binning.samples))


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
    reached: np.ndarray
    """[4, H] tokens that reach the lower edges of quantile bins"""
    octaves: np.ndarray
    """[H * 64] or [0]"""


class FusedLayerHarvest(LayerHarvest):
    """A `LayerHarvest` on the CPU with compiled inner loops, on as many threads as torch uses.

    The first batch compiles them, or loads what an earlier process compiled.
    """

    per_reached = 4

    def _search(self, flat: torch.Tensor, batch: Batch, cut: torch.Tensor, last_key: int) -> None:
        calibration = self.calibration
        low, high = calibration.low.numpy(), calibration.high.numpy()
        statistics = _Statistics(
            calibration.mean.numpy(),
            low,
            np.float32(HISTOGRAM_BINS) / (high - low),
            self._block.numpy(),
            *(
                getattr(self, name).numpy()
                for name in ("fired", "maximum", "histogram", "reached", "octaves")
            ),
        )
        tokens = _Tokens.of(flat, batch)
        bins, top = self._bins(), _Buffers.of(self.top)
        self._by_tile(
            lambda first, last: _sweep_tile(
                tokens, statistics, cut.numpy(), last_key, *bins, top, first, last
            )
        )
        self._check_finite()

    def _offer_rows(self, flat: torch.Tensor, batch: Batch, rows: torch.Tensor) -> None:
        tokens, bins = _Tokens.of(flat, batch), self._bins()
        chosen = rows.numpy()
        self._by_tile(lambda first, last: _offer_rows(tokens, *bins, chosen, first, last))

    def _cut(self, key: int) -> tuple[torch.Tensor, float]:
        cut = np.full(self.n_neurons, np.inf, np.float32)
        reach = np.zeros(self.n_neurons, np.float32)
        for binning in (self.openai, self.anthropic):
            columns = binning.lower, binning.threshold, binning.reach
            _lower_cut(*(column.numpy() for column in columns), key, cut, reach)
        return torch.from_numpy(cut), float(reach.mean())

    def _random_windows(
        self, flat: torch.Tensor, batch: Batch, rows: torch.Tensor, neurons: torch.Tensor
    ) -> torch.Tensor:
        windows = torch.empty(len(rows), 2 * self.sizes.context)
        places = rows.numpy(), neurons.numpy(), windows.numpy()
        tokens = _Tokens.of(flat, batch)
        _in_threads(len(rows), 1, lambda first, last: _copy_windows(tokens, *places, first, last))
        return windows

    def _bins(self) -> "tuple[_Bins, _Bins]":
        return _Bins.of(self.openai), _Bins.of(self.anthropic)

    def _by_tile(self, work: Callable[[int, int], Any]) -> None:
        """Do the work for each tile of neurons, from the first to one past the last."""
        per_thread = max(1, round(self.n_neurons / (_TILE * torch.get_num_threads())))
        _in_threads(self.n_neurons, per_thread, work)


def _in_threads(n: int, per_thread: int, work: Callable[[int, int], Any]) -> None:
    """Do the work for n things, in `per_thread` parts for each thread, each from its first to one past its last."""
    n_threads = torch.get_num_threads()
    n_parts = n_threads * per_thread
    edges = [i * n // n_parts for i in range(n_parts + 1)]
    list(_pool(n_threads).map(lambda edge: work(*edge), pairwise(edges)))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that the compiled functions run in."""
    return ThreadPoolExecutor(n_threads)


# ---- compiled functions -----------------------------------------------------------------------------


def _compiled(function: Any) -> Any:
    """Compile a function at its first call, without the interpreter's lock; keep the code for later processes."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for compiled code can be written
        return numba.njit(**options)(function)


@_compiled
def _lower_cut(lower, threshold, reach, key, cut, most):
    """Lower the cut [H] to that of a binning, and raise the largest reach [H]: see `LayerHarvest._cut`."""
    for neuron in range(len(lower)):
        for k in range(lower.shape[1]):
            if threshold[neuron, k] > key:
                cut[neuron] = min(cut[neuron], lower[neuron, k])
                most[neuron] = max(most[neuron], reach[neuron, k])


@_compiled
def _copy_windows(tokens, rows, neurons, windows, first, last):
    """Copy to windows `first` to `last` of [m, W] the activations of a neuron around a row, 0 outside its segment."""
    context = windows.shape[1] // 2
    for i in range(first, last):
        row, neuron, window = rows[i], neurons[i], windows[i]
        segment = tokens.segment_of[row]
        before = min(context, tokens.position[row] - tokens.start[segment], row)
        after = min(context, tokens.stop[segment] - tokens.position[row], len(tokens.flat) - row)
        window[: context - before] = np.float32(0)
        for k in range(-before, after):
            window[context + k] = tokens.flat[row + k, neuron]
        window[context + after :] = np.float32(0)


@_compiled
def _insert(tokens, buffers, offered, n_offered, per_neuron, is_unique):
    """Keep those of the offered tokens [n, 2] (row, buffer) that are among the best K of their buffer: see `TopKBuffers`.

    A neuron has `per_neuron` buffers. With `is_unique` a buffer keeps one token per document, and the key is the
    negative activation.
    """
    context, n_slots = buffers.window.shape[2] // 2, buffers.key.shape[1]
    for i in range(n_offered):
        row, buffer = offered[i, 0], offered[i, 1]
        neuron, segment = buffer // per_neuron, tokens.segment_of[row]
        position, document = tokens.position[row], tokens.document[segment]
        key = _key_of(tokens.flat[row, neuron]) if is_unique else tokens.key[row]
        worst = buffers.threshold[buffer]
        if key > worst:
            continue
        # the slot of the same document, or that of the worst: the largest key, of these the largest position
        slot = -1
        if is_unique:
            for k in range(n_slots):
                if buffers.document[buffer, k] == document and buffers.key[buffer, k] < EMPTY:
                    slot = k
        if slot < 0:
            for k in range(n_slots):
                if buffers.key[buffer, k] == worst and (
                    slot < 0 or buffers.position[buffer, k] > buffers.position[buffer, slot]
                ):
                    slot = k
        held = buffers.key[buffer, slot]
        if key > held or (key == held and position >= buffers.position[buffer, slot]):
            continue
        buffers.key[buffer, slot] = key
        buffers.position[buffer, slot] = position
        buffers.start[buffer, slot] = max(tokens.start[segment], position - context)
        buffers.stop[buffer, slot] = min(tokens.stop[segment], position + context)
        buffers.document[buffer, slot] = document
        # its window, as in `_copy_windows`
        before = min(context, position - tokens.start[segment], row)
        after = min(context, tokens.stop[segment] - position, len(tokens.flat) - row)
        for k in range(context - before):
            buffers.window[buffer, slot, k] = np.float32(0)
        for k in range(-before, after):
            buffers.window[buffer, slot, context + k] = tokens.flat[row + k, neuron]
        for k in range(context + after, 2 * context):
            buffers.window[buffer, slot, k] = np.float32(0)
        worst = buffers.key[buffer, 0]
        for k in range(1, n_slots):
            worst = max(worst, buffers.key[buffer, k])
        buffers.threshold[buffer] = worst


@_compiled
def _key_of(activation):
    """Return the key of a top excerpt: the bits of non-negative floats have the order of the floats."""
    return -np.int64(np.float32(activation).view(np.int32))


@_compiled
def _count_edges(row, edges, first, number):
    """Count in number [W] how many of the edges [bins, H] of its neuron each activation of row [W] reaches."""
    for j in range(len(row)):
        number[j] = 0
    for k in range(len(edges)):
        edge = edges[k, first : first + len(row)]
        for j in range(len(row)):
            number[j] += np.int32(row[j] >= edge[j])


@_compiled
def _offer_rows_to(tokens, bins, rows, first, last):
    """Do so for one binning."""
    threshold, n_bins = bins.samples.threshold, len(bins.edges)
    number = np.empty(last - first, np.int32)
    offered = np.empty((_OFFERED + last - first, 2), np.int64)
    n = 0
    for row in rows:
        key = tokens.key[row]
        _count_edges(tokens.flat[row, first:last], bins.edges, first, number)
        for j in range(last - first):
            buffer = (first + j) * n_bins + number[j] - 1
            if number[j] > 0 and key < threshold[buffer]:
                offered[n, 0], offered[n, 1] = row, buffer
                n += 1
        if n >= _OFFERED:
            _insert(tokens, bins.samples, offered, n, n_bins, False)
            n = 0
    _insert(tokens, bins.samples, offered, n, n_bins, False)


@_compiled
def _offer_rows(tokens, openai, anthropic, rows, first, last):
    """Offer neurons `first` to `last` of rows [n] as samples."""
    _offer_rows_to(tokens, openai, rows, first, last)
    _offer_rows_to(tokens, anthropic, rows, first, last)


@_compiled
def _look_up(flat, key, lower, threshold, found, n_found, offered):
    """Copy those of the activations found [n, 2] (row, neuron) that can be samples of a bin; return their number."""
    n, n_bins = 0, lower.shape[1]
    for i in range(n_found):
        row, neuron = found[i, 0], found[i, 1]
        value, number = flat[row, neuron], 0
        for k in range(n_bins):
            number += value >= lower[neuron, k]
        buffer = neuron * n_bins + number - 1
        if number > 0 and key[row] < threshold[buffer]:
            offered[n, 0], offered[n, 1] = row, buffer
            n += 1
    return n


@_compiled
def _offer_found(tokens, bins, found, n_found, offered):
    """Offer the activations found [n, 2] (row, neuron) as samples."""
    n = _look_up(
        tokens.flat, tokens.key, bins.lower, bins.samples.threshold, found, n_found, offered
    )
    _insert(tokens, bins.samples, offered, n, bins.lower.shape[1], False)


@_compiled
def _find(flat, key, reached, cut, last_key, low, high, first, found, n):
    """Add to found [n, 2] the activations of rows `low` to `high` that reach the cut; return the new n.

    Only neurons flagged in reached [W] have one.
    """
    words = reached.view(np.uint64)  # eight at a time: nearly all are 0
    for word in range(len(words)):
        if words[word]:
            for j in range(8 * word, 8 * word + 8):
                if reached[j]:
                    for row in range(low, high):
                        value = flat[row, first + j]
                        if cut[j] <= value < np.inf and key[row] > last_key:
                            found[n, 0], found[n, 1] = row, first + j
                            n += 1
    return n


@_compiled
def _offer_top(tokens, best, top, first, last):
    """Offer the maximum of each document from those of its pieces, best [P, W], to the top excerpts."""
    # ties with the worst that was held before the batch are dropped, whatever their position
    threshold = top.threshold[first:last]
    offered = np.empty(((len(tokens.first_piece) - 1) * (last - first), 2), np.int64)
    n = 0
    for number in range(len(tokens.first_piece) - 1):
        low, high = tokens.first_piece[number], tokens.first_piece[number + 1]
        for j in range(last - first):
            piece = low
            for other in range(low + 1, high):
                if best[other, j] > best[piece, j]:
                    piece = other
            if best[piece, j] > 0 and _key_of(best[piece, j]) < threshold[j]:
                row = tokens.first_row[piece]
                while tokens.flat[row, first + j] != best[piece, j]:
                    row += 1
                offered[n, 0], offered[n, 1] = row, first + j
                n += 1
    _insert(tokens, top, offered, n, 1, True)


# The loops below are functions with few arrays each: before a loop, the compiled code checks that its arrays do not
# overlap, and with many of them the compiler gives up and writes no vector instructions. Four rows at a time, so that
# sums are read and written once for four. Their slices are written out: made by a function, they take 1.8 times as long.


@_compiled
def _as_int(is_true):
    return np.int32(is_true)


@_compiled
def _reaching(a, b, c, d, edge):
    """Return how many of four activations reach an edge."""
    return _as_int(a >= edge) + _as_int(b >= edge) + _as_int(c >= edge) + _as_int(d >= edge)


@_compiled
def _add_moments(flat, row, first, mean, sums):
    """Add the powers 1 to 4 of the centred activations of four rows to sums [4, W]."""
    m1, m2, m3, m4 = sums[0], sums[1], sums[2], sums[3]
    last = first + len(mean)
    r0, r1, r2, r3 = (
        flat[row, first:last],
        flat[row + 1, first:last],
        flat[row + 2, first:last],
        flat[row + 3, first:last],
    )
    for j in range(len(mean)):
        a, b, c, d = r0[j] - mean[j], r1[j] - mean[j], r2[j] - mean[j], r3[j] - mean[j]
        aa, bb, cc, dd = a * a, b * b, c * c, d * d
        m1[j] += (a + b) + (c + d)
        m2[j] += (aa + bb) + (cc + dd)
        m3[j] += (aa * a + bb * b) + (cc * c + dd * d)
        m4[j] += (aa * aa + bb * bb) + (cc * cc + dd * dd)


@_compiled
def _add_moments_of_one(flat, row, first, mean, sums):
    """Do the same for one row."""
    m1, m2, m3, m4 = sums[0], sums[1], sums[2], sums[3]
    r0 = flat[row, first : first + len(mean)]
    for j in range(len(mean)):
        a = r0[j] - mean[j]
        m1[j] += a
        m2[j] += a * a
        m3[j] += a * a * a
        m4[j] += (a * a) * (a * a)


@_compiled
def _find_maxima(flat, row, first, cut, maxima, reached):
    """Update maxima [W] with four rows; set reached [W] where one of them reaches the cut [W]."""
    last = first + len(cut)
    r0, r1, r2, r3 = (
        flat[row, first:last],
        flat[row + 1, first:last],
        flat[row + 2, first:last],
        flat[row + 3, first:last],
    )
    for j in range(len(cut)):
        a = r0[j] if r0[j] > r1[j] else r1[j]
        b = r2[j] if r2[j] > r3[j] else r3[j]
        a = a if a > b else b
        maxima[j] = a if a > maxima[j] else maxima[j]
        reached[j] = a >= cut[j]


@_compiled
def _find_maxima_of_one(flat, row, first, cut, maxima, reached):
    """Do the same with one row."""
    r0 = flat[row, first : first + len(cut)]
    for j in range(len(cut)):
        a = r0[j]
        maxima[j] = a if a > maxima[j] else maxima[j]
        reached[j] = a >= cut[j]


@_compiled
def _count_reached(flat, row, first, edges, number):
    """Count the activations of four rows that are above 0, and that reach each of four edges [4, W].

    A number [W] has five counts of 6 bits, in this order from the lowest bits on.
    """
    e1, e2, e3, e4 = edges[0], edges[1], edges[2], edges[3]
    last, zero = first + len(number), np.float32(0)
    r0, r1, r2, r3 = (
        flat[row, first:last],
        flat[row + 1, first:last],
        flat[row + 2, first:last],
        flat[row + 3, first:last],
    )
    for j in range(len(number)):
        a, b, c, d = r0[j], r1[j], r2[j], r3[j]
        above = _as_int(a > zero) + _as_int(b > zero) + _as_int(c > zero) + _as_int(d > zero)
        number[j] += (
            above
            + (_reaching(a, b, c, d, e1[j]) << 6)
            + (_reaching(a, b, c, d, e2[j]) << 12)
            + (_reaching(a, b, c, d, e3[j]) << 18)
            + (_reaching(a, b, c, d, e4[j]) << 24)
        )


@_compiled
def _count_reached_of_one(flat, row, first, edges, number):
    """Do the same for one row."""
    for j in range(len(number)):
        a = flat[row, first + j]
        number[j] += _as_int(a > np.float32(0))
        for k in range(len(edges)):
            number[j] += _as_int(a >= edges[k, j]) << np.int32(6 * (k + 1))


@_compiled
def _move_counts(number, counts):
    """Add the five counts in number [W] to counts [5, W], and set number to 0."""
    for k in range(len(counts)):
        of_edge = counts[k]
        for j in range(len(number)):
            of_edge[j] += (number[j] >> np.int32(6 * k)) & np.int32(63)
    for j in range(len(number)):
        number[j] = 0


@_compiled
def _count_bins(flat, row, first, low, scale, bins, counts):
    """Count the activations of a row in histograms, counts [W * 64]; bins [W] is overwritten."""
    r0 = flat[row, first : first + len(bins)]
    last_bin = np.float32(HISTOGRAM_BINS - 1)
    for j in range(len(bins)):
        # NaN gives bin 0: the comparisons are false
        scaled = (r0[j] - low[j]) * scale[j]
        scaled = scaled if scaled > np.float32(0) else np.float32(0)
        scaled = scaled if scaled < last_bin else last_bin
        bins[j] = np.int32(scaled) + np.int32(HISTOGRAM_BINS) * np.int32(j)
    for j in range(len(bins)):
        counts[np.uint32(bins[j])] += np.uint8(1)


@_compiled
def _count_octaves(flat, row, first, bins, counts):
    """Count the activations of a row in octaves, counts [W * 64], as `octave_of` has them; bins [W] is overwritten."""
    bits = flat[row, first : first + len(bins)].view(np.int32)
    lowest, last_octave = np.int32(127 + LOWEST_OCTAVE), np.int32(OCTAVES - 1)
    for j in range(len(bins)):
        octave = (bits[j] >> np.int32(23)) - lowest
        octave = octave if octave > np.int32(0) else np.int32(0)
        octave = octave if octave < last_octave else last_octave
        bins[j] = octave + np.int32(OCTAVES) * np.int32(j)
    for j in range(len(bins)):
        counts[np.uint32(bins[j])] += np.uint8(1)


@_compiled
def _move(source, target):
    """Add the elements of one array to another, and set them to 0."""
    for i in range(len(source)):
        target[i] += source[i]
        source[i] = 0


@_compiled
def _add_sums(statistics, powers, best, counts, reached, first):
    """Add powers [4, W], maxima [P, W], histograms [W * 64] and the counts of `_count_reached` [5, W].

    They are of the neurons from `first` on.
    """
    for j in range(reached.shape[1]):
        for k in range(4):
            statistics.powers[k, first + j] += powers[k, j]
        statistics.fired[first + j] += reached[0, j]
        for k in range(1, len(reached)):
            statistics.reached[k - 1, first + j] += reached[k, j]
        for piece in range(len(best)):
            statistics.maximum[first + j] = max(statistics.maximum[first + j], best[piece, j])
    low = HISTOGRAM_BINS * first
    _move(counts, statistics.histogram[low : low + len(counts)])


@_compiled
def _sweep_tile(tokens, statistics, cut, last_key, openai, anthropic, top, first, last):
    """Add neurons `first` to `last` of a batch to their statistics and excerpts.

    Samples are taken of tokens with a key above `last_key`, of activations that reach the cut. If numbers
    are not finite, the sums are not either, and no excerpts are taken.
    """
    width, n_pieces, flat = last - first, len(tokens.first_row), tokens.flat
    mean, low = statistics.mean[first:last], statistics.low[first:last]
    scale, cut = statistics.scale[first:last], cut[first:last]
    best = np.full((n_pieces, width), -np.inf, np.float32)
    recent, before = np.zeros((4, width), np.float32), np.zeros((4, width), np.float64)
    edges = np.ascontiguousarray(openai.edges[1:, first:last])  # or its rows are read one by one
    bins = np.zeros(width, np.int32)
    recent_reached, n_reached = np.zeros(width, np.int32), np.zeros((5, width), np.int32)
    recent_counts = np.zeros(width * HISTOGRAM_BINS, np.uint8)  # these fit into the L1 cache
    counts = np.zeros(width * HISTOGRAM_BINS, np.uint32)
    n_octaves = width * OCTAVES if len(statistics.octaves) else 0
    recent_octaves, octaves = np.zeros(n_octaves, np.uint8), np.zeros(n_octaves, np.uint32)
    reached = np.zeros(-(-width // 8) * 8, np.uint8)
    flags = reached[:width]
    found = np.empty((_OFFERED + 4 * width + 1, 2), np.int64)
    offered, n_found = np.empty_like(found), 0
    n_summed, n_counted, n_compared = 0, 0, 0
    for piece in range(n_pieces):
        row, end = tokens.first_row[piece], tokens.end_row[piece]
        while row < end:
            n = 4 if row + 4 <= end else 1
            if n == 4:
                _add_moments(flat, row, first, mean, recent)
                _find_maxima(flat, row, first, cut, best[piece], flags)
                _count_reached(flat, row, first, edges, recent_reached)
            else:
                _add_moments_of_one(flat, row, first, mean, recent)
                _find_maxima_of_one(flat, row, first, cut, best[piece], flags)
                _count_reached_of_one(flat, row, first, edges, recent_reached)
            n_found = _find(
                flat, tokens.key, reached, cut, last_key, row, row + n, first, found, n_found
            )
            if n_found >= _OFFERED:
                _offer_found(tokens, openai, found, n_found, offered)
                _offer_found(tokens, anthropic, found, n_found, offered)
                n_found = 0
            for i in range(row, row + n):
                _count_bins(flat, i, first, low, scale, bins, recent_counts)
            if n_octaves:
                for i in range(row, row + n):
                    _count_octaves(flat, i, first, bins, recent_octaves)
            row, n_summed, n_counted = row + n, n_summed + n, n_counted + n
            n_compared += n
            if n_compared >= _IN_6_BITS:
                n_compared = 0
                _move_counts(recent_reached, n_reached)
            if n_summed >= _IN_FLOAT32:
                n_summed = 0
                _move(recent.reshape(-1), before.reshape(-1))
            if n_counted >= _IN_UINT8:
                n_counted = 0
                _move(recent_counts, counts)
                _move(recent_octaves, octaves)
    _offer_found(tokens, openai, found, n_found, offered)
    _offer_found(tokens, anthropic, found, n_found, offered)
    _move(recent.reshape(-1), before.reshape(-1))
    _move(recent_counts, counts)
    _move(recent_octaves, octaves)
    _move_counts(recent_reached, n_reached)
    _add_sums(statistics, before, best, counts, n_reached, first)
    if n_octaves:
        _move(octaves, statistics.octaves[OCTAVES * first : OCTAVES * last])
    if np.isfinite(before[0]).all():
        _offer_top(tokens, best, top, first, last)
