"""Neurons worth opening: well explained, selective, and not all of one kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cratelm.results.neuron_groups import NeuronGroup
from cratelm.results.neuron_table import NeuronTable
from cratelm.results.views import ExcerptView, NeuronView

RARELY = 0.2
"""firing rate below which a neuron is selective enough to be suggested"""
BEFORE, AFTER = 16, 8
"""tokens of an excerpt before its peak, and from the peak on"""


@dataclass(frozen=True)
class FeaturedNeuron:
    """One neuron that a newcomer should open."""

    model: str
    layer: int
    index: int
    value: float
    """what ranks it, x 100: see `ranking`"""
    group: str
    """family of its group; empty if that is not known"""
    explanation: str
    """its claim, without the evidence"""
    excerpt: ExcerptView | None
    """tokens around a large activation on held-out text; None if excerpts or text cannot be read"""
    name: str
    """how the neuron is written: its index, or `17+` and `17-` for the ends of neuron 17"""


def ranking(table: NeuronTable) -> tuple[NDArray[np.float64], str]:
    """Return the value [n] by which neurons are ranked, x 100, NaN without a value, and what it is, in words.

    It is the correlation over all held-out tokens of the principal explainer where that was measured; else the first
    score.
    """
    explainer = table.principal[1] if table.principal else ""
    if table.last_token is not None and explainer in table.last_token.correlations:
        return table.last_token.correlations[explainer], "correlation over all held-out tokens"
    column = table.best_score()
    if column is None:
        return np.full(len(table.layer), np.nan), ""
    return column.values, "score"


def featured_rows(
    table: NeuronTable, groups: Sequence[NeuronGroup], n: int, eligible: Callable[[int, int], bool]
) -> list[int]:
    """Return the rows of up to `n` neurons to feature: of each group the best one, the best groups first.

    Candidates have an explanation and a value above 0, and are `eligible(layer, index)`. Neurons that are above 0 on
    less than a fraction `RARELY` of tokens come before all others, unless their value is below the median; where
    there are fewer groups than `n`, the next best neurons of the same groups follow.
    """
    values, _ = ranking(table)
    values = np.where((table.maximum > 0) & (table.explanations != ""), values, np.nan)
    candidates = np.flatnonzero(values > 0)
    if not len(candidates):
        return []
    selective = (table.firing_rate < RARELY) & (values >= np.median(values[candidates]))
    order = candidates[np.lexsort((candidates, -values[candidates], ~selective[candidates]))]
    first: list[int] = []
    again: list[int] = []
    families: set[str] = set()
    for row in order.tolist():
        if not eligible(int(table.layer[row]), int(table.index[row])):
            continue
        family = groups[row].family
        (again if family in families else first).append(row)
        families.add(family)
        if len(first) == n:
            break
    return [*first, *again][:n]


def shown_excerpt(view: NeuronView) -> ExcerptView | None:
    """Return the tokens around the peak of one of a neuron's strongest excerpts; None without text.

    It is the one that the explanation predicts best, by the correlation of true and simulated activations; without a
    simulation, the strongest.
    """
    excerpts = [e for e in view.excerpts if e.kind == "top" and e.true]
    if not excerpts:
        return None
    excerpt = max(excerpts, key=_correlation)  # of equals the first, which is the strongest
    low, high = max(0, excerpt.peak - BEFORE), excerpt.peak + AFTER
    around = excerpt.true[low:high]
    return replace(excerpt, peak=excerpt.peak - low, true=around, simulated=())


def _correlation(excerpt: ExcerptView) -> float:
    """Return the correlation of true and simulated activations; -1 if one of them is constant or missing."""
    true, simulated = (
        [token.value for token in side] for side in (excerpt.true, excerpt.simulated)
    )
    if len(true) != len(simulated) or np.ptp(true) == 0 or np.ptp(simulated) == 0:
        return -1.0
    return float(np.corrcoef(true, simulated)[0, 1])
