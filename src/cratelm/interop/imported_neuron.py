"""One imported record as the neuron's excerpts and statistics, by split.

n tokens of an excerpt, m tokens of the sample that statistics stand on.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.interop.imported_texts import USED, Listed, Texts, Used, listed_records
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
"""tokens of an activation record: the offset of its peak is kept in 16 bits"""
_MOST_RECORDS = 2**14
"""activation records of a list: ranks, which count by two for `top`, are kept in 16 bits"""
_MOST_BINS = 2**7
"""quantiles: their numbers are kept in 8 bits"""


@dataclass
class Counts:
    """What was left out or had to be estimated, over all neurons."""

    repeated: int = 0
    """activation records left out because their list holds the same text already"""
    without_random: int = 0
    """neurons and splits with no random excerpt: statistics are those of all excerpts"""
    without_mean: int = 0
    """neurons whose file has no mean: it is that of the sample"""


def check(listed: Listed, path: Path) -> None:
    """Raises `InputError` for activations that float32 cannot hold, or for too many of something."""
    where = f"{path}: {listed.kind} {listed.rank}"
    for found, most, what in (
        (len(listed.record.tokens), _LONGEST, "tokens"),
        (listed.rank + 1, _MOST_RECORDS, "activation records in its list"),
        (listed.bin + 1, _MOST_BINS, "quantiles"),
    ):
        if found > most:
            raise InputError(
                f"{where}: {found:,} {what}, at most {most:,} were expected: leave it out of --files"
            )
    try:
        finite = bool(np.isfinite(_float32(listed)).all())
    except OverflowError:
        finite = False
    if not finite:
        raise InputError(
            f"{where} has an activation that is no finite number of float32 (NaN, infinite or above"
            " 3.4e38): leave it out of --files"
        )


def neuron_records(
    record: OpenAIRecord, model: str, site: str, texts: Texts, counts: Counts
) -> dict[Used, NeuronRecord]:
    """The neuron in each split; adds to `counts`."""
    neuron = NeuronId(model, site, record.layer, record.index)
    excerpts = _excerpts(record, texts, counts)
    counts.without_mean += not _is_number(record.mean)
    made = {}
    for split, found in excerpts.items():
        random = [e for e in found if e.kind == "random"]
        counts.without_random += not random
        sample = np.concatenate([e.activations for e in random or found]).astype(np.float64)
        maximum = max(float(e.activations.max()) for e in found)
        summary = _summary(neuron, record, sample, maximum)
        made[split] = NeuronRecord(summary, tuple(found))
    return made


def _excerpts(record: OpenAIRecord, texts: Texts, counts: Counts) -> dict[Used, list[Excerpt]]:
    excerpts: dict[Used, list[Excerpt]] = {split: [] for split in USED}
    seen: set[tuple[str, int]] = set()
    ranks: Counter[tuple[Used, str, int]] = Counter()
    for listed in listed_records(record):
        place = texts.place_of(listed.record)
        if (listed.kind, place.ordinal) in seen:
            counts.repeated += 1
            continue
        seen.add((listed.kind, place.ordinal))
        cell = place.split, listed.kind, listed.bin
        nth = ranks[cell]
        values = _float32(listed)
        peak = len(values) // 2 if listed.kind == "random" else int(values.argmax())
        excerpt = Excerpt(
            kind=listed.kind,
            rank=2 * nth + USED.index(place.split) if listed.kind == "top" else nth,
            bin=listed.bin,
            token_ids=np.array(texts.ids(listed.record), np.int32),
            activations=values,
            peak=peak,
            document=place.ordinal,
            position=place.start + peak,
        )
        ranks[cell] += 1
        excerpts[place.split].append(excerpt)
    return excerpts


def _summary(
    neuron: NeuronId, record: OpenAIRecord, sample: NDArray[np.float64], maximum: float
) -> NeuronSummary:
    """Moments from the file where it has them, the rest from `sample` [m]."""
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
    """The file's quantile boundaries [6]; NaN where there are none, or of other quantiles."""
    found = record.boundaries or ()
    n_bins = len(record.by_quantile or ()) or _OPENAI_EDGES - 1
    if not len(found) == _OPENAI_EDGES == n_bins + 1:
        return np.full(_OPENAI_EDGES, np.nan, np.float32)
    return np.array([_number(edge, math.nan) for edge in found], np.float32)


def _float32(listed: Listed) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.array(listed.record.activations, np.float64).astype(np.float32)


def _is_number(value: float | None) -> bool:
    try:
        return value is not None and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _number(value: float | None, otherwise: float) -> float:
    return float(value) if value is not None and _is_number(value) else otherwise
