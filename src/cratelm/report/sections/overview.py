"""Tables for runs with several models, such as those of `cratelm demo --families`: one line each, and any two compared."""

from itertools import combinations

from cratelm.records import Interval
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, interval_cell, mean_cell
from cratelm.report.sections.all_tokens import median_share
from cratelm.report.sections.comparisons import COMPARISON_COLUMNS, comparison_cells, comparisons
from cratelm.report.sections.models import trained_figures
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.stats.scores import Comparison
from cratelm.stats.seeds import holm
from cratelm.text.table import Cell, Column, Table


def tables(results: RunResults, resamples: int, seed: int) -> list[Table]:
    """Return the tables of this section; without rows if there are no more than two models."""
    return [overview_table(results), pairs_table(results, resamples, seed)]


def overview_table(results: RunResults) -> Table:
    """Return one line for each model, with its main figures, in the order of the loss."""
    metrics = results.metrics[:1]
    columns = [
        Column("model", "model"),
        Column("parameters", "parameters", ",d"),
        Column("loss", "loss [95%]", ".2f"),
        Column("nats_lost", "lost on explanations", ".2f"),
        Column("carried", "codes carry", ".2f"),
        Column("recovered", "recovered, %", ".0f"),
        Column("token_share", "token share, %", ".0f"),
        Column("token_share_median", "its median", ".0f"),
    ]
    for metric in metrics:
        columns += [
            Column(metric, f"{METRIC_NAMES[metric]} × 100", ".1f"),
            Column(f"{metric}_init", "untrained", ".1f"),
            Column(f"{metric}_shuffled", "shuffled", ".1f"),
        ]
    several = results.principal if len(results.principal) > 2 else ()
    rows = [_overview_row(results, m) for m in several]
    rows.sort(key=lambda row: row[2].value if isinstance(row[2], Interval) else float("inf"))
    return Table(
        "overview",
        "All models",
        tuple(columns),
        tuple(rows),
        "Loss: nats per token on held-out text. Lost on explanations: loss with all codes replaced by what the model's"
        " best explanations predict, minus its loss. Codes carry: loss with the codes at their means, minus its loss."
        " Recovered: the part of that which the explanations give back. Intervals of these are over documents."
        f" Scores: explainer {results.explainer}; untrained: the same model before training; shuffled: explanations of"
        f" other neurons. {INTERVAL_NOTE}",
    )


def _overview_row(results: RunResults, m: ModelResults) -> tuple[Cell, ...]:
    row = m.replacement.headline if m.replacement else None
    share = m.all_tokens.token_share.mean if m.all_tokens else None
    null = results.null(m)
    cells: list[Cell] = [
        m.name,
        trained_figures(m).get("parameters"),
        interval_cell(row.loss_true) if row else None,
        interval_cell(row.nats_lost) if row else None,
        interval_cell(row.carried) if row else None,
        interval_cell(row.recovered_mean, 100) if row else None,
        interval_cell(share, 100),
        median_share(m),
    ]
    for metric in results.metrics[:1]:
        cells += [
            mean_cell(m.find(results.explainer, metric)),
            mean_cell(null.find(results.explainer, metric)) if null else None,
            mean_cell(m.find(results.explainer, metric, "shuffled")),
        ]
    return tuple(cells)


def pairs_table(results: RunResults, resamples: int, seed: int) -> Table:
    """Return each model minus each other one under the first metric, with p-values adjusted for all pairs."""
    found: list[Comparison] = []
    are_twins = len(results.principal) == 2 and results.twins()  # which have tables of their own
    for a, b in combinations(() if are_twins else results.principal, 2):
        compared = comparisons(a, b, results.explainer, results.metrics[:1], resamples, seed)
        found += [c for c in compared if c.policy == "leave_out"]
    adjusted = holm([c.p_value for c in found]) if found else []
    rows = [
        (f"{c.model_a} − {c.model_b}", *comparison_cells(c), float(p))
        for c, p in zip(found, adjusted, strict=True)
    ]
    return Table(
        "pairs",
        "Any two models",
        (
            Column("models", "a − b"),
            *COMPARISON_COLUMNS,
            Column("p_adjusted", "p, Holm", ".2g"),
        ),
        tuple(rows),
        f"Explainer {results.explainer}. Columns as in the table of twins: difference × 100 over the layers in which both"
        f" have scores; p by {resamples:,} permutations within layers; p, Holm: adjusted for these {len(rows)} pairs. The"
        " models were trained once each. Any two layers or neurons stand side by side in the browser, page Compare.",
    )
