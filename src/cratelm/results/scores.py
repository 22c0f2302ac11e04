"""Read the results of `cratelm score` for one set of explanations: statistics, audits, calls.

Files: `scores/MODEL[@SET]/summary.json` and `calls.json`. `cratelm.score.store` reads scores of single neurons.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cratelm.llm.client import Tally
from cratelm.llm.probe import ProbeResult
from cratelm.records import Interval
from cratelm.runs import Stage, known_fields
from cratelm.runs.names import split_set
from cratelm.runs.reading import read_json
from cratelm.score.controls import Audit
from cratelm.score.duplicates import DuplicateAudit, DuplicateEffect, DuplicatePair
from cratelm.score.whole_summary import Gain, WholeMean, WholeSummary
from cratelm.stats.layers import LayeredMean
from cratelm.stats.scores import Counts, LayerStatistics, ModelStatistics


@dataclass(frozen=True)
class ScoreSummary:
    """Contents of `summary.json` of a set of scores."""

    statistics: tuple[ModelStatistics, ...]
    audit: Audit
    near_duplicates: DuplicateAudit | None
    """None if near-duplicates were not searched for"""
    preflight: ProbeResult | None
    """probe calls of the simulator; None without a language model"""
    all_tokens: WholeSummary | None = None
    """means over all held-out tokens, and what the last token alone explains; None if they were not measured"""
    by_end: Mapping[str, tuple[ModelStatistics, ...]] = field(default_factory=dict)
    """statistics of each end of the neurons, `+` and `-`; empty for neurons with one end"""

    def renamed(self, suffix: str) -> "ScoreSummary":
        """Return a copy with `suffix` appended to the names of the explainers."""
        near = self.near_duplicates
        if near is not None:
            effects = (replace(e, explainer=e.explainer + suffix) for e in near.effects)
            near = replace(near, effects=tuple(effects))

        def labelled(statistics: Iterable[ModelStatistics]) -> tuple[ModelStatistics, ...]:
            return tuple(replace(s, explainer=s.explainer + suffix) for s in statistics)

        return replace(
            self,
            statistics=labelled(self.statistics),
            near_duplicates=near,
            by_end={end: labelled(of) for end, of in self.by_end.items()},
        )


def read_score_summary(folder: Path) -> ScoreSummary:
    """Return the contents of `summary.json` in the folder of a set of scores."""
    return read_json(folder / "summary.json", _score_summary)


def _score_summary(record: dict[str, Any]) -> ScoreSummary:
    audit = record["leakage_audit"]
    return ScoreSummary(
        statistics=tuple(map(_statistics, record["statistics"])),
        audit=Audit(**{**audit, "shared": tuple(audit["shared"])}),
        near_duplicates=_duplicate_audit(record.get("near_duplicates")),
        preflight=_probe_result(record.get("preflight")),
        all_tokens=_whole_summary(record.get("all_tokens")),
        by_end={end: tuple(map(_statistics, of)) for end, of in record.get("by_end", {}).items()},
    )


def read_statistics(folder: Path) -> tuple[ModelStatistics, ...]:
    """Return only the statistics of `summary.json`, also from a file that lacks the other parts."""
    return read_json(
        folder / "summary.json", lambda record: tuple(map(_statistics, record["statistics"]))
    )


def read_calls(folder: Path) -> Tally | None:
    """Return the calls to a language model of the last command that wrote the folder; None without calls."""
    path = folder / "calls.json"
    if not path.is_file():
        return None
    return read_json(path, lambda record: Tally(**{**record, "failed": Counter(record["failed"])}))


def label_suffix(scored: Stage) -> str:
    """Return what labels the explainers of a set of scores: its name in brackets, if the scores were named.

    The same explanations may be scored again under another name.
    """
    done = scored.completion()
    named = done is not None and done.config.get("name")
    return f" ({split_set(scored.name)[1]})" if named else ""


def find_statistics(
    statistics: tuple[ModelStatistics, ...],
    explainer: str,
    metric: str,
    control: str = "none",
    policy: str = "leave_out",
) -> ModelStatistics | None:
    """Return the first of `statistics` with this explainer, metric, control and policy; None if there is none."""
    wanted = (explainer, metric, control, policy)
    for s in statistics:
        if (s.explainer, s.metric, s.control, s.policy) == wanted:
            return s
    return None


def mean_interval(s: ModelStatistics | LayerStatistics | None) -> Interval | None:
    """Return a mean x 100 with its interval; None if no neuron has a value."""
    return None if s is None or s.mean is None else Interval(s.mean, s.low, s.high)


def layer_intervals(s: ModelStatistics | None) -> dict[int, Interval]:
    """Return the mean x 100 by layer, for the layers that have one: the curve of scores by layer."""
    layers = {layer.layer: mean_interval(layer) for layer in (s.layers if s else ())}
    return {number: mean for number, mean in layers.items() if mean is not None}


def _statistics(record: dict[str, Any]) -> ModelStatistics:
    layers = tuple(
        LayerStatistics(**{**layer, "counts": Counts(**layer["counts"])})
        for layer in record["layers"]
    )
    counts = Counts(**record["counts"])
    return ModelStatistics(
        **known_fields(ModelStatistics, {**record, "counts": counts, "layers": layers})
    )


def _duplicate_audit(record: dict[str, Any] | None) -> DuplicateAudit | None:
    if not record:
        return None
    pairs = tuple(DuplicatePair(**known_fields(DuplicatePair, pair)) for pair in record["examples"])
    effects = tuple(
        DuplicateEffect(**known_fields(DuplicateEffect, effect)) for effect in record["effects"]
    )
    return DuplicateAudit(
        **known_fields(DuplicateAudit, {**record, "examples": pairs, "effects": effects})
    )


def _probe_result(record: dict[str, Any] | None) -> ProbeResult | None:
    if not record:
        return None
    values = dict(record)
    return ProbeResult(supports_logprobs=values.pop("reads"), **values)


def _whole_summary(record: dict[str, Any] | None) -> WholeSummary | None:
    if not record:
        return None
    means = (WholeMean(**_with_mean(WholeMean, row)) for row in record["scores"])
    gains = (Gain(**_with_mean(Gain, row)) for row in record["gains"])
    return WholeSummary(
        n_tokens=record["n_tokens"],
        token_share=_layered_mean(record["token_share"]),
        token_entropy=_layered_mean(record["token_entropy"]),
        scores=tuple(means),
        gains=tuple(gains),
        token_share_median=_layered_mean(median)
        if (median := record.get("token_share_median"))
        else None,
        n_misled=record.get("n_misled"),
    )


def _with_mean(kind: type, row: dict[str, Any]) -> dict[str, Any]:
    return known_fields(kind, {**row, "of": _layered_mean(row["of"])})


def _layered_mean(record: dict[str, Any]) -> LayeredMean:
    mean = record["mean"]
    interval = None if mean is None else Interval(**known_fields(Interval, mean))
    return LayeredMean(**known_fields(LayeredMean, {**record, "mean": interval}))
