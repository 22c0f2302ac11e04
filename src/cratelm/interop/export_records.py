"""`cratelm export records`: the excerpts of a harvest as OpenAI's NeuronRecord JSON.

A file a neuron, `LAYER/NEURON.json` as in the published data of Bills et al. 2023; the format is
described in `cratelm.interop.openai_records`. A list of the format has one order of ranks, of
which the even ones explain and the odd ones are scored on. So it takes turns: rank r of the `fit`
split is at place 2 r, rank r of `held_out` at place 2 r + 1, and where one split has more excerpts
they are left out and counted. What is exported and imported again thus has the same splits.

| field | from |
|---|---|
| most_positive_activation_records | kind `top` |
| random_sample | kind `random` |
| random_sample_by_quantile | kind `openai_bin`, a list a bin |
| quantile_boundaries | `openai_edges` |
| mean, variance, skewness, kurtosis | all tokens of both splits; null where the variance is 0 |

Activations are written as the shortest number that is the same in float32. Anthropic bins and tokens
out of context have no field and are left out. Neurons that were imported from such files are written
as they were read, with all their fields.
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
from cratelm.records import Excerpt, ExcerptKind, NeuronRecord, NeuronSummary
from cratelm.runs import Run
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True)
class ExportRecordsResult:
    """What was written."""

    path: Path
    neurons: int
    """files"""
    left_out: int
    """excerpts of the three kinds that one split has more of than the other"""


def export_records(config: ExportRecordsConfig) -> ExportRecordsResult:
    """Writes the neurons of a harvest; see the module for what becomes of each excerpt.

    Raises `InputError` where the run has no harvest of the model or not the neurons asked for, or
    where `--out` is not empty.
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
        for record, left_out in _records(run, stage.path, chosen):
            if (record.layer, record.index) in keys:
                path = folder / str(record.layer) / f"{record.index}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(encode_record(record))
                n_left_out += left_out
                bar.update()
    return ExportRecordsResult(config.out, len(keys), n_left_out)


def _records(
    run: Run, harvest: Path, chosen: dict[int, list[NeuronSummary]]
) -> Iterator[tuple[OpenAIRecord, int]]:
    """Records, and how many excerpts each leaves out."""
    if (harvest / SOURCE).is_file():
        yield from ((record, 0) for record in read_source(harvest))
        return
    store = TokenStore(run.stage("tokens").path)
    for fit, held_out in both_splits(harvest, chosen):
        yield openai_record(fit, held_out, store)


def openai_record(
    fit: NeuronRecord, held_out: NeuronRecord, store: TokenStore
) -> tuple[OpenAIRecord, int]:
    """A neuron as a NeuronRecord, and how many excerpts of its kinds found no place in it."""
    edges = fit.summary.openai_edges
    lists = {
        (kind, bin_): _turns(_ranked(fit, kind, bin_), _ranked(held_out, kind, bin_))
        for kind, bin_ in _LISTS
    }
    written = {cell: tuple(_activations(e, store) for e in row) for cell, row in lists.items()}
    n_there = sum(e.kind in _KINDS for e in (*fit.excerpts, *held_out.excerpts))
    record = OpenAIRecord.of(
        fit.neuron.layer,
        fit.neuron.index,
        top=written["top", -1],
        random=written["random", -1],
        by_quantile=tuple(written["openai_bin", bin_] for bin_ in range(_QUANTILES)),
        boundaries=tuple(_finite(shortest_float(edge)) for edge in edges),
        **pooled_moments([fit.summary, held_out.summary]),
    )
    return record, n_there - sum(map(len, lists.values()))


def pooled_moments(summaries: Sequence[NeuronSummary]) -> dict[str, Any]:
    """Moments over the tokens of all `summaries`: mean, variance, skewness, kurtosis; None for none."""
    share = np.array([s.n_tokens for s in summaries], np.float64)
    share /= share.sum()
    mean, variance = (
        np.array([getattr(s, name) for s in summaries]) for name in ("mean", "variance")
    )
    # a split without spread has no skew, and central moments of 0
    third = np.where(variance > 0, [s.skew for s in summaries] * variance**1.5, 0)
    fourth = np.where(variance > 0, [s.kurtosis for s in summaries] * variance**2, 0)
    centre = share @ mean
    off = mean - centre
    second = share @ (variance + off**2)
    skewed = share @ (third + 3 * off * variance + off**3)
    fourth = share @ (fourth + 4 * off * third + 6 * off**2 * variance + off**4)
    spread = second if second > 0 else math.nan
    found = (centre, second, skewed / spread**1.5, fourth / spread**2)
    names = ("mean", "variance", "skewness", "kurtosis")
    return {name: _finite(float(value)) for name, value in zip(names, found, strict=True)}


_QUANTILES = 5
_LISTS: tuple[tuple[ExcerptKind, int], ...] = (
    ("top", -1),
    ("random", -1),
    *(("openai_bin", bin_) for bin_ in range(_QUANTILES)),
)
_KINDS = {kind for kind, _ in _LISTS}


def _ranked(record: NeuronRecord, kind: ExcerptKind, bin_: int) -> list[Excerpt]:
    return sorted((e for e in record.of_kind(kind) if e.bin == bin_), key=lambda e: e.rank)


def _turns(fit: Sequence[Excerpt], held_out: Sequence[Excerpt]) -> list[Excerpt]:
    """One of each in turn, as long as both have one."""
    return [e for pair in zip(fit, held_out, strict=False) for e in pair]


def _activations(excerpt: Excerpt, store: TokenStore) -> ActivationRecord:
    tokens = store.decode_tokens(excerpt.token_ids)
    return ActivationRecord(tuple(tokens), tuple(map(shortest_float, excerpt.activations)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
