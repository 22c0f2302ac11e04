"""Names and cells that the tables of a report share."""

from cratelm.records import Interval, Metric
from cratelm.stats.scores import Counts, LayerStatistics, ModelStatistics
from cratelm.text.table import Cell

METRIC_NAMES: dict[Metric, str] = {
    "top_and_random": "top-and-random",
    "random_only": "random-only",
    "anthropic": "Anthropic",
    "detection": "detection",
    "fuzzing": "fuzzing",
    "intruder": "intruder",
    "embedding": "embedding",
}
POLICY_NAMES = {"leave_out": "left out", "count_zero": "counted as chance"}
INTERVAL_NOTE = (
    "[ ]: 95% bootstrap interval over neurons, resampled within their layer. It does not cover another"
    " training seed, corpus or draw of excerpts."
)


def mean_cell(s: ModelStatistics | LayerStatistics | None) -> Cell:
    return interval_cell(s.mean, s.low, s.high) if s else None


def interval_cell(value: float | None, low: float | None, high: float | None) -> Cell:
    return value if value is None or low is None or high is None else Interval(value, low, high)


def without_score(counts: Counts) -> str:
    """`undefined / dead / failed`"""
    return f"{counts.undefined:,} / {counts.dead:,} / {counts.failed:,}"
