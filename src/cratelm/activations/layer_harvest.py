"""What a harvest keeps of one layer while the tokens pass by.

Shape legend: N tokens of a batch, H neurons, S segments, W tokens of an excerpt, m excerpts.

Memory depends on neurons and excerpts, never on the number of tokens: `bytes_a_neuron` is the
formula, 77 kB at the default sizes. The activations of one batch come on top.
"""

from dataclasses import dataclass

import numpy as np
import torch

from cratelm.activations.batches import NEVER, Batch
from cratelm.activations.calibration import Calibration
from cratelm.activations.topk import Candidates, TopKBuffers
from cratelm.errors import InputError
from cratelm.records import ANTHROPIC_BINS, HISTOGRAM_BINS

_PREFIX = 16
"""at least half as many tokens, those with the lowest keys, are looked at in full in each batch"""
_HISTOGRAM_BLOCK = 64
"""neurons whose histograms are counted together"""
_GATHER = 2**22
"""elements gathered at once when a segment's maximum is located"""


@dataclass(frozen=True)
class ExcerptSizes:
    """How many excerpts of which length are kept of a neuron."""

    top: int = 50
    random: int = 50
    per_bin: int = 20
    context: int = 32
    """tokens before the chosen one in a long excerpt, and from it on"""
    short_context: int = 4


def bytes_a_neuron(sizes: ExcerptSizes) -> int:
    """Bytes that a harvest holds of one neuron, however many tokens pass by.

    A place of an excerpt takes 4 bytes a token of its window and 40 of bookkeeping (48 if random);
    a bin 20 more, its edge, its share and its threshold; the statistics 644.
    """
    long, short = 4 * 2 * sizes.context, 4 * 2 * sizes.short_context
    top = sizes.top * (40 + long) + 8
    random = sizes.random * (48 + long)
    openai = 5 * (sizes.per_bin * (40 + long) + 20)
    anthropic = ANTHROPIC_BINS * (sizes.per_bin * (40 + short) + 20)
    return top + random + openai + anthropic + 8 * HISTOGRAM_BINS + 132


