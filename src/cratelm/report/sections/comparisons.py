"""Tables of differences: CRATE less GPT-2, and a language model less what needs none."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

from cratelm.errors import InputError
from cratelm.records import SCORERS, Metric, NeuronScore
from cratelm.report.cells import METRIC_NAMES, POLICY_NAMES, interval_cell
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.stats.scores import POLICIES, Comparison, Policy, compare_models
from cratelm.text.table import Cell, Column, Table

FIGURES = (
    Column("metric", "metric"),
    Column("policy", "without a score"),
    Column("mean_a", "mean a", ".1f"),
    Column("mean_b", "mean b", ".1f"),
    Column("difference", "difference [95%]", ".1f"),
    Column("p_value", "p", ".2g"),
    Column("cohens_d", "Cohen's\u00a0d [95%]", ".2f"),
    Column("superiority", "P(a\u00a0>\u00a0b)", ".2f"),
    Column("paired", "paired"),
    Column("n_a", "n a", ",d"),
    Column("n_b", "n b", ",d"),
)
"""of a comparison: what `figures_of` gives"""


def twins(results: RunResults, resamples: int, seed: int) -> Table:
    """Each CRATE less its GPT-2, for every explainer, metric and policy."""
    rows = _twin_rows(results, results.explainers, results.metrics, resamples, seed)
    return Table(
        "twins",
        "CRATE less GPT-2",
        (Column("models", "a − b"), Column("explainer", "explainer"), *FIGURES),
        rows,
        "Difference × 100 over the layers where both have scores; [ ]: 95% bootstrap interval over neurons"
        " (over pairs where paired). p: two-sided permutation test within layers, at least"
        f" 1/{resamples + 1:,}, not corrected for the {len(rows)} comparisons here. Paired: random-only, where neurons of the same layer and index"
        " are scored on excerpts at the same positions; there only pairs with both values count, so the"
        " means differ from those above. P(a > b): chance that a neuron of a scores higher, ties half."
        " The neurons of two trained models are compared, not many trainings of each: a difference may"
        " be one of these seeds.",
    )


def twins_with_model(results: RunResults, resamples: int, seed: int) -> Table:
    """Each CRATE less its GPT-2 under every explainer and scorer of a language model."""
    rows = _twin_rows(results, results.with_model, SCORERS, resamples, seed)
    return Table(
        "twins_with_model",
        "CRATE less GPT-2, with a language model",
        (Column("models", "a − b"), Column("explainer", "explainer"), *FIGURES),
        rows,
        "Each model's own sample of neurons. [ ], p, pairs and P(a > b) as in the table of twins above;"
        f" p not corrected for the {len(rows)} comparisons here.",
    )


def _twin_rows(
    results: RunResults,
    explainers: Sequence[str],
    metrics: Sequence[Metric],
    resamples: int,
    seed: int,
) -> tuple[tuple[Cell, ...], ...]:
    rows: list[tuple[Cell, ...]] = []
    for (a, b), explainer, metric, policy in product(
        results.twins(), explainers, metrics, POLICIES
    ):
        try:
            c = compare_models(
                a.scores,
                b.scores,
                metric,
                explainer=explainer,
                policy=policy,
                resamples=resamples,
                seed=seed,
            )
        except InputError:  # no layer where both have scores: nothing to compare, no row
            continue
        rows.append((f"{c.model_a} − {c.model_b}", c.explainer, *figures_of(c)))
    return tuple(rows)


def model_less_free(results: RunResults, resamples: int, seed: int) -> Table:
    """Within one model: each explainer with a language model less each without, on the same neurons."""
    rows: list[tuple[Cell, ...]] = []
    for m in results.principal:
        with_model, free = _explainers(m)
        for metric, a, b, policy in product(SCORERS, with_model, free, POLICIES):
            c = _paired(m.scores, a, b, metric, policy, resamples, seed)
            if c is not None:
                rows.append((m.name, f"{a} − {b}", *figures_of(c)))
    return Table(
        "model_less_free",
        "Language model less LLM-free",
        (Column("model", "model"), Column("explainers", "a − b"), *FIGURES),
        tuple(rows),
        "Difference × 100 of two explainers of the same neurons, on the same held-out excerpts: over the"
        " neurons where both have a value (left out) or that both were to score (counted as chance, which is 0"
        " for a correlation). [ ]: 95%"
        " bootstrap interval over neurons; p: two-sided test by random signs of the neurons' differences,"
        f" at least 1/{resamples + 1:,}, not corrected for the {len(rows)} comparisons here.",
    )


def _paired(
    scores: Iterable[NeuronScore],
    a: str,
    b: str,
    metric: Metric,
    policy: Policy,
    resamples: int,
    seed: int,
) -> Comparison | None:
    """Explainer `a` less `b` on the neurons of both; None where they have none in common."""
    mine = [s for s in scores if s.metric == metric and s.explainer in (a, b)]
    # Two explainers of one model are compared as two models are: under one name.
    sides = [[replace(s, explainer="") for s in mine if s.explainer == side] for side in (a, b)]
    try:
        return compare_models(
            sides[0],
            sides[1],
            metric,
            explainer="",
            policy=policy,
            paired=True,
            resamples=resamples,
            seed=seed,
        )
    except InputError:
        return None


def _explainers(m: ModelResults) -> tuple[list[str], list[str]]:
    """With a language model, and without."""
    with_model = sorted({e for found in m.with_model for e in found.explainers})
    free = {e for found in m.sets if not found.name for e in found.explainers}
    return with_model, sorted(free)


def figures_of(c: Comparison) -> tuple[Cell, ...]:
    return (
        METRIC_NAMES[c.metric],
        POLICY_NAMES[c.policy],
        c.mean_a,
        c.mean_b,
        interval_cell(c.difference, c.low, c.high),
        c.p_value,
        interval_cell(c.cohens_d, c.cohens_d_low, c.cohens_d_high),
        c.superiority,
        "yes" if c.paired else "no",
        c.n_a,
        c.n_b,
    )
