"""Convert one imported record into the neuron's excerpts and statistics, by split.

Shape legend: n tokens of an excerpt, m tokens of the sample from which statistics are computed.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.interop.imported_texts import (
    IMPORT_SPLITS,
    ImportedTexts,
    ImportSplit,
    ListedRecord,
    listed_records,
)
from cratelm.interop.openai_records import OpenAIRecord
from cratelm.records import (
    ANTHROPIC_BINS,
    HISTOGRAM_BINS,
    OPENAI_QUANTILES,
    Excerpt,
    FloatArray,
    NeuronId,
    NeuronRecord,
    NeuronSummary,
)

_OPENAI_EDGES, _ANTHROPIC_EDGES = len(OPENAI_QUANTILES), ANTHROPIC_BINS + 1
_LONGEST = np.iinfo(np.int16).max
"""maximum number of tokens of an activation record: the offset of its peak is stored in 16 bits"""
_MOST_RECORDS = 2**14
"""maximum number of activation records in a list: ranks, which for `top` count by two, are stored in 16 bits"""
_MOST_BINS = 2**7
"""maximum number of quantiles: their numbers are stored in 8 bits"""


@dataclass
class ImportCounts:
    """Counts of what was omitted or had to be estimated, over all neurons."""

    repeated: int = 0
    """activation records omitted because their list already contains the same text"""
    without_random: int = 0
    """neurons, counted in each split, without a random excerpt: their statistics are over all excerpts"""
    without_mean: int = 0
    """neurons whose file has no mean: it is estimated from the sample"""


def check(listed: ListedRecord, path: Path) -> None:
    """Raise `InputError` for activations that float32 cannot represent, and for lists that are too long."""
    position = f"{path}: {listed.kind} {listed.rank}"
    for count, most, items in (
        (len(listed.record.tokens), _LONGEST, "tokens"),
        (listed.rank + 1, _MOST_RECORDS, "activation records in its list"),
        (listed.bin + 1, _MOST_BINS, "quantiles"),
    ):
        if count > most:
            raise InputError(
                f"{position} has {count:,} {items}, but at most {most:,} are supported: leave the file out of"
                " --files"
            )
    try:
        finite = bool(np.isfinite(_float32(listed)).all())
    except OverflowError:
        finite = False
    if not finite:
        raise InputError(
            f"{position} has an activation that is not a finite float32 number (NaN, infinite or above 3.4e38):"
            " leave the file out of --files"
        )


def neuron_records(
    record: OpenAIRecord, model: str, site: str, texts: ImportedTexts, counts: ImportCounts
) -> dict[ImportSplit, NeuronRecord]:
    """Return the neuron's record for each split, and add to `counts`."""
    neuron = NeuronId(model, site, record.layer, record.index)
    excerpts = _excerpts(record, texts, counts)
    counts.without_mean += not _is_number(record.mean)
    records = {}
    for split, of_split in excerpts.items():
        random = [e for e in of_split if e.kind == "random"]
        counts.without_random += not random
        sample = np.concatenate([e.activations for e in random or of_split]).astype(np.float64)
        maximum = max(float(e.activations.max()) for e in of_split)
        summary = _summary(neuron, record, sample, maximum)
        records[split] = NeuronRecord(summary, tuple(of_split))
    return records


def _excerpts(
    record: OpenAIRecord, texts: ImportedTexts, counts: ImportCounts
) -> dict[ImportSplit, list[Excerpt]]:
    excerpts: dict[ImportSplit, list[Excerpt]] = {split: [] for split in IMPORT_SPLITS}
    seen: set[tuple[str, int]] = set()
    ranks: Counter[tuple[ImportSplit, str, int]] = Counter()
    for listed in listed_records(record):
        position = texts.position_of(listed.record)
        if (listed.kind, position.ordinal) in seen:
            counts.repeated += 1
            continue
        seen.add((listed.kind, position.ordinal))
        cell = position.split, listed.kind, listed.bin
        nth = ranks[cell]
        values = _float32(listed)
        peak = len(values) // 2 if listed.kind == "random" else int(values.argmax())
        excerpt = Excerpt(
            kind=listed.kind,
            rank=2 * nth + IMPORT_SPLITS.index(position.split) if listed.kind == "top" else nth,
            bin=listed.bin,
            token_ids=np.array(texts.ids(listed.record), np.int32),
            activations=values,
            peak=peak,
            document=position.ordinal,
            position=position.start + peak,
        )
        ranks[cell] += 1
        excerpts[position.split].append(excerpt)
    return excerpts


def _summary(
    neuron: NeuronId, record: OpenAIRecord, sample: NDArray[np.float64], maximum: float
) -> NeuronSummary:
    """Return the summary, with the moments from the file if it has them, and all other statistics from `sample` [m]."""
    low = min(0.0, float(sample.min()))
    high = max(maximum, low + 1) if maximum <= low else maximum
    counted, _ = np.histogram(sample.clip(low, high), HISTOGRAM_BINS, (low, high))
    centred = sample - sample.mean()
    variance = float(np.mean(centred**2))
    spread = math.sqrt(variance) or math.nan
    return NeuronSummary(
        neuron=neuron,
        n_tokens=len(sample),
        mean=_number(record.mean, float(sample.mean())),
        variance=_number(record.variance, variance),
        skew=_number(record.skewness, float(np.mean((centred / spread) ** 3))),
        kurtosis=_number(record.kurtosis, float(np.mean((centred / spread) ** 4))),
        firing_rate=float(np.mean(sample > 0)),
        maximum=maximum,
        histogram=counted.astype(np.int64),
        histogram_low=low,
        histogram_high=high,
        openai_edges=_edges(record),
        anthropic_edges=np.full(_ANTHROPIC_EDGES, np.nan, np.float32),
    )


def _edges(record: OpenAIRecord) -> FloatArray:
    """Return the file's quantile boundaries [6]; NaN if it has none, or if they belong to other quantiles."""
    boundaries = record.boundaries or ()
    n_bins = len(record.by_quantile or ()) or _OPENAI_EDGES - 1
    if not len(boundaries) == _OPENAI_EDGES == n_bins + 1:
        return np.full(_OPENAI_EDGES, np.nan, np.float32)
    return np.array([_number(edge, math.nan) for edge in boundaries], np.float32)


def _float32(listed: ListedRecord) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.array(listed.record.activations, np.float64).astype(np.float32)


def _is_number(value: float | None) -> bool:
    try:
        return value is not None and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _number(value: float | None, otherwise: float) -> float:
    return float(value) if value is not None and _is_number(value) else otherwise
