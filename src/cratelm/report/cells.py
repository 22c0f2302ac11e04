"""Names and cells shared by the tables of a report."""

import math
from collections.abc import Sequence

from cratelm.records import CHANCE, Estimate, Interval, Metric
from cratelm.report.drawing import Series
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.results.scores import mean_interval
from cratelm.runs.names import NullKind, null_kind
from cratelm.stats.scores import Counts, LayerStatistics, ModelStatistics
from cratelm.text import table
from cratelm.text.table import Cell

METRIC_NAMES: dict[Metric, str] = {
    "top_and_random": "top-and-random",
    "random_only": "random-only",
    "anthropic": "Anthropic",
    "all_tokens_estimate": "all tokens, estimated",
    "detection": "detection",
    "detection_hard": "detection, hard negatives",
    "fuzzing": "fuzzing",
    "fuzzing_hard": "fuzzing, hard negatives",
    "intruder": "intruder",
    "embedding": "embedding",
}
DERIVED_NULLS: dict[NullKind, tuple[str, str]] = {
    "permuted": (
        "permuted weights",
        " Permuted weights: the trained model with each tensor of its blocks permuted inside itself.",
    ),
    "embeddings": (
        "only embeddings trained",
        " Only embeddings trained: the trained embeddings and head, with fresh weights for the rest.",
    ),
}
"""null controls that are made from the trained model (`cratelm train --null`): heading, and note"""
POLICY_NAMES = {"leave_out": "left out", "count_zero": "counted as chance"}
INTERVAL_NOTE = (
    "[ ]: 95% bootstrap interval over neurons, resampled within their layer. It does not cover another"
    " training seed, corpus or draw of excerpts."
)


def interval_cell(interval: Interval | None, by: float = 1) -> Cell:
    """Return a value with its interval, both times `by`; the value alone if it has no interval."""
    if interval is None:
        return None
    value = by * interval.value
    if interval.low is None or interval.high is None:
        return value
    low, high = sorted((by * interval.low, by * interval.high))  # a negative factor swaps them
    return table.Interval(value, low, high)


def estimate_cell(estimate: Estimate | None, by: float = 1) -> Cell:
    """Return a value with its standard error, both times `by`; the value alone if it has no error."""
    if estimate is None or math.isnan(estimate.value):
        return None
    value, error = by * estimate.value, estimate.error
    return value if error is None else Estimate(value, abs(by) * error)


def mean_cell(s: ModelStatistics | LayerStatistics | None) -> Cell:
    """Return a mean score with its interval."""
    return interval_cell(mean_interval(s))


def chance_of(metrics: Sequence[Metric]) -> str:
    """Return what a score without a value counts as under the policy `count_zero`, in words: 0 for correlations."""
    return "chance" if any(CHANCE[metric] for metric in metrics) else "0"


def derived_kinds(results: RunResults) -> list[NullKind]:
    """Return the kinds of `DERIVED_NULLS` that any model of a report has."""
    return [k for k in DERIVED_NULLS if any(results.null(m, k) for m in results.principal)]


def without_score(counts: Counts) -> str:
    """Return the counts `undefined / dead / failed`."""
    return f"{counts.undefined:,} / {counts.dead:,} / {counts.failed:,}"


def series_of(m: ModelResults) -> Series:
    """Return the colour, marker and label of a model in all figures."""
    return Series(m.name, m.place, (null_kind(m.name) or "init") if m.null_of else "")
