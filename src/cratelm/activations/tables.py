"""Tables of `store` from the harvest of a layer, built without a Python object per token.

Shape legend: H neurons, n excerpts, W tokens of a window.
"""

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch

from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.store import EXCERPTS, SUMMARIES
from cratelm.activations.topk import EMPTY, TopKBuffers
from cratelm.records import EXCERPT_KINDS, HISTOGRAM_BINS, ExcerptKind
from cratelm.tokens.shards import TokenSplit

_READ = 2**20
"""tokens read from the shards at once"""


@dataclass(frozen=True, eq=False)
class Rows:
    """Excerpts of one kind as columns."""

    kind: ExcerptKind
    neuron: np.ndarray
    """[n], as are all columns but `window`"""
    bin: np.ndarray
    """bin, -1 if the kind has no bins"""
    rank: np.ndarray
    start: np.ndarray
    """first position of the excerpt in the split"""
    stop: np.ndarray
    """one past its last position"""
    position: np.ndarray
    """position of the token that it was chosen for"""
    document: np.ndarray
    """ordinal of its document"""
    window: np.ndarray
    """[n, W] activations around `position`, which is in column W / 2"""

    def between(self, low: int, high: int) -> "Rows":
        """Return the rows of the neurons low <= index < high."""
        chosen = (self.neuron >= low) & (self.neuron < high)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{k: v if k == "kind" else v[chosen] for k, v in columns.items()})

    def table(self, split: TokenSplit) -> pa.Table:
        """Return the columns of `EXCERPTS` except model, site and layer."""
        context = self.window.shape[1] // 2
        columns = np.arange(self.window.shape[1]) - context
        positions = self.position[:, None] + columns
        inside = (positions >= self.start[:, None]) & (positions < self.stop[:, None])
        offsets = np.concatenate([[0], np.cumsum(inside.sum(1))]).astype(np.int32)
        tokens = tokens_at(split, positions[inside]).astype(np.int32)
        n = len(self.neuron)
        return pa.table(
            {
                "index": self.neuron.astype(np.int32),
                "kind": pa.DictionaryArray.from_arrays(
                    np.full(n, EXCERPT_KINDS.index(self.kind), np.int8), list(EXCERPT_KINDS)
                ),
                "bin": self.bin.astype(np.int8),
                "rank": self.rank.astype(np.int16),
                "peak": (self.position - self.start).astype(np.int16),
                "document": self.document.astype(np.int64),
                "position": self.position.astype(np.int64),
                "token_ids": pa.ListArray.from_arrays(offsets, tokens),
                "activations": pa.ListArray.from_arrays(offsets, self.window[inside]),
            }
        )


def excerpt_rows(harvest: LayerHarvest, low: int, high: int) -> list[Rows]:
    """Return the excerpts of the neurons low <= index < high, one `Rows` per kind."""
    n_openai, n_anthropic = harvest.openai.n_bins, harvest.anthropic.n_bins
    return [
        _buffer_rows("top", harvest.top, low, high, 1),
        _random_rows(harvest, low, high),
        _buffer_rows("openai_bin", harvest.openai.samples, low, high, n_openai),
        _buffer_rows("anthropic_bin", harvest.anthropic.samples, low, high, n_anthropic),
    ]


def _buffer_rows(kind: ExcerptKind, buffers: TopKBuffers, low: int, high: int, bins: int) -> Rows:
    """Return what the buffers of some neurons hold, `bins` buffers per neuron, ranked by key."""
    part = slice(low * bins, high * bins)
    key, position = buffers.key[part].cpu().numpy(), buffers.position[part].cpu().numpy()
    buffer, slot = np.nonzero(key < EMPTY)
    order = np.lexsort((position[buffer, slot], key[buffer, slot], buffer))
    buffer, slot = buffer[order], slot[order]
    first = np.searchsorted(buffer, buffer, side="left")

    def column(tensor: torch.Tensor) -> np.ndarray:
        return tensor[part].cpu().numpy()[buffer, slot]

    return Rows(
        kind=kind,
        neuron=low + buffer // bins,
        bin=buffer % bins if bins > 1 else np.full(len(buffer), -1),
        rank=np.arange(len(buffer)) - first,
        start=column(buffers.start),
        stop=column(buffers.stop),
        position=position[buffer, slot],
        document=column(buffers.document),
        window=column(buffers.window),
    )


