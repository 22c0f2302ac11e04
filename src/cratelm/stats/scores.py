"""Figures of layers and models from the scores of their neurons, with their uncertainty.

All figures are x 100. A layer's score is the mean over its neurons, a model's the mean over its
layers (Bai & Ma 2025), so each layer counts the same. Neurons are the unit of uncertainty: they are
resampled with replacement within their layer (percentile bootstrap, Efron & Tibshirani 1993, chapter
13); layers are not resampled, because a model has exactly these. The score of a neuron with two ends is the mean
over those of its ends that count (`cratelm.stats.ends`). SciPy's `bootstrap` and
`permutation_test` have no strata, so neither can draw within layers.

Scores without a value (undefined, dead, failed) follow one of two policies: `leave_out` takes the mean
over the neurons that have a value; `count_zero` gives the others the score of an uninformative
explanation: 0 for a correlation, chance for the other scorers.

All functions take any sequence of scores; a `ScoreTable` is the quickest, since they compute on columns.

Shapes: n neurons of a layer, L layers, R resamples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.records import CHANCE, ENDS, Control, Metric, NeuronScore, Status, has_both_ends
from cratelm.stats.ends import clustered
from cratelm.stats.intervals import percentile_bounds, resampled_means, resampled_moments
from cratelm.stats.score_table import ScoreTable

Policy = Literal["leave_out", "count_zero"]
POLICIES: tuple[Policy, ...] = ("leave_out", "count_zero")
_BLOCK = 2_000_000
"""random numbers held at a time: 16 MB"""


@dataclass(frozen=True)
class Counts:
    """Numbers of neurons by the status of their score; at a site with both ends, of ends."""

    defined: int
    undefined: int
    """the correlation does not exist"""
    dead: int
    """never fired on the fit or on the held-out split"""
    failed: int
    """the explainer or the simulator did not answer"""

    @property
    def total(self) -> int:
        """Return the number of neurons."""
        return self.defined + self.undefined + self.dead + self.failed


@dataclass(frozen=True)
class LayerStatistics:
    """One layer under one explainer, metric, control and policy."""

    layer: int
    mean: float | None
    """x 100; None if no neuron has a value"""
    low: float | None
    """lower bound of the bootstrap interval, x 100; None for fewer than two neurons"""
    high: float | None
    counts: Counts


@dataclass(frozen=True)
class ModelStatistics:
    """One model under one explainer, metric, control and policy."""

    model: str
    explainer: str
    metric: Metric
    control: Control
    policy: Policy
    mean: float | None
    """mean over layers of the layer means, x 100, over the layers that have a value; None if none has"""
    low: float | None
    """lower bound of the bootstrap interval, neurons resampled within their layer, x 100; None if one
    of the layers has a single value"""
    high: float | None
    variance: float | None
    """population variance of the layer means over the layers, (x 100)^2: low if scores are steady"""
    confidence: float
    """confidence of the intervals, such as 0.95"""
    counts: Counts
    layers: tuple[LayerStatistics, ...]


@dataclass(frozen=True)
class Comparison:
    """Two models under one explainer, metric and policy: a - b."""

    model_a: str
    model_b: str
    explainer: str
    metric: Metric
    policy: Policy
    paired: bool
    """True if neurons of the same layer and index were scored on the same excerpt positions;
    then only pairs in which both have a value count"""
    n_a: int
    """number of neurons that count"""
    n_b: int
    n_layers: int
    mean_a: float
    """mean over layers of the layer means, x 100, of the neurons that count"""
    mean_b: float
    difference: float
    """mean_a - mean_b, x 100"""
    low: float | None
    """lower bound of the bootstrap interval of the difference; None if a layer has fewer than two neurons"""
    high: float | None
    p_value: float
    """two-sided permutation test within layers: of labels, or of signs if paired"""
    cohens_d: float | None
    """difference / standard deviation pooled within layers and models; None if the deviation is 0"""
    cohens_d_low: float | None
    """lower bound of its bootstrap interval"""
    cohens_d_high: float | None
    superiority: float
    """probability that a neuron of a scores higher than one of the same layer of b (ties count half),
    0..1; if paired, higher than its twin. Mean over layers"""
    confidence: float


def model_statistics(
    scores: Sequence[NeuronScore],
    *,
    explainer: str,
    metric: Metric,
    control: Control = "none",
    policy: Policy = "leave_out",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ModelStatistics:
    """Return mean, interval, variance over layers and counts of one model's scores.

    Raises `InputError` if `scores` has no such scores, or those of several models.
    """
    chosen = _chosen(scores, explainer, metric, control)
    rng = np.random.default_rng(seed)
    layers, centres, spread = [], [], []
    for layer in np.unique(chosen.numbers("layer")).tolist():
        members = chosen.select(layer=layer)
        values = _values(members, metric, policy).numbers
        means = resampled_means(values, resamples, rng)
        low, high = percentile_bounds(means, confidence) if len(values) > 1 else (None, None)
        mean = float(values.mean()) if len(values) else None
        layers.append(LayerStatistics(layer, mean, low, high, _counts(members)))
        if len(values):
            centres.append(mean)
            spread.append(means)
    bounded = len(spread) > 0 and all(c.low is not None for c in layers if c.mean is not None)
    low, high = percentile_bounds(np.mean(spread, axis=0), confidence) if bounded else (None, None)
    return ModelStatistics(
        model=_model(chosen),
        explainer=explainer,
        metric=metric,
        control=control,
        policy=policy,
        mean=float(np.mean(centres)) if centres else None,
        low=low,
        high=high,
        variance=float(np.var(centres)) if centres else None,
        confidence=confidence,
        counts=_counts(chosen),
        layers=tuple(layers),
    )


def all_statistics(
    scores: Sequence[NeuronScore], *, resamples: int = 2000, seed: int = 0
) -> list[ModelStatistics]:
    """Return the statistics of every explainer, metric, control and policy in one model's `scores`."""
    groups = ScoreTable.of(scores).groups("explainer", "metric", "control")
    found: list[ModelStatistics] = []
    for (explainer, metric, control), group in groups.items():
        for policy in POLICIES:
            # Policies differ in scores without a value. Most of the time is the bootstrap's.
            if policy != POLICIES[0] and group.has("value").all():
                found.append(replace(found[-1], policy=policy))
                continue
            statistics = model_statistics(
                group,
                explainer=explainer,
                metric=cast("Metric", metric),
                control=cast("Control", control),
                policy=policy,
                resamples=resamples,
                seed=seed,
            )
            found.append(statistics)
    return found


