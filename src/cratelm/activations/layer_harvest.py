"""Statistics and excerpts of the neurons of one layer, updated batch after batch.

Every activation of a corpus passes through here once, so this file is optimised for time per activation
(`benchmarks/harvest.py` compares it with sorting them all). Most of that time is spent reading the
activation from memory. Hence the blocks that fit into a processor's cache, and hence the plan
by which most activations are read only for their statistics and never considered as excerpts:

    moments, firing counts    every activation
    histogram                 every activation
    octaves                   every activation, at sites whose neurons are nowhere exactly 0
    sizes of quantile bins    every activation
    top excerpts              one candidate per document: its maximum
    random excerpts           positions drawn beforehand, looked up
    samples of bins           the tokens with the lowest sampling keys, and rare high activations

On the CPU, with the extra `fast`, `FusedLayerHarvest` replaces the methods that read all activations by compiled
ones; those of this file run everywhere.

Memory depends on neurons and excerpts, never on the number of tokens: `bytes_per_neuron` has the
formula, which gives 77 kB at the default sizes, and 512 bytes more with octaves. The activations of one batch are extra.

Shape legend: N tokens of a batch, H neurons, S segments, W tokens of an excerpt, m excerpts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cratelm.activations.batches import NEVER, Batch
from cratelm.activations.calibration import Calibration
from cratelm.activations.topk import Candidates, TopKBuffers
from cratelm.activations.windows import BatchWindows
from cratelm.errors import InputError
from cratelm.records import ANTHROPIC_BINS, HISTOGRAM_BINS

_PREFIX = 16
"""in each batch, at least half as many tokens, those with the lowest keys, have all their activations
considered as samples of bins"""
_HISTOGRAM_BLOCK = 64
"""number of neurons whose histograms are counted together: their 4,096 counters fit into the L1 cache"""
STATISTICS = ("fired", "maximum", "histogram", "reached")
"""attributes of a `LayerHarvest` that are added to by every batch, and belong to its state"""
OCTAVES = 64
"""number of octaves in which activations above 0 are counted"""
LOWEST_OCTAVE = -40
"""octave k has the activations from 2^(k - 40) to 2^(k - 39); the outer ones also count what lies beyond"""
_GATHER = 2**22
"""elements gathered at once when a segment's maximum is located: 16 MiB"""


@dataclass(frozen=True)
class ExcerptSizes:
    """Numbers and lengths of the excerpts that are kept per neuron."""

    top: int = 50
    """number of excerpts with the highest activation"""
    random: int = 50
    """number of excerpts around random tokens"""
    per_bin: int = 20
    """number of excerpts from each bin of both binnings"""
    context: int = 32
    """tokens of a long excerpt before the chosen one, and again from it on"""
    short_context: int = 4
    """the same for a short excerpt"""


def bytes_per_neuron(sizes: ExcerptSizes, *, with_octaves: bool = False) -> int:
    """Return the bytes that a harvest holds per neuron, however many tokens it searches.

    A slot takes 4 bytes per token of its window and 40 for bookkeeping (48 if random); a bin takes 20
    more for its edge, its reach and its threshold; the statistics take 708, and 512 more with octaves. Each end of a
    neuron counts as a neuron.
    """
    long, short = 4 * 2 * sizes.context, 4 * 2 * sizes.short_context
    top = sizes.top * (40 + long) + 8
    random = sizes.random * (48 + long)
    openai = 5 * (sizes.per_bin * (40 + long) + 20)
    anthropic = ANTHROPIC_BINS * (sizes.per_bin * (40 + short) + 20)
    octaves = 8 * OCTAVES if with_octaves else 0
    return top + random + openai + anthropic + 8 * HISTOGRAM_BINS + 196 + octaves


