"""`cratelm export records`: write the excerpts of a harvest as OpenAI's NeuronRecord JSON.

There is one file per neuron, `LAYER/NEURON.json`, as in the published data of Bills et al. 2023. The two ends of neurons
are two such sets of files, in the folders `plus` and `minus`.
`cratelm.interop.openai_records` describes the format. Its lists are ordered by rank; even ranks are used to explain
a neuron, and odd ranks to score the explanation. Therefore the splits alternate: rank r of `fit` is at position 2 r,
rank r of `held_out` at position 2 r + 1. If one split has more excerpts than the other, the surplus excerpts are
omitted, and counted. Records that are exported and imported again thus have the same splits.

| field | source |
|---|---|
| most_positive_activation_records | kind `top` |
| random_sample | kind `random` |
| random_sample_by_quantile | kind `openai_bin`, one list per bin |
| quantile_boundaries | `openai_edges` |
| mean, variance, skewness, kurtosis | all tokens of both splits; null if the variance is 0 |

Activations are written as the shortest number that is the same in float32. There is no field for Anthropic bins
and tokens out of context, so these are omitted. Neurons that were imported from such files are written as they were
read, with all their fields.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cratelm.interop.config import ExportRecordsConfig
from cratelm.interop.harvested_neurons import both_splits, chosen_neurons, harvest_of
from cratelm.interop.openai_records import (
    SOURCE,
    ActivationRecord,
    OpenAIRecord,
    encode_record,
    read_source,
    shortest_float,
)
from cratelm.interop.out_folder import EXPORT_MARK, check_out, out_folder
from cratelm.records import END_WORDS, Excerpt, ExcerptKind, NeuronKey, NeuronRecord, NeuronSummary
from cratelm.runs import Run
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True)
class ExportRecordsResult:
    """Result of `cratelm export records`."""

    path: Path
    neurons: int
    """number of neurons, which is the number of files"""
    left_out: int
    """number of excerpts of the three kinds that were omitted, because one split has more than the other"""


def export_records(config: ExportRecordsConfig) -> ExportRecordsResult:
    """Write the neurons of a harvest, in the format described at the top of this module.

    Raises `InputError` if the run has no harvest of the model or lacks the requested neurons, or if `--out` is not
    empty.
    """
    run = Run(config.run)
    stage, identities = harvest_of(run, config.model)
    chosen = chosen_neurons(stage.path, config.layers, config.only)
    check_out(config.out, force=config.force, mark=EXPORT_MARK)
    content = {"format": "OpenAI NeuronRecord", "model": config.model, **identities}
    keys = {s.neuron.key for s in chain.from_iterable(chosen.values())}
    n_left_out = 0
    with (
        out_folder(config.out, content, mark=EXPORT_MARK) as folder,
        tqdm(total=len(keys), desc="export", unit="neuron", disable=config.quiet) as bar,
    ):
        for key, place, (record, left_out) in _records(run, stage.path, chosen):
            if key in keys:
                path = folder / place / str(record.layer) / f"{record.index}.json"
                path.parent.mkdir(exist_ok=True, parents=True)
                path.write_bytes(encode_record(record))
                n_left_out += left_out
                bar.update()
    return ExportRecordsResult(config.out, len(keys), n_left_out)


def _records(
    run: Run, harvest: Path, chosen: dict[int, list[NeuronSummary]]
) -> Iterator[tuple[NeuronKey, str, tuple[OpenAIRecord, int]]]:
    """Yield neuron, folder and record, with the number of excerpts that it omits."""
    if (harvest / SOURCE).is_file():
        for record in read_source(harvest):
            yield NeuronKey(record.layer, record.index), "", (record, 0)
        return
    store = TokenStore(run.stage("tokens").path)
    for fit, held_out in both_splits(harvest, chosen):
        place = END_WORDS[fit.neuron.end] if fit.neuron.n_ends > 1 else ""
        yield fit.neuron.key, place, openai_record(fit, held_out, store)


def openai_record(
    fit: NeuronRecord, held_out: NeuronRecord, store: TokenStore
) -> tuple[OpenAIRecord, int]:
    """Return a neuron as a NeuronRecord, and the number of excerpts that the record omits."""
    edges = fit.summary.openai_edges
    lists = {
        (kind, bin_): _alternating(_ranked(fit, kind, bin_), _ranked(held_out, kind, bin_))
        for kind, bin_ in _LISTS
    }
    written = {cell: tuple(_activations(e, store) for e in row) for cell, row in lists.items()}
    n_excerpts = sum(e.kind in _KINDS for e in (*fit.excerpts, *held_out.excerpts))
    record = OpenAIRecord.of(
        fit.neuron.layer,
        fit.neuron.number,
        top=written["top", -1],
        random=written["random", -1],
        by_quantile=tuple(written["openai_bin", bin_] for bin_ in range(_QUANTILES)),
        boundaries=tuple(_finite(shortest_float(edge)) for edge in edges),
        **pooled_moments([fit.summary, held_out.summary]),
    )
    return record, n_excerpts - sum(map(len, lists.values()))


def pooled_moments(summaries: Sequence[NeuronSummary]) -> dict[str, Any]:
    """Return mean, variance, skewness and kurtosis over the tokens of all `summaries`, with None for undefined values."""
    share = np.array([s.n_tokens for s in summaries], np.float64)
    share /= share.sum()
    mean, variance = (
        np.array([getattr(s, name) for s in summaries]) for name in ("mean", "variance")
    )
    # a split with variance 0 has no skew and no kurtosis, but its central moments are 0
    third = np.where(variance > 0, [s.skew for s in summaries] * variance**1.5, 0)
    fourth = np.where(variance > 0, [s.kurtosis for s in summaries] * variance**2, 0)
    centre = share @ mean
    off = mean - centre
    second = share @ (variance + off**2)
    skewed = share @ (third + 3 * off * variance + off**3)
    fourth = share @ (fourth + 4 * off * third + 6 * off**2 * variance + off**4)
    spread = second if second > 0 else math.nan
    moments = (centre, second, skewed / spread**1.5, fourth / spread**2)
    names = ("mean", "variance", "skewness", "kurtosis")
    return {name: _finite(float(value)) for name, value in zip(names, moments, strict=True)}


_QUANTILES = 5
_LISTS: tuple[tuple[ExcerptKind, int], ...] = (
    ("top", -1),
    ("random", -1),
    *(("openai_bin", bin_) for bin_ in range(_QUANTILES)),
)
_KINDS = {kind for kind, _ in _LISTS}


def _ranked(record: NeuronRecord, kind: ExcerptKind, bin_: int) -> list[Excerpt]:
    return sorted((e for e in record.of_kind(kind) if e.bin == bin_), key=lambda e: e.rank)


def _alternating(fit: Sequence[Excerpt], held_out: Sequence[Excerpt]) -> list[Excerpt]:
    """Return excerpts of the two splits in turn, until one split has no more."""
    return [e for pair in zip(fit, held_out, strict=False) for e in pair]


def _activations(excerpt: Excerpt, store: TokenStore) -> ActivationRecord:
    tokens = store.aligned_text(excerpt.token_ids)
    return ActivationRecord(tuple(tokens), tuple(map(shortest_float, excerpt.activations)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
