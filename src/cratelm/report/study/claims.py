"""The paper's claims about CRATE and GPT-2, each as a comparison of two figures that the data can contradict.

A claim holds if the 95% interval of the difference lies on its side of 0 and its p-value, adjusted for all comparisons of
the page (Holm 1979), is below .05; it is contradicted if the interval lies on the other side with such a p-value.
Everything else is undecided at this budget.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cratelm.records import SIMULATION_METRICS
from cratelm.report.cells import METRIC_NAMES
from cratelm.report.sections.scores import PUBLISHED, PUBLISHED_LOSS
from cratelm.results.seeds import TOKEN_SHARE
from cratelm.results.study import (
    ALL,
    CONTEXT,
    HARD,
    LOSS,
    LOST,
    PRECISION,
    REPLACED,
    STEADINESS,
    StudyResults,
)
from cratelm.stats.replicates import Replicates
from cratelm.stats.seeds import holm

Verdict = Literal["holds", "contradicted", "undecided"]
ALPHA = 0.05


@dataclass(frozen=True)
class Measure:
    """How a figure is called and shown."""

    key: str
    label: str
    scale: float = 1.0
    form: str = ".2f"


MEASURES = {
    m.key: m
    for m in (
        Measure(LOSS, "loss, nats", 1, ".3f"),
        Measure(REPLACED, "loss on explanations, nats", 1, ".3f"),
        Measure(LOST, "nats lost on explanations", 1, ".3f"),
        Measure("carried", "nats that the codes carry", 1, ".2f"),
        Measure("recovered", "given back of them, %", 100, ".1f"),
        Measure(TOKEN_SHARE, "token share, %", 100, ".1f"),
        Measure(CONTEXT, "explained beyond the last token, %", 100, ".1f"),
        Measure(ALL, "correlation over all tokens × 100", 100, ".1f"),
        Measure(PRECISION, "average precision over all tokens × 100", 100, ".1f"),
        Measure(HARD, "AUC, hard negatives × 100", 100, ".1f"),
        Measure("density", "neurons above 0, %", 100, ".1f"),
        *(Measure(m, f"{METRIC_NAMES[m]} × 100", 100, ".1f") for m in SIMULATION_METRICS),
        *(
            Measure(key, f"variance over layers, {METRIC_NAMES[STEADINESS[key]]}", 1e4, ".2f")  # type: ignore[index]
            for key in STEADINESS
        ),
    )
}
"""measures of a study by key, in the order of its tables"""


@dataclass(frozen=True)
class Claim:
    """CRATE's figure is above GPT-2's (`sign` 1) or below it (-1)."""

    text: str
    size: str
    measure: str
    sign: int
    published: str = ""
    """the paper's figures, CRATE and GPT-2; empty for a claim that the paper did not measure"""


@dataclass(frozen=True)
class Tested:
    """A claim with what was measured."""

    claim: Claim
    crate: Replicates
    gpt2: Replicates
    difference: Replicates
    p: float
    """adjusted for all comparisons"""

    @property
    def verdict(self) -> Verdict:
        """Return whether the claim holds, is contradicted, or is undecided."""
        low, high = self.difference.bounds
        if self.p >= ALPHA or low <= 0 <= high:
            return "undecided"
        return "holds" if self.difference.value * self.claim.sign > 0 else "contradicted"


def claims_of(size: str) -> Iterator[Claim]:
    """Yield the claims of the paper about models of one size, then the same under stricter measures."""
    deep = size != "1l"
    published = PUBLISHED.get(size)
    for number, metric in enumerate(SIMULATION_METRICS):
        pair = published[2 * number : 2 * number + 2] if published else ()
        text = f"CRATE's neurons score {'higher' if deep else 'lower'}"
        shown = " / ".join(f"{mean:g}" for mean, _ in pair)
        yield Claim(text, size, metric, 1 if deep else -1, shown)
        if deep:
            shown = " / ".join(f"{variance:g}" for _, variance in pair)
            yield Claim("CRATE is steadier over layers", size, f"variance:{metric}", -1, shown)
    losses = PUBLISHED_LOSS.get(size, ())
    yield Claim("CRATE predicts text worse", size, LOSS, 1, " / ".join(f"{x:g}" for x in losses))
    stricter = {
        ALL: "CRATE's neurons are better explained, over all tokens",
        PRECISION: "the same, by average precision",
        HARD: "the same, against hard negatives",
        CONTEXT: "CRATE's neurons are better explained beyond the last token",
    }
    for measure, text in stricter.items():
        yield Claim(text, size, measure, 1)
    yield Claim("CRATE's neurons depend more on the last token alone", size, TOKEN_SHARE, 1)
    yield Claim("CRATE loses fewer nats on its explanations", size, LOST, -1)
    yield Claim("CRATE is the better model when both run on explanations", size, REPLACED, -1)


def tested_claims(results: StudyResults) -> list[Tested]:
    """Return every claim that the study has figures for, by size."""
    found = [t for size in _sizes(results) for t in _tested(results, size)]
    adjusted = holm([t.p for t in found]) if found else ()
    return [replace(t, p=float(p)) for t, p in zip(found, adjusted, strict=True)]


def _sizes(results: StudyResults) -> Sequence[str]:
    trained = [g.first for g in results.groups.values() if not g.first.control]
    return list(dict.fromkeys(m.size for m in trained))


def _tested(results: StudyResults, size: str) -> Iterator[Tested]:
    a, b = f"crate-{size}", f"gpt2-{size}"
    if a not in results.groups or b not in results.groups:
        return
    for claim in claims_of(size):
        difference = results.difference(a, b, claim.measure)
        if difference is None:
            continue
        common = [s for s in results.groups[a].models if s in results.groups[b].models]
        of = [results.figure(name, claim.measure, common) for name in (a, b)]
        if of[0] is not None and of[1] is not None:
            yield Tested(claim, of[0], of[1], difference, difference.p_value)