class Binning:
    """One way of dividing the activations of H neurons into bins, with a sample of each bin.

    The sample of a bin consists of the members with the lowest sampling keys (`batches.sampling_keys`). It
    is uniform, needs no count of the members, and does not depend on the order in which tokens are searched.
    """

    def __init__(
        self,
        lower: torch.Tensor,
        reach: torch.Tensor,
        is_open: torch.Tensor,
        slots: int,
        context: int,
    ) -> None:
        """`is_open` [H, bins] is False for bins of zero width, which take no samples."""
        self.n_bins = lower.shape[1]
        self.lower = lower
        """[H, bins] an activation is in the last bin whose lower edge it reaches"""
        self.edges = lower.T.contiguous()
        """[bins, H] the same, transposed for a comparison with [n, H]"""
        self.reach = reach
        """[H, bins] fraction of tokens that reach the bin, as estimated by the calibration"""
        self.context = context
        self.samples = TopKBuffers(lower.numel(), slots, 2 * context, lower.device)
        """[H * bins] a buffer per neuron and bin"""
        self.samples.threshold[~is_open.flatten()] = -1

    @property
    def threshold(self) -> torch.Tensor:
        """Return [H, bins]: a token of the bin with a key below this is kept."""
        return self.samples.threshold.view_as(self.lower)

    def assign(
        self, value: torch.Tensor, neuron: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffer (neuron and bin) of each value, and whether its key is low enough for it.

        Shapes: value [n, H] with neuron [H] and key [n, 1], or all [n].
        """
        # Counting the edges reached takes a third to a ninth of the time of a bisection per value.
        number = torch.full_like(value, -1, dtype=torch.int8)
        for edge in self.edges:
            number += value >= (edge if value.dim() == 2 else edge[neuron])
        buffer = neuron * self.n_bins + number.clamp(min=0)
        return buffer, (number >= 0) & (key < self.samples.threshold[buffer])


class LayerHarvest:
    """Statistics and excerpts of the H neurons of one layer; batches are added in order."""

    per_reached = 1
    """what it costs to offer an activation that reaches the cut, in activations of the prefix; a matter of speed"""

    def __init__(
        self,
        calibration: Calibration,
        random: np.ndarray,
        sizes: ExcerptSizes,
        layer: int,
        *,
        is_first: bool = True,
        with_octaves: bool = False,
    ):
        """`random` [H, K_r] are the positions in the split of random excerpts, -1 for none.

        `with_octaves`: count the activations by octave, from which the firing rate of neurons is computed that are
        nowhere exactly 0. The maximum, which decides what counts as firing, is known only at the end.

        `is_first`: it gets the first batches of the split. A harvest of later ones keeps the sums of each block (32
        bytes per neuron and block) until it is merged.
        """
        device, n_neurons = calibration.mean.device, len(calibration.mean)
        self.calibration, self.sizes, self.layer = calibration, sizes, layer
        self.n_neurons = n_neurons
        self.n_tokens = 0
        self.prefix = _PREFIX
        """number of tokens of the last batch whose activations were all considered as samples"""
        self._powers = torch.zeros(4, n_neurons, dtype=torch.float64, device=device)
        """[4, H] `powers` of the blocks of batches that have ended"""
        self._block = torch.zeros_like(self._powers)
        """[4, H] those of the current block"""
        self._later: list[torch.Tensor] | None = None if is_first else []
        """of each block that has ended, if blocks of another process come before them"""
        self.fired = torch.zeros(n_neurons, dtype=torch.float64, device=device)
        self.maximum = torch.full((n_neurons,), -torch.inf, device=device)
        self.histogram = torch.zeros(n_neurons * HISTOGRAM_BINS, dtype=torch.int64, device=device)
        n_octaves = OCTAVES if with_octaves else 0
        self.octaves = torch.zeros(n_neurons * n_octaves, dtype=torch.int64, device=device)
        """[H * 64] number of tokens by octave; [0] without"""
        window = 2 * sizes.context
        self.top = TopKBuffers(n_neurons, sizes.top, window, device, unique_documents=True)
        self.openai = _openai_binning(calibration, sizes)
        self.anthropic = _anthropic_binning(calibration, sizes)
        self.reached = torch.zeros(
            self.openai.n_bins - 1, n_neurons, dtype=torch.int64, device=device
        )
        """[4, H] number of tokens that reach the lower edge of each quantile bin but the first"""
        self._of_batch: BatchWindows | None = None
        """of the batch that is being added"""
        self._plan_random(random, window, device)

    def _plan_random(self, random: np.ndarray, window: int, device: torch.device) -> None:
        """Sort the positions of random excerpts once, so that a batch finds its positions by bisection."""
        neuron, rank = np.nonzero(random >= 0)
        order = np.argsort(random[neuron, rank], kind="stable")
        self.random_neuron, self.random_rank = neuron[order], rank[order]
        self.random_position = random[neuron, rank][order]
        shape = (len(order),)
        self.random_start = torch.zeros(shape, dtype=torch.int64, device=device)
        self.random_stop = torch.zeros_like(self.random_start)
        self.random_document = torch.full_like(self.random_start, -1)
        """-1 until the position is reached"""
        self.random_window = torch.zeros((*shape, window), device=device)

    @torch.no_grad()
    def add(self, activations: torch.Tensor, batch: Batch) -> None:
        """Add activations [B, T, H] of a batch. Raises `InputError` if they are not finite."""
        flat = activations.reshape(-1, self.n_neurons).float()  # [N, H]
        self._of_batch = BatchWindows(flat, batch, self.sizes.context)
        # The prefix first: it determines how high an activation of the other tokens must be to matter to
        # a bin, and the sweep, which reads all activations anyway, records where these are.
        cut, last_key = self._sample_prefix(flat, batch)
        self._search(flat, batch, cut, last_key)
        self._update_random(flat, batch)
        self.n_tokens += batch.n_text
        self._of_batch = None  # it may have a copy of the activations

    @property
    def powers(self) -> torch.Tensor:
        """Return sums [4, H] of (a - calibration mean)^k, k = 1..4: sums of plain powers would cancel."""
        return self._powers + self._block

    @property
    def openai_counts(self) -> torch.Tensor:
        """Return [H, 5] the number of tokens in each quantile bin; the outer bins also count values beyond their edges."""
        all_tokens = torch.full_like(self.reached[:1], self.n_tokens)
        at_least = torch.cat([all_tokens, self.reached, torch.zeros_like(all_tokens)])
        return (at_least[:-1] - at_least[1:]).T

    def firing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the number of tokens [H] on which each neuron fires, and its lowest activation [H] that counts as firing.

        This is the largest power of two that is at most a tenth of the neuron's maximum (`records.NeuronSummary`); 0 for
        a neuron that is never above 0. Needs octaves.
        """
        tenth = torch.log2(self.maximum.double().clamp(min=0) / 10).floor()
        octave = (tenth - LOWEST_OCTAVE).clamp(0, OCTAVES - 1).long()  # [H]
        above = (
            self.octaves.view(-1, OCTAVES).flip(1).cumsum(1).flip(1)
        )  # [H, 64] in this octave or a higher one
        alive = self.maximum > 0
        threshold = torch.exp2((octave + LOWEST_OCTAVE).double()).where(alive, 0.0)
        return above.gather(1, octave[:, None])[:, 0].where(alive, 0), threshold

    def end_block(self) -> None:
        """End a block of batches (`SearchPlan.blocks`)."""
        if self._later is None:
            self._powers += self._block
        else:
            self._later.append(self._block.cpu())
        self._block = torch.zeros_like(self._block)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what the batches added, on the CPU, for `merge`; all blocks of batches must have ended."""
        columns = ("random_start", "random_stop", "random_document", "random_window")
        reached = torch.nonzero(self.random_document >= 0).flatten()
        buffers = self._buffers.items()
        return {
            "n_tokens": torch.tensor(self.n_tokens),
            "powers": torch.stack(self._later or [self._powers.cpu()]),
            **{name: getattr(self, name).cpu() for name in STATISTICS},
            "octaves": self.octaves.cpu(),
            "random": reached.cpu(),
            **{name: getattr(self, name)[reached].cpu() for name in columns},
            **{f"{name}.{k}": column for name, b in buffers for k, column in b.filled().items()},
        }

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Add the `state` of a harvest of the batches that follow: the result is that of one harvest of both.

        Blocks of batches must have ended in both. Harvests of several shares are merged in the order of their batches.
        """
        device = self._powers.device
        self.n_tokens += int(state["n_tokens"])
        for block in state["powers"]:
            self._block = block.to(device)
            self.end_block()
        self.fired += state["fired"].to(device)
        self.maximum = torch.maximum(self.maximum, state["maximum"].to(device))
        self.histogram += state["histogram"].to(device)
        self.octaves += state["octaves"].to(device)
        self.reached += state["reached"].to(device)
        reached = state["random"].to(device)
        for name in ("random_start", "random_stop", "random_document", "random_window"):
            getattr(self, name)[reached] = state[name].to(device)
        for name, buffers in self._buffers.items():
            prefix = f"{name}."
            buffers.merge(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )

    def _windows(self) -> BatchWindows:
        assert self._of_batch is not None, "no batch is being added"
        return self._of_batch

    @property
    def _buffers(self) -> dict[str, TopKBuffers]:
        return {"top": self.top, "openai": self.openai.samples, "anthropic": self.anthropic.samples}

    def _search(self, flat: torch.Tensor, batch: Batch, cut: torch.Tensor, last_key: int) -> None:
        """Add to the statistics, and offer candidates for the top excerpts and, beyond the prefix, for samples."""
        reached = self._sweep(flat, batch, cut)
        self._check_finite()
        self._count_bins(flat, batch)
        self._count_histogram(flat, batch)
        if len(self.octaves):
            self._count_octaves(flat, batch)
        self._update_top(flat, batch)
        self._sample_above(flat, batch, reached, last_key)

    def _check_finite(self) -> None:
        if not torch.isfinite(self._block[0]).all():
            raise InputError(
                f"layer {self.layer} has activations that are not finite numbers:"
                " the model is damaged or its training diverged; evaluate it first"
            )

    def _sweep(self, flat: torch.Tensor, batch: Batch, cut: torch.Tensor) -> torch.Tensor:
        """Add to moments and firing counts; return the offsets [n] in flat of activations >= cut [H].

        It works in pieces that stay in the processor's cache: twice as fast as all at once, on one core at
        3,072 neurons.
        """
        rows = len(flat) if flat.is_cuda else max(8, 2**17 // self.n_neurons)  # 512 KiB
        reached = []
        for first in range(0, len(flat), rows):
            piece, text = flat[first : first + rows], batch.is_text[first : first + rows]
            centred = piece - self.calibration.mean
            square = centred * centred
            powers = [text @ x for x in (centred, square, square * centred, square * square)]
            self._block += torch.stack(powers)
            self.fired += text @ (piece > 0).float()
            reached.append(_nonzero(piece >= cut) + first * self.n_neurons)
        return torch.cat(reached)

    def _count_bins(self, flat: torch.Tensor, batch: Batch) -> None:
        """Count the text tokens that reach each lower edge, in pieces that stay in the processor's cache."""
        rows = len(flat) if flat.is_cuda else max(8, 2**17 // self.n_neurons)
        is_text = batch.is_text[:, None] > 0
        for first in range(0, len(flat), rows):
            piece, text = flat[first : first + rows], is_text[first : first + rows]
            for number, edge in zip(self.reached, self.openai.edges[1:], strict=True):
                number += ((piece >= edge) & text).sum(0)

    def _count_histogram(self, flat: torch.Tensor, batch: Batch) -> None:
        """Count text tokens in the histograms, in blocks of neurons whose counters stay in the L1 cache.

        This is 1.3 to 1.5 times as fast as all neurons at once, on one core (512 and 3,072 neurons).
        """
        width = self.n_neurons if flat.is_cuda else _HISTOGRAM_BLOCK
        # What is not text is counted with it and subtracted again: these are few rows, whereas copying the
        # text without them would copy nearly all rows.
        others = flat[batch.is_text == 0]
        for first in range(0, self.n_neurons, width):
            block = slice(first, first + width)
            counts = self._bin_counts(flat, block) - self._bin_counts(others, block)
            self.histogram[first * HISTOGRAM_BINS : (first + width) * HISTOGRAM_BINS] += counts

    def _count_octaves(self, flat: torch.Tensor, batch: Batch) -> None:
        """Count the text tokens in octaves, in blocks of neurons as for the histograms."""
        width = self.n_neurons if flat.is_cuda else _HISTOGRAM_BLOCK
        is_text = batch.is_text > 0
        for first in range(0, self.n_neurons, width):
            rows = flat[:, first : first + width][is_text]
            octave = octave_of(rows) + OCTAVES * torch.arange(rows.shape[1], device=rows.device)
            counts = torch.bincount(octave.flatten(), minlength=OCTAVES * rows.shape[1])
            self.octaves[first * OCTAVES : first * OCTAVES + len(counts)] += counts

    def _bin_counts(self, rows: torch.Tensor, block: slice) -> torch.Tensor:
        """Return counts [block * 64] of rows [n, H] in the histogram bins of a block of neurons."""
        low, high = self.calibration.low[block], self.calibration.high[block]
        first = torch.arange(len(low), device=rows.device, dtype=torch.int32) * HISTOGRAM_BINS
        scaled = (rows[:, block] - low) * (HISTOGRAM_BINS / (high - low))
        bins = scaled.clamp_(0, HISTOGRAM_BINS - 1).to(torch.int32) + first
        return torch.bincount(bins.flatten(), minlength=len(low) * HISTOGRAM_BINS)

    def _update_top(self, flat: torch.Tensor, batch: Batch) -> None:
        """Offer the maximum of each document; most are below the K-th best and cost nothing more."""
        if not batch.segments:
            return
        best = torch.stack([flat[low:high].amax(0) for low, high in batch.segments])  # [S, H]
        self.maximum = torch.maximum(self.maximum, best.amax(0))
        # only the best segment of a document in this batch can matter; of equal ones, the first
        spans = batch.document_spans()
        segment_of_best = torch.stack([best[a:b].argmax(0) + a for a, b in spans])  # [documents, H]
        best = best.gather(0, segment_of_best)
        # The bits of non-negative floats, read as integers, have the order of the floats. This gives an
        # exact integer key, as the samples have, without a second kind of buffer.
        keys = -best.clamp(min=0).view(torch.int32).to(torch.int64)
        document, neuron = torch.nonzero((keys < self.top.threshold) & (best > 0), as_tuple=True)
        segment, value = segment_of_best[document, neuron], best[document, neuron]
        row = _locate(self._windows(), batch, segment, neuron, value)
        candidates = self._candidates(
            batch, neuron, keys[document, neuron], row, self.sizes.context
        )
        self.top.update(
            candidates, lambda i: self._windows().around(row[i], neuron[i], self.sizes.context)
        )

    def _update_random(self, flat: torch.Tensor, batch: Batch) -> None:
        """Record the random excerpts whose positions, drawn beforehand, lie in this batch."""
        device, context = flat.device, self.sizes.context
        low, high = int(batch.position[0]), int(batch.position[-1])
        first, last = np.searchsorted(self.random_position, [low, high + 1])
        if first == last:
            return
        wanted = torch.from_numpy(self.random_position[first:last]).to(device)
        row = batch.rows_of(wanted)
        neuron = torch.from_numpy(self.random_neuron[first:last]).to(device)
        excerpts = self._candidates(batch, neuron, row, row, context)
        self.random_start[first:last] = excerpts.start
        self.random_stop[first:last] = excerpts.stop
        self.random_document[first:last] = excerpts.document
        self.random_window[first:last] = self._random_windows(flat, batch, row, neuron)

    def _random_windows(
        self, flat: torch.Tensor, batch: Batch, rows: torch.Tensor, neurons: torch.Tensor
    ) -> torch.Tensor:
        """Return the activations [m, W] of neurons [m] around rows [m]."""
        return self._windows().around(rows, neurons, self.sizes.context)

    def _sample_prefix(self, flat: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """Offer all activations of the tokens with the lowest keys to both binnings.

        Return cut [H], the lowest activation with which the other tokens can still matter, and the
        highest key of the tokens that were processed here.

        The plain method determines for every activation its bin, and whether its key is low enough for
        that bin. But a full bin has a threshold, and takes no token with a higher key. So once the tokens
        with the lowest keys are processed, in order, common bins are complete: they fill up soon, and
        their thresholds are below all remaining keys. Only rare bins can still take tokens, and these
        are bins of high activations: those of the other tokens above `cut`, the lowest edge of such a
        bin. The prefix is doubled until it costs as much as offering the other activations above `cut`, whose
        fraction the calibration estimated.
        """
        ordered, rows = batch.by_key
        n_text = int((ordered < NEVER).sum())
        cut = torch.full_like(self.maximum, torch.inf)
        done, last_key, reach = 0, -1, 1.0
        while done < n_text and reach * n_text * self.per_reached > done:
            prefix = rows[done : min(n_text, max(self.prefix // 2, 2 * done))]
            self._offer_rows(flat, batch, prefix)
            done += len(prefix)
            last_key = int(ordered[done - 1])
            cut, reach = self._cut(last_key)
        if done == n_text:
            cut = torch.full_like(cut, torch.inf)  # there are no other tokens
        self.prefix = max(_PREFIX, done)
        return cut, last_key

    def _offer_rows(self, flat: torch.Tensor, batch: Batch, rows: torch.Tensor) -> None:
        """Offer all activations of rows [n] as samples."""
        neurons = torch.arange(self.n_neurons, device=flat.device)
        for binning in (self.openai, self.anthropic):
            buffer, wanted = binning.assign(flat[rows], neurons, batch.key[rows, None])
            at, neuron = torch.nonzero(wanted, as_tuple=True)
            self._sample(binning, flat, batch, buffer[at, neuron], rows[at], neuron)

    def _cut(self, key: int) -> tuple[torch.Tensor, float]:
        """Return the lower edge [H] of the lowest bin that may take tokens with keys above `key`.

        Also return the fraction of tokens that reach it, averaged over the neurons.
        """
        cut = torch.full_like(self.maximum, torch.inf)
        reach = torch.zeros_like(cut)
        for binning in (self.openai, self.anthropic):
            unfilled = binning.threshold > key
            cut = torch.minimum(cut, torch.where(unfilled, binning.lower, torch.inf).amin(1))
            reach = torch.maximum(reach, torch.where(unfilled, binning.reach, 0.0).amax(1))
        return cut, float(reach.mean())

    def _sample_above(
        self, flat: torch.Tensor, batch: Batch, reached: torch.Tensor, last_key: int
    ) -> None:
        """Offer the activations `reached` [n] of the tokens that `_sample_prefix` did not process."""
        row, neuron = reached // self.n_neurons, reached % self.n_neurons
        key = batch.key[row]
        others = torch.nonzero((key > last_key) & (key < NEVER)).flatten()
        row, neuron, key = row[others], neuron[others], key[others]
        value = flat.flatten()[reached[others]]
        for binning in (self.openai, self.anthropic):
            buffer, wanted = binning.assign(value, neuron, key)
            index = torch.nonzero(wanted).flatten()
            self._sample(binning, flat, batch, buffer[index], row[index], neuron[index])

    def _sample(
        self,
        binning: Binning,
        flat: torch.Tensor,
        batch: Batch,
        buffer: torch.Tensor,
        row: torch.Tensor,
        neuron: torch.Tensor,
    ) -> None:
        """Offer tokens [n] to buffers [n] of a binning."""
        candidates = self._candidates(batch, buffer, batch.key[row], row, binning.context)
        binning.samples.update(
            candidates, lambda i: self._windows().around(row[i], neuron[i], binning.context)
        )

    def _candidates(
        self, batch: Batch, buffer: torch.Tensor, key: torch.Tensor, row: torch.Tensor, context: int
    ) -> Candidates:
        """Return the tokens at rows [n] as candidates, each with its excerpt inside its segment."""
        segment, position = batch.segment_of[row], batch.position[row]
        return Candidates(
            buffer=buffer,
            key=key,
            position=position,
            start=torch.maximum(batch.start[segment], position - context),
            stop=torch.minimum(batch.stop[segment], position + context),
            document=batch.document[segment],
        )


def octave_of(activations: torch.Tensor) -> torch.Tensor:
    """Return the octave, 0 to 63, of each activation in float32; 0 for those that are not above 0."""
    # The exponent is in the bits from 23 on; the sign, which is the highest bit, makes the integer negative.
    exponent = (activations.contiguous().view(torch.int32) >> 23) - (127 + LOWEST_OCTAVE)
    return exponent.clamp_(0, OCTAVES - 1)


def _openai_binning(calibration: Calibration, sizes: ExcerptSizes) -> Binning:
    """Return 5 bins between quantiles; the outer bins also take values beyond the calibration's range."""
    edges = calibration.openai_edges
    is_open = edges[:, 1:] > edges[:, :-1]
    is_open[:, -1] = True
    lower = edges[:, :-1].clone()
    lower[:, 0] = -torch.inf
    return Binning(lower, calibration.openai_reach, is_open, sizes.per_bin, sizes.context)


def _anthropic_binning(calibration: Calibration, sizes: ExcerptSizes) -> Binning:
    """Return 12 equal bins above 0; the last also takes values beyond the calibration's maximum."""
    edges = calibration.anthropic_edges
    is_open = edges[:, 1:] > edges[:, :-1]
    lower = edges[:, :-1].clone()
    lower[:, 0] = torch.finfo(lower.dtype).tiny
    return Binning(lower, calibration.anthropic_reach, is_open, sizes.per_bin, sizes.short_context)


def _locate(
    windows: BatchWindows,
    batch: Batch,
    segment: torch.Tensor,
    neuron: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Return the first row [n] of each segment at which its neuron has `value`.

    It is used only for maxima that pass the threshold: an argmax over every segment and neuron would cost
    as much again as the maximum itself. Segments are processed in groups of similar length, which bounds
    what is gathered: the longest segment of a group times the size of the group.
    """
    bounds = torch.tensor(batch.segments, device=segment.device)
    low, length = bounds[segment, 0], bounds[segment, 1] - bounds[segment, 0]
    order = torch.argsort(length)
    located = torch.empty_like(segment)
    first = 0
    while first < len(order):
        size = max(1, _GATHER // max(1, int(length[order[min(first + 2**14, len(order)) - 1]])))
        group = order[first : first + min(size, 2**14)]
        offsets = torch.arange(int(length[group[-1]]), device=segment.device)
        rows = low[group, None] + torch.minimum(offsets[None], length[group, None] - 1)
        hit = windows.at(rows, neuron[group]) == value[group, None]
        located[group] = rows.gather(1, hit.int().argmax(1, keepdim=True)).flatten()
        first += len(group)
    return located


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Return the offsets of the true elements of a matrix.

    NumPy's function takes a third to a ninth of the time of torch's.
    """
    if mask.is_cuda:
        return torch.nonzero(mask.flatten()).flatten()
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
