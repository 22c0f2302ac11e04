"""Choose the neurons to explain, and the fit excerpts from which a language model explains each.

The excerpts have the ranks used in the paper (Bai & Ma 2025), in our `fit` split; scores use `held_out`
(`cratelm.score.selection`). Explainers that need no language model read every fit excerpt instead.

| metric | explained from |
|---|---|
| top_and_random, random_only | top ranks 0, 2, 4, 6, 8, 64 tokens |
| anthropic | top 15, 2 of each of 12 bins, 5 random, 8 tokens |

If a neuron has fewer excerpts, those that exist are used.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.activations.store import ExcerptFile, read_records, read_summaries, summaries_path
from cratelm.errors import InputError
from cratelm.explain.store import SampledNeuron
from cratelm.records import (
    Excerpt,
    ExcerptKind,
    Metric,
    NeuronRecord,
    NeuronSummary,
    Split,
    neuron_name,
    parse_neuron_ids,
)
from cratelm.runs.reading import read_parquet

TOP_RANKS = (0, 2, 4, 6, 8)
ANTHROPIC_TOP_RANKS = tuple(range(15))
ANTHROPIC_WINDOW = (4, 4)
"""tokens before the peak, and tokens from it on"""
PER_BIN = 2
N_RANDOM = 5


def select_neurons(
    harvest: Path, per_layer: int, seed: int, only: Sequence[str] = ()
) -> list[SampledNeuron]:
    """Return the neurons to explain, sorted by layer and index.

    They are `per_layer` neurons of each layer (0 for all), or, if `only` is not empty, those named in it (`0:17`).
    The draw depends only on the seed, the layer and the number of neurons of the layer, so that twins draw
    the same indices and a smaller sample is a subset of a larger one. At a site with both ends, neurons are drawn, each
    with its two ends; an end that never fires is left out if the other one does, unless it is named.

    Raises `InputError` if the harvest lacks one of `only`.
    """
    layers: dict[int, list[NeuronSummary]] = {}
    for summary in read_summaries(harvest, "fit"):
        layers.setdefault(summary.neuron.layer, []).append(summary)
    if only:
        return _named(harvest, layers, only)
    chosen = []
    for layer, neurons in sorted(layers.items()):
        ends = neurons[0].neuron.n_ends
        if 0 < per_layer < len(neurons) // ends:
            # the beginning of a permutation, so that a larger sample contains a smaller one
            rng = np.random.default_rng([seed, layer])
            drawn = np.sort(rng.permutation(len(neurons) // ends)[:per_layer])
            neurons = [neurons[ends * i + end] for i in drawn for end in range(ends)]
        chosen += [_sampled(s) for s in neurons if s.dead or not s.silent]
    return chosen


def _sampled(summary: NeuronSummary) -> SampledNeuron:
    return SampledNeuron(summary.neuron, summary.silent)


def _named(
    harvest: Path, layers: dict[int, list[NeuronSummary]], only: Sequence[str]
) -> list[SampledNeuron]:
    """Return the neurons named in `only`. Raises `InputError` if there is no such neuron."""
    by_key = {s.neuron.key: s for of_layer in layers.values() for s in of_layer}
    first = next(iter(by_key.values())).neuron
    site = first.site
    chosen = []
    for key in parse_neuron_ids("--only", only, site):
        if key not in by_key:
            n = len(next(iter(layers.values()))) // first.n_ends
            raise InputError(
                f"--only {key.layer}:{neuron_name(key.index, site)}: {harvest} does not have this neuron; it has"
                f" layers {', '.join(map(str, sorted(layers)))} of {n} neurons each"
            )
        summary, name = by_key[key], f"{key.layer}:{neuron_name(key.index, site)}"
        if summary.dead or not summary.silent or name in only:
            chosen.append(_sampled(summary))
    return chosen


def read_selected_records(
    harvest: Path, split: Split, selected: Sequence[SampledNeuron]
) -> Iterator[NeuronRecord]:
    """Yield the records of the selected neurons of one split, by layer and index, one at a time.

    Raises `InputError` if the harvest lacks one of them.
    """
    for layer, indices in _by_layer(selected).items():
        n_read = 0
        for record in read_records(harvest, split, layers=[layer], indices=indices):
            n_read += 1
            yield record
        _check_harvested(harvest, split, layer, n_read, len(indices))


def read_selected_rows(
    harvest: Path, split: Split, selected: Sequence[SampledNeuron], columns: Sequence[str]
) -> Iterator[tuple[int, pa.Table]]:
    """Yield columns of the excerpts of the selected neurons of one split, with their layer; memory: one row group.

    `columns` must include `layer` and `index`. The selection is that of `read_selected_records`, which is
    ten times slower, since it makes an object of each excerpt. Raises `InputError` as that does.
    """
    keys = read_parquet(summaries_path(harvest, split), ["layer", "index"])
    layers, indices = keys["layer"].to_numpy(), keys["index"].to_numpy()
    file = ExcerptFile(harvest, split)
    for layer, wanted in _by_layer(selected).items():
        n_harvested = int(np.isin(indices[layers == layer], wanted).sum())
        for group in file.groups([layer]):
            table = file.read_group(group, columns)
            chosen = (table["layer"].to_numpy() == layer) & np.isin(
                table["index"].to_numpy(), wanted
            )
            if chosen.any():
                yield layer, table.filter(pa.array(chosen))
        _check_harvested(harvest, split, layer, n_harvested, len(wanted))


def _by_layer(selected: Sequence[SampledNeuron]) -> dict[int, list[int]]:
    """Return the indices of the selected neurons by layer."""
    layers: dict[int, list[int]] = {}
    for s in selected:
        layers.setdefault(s.neuron.layer, []).append(s.neuron.index)
    return layers


def _check_harvested(harvest: Path, split: Split, layer: int, n_harvested: int, n: int) -> None:
    if n_harvested != n:
        raise InputError(
            f"{harvest} has only {n_harvested} of the {n} explained neurons of layer"
            f" {layer} in the {split} split: type `cratelm harvest --force` for this model"
        )


def explained_from(record: NeuronRecord, metric: Metric) -> tuple[Excerpt, ...]:
    """Return the excerpts of `record` (of the fit split) to explain from for `metric`, in a fixed order."""
    if metric != "anthropic":
        return by_rank(record, "top", TOP_RANKS)
    top = by_rank(record, "top", ANTHROPIC_TOP_RANKS)
    bins = first_of_bins(record, PER_BIN, without={e.position for e in top})
    random = by_rank(record, "random", range(N_RANDOM))
    return tuple(e.narrowed(*ANTHROPIC_WINDOW) for e in top + bins + random)


def contrasting(record: NeuronRecord, metric: Metric, n: int) -> tuple[Excerpt, ...]:
    """Return up to `n` random excerpts of `record` that do not activate the neuron, the lowest first.

    In these, its activation stays below half of its maximum. They are cut to the window of `metric`;
    excerpts that `explained_from` returns are skipped.
    """
    used = {e.position for e in explained_from(record, metric)}
    candidates = [
        e.narrowed(*ANTHROPIC_WINDOW) if metric == "anthropic" else e
        for e in record.of_kind("random")
        if e.position not in used and len(e)
    ]
    silent = [e for e in candidates if float(e.activations.max()) < record.summary.maximum / 2]
    return tuple(sorted(silent, key=lambda e: (float(e.activations.max()), e.rank))[:n])


def by_rank(record: NeuronRecord, kind: ExcerptKind, ranks: Iterable[int]) -> tuple[Excerpt, ...]:
    """Return the excerpts of a kind with these ranks, in the order of `ranks`; missing ranks are skipped."""
    table = ExcerptTable.of(record.excerpts)
    rows = np.flatnonzero(table.is_kind(kind))
    row_of = dict(zip(table.ranks[rows].tolist(), rows.tolist(), strict=True))
    return tuple(record.excerpts[row_of[rank]] for rank in ranks if rank in row_of)


def first_of_bins(
    record: NeuronRecord, per_bin: int, without: Collection[int] = ()
) -> tuple[Excerpt, ...]:
    """Return the first `per_bin` excerpts of each Anthropic bin, sorted by bin and rank.

    Excerpts whose peak is at a position in `without` are skipped, so that no token is used twice.
    """
    table = ExcerptTable.of(record.excerpts)
    rows = np.flatnonzero(table.is_kind("anthropic_bin"))
    rows = rows[np.lexsort((table.ranks[rows], table.bins[rows]))]
    rows = rows[~np.isin(table.positions[rows], list(without))]
    bins = table.bins[rows]
    number = np.arange(len(rows)) - np.searchsorted(bins, bins)  # within its bin
    return tuple(record.excerpts[row] for row in rows[number < per_bin].tolist())
