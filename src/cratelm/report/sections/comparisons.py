"""Tables of differences: CRATE minus GPT-2, and explainers with a language model minus those without."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import product

from cratelm.errors import InputError
from cratelm.records import METRICS, Interval, Metric
from cratelm.report.cells import METRIC_NAMES, POLICY_NAMES, interval_cell
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.results.seeds import seed_groups
from cratelm.stats.score_table import ScoreTable
from cratelm.stats.scores import POLICIES, Comparison, Policy, compare_models
from cratelm.text.table import Cell, Column, Table

COMPARISON_COLUMNS = (
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
"""columns of the cells that `comparison_cells` returns"""


def tables(results: RunResults, resamples: int, seed: int) -> list[Table]:
    """Return the tables of differences."""
    makers = (twins_table, llm_difference_table, llm_twins_table)
    return [make(results, resamples, seed) for make in makers]


def twins_table(results: RunResults, resamples: int, seed: int) -> Table:
    """Return each CRATE minus its GPT-2, for every explainer, metric and policy."""
    rows = _twin_rows(results, results.explainers, results.metrics, resamples, seed)
    return Table(
        "twins",
        "CRATE minus GPT-2",
        (Column("models", "a − b"), Column("explainer", "explainer"), *COMPARISON_COLUMNS),
        rows,
        "Difference × 100 over the layers in which both have scores; [ ]: 95% bootstrap interval over neurons"
        " (over pairs if paired). p: two-sided permutation test within layers, at least"
        f" 1/{resamples + 1:,}, not corrected for the {len(rows)} comparisons here. Paired: in random-only,"
        " neurons of the same layer and index are scored on excerpts at the same positions; only pairs with"
        " both values count, so the means differ from those above. P(a > b): probability that a neuron of a"
        " scores higher, with ties counted half. "
        + (
            "Each row compares one seed of each model: “Several seeds” says how much a difference is due to the seeds."
            if seed_groups(results)
            else "Each model was trained only once, so a difference may be due to the random seeds."
        ),
    )


def llm_twins_table(results: RunResults, resamples: int, seed: int) -> Table:
    """Return each CRATE minus its GPT-2 under every explainer and scorer of a language model."""
    rows = _twin_rows(results, results.llm_explainers, METRICS, resamples, seed)
    return Table(
        "twins_llm",
        "CRATE minus GPT-2, with a language model",
        (Column("models", "a − b"), Column("explainer", "explainer"), *COMPARISON_COLUMNS),
        rows,
        "Each model's own sample of neurons. [ ], p, pairs and P(a > b) as in the table of twins above;"
        f" p is not corrected for the {len(rows)} comparisons here.",
    )


def _twin_rows(
    results: RunResults,
    explainers: Sequence[str],
    metrics: Sequence[Metric],
    resamples: int,
    seed: int,
) -> tuple[tuple[Cell, ...], ...]:
    rows: list[tuple[Cell, ...]] = []
    for (a, b), explainer in product(results.twins(), explainers):
        for c in comparisons(a, b, explainer, metrics, resamples, seed):
            rows.append((f"{c.model_a} − {c.model_b}", c.explainer, *comparison_cells(c)))
    return tuple(rows)


def comparisons(
    a: ModelResults,
    b: ModelResults,
    explainer: str,
    metrics: Sequence[Metric],
    resamples: int,
    seed: int,
    paired: bool | None = None,
) -> Iterator[Comparison]:
    """Yield model a minus model b for each metric and policy for which there is a layer in which both have scores."""
    for metric, policy in product(metrics, POLICIES):
        with contextlib.suppress(InputError):  # there is no such layer
            yield compare_models(
                a.scores,
                b.scores,
                metric,
                explainer=explainer,
                policy=policy,
                paired=paired,
                resamples=resamples,
                seed=seed,
            )


def llm_difference_table(results: RunResults, resamples: int, seed: int) -> Table:
    """Return each explainer with a language model minus each without one, within one model.

    Both are compared on the same neurons.
    """
    rows: list[tuple[Cell, ...]] = []
    for m in results.principal:
        for metric, a, b, policy in product(METRICS, *_explainers(m), POLICIES):
            c = _paired(m.scores, a, b, metric, policy, resamples, seed)
            if c is not None:
                rows.append((m.name, f"{a} − {b}", *comparison_cells(c)))
    return Table(
        "llm_minus_llm_free",
        "Language model minus LLM-free",
        (Column("model", "model"), Column("explainers", "a − b"), *COMPARISON_COLUMNS),
        tuple(rows),
        "Difference × 100 between two explainers of the same neurons, on the same held-out excerpts: over the"
        " neurons for which both have a value (left out), or over all neurons selected for both (counted as"
        " chance, which is 0 for a correlation). [ ]: 95% bootstrap interval over neurons; p: two-sided test by"
        f" random signs of the neurons' differences, at least 1/{resamples + 1:,}, not corrected for the"
        f" {len(rows)} comparisons here.",
    )


def _paired(
    scores: ScoreTable,
    a: str,
    b: str,
    metric: Metric,
    policy: Policy,
    resamples: int,
    seed: int,
) -> Comparison | None:
    """Return explainer `a` minus `b` on the neurons of both; None if they have no neurons in common."""
    # `compare_models` compares two models under one explainer; an empty name for both makes it compare explainers
    sides = [scores.select(metric=metric, explainer=side).relabelled("") for side in (a, b)]
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
    """Return the explainers of a model with a language model, and those without."""
    by_llm = {e for of_set in m.llm_sets for e in of_set.explainers}
    without = {e for of_set in m.sets if not of_set.name for e in of_set.explainers}
    return sorted(by_llm), sorted(without)


def comparison_cells(c: Comparison) -> tuple[Cell, ...]:
    """Return the cells of a comparison, in the order of `COMPARISON_COLUMNS`."""
    effect = None if c.cohens_d is None else Interval(c.cohens_d, c.cohens_d_low, c.cohens_d_high)
    return (
        METRIC_NAMES[c.metric],
        POLICY_NAMES[c.policy],
        c.mean_a,
        c.mean_b,
        interval_cell(Interval(c.difference, c.low, c.high)),
        c.p_value,
        interval_cell(effect),
        c.superiority,
        "yes" if c.paired else "no",
        c.n_a,
        c.n_b,
    )