class Binning:
    """One way of cutting the activations of H neurons into bins, with a sample of each bin."""

    def __init__(
        self,
        lower: torch.Tensor,
        reach: torch.Tensor,
        is_open: torch.Tensor,
        places: int,
        context: int,
    ) -> None:
        """`is_open` [H, bins] is False for bins of no width: they take nothing."""
        self.n_bins = lower.shape[1]
        self.lower = lower
        """[H, bins] an activation is in the last bin whose lower edge it reaches"""
        self.edges = lower.T.contiguous()
        """[bins, H] the same"""
        self.reach = reach
        """[H, bins] share of tokens that reach it, as the pilot found"""
        self.context = context
        self.cells = TopKBuffers(lower.numel(), places, 2 * context, lower.device)
        self.cells.threshold[~is_open.flatten()] = -1

    @property
    def threshold(self) -> torch.Tensor:
        """[H, bins] a token of the bin with a key below this is kept."""
        return self.cells.threshold.view_as(self.lower)

    def cells_of(
        self, value: torch.Tensor, neuron: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cell (neuron and bin) of each value, and True where its key is low enough to be kept there.

        Shapes: value [n, H] with neuron [H] and key [n, 1], or all [n].
        """
        number = torch.full_like(value, -1, dtype=torch.int8)
        for edge in self.edges:
            number += value >= (edge if value.dim() == 2 else edge[neuron])
        cell = neuron * self.n_bins + number.clamp(min=0)
        return cell, (number >= 0) & (key < self.cells.threshold[cell])


class LayerHarvest:
    """Statistics and excerpts of the H neurons of one layer; feed it batch after batch, in order."""

    def __init__(self, pilot: Calibration, random: np.ndarray, sizes: ExcerptSizes, layer: int):
        device, n_neurons = pilot.mean.device, len(pilot.mean)
        self.pilot, self.sizes, self.layer = pilot, sizes, layer
        self.n_neurons = n_neurons
        self.n_tokens = 0
        self.prefix = _PREFIX
        """tokens of the last batch that were looked at in full"""
        self.powers = torch.zeros(4, n_neurons, dtype=torch.float64, device=device)
        """[4, H] sums of (a - pilot mean)^k, k = 1..4"""
        self.fired = torch.zeros(n_neurons, dtype=torch.float64, device=device)
        self.maximum = torch.full((n_neurons,), -torch.inf, device=device)
        self.histogram = torch.zeros(n_neurons * HISTOGRAM_BINS, dtype=torch.int64, device=device)
        window = 2 * sizes.context
        self.top = TopKBuffers(n_neurons, sizes.top, window, device, unique_documents=True)
        self.openai = _openai_binning(pilot, sizes)
        self.anthropic = _anthropic_binning(pilot, sizes)
        self._plan_random(random, window, device)

    def _plan_random(self, random: np.ndarray, window: int, device: torch.device) -> None:
        """random [H, K_r] positions, -1 for none: sorted once, so that a batch finds its own by bisection."""
        neuron, rank = np.nonzero(random >= 0)
        order = np.argsort(random[neuron, rank], kind="stable")
        self.random_neuron, self.random_rank = neuron[order], rank[order]
        self.random_position = random[neuron, rank][order]
        shape = (len(order),)
        self.random_start = torch.zeros(shape, dtype=torch.int64, device=device)
        self.random_stop = torch.zeros_like(self.random_start)
        self.random_document = torch.zeros_like(self.random_start)
        self.random_window = torch.zeros((*shape, window), device=device)

    @torch.no_grad()
    def add(self, activations: torch.Tensor, batch: Batch) -> None:
        """Takes in activations [B, T, H] of a batch. Raises `InputError` where they are not finite."""
        flat = activations.reshape(-1, self.n_neurons).float()  # [N, H]
        cut, last_key = self._sample_prefix(flat, batch)
        reached = self._sweep(flat, batch, cut)
        self._count_histogram(flat, batch)
        self._keep_top(flat, batch)
        self._keep_random(flat, batch)
        self._sample_rest(flat, batch, reached, last_key)
        self.n_tokens += batch.n_text

    def _sweep(self, flat: torch.Tensor, batch: Batch, cut: torch.Tensor) -> torch.Tensor:
        """Moments and firing counts; returns the offsets [n] in flat of activations >= cut [H].

        Done in pieces that stay in the processor's cache: 20 times faster than whole on a CPU.
        """
        rows = len(flat) if flat.is_cuda else max(8, 2**17 // self.n_neurons)
        reached = []
        for first in range(0, len(flat), rows):
            piece, text = flat[first : first + rows], batch.is_text[first : first + rows]
            centred = piece - self.pilot.mean
            square = centred * centred
            powers = [text @ x for x in (centred, square, square * centred, square * square)]
            self.powers += torch.stack(powers)
            self.fired += text @ (piece > 0).float()
            reached.append(_nonzero(piece >= cut) + first * self.n_neurons)
        if not torch.isfinite(self.powers[0]).all():
            raise InputError(
                f"layer {self.layer} has activations that are not finite numbers:"
                " the model is damaged or its training diverged; evaluate it first"
            )
        return torch.cat(reached)

    def _count_histogram(self, flat: torch.Tensor, batch: Batch) -> None:
        """In blocks of neurons whose counters stay in the nearest cache: 7 times faster on a CPU."""
        width = self.n_neurons if flat.is_cuda else _HISTOGRAM_BLOCK
        marks = flat[
            batch.is_text == 0
        ]  # end marks, counted and taken off again: cheaper than a copy of the text
        for first in range(0, self.n_neurons, width):
            block = slice(first, first + width)
            counts = self._bin_counts(flat, block) - self._bin_counts(marks, block)
            self.histogram[first * HISTOGRAM_BINS : (first + width) * HISTOGRAM_BINS] += counts

    def _bin_counts(self, rows: torch.Tensor, block: slice) -> torch.Tensor:
        """Counts [block * 64] of rows [n, H] in the bins of some neurons."""
        low, high = self.pilot.low[block], self.pilot.high[block]
        first = torch.arange(len(low), device=rows.device, dtype=torch.int32) * HISTOGRAM_BINS
        scaled = (rows[:, block] - low) * (HISTOGRAM_BINS / (high - low))
        bins = scaled.clamp_(0, HISTOGRAM_BINS - 1).to(torch.int32) + first
        return torch.bincount(bins.flatten(), minlength=len(low) * HISTOGRAM_BINS)

    def _keep_top(self, flat: torch.Tensor, batch: Batch) -> None:
        """Offers the maximum of each document; most fall short of the K-th best and cost nothing more."""
        if not batch.segments:
            return
        best = torch.stack([flat[low:high].amax(0) for low, high in batch.segments])  # [S, H]
        self.maximum = torch.maximum(self.maximum, best.amax(0))
        # of a document's segments in this batch only the best can matter, the first where they tie
        spans = batch.document_spans()
        segment_of_best = torch.stack([best[a:b].argmax(0) + a for a, b in spans])  # [documents, H]
        best = best.gather(0, segment_of_best)
        keys = -best.clamp(min=0).view(torch.int32).to(torch.int64)  # order of the floats above 0
        document, neuron = torch.nonzero((keys < self.top.threshold) & (best > 0), as_tuple=True)
        segment, value = segment_of_best[document, neuron], best[document, neuron]
        row = _locate(flat, batch, segment, neuron, value)
        offered = self._candidates(batch, neuron, keys[document, neuron], row, self.sizes.context)
        self.top.offer(
            offered, lambda i: _windows(flat, batch, row[i], neuron[i], self.sizes.context)
        )

    def _keep_random(self, flat: torch.Tensor, batch: Batch) -> None:
        """The positions were drawn beforehand; here are those that lie in this batch."""
        device, context = flat.device, self.sizes.context
        low, high = int(batch.position[0]), int(batch.position[-1])
        first, last = np.searchsorted(self.random_position, [low, high + 1])
        if first == last:
            return
        wanted = torch.from_numpy(self.random_position[first:last]).to(device)
        row = torch.searchsorted(batch.position, wanted)
        neuron = torch.from_numpy(self.random_neuron[first:last]).to(device)
        found = self._candidates(batch, neuron, row, row, context)
        self.random_start[first:last] = found.start
        self.random_stop[first:last] = found.stop
        self.random_document[first:last] = found.document
        self.random_window[first:last] = _windows(flat, batch, row, neuron, context)

    def _sample_prefix(self, flat: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """Offers all activations of the tokens with the lowest keys to both binnings.

        Returns cut [H], the lowest activation that the other tokens must reach to matter, and the
        key up to which tokens were dealt with here. A bin whose threshold lies below that key needs
        nothing from the others: so common bins, soon full, cost a few tokens, and rare ones are
        searched in the few activations above `cut`. The prefix is doubled until it costs as much as
        the search that is left, by the pilot's estimate.
        """
        ordered, rows = torch.sort(batch.key)
        n_text = int((ordered < NEVER).sum())
        neurons = torch.arange(self.n_neurons, device=flat.device)
        cut = torch.full_like(self.maximum, torch.inf)
        done, last_key, reach = 0, -1, 1.0
        while done < n_text and reach * n_text > done:
            some = rows[done : min(n_text, max(self.prefix // 2, 2 * done))]
            for binning in (self.openai, self.anthropic):
                cell, wanted = binning.cells_of(flat[some], neurons, batch.key[some, None])
                place, neuron = torch.nonzero(wanted, as_tuple=True)
                self._offer(binning, flat, batch, cell[place, neuron], some[place], neuron)
            done += len(some)
            last_key = int(ordered[done - 1])
            cut, reach = self._cut(last_key)
        self.prefix = max(_PREFIX, done)
        return cut, last_key

    def _cut(self, key: int) -> tuple[torch.Tensor, float]:
        """Lower edge [H] of the lowest bin that may take tokens with keys above `key`; share of tokens that reach it."""
        cut = torch.full_like(self.maximum, torch.inf)
        reach = torch.zeros_like(cut)
        for binning in (self.openai, self.anthropic):
            waiting = binning.threshold > key
            cut = torch.minimum(cut, torch.where(waiting, binning.lower, torch.inf).amin(1))
            reach = torch.maximum(reach, torch.where(waiting, binning.reach, 0.0).amax(1))
        return cut, float(reach.mean())

    def _sample_rest(
        self, flat: torch.Tensor, batch: Batch, reached: torch.Tensor, last_key: int
    ) -> None:
        """Offers the activations `reached` [n] of tokens that `_sample_prefix` left."""
        row, neuron = reached // self.n_neurons, reached % self.n_neurons
        key = batch.key[row]
        left = torch.nonzero((key > last_key) & (key < NEVER)).flatten()
        row, neuron, key = row[left], neuron[left], key[left]
        value = flat.flatten()[reached[left]]
        for binning in (self.openai, self.anthropic):
            cell, wanted = binning.cells_of(value, neuron, key)
            index = torch.nonzero(wanted).flatten()
            self._offer(binning, flat, batch, cell[index], row[index], neuron[index])

    def _offer(
        self,
        binning: Binning,
        flat: torch.Tensor,
        batch: Batch,
        cell: torch.Tensor,
        row: torch.Tensor,
        neuron: torch.Tensor,
    ) -> None:
        offered = self._candidates(batch, cell, batch.key[row], row, binning.context)
        binning.cells.offer(
            offered, lambda i: _windows(flat, batch, row[i], neuron[i], binning.context)
        )

    def _candidates(
        self, batch: Batch, cell: torch.Tensor, key: torch.Tensor, row: torch.Tensor, context: int
    ) -> Candidates:
        segment, position = batch.segment_of[row], batch.position[row]
        return Candidates(
            cell=cell,
            key=key,
            position=position,
            start=torch.maximum(batch.start[segment], position - context),
            stop=torch.minimum(batch.stop[segment], position + context),
            document=batch.document[segment],
        )


def _openai_binning(pilot: Calibration, sizes: ExcerptSizes) -> Binning:
    """5 bins between quantiles; the outer ones take what lies beyond the pilot's range."""
    edges = pilot.openai_edges
    is_open = edges[:, 1:] > edges[:, :-1]
    is_open[:, -1] = True
    lower = edges[:, :-1].clone()
    lower[:, 0] = -torch.inf
    return Binning(lower, pilot.openai_reach, is_open, sizes.per_bin, sizes.context)


def _anthropic_binning(pilot: Calibration, sizes: ExcerptSizes) -> Binning:
    """12 equal bins above 0; the last takes what lies beyond the pilot's maximum."""
    edges = pilot.anthropic_edges
    is_open = edges[:, 1:] > edges[:, :-1]
    lower = edges[:, :-1].clone()
    lower[:, 0] = torch.finfo(lower.dtype).tiny
    return Binning(lower, pilot.anthropic_reach, is_open, sizes.per_bin, sizes.short_context)


def _locate(
    flat: torch.Tensor,
    batch: Batch,
    segment: torch.Tensor,
    neuron: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """First row [n] of each segment at which its neuron has `value`."""
    bounds = torch.tensor(batch.segments, device=flat.device)
    low, length = bounds[segment, 0], bounds[segment, 1] - bounds[segment, 0]
    order = torch.argsort(length)
    found = torch.empty_like(segment)
    first = 0
    while first < len(order):
        size = max(1, _GATHER // max(1, int(length[order[min(first + 2**14, len(order)) - 1]])))
        some = order[first : first + min(size, 2**14)]
        offsets = torch.arange(int(length[some[-1]]), device=flat.device)
        rows = low[some, None] + torch.minimum(offsets[None], length[some, None] - 1)
        hit = flat[rows, neuron[some, None]] == value[some, None]
        found[some] = rows.gather(1, hit.int().argmax(1, keepdim=True)).flatten()
        first += len(some)
    return found


def _windows(
    flat: torch.Tensor, batch: Batch, row: torch.Tensor, neuron: torch.Tensor, context: int
) -> torch.Tensor:
    """Activations [m, 2 * context] of neuron [m] around row [m], 0 outside the segment."""
    rows = row[:, None] + torch.arange(-context, context, device=flat.device)
    rows = rows.clamp(0, len(flat) - 1)
    inside = batch.segment_of[rows] == batch.segment_of[row][:, None]
    return torch.where(inside, flat[rows, neuron[:, None]], 0.0)


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Offsets of the true elements of a matrix. NumPy's is 20 times faster than torch's on a CPU."""
    if mask.is_cuda:
        return torch.nonzero(mask.flatten()).flatten()
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