def _random_rows(harvest: LayerHarvest, low: int, high: int) -> Rows:
    chosen = np.flatnonzero((harvest.random_neuron >= low) & (harvest.random_neuron < high))
    return Rows(
        kind="random",
        neuron=harvest.random_neuron[chosen],
        bin=np.full(len(chosen), -1),
        rank=harvest.random_rank[chosen],
        start=harvest.random_start.cpu().numpy()[chosen],
        stop=harvest.random_stop.cpu().numpy()[chosen],
        position=harvest.random_position[chosen],
        document=harvest.random_document.cpu().numpy()[chosen],
        window=harvest.random_window.cpu().numpy()[chosen],
    )


def excerpt_table(
    rows: list[Rows], split: TokenSplit, model: str, site: str, layer: int
) -> pa.Table:
    """Return rows of some neurons of one layer as a table of `EXCERPTS`, sorted."""
    kinds = np.concatenate([np.full(len(r.neuron), EXCERPT_KINDS.index(r.kind)) for r in rows])
    neuron, bins, rank = (
        np.concatenate([getattr(r, name) for r in rows]) for name in ("neuron", "bin", "rank")
    )
    table = pa.concat_tables([r.table(split) for r in rows]).unify_dictionaries()
    table = table.take(pa.array(np.lexsort((rank, bins, kinds, neuron))))
    return _with_names(table, EXCERPTS.schema, model, site, layer)


def summary_table(harvest: LayerHarvest, model: str, site: str, layer: int) -> pa.Table:
    """Return one row per neuron of `SUMMARIES`, from the sums of the harvest."""
    n, calibration = harvest.n_tokens, harvest.calibration
    # Central moments from moments about the calibration's mean, which is near the mean, so that little
    # cancels.
    p1, p2, p3, p4 = (p / n for p in harvest.powers.cpu().numpy())
    variance = np.maximum(p2 - p1**2, 0)
    third = p3 - 3 * p1 * p2 + 2 * p1**3
    fourth = p4 - 4 * p1 * p3 + 6 * p1**2 * p2 - 3 * p1**4
    spread = np.where(variance > 0, variance, np.nan)
    histogram = harvest.histogram.view(-1, HISTOGRAM_BINS).cpu().numpy()
    table = pa.table(
        {
            "index": np.arange(harvest.n_neurons, dtype=np.int32),
            "n_tokens": np.full(harvest.n_neurons, n, np.int64),
            "mean": calibration.mean.double().cpu().numpy() + p1,
            "variance": variance,
            "skew": third / spread**1.5,
            "kurtosis": fourth / spread**2,
            "firing_rate": harvest.fired.cpu().numpy() / n,
            "maximum": harvest.maximum.cpu().numpy(),
            "histogram": _lists(histogram),
            "histogram_low": calibration.low.cpu().numpy(),
            "histogram_high": calibration.high.cpu().numpy(),
            "openai_edges": _lists(calibration.openai_edges.cpu().numpy()),
            "anthropic_edges": _lists(calibration.anthropic_edges.cpu().numpy()),
        }
    )
    return _with_names(table, SUMMARIES.schema, model, site, layer)


def tokens_at(split: TokenSplit, positions: np.ndarray) -> np.ndarray:
    """Return token ids [n] at any positions [n] of a split, reading the shards in pieces."""
    # In order of position, so that each piece of a shard is read once and not once per token.
    order = np.argsort(positions, kind="stable")
    ordered, tokens = positions[order], np.empty(len(positions), np.int64)
    first = 0
    while first < len(ordered):
        low = int(ordered[first])
        last = int(np.searchsorted(ordered, low + _READ))
        piece = split.read(low, int(ordered[last - 1]) + 1)
        tokens[order[first:last]] = piece[ordered[first:last] - low]
        first = last
    return tokens


def _lists(rows: np.ndarray) -> pa.ListArray:
    """Return [n, m] as a list column."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, np.ascontiguousarray(rows).ravel())


def _with_names(table: pa.Table, schema: pa.Schema, model: str, site: str, layer: int) -> pa.Table:
    n = table.num_rows
    columns = {name: table[name] for name in table.column_names}
    columns["model"], columns["site"] = pa.array([model] * n), pa.array([site] * n)
    columns["layer"] = pa.array(np.full(n, layer, np.int32))
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)
