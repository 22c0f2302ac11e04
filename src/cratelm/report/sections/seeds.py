"""Several seeds of one model: means over seeds, CRATE minus GPT-2 in pairs of seeds, and what `cratelm seeds` measured."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from cratelm.analysis.seeds_store import SeedsSummary
from cratelm.records import Metric
from cratelm.report.cells import METRIC_NAMES, interval_cell
from cratelm.results.run_results import RunResults
from cratelm.results.seeds import (
    PRECISION,
    TOKEN_SHARE,
    Layers,
    Measure,
    SeedGroup,
    SeedScores,
    read_seed_scores,
    seed_groups,
)
from cratelm.results.side_results import read_seed_studies
from cratelm.runs.names import FAMILIES, family_of, null_kind, twin_name
from cratelm.score.whole_summary import ALL_TOKENS
from cratelm.stats.seeds import (
    SeedComparison,
    compare_over_seeds,
    holm,
    mean_over_layers,
    mean_over_seeds,
)
from cratelm.text.table import Cell, Column, Table

_MEASURES = {
    TOKEN_SHARE: "token share, %",
    ALL_TOKENS: "all tokens, correlation",
    PRECISION: "all tokens, average precision",
}
"""names of measures that are not metrics of excerpts"""
FEW = (
    " Resampling 2 or 3 seeds underestimates how much seeds differ: such an interval, and its p, are optimistic, and a"
    " fourth seed may lie outside."
)
Scores = Mapping[Measure, Mapping[int, SeedScores]]


def tables(results: RunResults, resamples: int, seed: int) -> list[Table]:
    """Return the tables of this section, which are empty if no model has two seeds."""
    groups = seed_groups(results)
    scores = {group.base: read_seed_scores(results, group) for group in groups}
    seeded = {"resamples": resamples, "seed": seed}
    studies = read_seed_studies(results.run, [m.name for m in results.models])
    return [
        means_table(groups, scores, **seeded),
        twins_table(groups, scores, **seeded),
        matches_table(studies),
        transfer_table(studies),
    ]


def means_table(
    groups: Sequence[SeedGroup], scores: Mapping[str, Scores], resamples: int, seed: int
) -> Table:
    """Return the mean over the seeds of each model, for every explainer and measure."""
    columns = (
        Column("model", "model"),
        Column("models", "its seeds"),
        Column("explainer", "explainer"),
        Column("measure", "measure"),
        Column("mean", "mean × 100 [95%]", ".1f"),
        Column("by_seed", "each seed"),
        Column("neurons", "neurons with a score", ",d"),
        Column("none", "undefined / dead / failed"),
        Column("seeds", "seeds", "d"),
    )
    rows: list[tuple[Cell, ...]] = []
    for group in groups:
        names = ", ".join(m.name for m in group.models.values())
        for (explainer, measure), by_seed in scores[group.base].items():
            values = _with_common_layers([s.values for s in by_seed.values()])
            if not values[0]:
                continue
            mean = mean_over_seeds(values, resamples=resamples, seed=seed)
            each = ", ".join(f"{100 * mean_over_layers(v):.1f}" for v in values)
            counts = [sum(getattr(s, name) for s in by_seed.values()) for name in ("undefined", "dead", "failed")]  # fmt: skip
            rows.append(
                (
                    group.base,
                    names,
                    explainer or "last token",
                    _name(measure),
                    interval_cell(mean, 100),
                    each,
                    sum(len(v) for of in values for v in of.values()),
                    " / ".join(f"{count:,}" for count in counts),
                    len(values),
                )
            )
    return Table(
        "seeds",
        "Means over seeds",
        columns,
        tuple(rows),
        "Mean over seeds of the mean over layers of the mean over neurons. [ ]: 95% hierarchical bootstrap interval, in"
        " which seeds are resampled and, within each, the neurons of every layer. Neurons without a score are excluded,"
        f" and counted over all seeds.{FEW}",
    )


def twins_table(
    groups: Sequence[SeedGroup], scores: Mapping[str, Scores], resamples: int, seed: int
) -> Table:
    """Return each CRATE minus its GPT-2 in pairs of seeds, for every explainer, measure and layer."""
    rows, tests = _twin_rows(groups, scores, resamples, seed)
    return Table(
        "seeds_twins",
        "CRATE minus GPT-2 over seeds",
        (
            Column("models", "a − b"),
            Column("pairs", "pairs"),
            Column("explainer", "explainer"),
            Column("measure", "measure"),
            Column("layer", "layer"),
            Column("mean_a", "mean a", ".1f"),
            Column("mean_b", "mean b", ".1f"),
            Column("difference", "difference [95%]", ".1f"),
            Column("p_value", "p", ".2g"),
            Column("p_holm", "p, Holm", ".2g"),
            Column("seeds", "seeds", "d"),
        ),
        tuple(rows),
        "Difference × 100, paired by seed: pairs are resampled, and within each the neurons of both models. p: two-sided,"
        f" from the same resamples, at least 2/{resamples + 1:,}. p, Holm: adjusted for all"
        f" {' and '.join(map(str, tests)) or 'no'} tests of a pair of models, over explainers, measures and layers."
        f"{FEW} With S pairs of seeds, a test of the signs alone could not fall below 2^(1 − S): .5 for 2, .25 for 3.",
    )


def _twin_rows(
    groups: Sequence[SeedGroup], scores: Mapping[str, Scores], resamples: int, seed: int
) -> tuple[list[tuple[Cell, ...]], list[int]]:
    """Return the rows of `twins_table`, and the number of tests of each pair of models."""
    by_base = {group.base: group for group in groups}
    rows: list[tuple[Cell, ...]] = []
    tests = []
    for a in groups:
        b = by_base.get(twin_name(a.base))
        if family_of(a.base) != FAMILIES[0] or b is None or null_kind(a.base):
            continue
        shared = sorted(set(a.models) & set(b.models))
        if len(shared) > 1:
            of_pair = _differences(scores[a.base], scores[b.base], shared, resamples, seed)
            adjusted = holm([c.p_value for *_, c in of_pair])
            tests.append(len(of_pair))
            names = [f"{a.models[s].name} − {b.models[s].name}" for s in shared]
            for (explainer, measure, layer, means, c), p in zip(of_pair, adjusted, strict=True):
                rows.append(
                    (
                        f"{a.base} − {b.base}",
                        ", ".join(names),
                        explainer or "last token",
                        _name(measure),
                        layer,
                        *means,
                        interval_cell(c.difference, 100),
                        c.p_value,
                        float(p),
                        len(shared),
                    )
                )
    return rows, tests


def matches_table(studies: Sequence[SeedsSummary]) -> Table:
    """Return how similar the matched neurons of each pair of seeds are, trained and untrained."""
    rows = [
        (m.model_a, m.model_b, m.layer, m.similarity, m.mean, m.untrained, m.neurons, m.constant)
        for study in studies
        for m in study.matches
    ]
    return Table(
        "seed_matches",
        "Matched neurons of two seeds",
        (
            Column("model_a", "one seed"),
            Column("model_b", "another"),
            Column("layer", "layer", "d"),
            Column("similarity", "matched by"),
            Column("mean", "mean of the matches", ".3f"),
            Column("untrained", "null: untrained", ".3f"),
            Column("neurons", "pairs", ",d"),
            Column("constant", "constant", ",d"),
        ),
        tuple(rows),
        "Each neuron of one seed is matched with one of the other, so that the sum of similarities is largest. Activations:"
        " absolute correlation over held-out tokens, the mean of which is PW-MCC (Song et al. 2025). Atoms: absolute"
        " cosine of the atoms of CRATE's dictionary, or of the output weights of GPT-2's neurons; each seed has its own"
        " basis of the residual stream, so that atoms need not agree where activations do. Untrained: the same models"
        " with their initial weights; similarity up to there says nothing. Constant: neurons of either seed that have no"
        " similarity, which counts as 0.",
    )


def transfer_table(studies: Sequence[SeedsSummary]) -> Table:
    """Return how much of its score an explanation keeps on the match of its neuron."""
    rows = [
        (
            t.model_a,
            t.model_b,
            t.explainer,
            None if t.own is None else 100 * t.own,
            interval_cell(t.transfer),
            interval_cell(t.random),
            t.neurons,
            t.undefined,
            t.constant,
        )
        for study in studies
        for t in study.transfers
    ]
    return Table(
        "seed_transfer",
        "Explanations on the matches of their neurons",
        (
            Column("model_a", "explained"),
            Column("model_b", "scored on"),
            Column("explainer", "explainer"),
            Column("own", "own score × 100", ".1f"),
            Column("transfer", "kept on the match [95%]", ".3f"),
            Column("random", "null: random neuron [95%]", ".3f"),
            Column("neurons", "neurons", ",d"),
            Column("undefined", "undefined", ",d"),
            Column("constant", "constant matches", ",d"),
        ),
        tuple(rows),
        "Own score: correlation of the simulation with the explained neuron over held-out tokens, mean over neurons. Kept:"
        " the mean correlation with the matches by activations, divided by the own score; 1 if an explanation holds as"
        " well for the other seed. Null: with a random neuron of the same layer instead. [ ]: 95% bootstrap interval over"
        " neurons. Undefined: neurons or simulations that are constant, which are excluded. Constant matches count as 0.",
    )


def _differences(
    a: Scores, b: Scores, seeds: Sequence[int], resamples: int, seed: int
) -> list[tuple[str, str, str, tuple[float, float], SeedComparison]]:
    """Return explainer, measure, layer, both means x 100 and the comparison, over all layers and for each."""
    found = []
    for explainer, measure in a:
        if (explainer, measure) not in b:
            continue
        sides = [[of[explainer, measure][s].values for s in seeds] for of in (a, b)]
        common = _with_common_layers([*sides[0], *sides[1]])
        layers = list(common[0])
        for label, chosen in [("all", layers), *((str(n), [n]) for n in layers)]:
            if not chosen or (label != "all" and len(layers) == 1):
                continue
            picked = [{n: of[n] for n in chosen} for of in common]
            x, y = picked[: len(seeds)], picked[len(seeds) :]
            comparison = compare_over_seeds(x, y, resamples=resamples, seed=seed)
            means = [100 * float(np.mean([mean_over_layers(v) for v in of])) for of in (x, y)]
            found.append((explainer, measure, label, (means[0], means[1]), comparison))
    return found


def _with_common_layers(seeds: Sequence[Layers]) -> list[Layers]:
    """Return the values of the layers in which every seed has some."""
    common = [n for n in seeds[0] if all(n in of for of in seeds)]
    return [{n: of[n] for n in common} for of in seeds]


def _name(measure: str) -> str:
    return _MEASURES.get(measure) or METRIC_NAMES[cast("Metric", measure)]
