"""Tables of `store` from the harvest of a layer, built without a Python object per token.

Shape legend: H neurons, n excerpts, W tokens of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch

from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.store import EXCERPTS, summary_schema
from cratelm.activations.topk import EMPTY, TopKBuffers
from cratelm.records import EXCERPT_KINDS, HISTOGRAM_BINS, ExcerptKind, has_both_ends
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


def excerpt_rows(harvest: LayerHarvest, low: int, high: int) -> list[Rows]:
    """Return the excerpts of the neurons low <= index < high, one `Rows` per kind."""
    n_openai, n_anthropic = harvest.openai.n_bins, harvest.anthropic.n_bins
    return [
        top_rows(harvest, low, high),
        _random_rows(harvest, low, high),
        _buffer_rows("openai_bin", harvest.openai.samples, low, high, n_openai),
        _buffer_rows("anthropic_bin", harvest.anthropic.samples, low, high, n_anthropic),
    ]


def top_rows(harvest: LayerHarvest, low: int, high: int) -> Rows:
    """Return the highest excerpts of the neurons low <= index < high."""
    return _buffer_rows("top", harvest.top, low, high, 1)


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
    names = ("neuron", "bin", "rank", "start", "stop", "position", "document")
    columns = {name: np.concatenate([getattr(r, name) for r in rows]) for name in names}
    order = np.lexsort((columns["rank"], columns["bin"], kinds, columns["neuron"]))
    columns, kinds = {name: column[order] for name, column in columns.items()}, kinds[order]
    start, position = columns["start"], columns["position"]
    lengths = columns["stop"] - start
    first = np.concatenate([[0], np.cumsum(lengths)])  # [n + 1] of each row, among all tokens
    token = np.arange(first[-1])
    activations = np.concatenate([r.window.ravel() for r in rows])
    at = np.repeat(_first_in_window(rows)[order] - first[:-1], lengths) + token
    tokens = tokens_at(split, np.repeat(start - first[:-1], lengths) + token)
    offsets = _array(first, np.int32)
    table = {
        "index": _array(columns["neuron"], np.int32),
        "kind": pa.DictionaryArray.from_arrays(_array(kinds, np.int8), _strings(EXCERPT_KINDS)),
        "bin": _array(columns["bin"], np.int8),
        "rank": _array(columns["rank"], np.int16),
        "peak": _array(position - start, np.int16),
        "document": _array(columns["document"], np.int64),
        "position": _array(position, np.int64),
        "token_ids": pa.ListArray.from_arrays(offsets, _array(tokens, np.int32)),
        "activations": pa.ListArray.from_arrays(offsets, _array(activations[at], np.float32)),
    }
    return _with_names(table, EXCERPTS.schema, model, site, layer)


def _first_in_window(rows: list[Rows]) -> np.ndarray:
    """Return where the first token of each excerpt [n] is among the elements of all windows, one row after another."""
    first, before = [], 0
    for r in rows:
        n, width = r.window.shape
        first.append(before + np.arange(n) * width + width // 2 - (r.position - r.start))
        before += n * width
    return np.concatenate(first)


def summary_table(harvest: LayerHarvest, model: str, site: str, layer: int) -> pa.Table:
    """Return one row per neuron of `SUMMARIES`, from the sums of the harvest.

    With the optional columns that its neurons have.
    """
    n, calibration = harvest.n_tokens, harvest.calibration
    # Central moments from moments about the calibration's mean, which is near the mean, so that little
    # cancels.
    p1, p2, p3, p4 = (p / n for p in harvest.powers.cpu().numpy())
    variance = np.maximum(p2 - p1**2, 0)
    third = p3 - 3 * p1 * p2 + 2 * p1**3
    fourth = p4 - 4 * p1 * p3 + 6 * p1**2 * p2 - 3 * p1**4
    spread = np.where(variance > 0, variance, np.nan)
    histogram = harvest.histogram.view(-1, HISTOGRAM_BINS).cpu().numpy()
    maximum = harvest.maximum.cpu().numpy()
    fired, more = harvest.fired, {}
    if with_firing := len(harvest.octaves) > 0:
        fired, threshold = harvest.firing()
        more["firing_threshold"] = _array(threshold.cpu().numpy(), np.float32)
    if with_ends := has_both_ends(site):
        more["opposite_maximum"] = _array(maximum.reshape(-1, 2)[:, ::-1].ravel(), np.float32)
    table = {
        "index": _array(np.arange(harvest.n_neurons), np.int32),
        "n_tokens": _array(np.full(harvest.n_neurons, n), np.int64),
        "mean": _array(calibration.mean.double().cpu().numpy() + p1, np.float64),
        "variance": _array(variance, np.float64),
        "skew": _array(third / spread**1.5, np.float64),
        "kurtosis": _array(fourth / spread**2, np.float64),
        "firing_rate": _array(fired.cpu().numpy() / n, np.float64),
        "maximum": _array(maximum, np.float32),
        "histogram": _lists(histogram, np.int64),
        "histogram_low": _array(calibration.low.cpu().numpy(), np.float32),
        "histogram_high": _array(calibration.high.cpu().numpy(), np.float32),
        "openai_edges": _lists(calibration.openai_edges.cpu().numpy(), np.float32),
        "openai_counts": _lists(harvest.openai_counts.cpu().numpy(), np.int64),
        "anthropic_edges": _lists(calibration.anthropic_edges.cpu().numpy(), np.float32),
        **more,
    }
    schema = summary_schema(with_firing=with_firing, with_ends=with_ends)
    return _with_names(table, schema, model, site, layer)


def tokens_at(split: TokenSplit, positions: np.ndarray) -> np.ndarray:
    """Return token ids [n] at any positions [n] of a split, reading the shards in pieces."""
    low = int(positions.min(initial=split.n_tokens))
    if positions.max(initial=low) - low < _READ:
        return split.read(low, int(positions.max(initial=low - 1)) + 1)[positions - low]
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


# ---- Arrow arrays from NumPy's memory ----
#
# `pyarrow.array` imports pandas wherever it is installed, which takes half a second, and these functions do not.


def _array(values: np.ndarray, dtype: type) -> pa.Array:
    """Return numbers [n] as an Arrow array of a type."""
    values = np.ascontiguousarray(values, dtype)
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _lists(rows: np.ndarray, dtype: type) -> pa.ListArray:
    """Return numbers [n, m] as a list column."""
    offsets = _array(np.arange(len(rows) + 1) * rows.shape[1], np.int32)
    return pa.ListArray.from_arrays(offsets, _array(rows.ravel(), dtype))


def _strings(texts: Sequence[str]) -> pa.StringArray:
    """Return texts [n] as an Arrow array."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))
    )


def _with_names(
    table: dict[str, pa.Array], schema: pa.Schema, model: str, site: str, layer: int
) -> pa.Table:
    """Return the columns of a layer with those that name its neurons, in the order of a schema."""
    n = len(table["index"])
    none = _array(np.zeros(n), np.int64)
    table["model"], table["site"] = _strings([model]).take(none), _strings([site]).take(none)
    table["layer"] = _array(np.full(n, layer), np.int32)
    return pa.Table.from_arrays([table[name] for name in schema.names], schema=schema)
