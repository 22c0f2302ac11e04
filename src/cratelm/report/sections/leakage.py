"""Tables of the leakage audit: documents explained from and scored on, and near-duplicate passages."""

from cratelm.report.cells import METRIC_NAMES
from cratelm.results.run_results import ResultSet, RunResults
from cratelm.score.duplicates import DuplicateAudit
from cratelm.text.table import Cell, Column, Table


def tables(results: RunResults) -> list[Table]:
    """Return the tables of this section."""
    makers = (documents_table, near_duplicates_table, effects_table, examples_table)
    return [make(results) for make in makers]


def documents_table(results: RunResults) -> Table:
    """Return the numbers of documents explained from, scored on, and both."""
    columns = (
        Column("model", "model"),
        Column("explained", "documents explained from", ",d"),
        Column("scored", "documents scored on", ",d"),
        Column("shared", "in both", ",d"),
    )
    rows = tuple(
        (of_set.label, audit.n_explained, audit.n_scored, len(audit.shared))
        for m in results.models
        for of_set in m.sets
        if (audit := of_set.audit) is not None
    )
    return Table(
        "leakage",
        "Documents",
        columns,
        rows,
        "Counted over all neurons, from the document numbers recorded with each explanation and score.",
    )


def near_duplicates_table(results: RunResults) -> Table:
    """Return the fraction of scored passages that are near-duplicates of passages explained from."""
    columns = (
        Column("model", "model"),
        Column("explained", "passages explained from", ",d"),
        Column("scored", "passages scored on", ",d"),
        Column("near_duplicates", "near-duplicates", ",d"),
        Column("percent", "% of passages scored on", ".1f"),
        Column("threshold", "similarity threshold", ".2f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for of_set, near in _audited(results):
        n, scored = near.n_near_duplicates, near.n_passages_scored
        share = 100 * n / scored if scored else None
        counts = (near.n_passages_explained, scored, n, share)
        rows.append((of_set.label, *counts, near.threshold))
    return Table(
        "near_duplicates",
        "Near-duplicate passages",
        columns,
        tuple(rows),
        "Different documents may contain the same text, such as licences, tables or copied code. A passage is up"
        " to 64 tokens around an excerpt. It is a near-duplicate if the Jaccard similarity between its sequences"
        " of 5 tokens and those of a passage from which any neuron was explained reaches the threshold."
        " The scores above include near-duplicates; the table below shows their effect.",
    )


def effects_table(results: RunResults) -> Table:
    """Return the mean scores with and without near-duplicates."""
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("metric", "metric"),
        Column("neurons", "neurons affected", ",d"),
        Column("records", "excerpts excluded", ",d"),
        Column("mean_with", "mean ×\u00a0100 with", ".1f"),
        Column("mean_without", "without", ".1f"),
        Column("difference", "without − with", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for of_set, near in _audited(results):
        for e in near.effects:
            with_, without = e.mean_with, e.mean_without
            gap = None if with_ is None or without is None else without - with_
            names = (of_set.label, e.explainer, METRIC_NAMES[e.metric])
            rows.append((*names, e.n_neurons, e.n_records, with_, without, gap))
    return Table(
        "duplicate_effects",
        "Scores without near-duplicates",
        columns,
        tuple(rows),
        "Means over the neurons that were scored on at least one near-duplicate and have a score with and without"
        " these excerpts. Simulation metrics only.",
    )


def examples_table(results: RunResults) -> Table:
    """Return a few pairs of near-duplicates."""
    columns = (
        Column("model", "model"),
        Column("fit_document", "document explained from", "d"),
        Column("held_out_document", "document scored on", "d"),
        Column("similarity", "similarity", ".2f"),
    )
    rows = tuple(
        (of_set.label, pair.fit_document, pair.held_out_document, pair.similarity)
        for of_set, near in _audited(results)
        for pair in near.examples
    )
    return Table(
        "duplicate_examples",
        "Pairs of near-duplicates",
        columns,
        rows,
        "The first few pairs of each model. Numbers are rows of tokens/documents.parquet.",
    )


def _audited(results: RunResults) -> list[tuple[ResultSet, DuplicateAudit]]:
    """Return the sets whose near-duplicates were searched for, with the result."""
    sets = [of_set for m in results.models for of_set in m.sets]
    return [(s, s.near_duplicates) for s in sets if s.near_duplicates is not None]