def statistics_by_end(
    scores: Sequence[NeuronScore], *, resamples: int = 2000, seed: int = 0
) -> dict[str, list[ModelStatistics]]:
    """Return `all_statistics` of each end of the neurons alone, by `+` and `-`; empty for neurons with one end."""
    table = ScoreTable.of(scores)
    if not len(table) or not has_ends(table):
        return {}
    ends = table.numbers("index") % 2
    parts = {end: table.where(ends == number) for number, end in enumerate(ENDS)}
    return {
        end: all_statistics(part, resamples=resamples, seed=seed)
        for end, part in parts.items()
        if len(part)
    }


def compare_models(
    scores_a: Sequence[NeuronScore],
    scores_b: Sequence[NeuronScore],
    metric: Metric,
    *,
    explainer: str,
    policy: Policy = "leave_out",
    paired: bool | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Return the difference between two models' scores (control `none`) over the layers that both have.

    With `paired` None, only `random_only` is paired: its excerpts of neurons of the same layer and index
    are at the same positions in both twins. The p-value is (1 + as extreme) / (1 + R) (Phipson & Smyth
    2010), so it is never 0.

    Raises `InputError` if the two have no layer in common with values to compare.
    """
    chosen = [_chosen(s, explainer, metric, "none") for s in (scores_a, scores_b)]
    model_a, model_b = map(_model, chosen)
    paired = _are_paired(metric, chosen) if paired is None else paired
    values_a, values_b = (_values(side, metric, policy) for side in chosen)
    layers = _common_layers(values_a, values_b, paired)
    if not layers:
        raise InputError(
            f"{model_a} and {model_b} have no layer in which both"
            f" have {explainer} scores on {metric}: score the same layers of both"
        )
    rng = np.random.default_rng(seed)  # drawn from in this order: effects, then relabellings
    a, b = ([layer[side] for layer in layers] for side in (0, 1))
    mean_a, mean_b = (float(np.mean([v.mean() for v in side])) for side in (a, b))
    effects, differences = _resampled_effects(layers, paired, resamples, rng)
    bounded = all(len(v) > 1 for v in a + b)
    low, high = percentile_bounds(differences, confidence) if bounded else (None, None)
    pooled = _pooled_deviation([np.var(v) for v in a + b], [len(v) for v in a + b])
    d_low, d_high = (
        percentile_bounds(effects, confidence) if bounded and pooled > 0 else (None, None)
    )
    return Comparison(
        model_a=model_a,
        model_b=model_b,
        explainer=explainer,
        metric=metric,
        policy=policy,
        paired=paired,
        n_a=sum(map(len, a)),
        n_b=sum(map(len, b)),
        n_layers=len(layers),
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean_a - mean_b,
        low=low,
        high=high,
        p_value=_permutation_p(layers, paired, mean_a - mean_b, resamples, rng),
        cohens_d=float((mean_a - mean_b) / pooled) if pooled > 0 else None,
        cohens_d_low=d_low,
        cohens_d_high=d_high,
        superiority=float(np.mean([_superiority(x, y, paired) for x, y in layers])),
        confidence=confidence,
    )


def _are_paired(metric: Metric, sides: Sequence[ScoreTable]) -> bool:
    """Return whether the excerpts of two models are at the same positions, neuron by neuron."""
    # of neurons with two ends, random excerpts are drawn at other positions than of neurons with one
    return metric == "random_only" and len({has_ends(side) for side in sides}) == 1


def _chosen(
    scores: Iterable[NeuronScore], explainer: str, metric: Metric, control: Control
) -> ScoreTable:
    chosen = ScoreTable.of(scores).select(explainer=explainer, metric=metric, control=control)
    models = sorted(model for (model,) in chosen.counts("model"))
    if len(models) != 1:
        raise InputError(
            f"found scores of {' and '.join(models) or 'no model'} for {explainer}, {metric}, control"
            f" {control}: give the scores of exactly one model"
        )
    return chosen


def _model(scores: ScoreTable) -> str:
    ((model,),) = scores.counts("model")
    return model


class _Values(NamedTuple):
    """Scores x 100 of distinct neurons."""

    places: NDArray[np.int64]
    """[n] layer and index, see `ScoreTable.places`"""
    numbers: NDArray[np.float64]
    """[n]"""

    @property
    def layers(self) -> NDArray[np.int64]:
        """Return the layers [n]."""
        return self.places >> 32

    def distinct(self, keys: NDArray[np.int64]) -> "_Values":
        """Return one value for each of `keys` [n]: the last, at the place of the first."""
        _, first = np.unique(keys, return_index=True)
        if len(first) == len(keys):
            return self
        _, from_end = np.unique(keys[::-1], return_index=True)
        order = np.argsort(first)
        return _Values(self.places[first[order]], self.numbers[::-1][from_end[order]])


def _values(scores: ScoreTable, metric: Metric, policy: Policy) -> _Values:
    """Return the scores that count, one per neuron, in the order of the neurons' first ones."""
    has_value = scores.has("value")
    numbers = 100 * np.where(has_value, scores.numbers("value"), CHANCE[metric])
    counting = has_value if policy == "leave_out" else np.ones(len(scores), bool)
    places, (sites, names) = scores.places(), scores.words("site")
    values = _Values(places[counting], numbers[counting])
    values = values.distinct((places * len(names) + sites)[counting])
    return _by_neuron(values) if has_ends(scores) else values


def has_ends(scores: ScoreTable) -> bool:
    """Return whether the neurons of the scores, which are of one site, are ends."""
    _, names = scores.words("site")
    return any(map(has_both_ends, names))


def _by_neuron(values: _Values) -> _Values:
    """Return the mean over the ends of each neuron, with the numbers of neurons in place of those of ends."""
    layers, numbers = values.places >> 32, (values.places & 0xFFFF_FFFF) // 2
    places = layers << 32 | numbers
    means, first = clustered(values.numbers, places)
    return _Values(places[first], means)


def _counts(scores: ScoreTable) -> Counts:
    n = scores.counts("status")
    statuses = (Status.DEFINED, Status.UNDEFINED, Status.DEAD, Status.FAILED)
    return Counts(*(n.get((str(status),), 0) for status in statuses))


def _common_layers(a: _Values, b: _Values, paired: bool) -> list[tuple[NDArray, NDArray]]:
    """Return the values of a and of b by layer; if paired, those of the same index in the same order.

    Sites differ between architectures (`ista`, `mlp`), so neurons are matched by layer and index.
    """
    a, b = a.distinct(a.places), b.distinct(b.places)
    if paired:
        both, in_a, in_b = np.intersect1d(
            a.places, b.places, assume_unique=True, return_indices=True
        )
        a, b = _Values(both, a.numbers[in_a]), _Values(both, b.numbers[in_b])
    common = np.intersect1d(a.layers, b.layers).tolist()
    return [(a.numbers[a.layers == layer], b.numbers[b.layers == layer]) for layer in common]


def _resampled_effects(
    layers: list[tuple[NDArray, NDArray]],
    paired: bool,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[NDArray, NDArray]:
    """Return [R] effect sizes and [R] differences of neurons (or pairs) drawn within layers."""
    gaps, variances, sizes = [], [], []
    for a, b in layers:
        # The same seed draws the same positions, so both neurons of a pair are drawn together.
        seeds = rng.integers(0, 2**63, 2)
        streams = [np.random.default_rng(seeds[0 if paired else side]) for side in (0, 1)]
        mean_a, var_a = resampled_moments(a, resamples, streams[0])
        mean_b, var_b = resampled_moments(b, resamples, streams[1])
        gaps.append(mean_a - mean_b)
        variances += [var_a, var_b]
        sizes += [len(a), len(b)]
    difference = np.mean(gaps, axis=0)
    pooled = _pooled_deviation(variances, sizes)
    return difference / np.where(pooled > 0, pooled, np.inf), difference


def _pooled_deviation(variances: Sequence, sizes: Sequence[int]) -> NDArray:
    """Return the pooled standard deviation of groups, from their population variances and sizes.

    Its square is unbiased.
    """
    squares = sum(n * np.asarray(v) for n, v in zip(sizes, variances, strict=True))
    return np.sqrt(squares / max(1, sum(sizes) - len(sizes)))


def _permutation_p(
    layers: list[tuple[NDArray, NDArray]],
    paired: bool,
    observed: float,
    resamples: int,
    rng: np.random.Generator,
) -> float:
    """Return the fraction of relabellings within layers with a difference as large, of either sign."""
    relabelled = np.mean(
        [
            _flipped(a - b, resamples, rng) if paired else _relabelled(a, b, resamples, rng)
            for a, b in layers
        ],
        axis=0,
    )  # [R]
    # The margin counts ties, which rounding would break either way, as extreme.
    extreme = np.abs(relabelled) >= abs(observed) * (1 - 1e-9)
    return float((1 + extreme.sum()) / (1 + resamples))


def _flipped(gaps: NDArray, resamples: int, rng: np.random.Generator) -> NDArray:
    """Return [R] means of the differences of pairs, each with a random sign."""
    step = max(1, _BLOCK // len(gaps))
    blocks = [min(step, resamples - start) for start in range(0, resamples, step)]
    signs = (rng.choice((-1.0, 1.0), (size, len(gaps))) for size in blocks)
    return np.concatenate([s @ gaps for s in signs]) / len(gaps)


def _relabelled(a: NDArray, b: NDArray, resamples: int, rng: np.random.Generator) -> NDArray:
    """Return [R] differences of means after assigning all values at random to groups of these sizes."""
    together = np.concatenate([a, b])
    first = np.zeros(len(together))
    first[: len(a)] = 1
    step = max(1, _BLOCK // len(together))
    sums = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        sums.append(rng.permuted(np.tile(first, (size, 1)), axis=1) @ together)
    sum_a = np.concatenate(sums)
    return sum_a / len(a) - (together.sum() - sum_a) / len(b)


def _superiority(a: NDArray, b: NDArray, paired: bool) -> float:
    """Return P(a > b) + P(a = b) / 2 over all pairs or, if paired, over corresponding elements.

    Over all pairs this is `stats.auc.roc_area`, computed by binary search: the order of operations
    differs, and so may the last digit.
    """

    if paired:
        return float(np.mean((a > b) + 0.5 * (a == b)))
    ordered = np.sort(b)
    below = np.searchsorted(ordered, a, "left")
    up_to = np.searchsorted(ordered, a, "right")
    return float(np.mean((below + up_to) / 2) / len(b))
