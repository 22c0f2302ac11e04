"""What the summary of scores with a language model adds: excerpts lost to failed calls, and hard negatives."""

from dataclasses import dataclass

import numpy as np

from cratelm.records import HARD_METRICS, Status
from cratelm.stats.layers import LayeredMean, layered_mean
from cratelm.stats.score_table import ScoreTable
from cratelm.stats.scores import has_ends


@dataclass(frozen=True)
class LostExcerpts:
    """What failed calls cost the scores that exist nevertheless."""

    explainer: str
    metric: str
    control: str
    n_scores: int
    """scores that are computed without some of their excerpts"""
    n_excerpts: int
    """excerpts (of intruder, trials) that they are computed without"""


def lost_excerpts(scores: ScoreTable) -> dict[tuple[str, ...], LostExcerpts]:
    """Return what failed calls cost, by explainer, metric and control, where they cost excerpts.

    Scores that failed altogether are not among these.
    """
    codes, words = scores.words("status")
    failed = np.array([word == str(Status.FAILED) for word in words], bool)[codes]
    losing = scores.where((scores.numbers("n_failed") > 0) & ~failed)
    found = {}
    for (explainer, metric, control), group in losing.groups(
        "explainer", "metric", "control"
    ).items():
        n_excerpts = int(group.numbers("n_failed").sum())
        found[explainer, metric, control] = LostExcerpts(
            explainer, metric, control, len(group), n_excerpts
        )
    return found


@dataclass(frozen=True)
class HardDifference:
    """How a metric changes if its random negatives are replaced by hard ones, paired over neurons."""

    explainer: str
    metric: str
    """the metric with random negatives: `detection` or `fuzzing`"""
    difference: LayeredMean
    """hard minus random, x 100; `undefined` counts neurons that have a value with random negatives alone"""

    def in_words(self) -> str:
        """Return the difference, its interval and the counts."""
        mean, without = self.difference.mean, self.difference.undefined
        if mean is None:
            return f"none: {without:,} neurons have a score, none with hard negatives"
        return (
            f"{mean.in_words('+.1f')} with hard negatives, paired over {self.difference.defined:,} neurons;"
            f" {without:,} more have no score with hard negatives"
        )


def hard_differences(scores: ScoreTable, resamples: int, seed: int) -> list[HardDifference]:
    """Return the difference for each explainer and metric scored with both kinds of negatives."""
    groups = scores.select(control="none").groups("explainer", "metric")
    pairs = [
        (explainer, metric, random, groups[explainer, hard_metric])
        for metric, hard_metric in HARD_METRICS.items()
        for (explainer, scored), random in groups.items()
        if scored == metric and (explainer, hard_metric) in groups
    ]
    differences = []
    for explainer, metric, random, hard in pairs:
        value_of = dict(zip(hard.places().tolist(), hard.numbers("value").tolist(), strict=True))
        random = random.where(random.has("value"))
        of_hard = np.array([value_of.get(at, np.nan) for at in random.places().tolist()])
        changes = 100 * (of_hard - random.numbers("value"))
        layers = random.numbers("layer")
        numbers = random.numbers("index") // 2 if has_ends(random) else None
        mean = layered_mean(
            changes, layers, numbers_in_layer=numbers, resamples=resamples, seed=seed
        )
        differences.append(HardDifference(explainer, metric, mean))
    return differences
