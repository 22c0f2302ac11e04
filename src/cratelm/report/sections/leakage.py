"""The leakage audit's tables: documents in both, and passages that are nearly the same."""

from cratelm.report.cells import METRIC_NAMES
from cratelm.results.run_results import ModelResults, ResultSet, RunResults
from cratelm.text.table import Cell, Column, Table


def leakage(results: RunResults) -> Table:
    columns = (
        Column("model", "model"),
        Column("explained", "documents explained from", ",d"),
        Column("scored", "documents scored on", ",d"),
        Column("shared", "in both", ",d"),
    )
    rows = tuple(
        (found.label(m.name), audit["n_explained"], audit["n_scored"], len(audit["shared"]))
        for m in results.models
        for found in m.sets
        if (audit := found.audit) is not None
    )
    return Table(
        "leakage",
        "Documents",
        columns,
        rows,
        "From the document numbers that explanations and scores carry themselves, all neurons together.",
    )


def near_duplicates(results: RunResults) -> Table:
    """How much of what was scored on is nearly the same as what was explained from."""
    columns = (
        Column("model", "model"),
        Column("explained", "passages explained from", ",d"),
        Column("scored", "passages scored on", ",d"),
        Column("near_duplicates", "near-duplicates", ",d"),
        Column("percent", "% of those scored on", ".1f"),
        Column("threshold", "similarity from", ".2f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for m, found in _audited(results):
        near = found.near_duplicates
        n, scored = near["n_near_duplicates"], near["n_passages_scored"]
        share = 100 * n / scored if scored else None
        counts = (near["n_passages_explained"], scored, n, share)
        rows.append((found.label(m.name), *counts, near["threshold"]))
    return Table(
        "near_duplicates",
        "Near-duplicate passages",
        columns,
        tuple(rows),
        "Documents of the splits differ, their text may not: licences, tables, copied code. A passage is"
        " up to 64 tokens around an excerpt; it is a near-duplicate where the Jaccard similarity of its"
        " runs of 5 tokens with those of a passage that any neuron was explained from reaches the"
        " threshold. Near-duplicates stay in the scores above; the tables below say what they do.",
    )


def duplicate_effects(results: RunResults) -> Table:
    """What leaving near-duplicates out does to the means."""
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("metric", "metric"),
        Column("neurons", "neurons affected", ",d"),
        Column("records", "excerpts left out", ",d"),
        Column("mean_with", "mean ×\u00a0100 with", ".1f"),
        Column("mean_without", "without", ".1f"),
        Column("difference", "without − with", ".1f"),
    )
    rows: list[tuple[Cell, ...]] = []
    for m, found in _audited(results):
        for effect in found.near_duplicates["effects"]:
            with_, without = effect["mean_with"], effect["mean_without"]
            gap = None if with_ is None or without is None else without - with_
            names = (found.label(m.name), effect["explainer"], METRIC_NAMES[effect["metric"]])
            rows.append((*names, effect["n_neurons"], effect["n_records"], with_, without, gap))
    return Table(
        "duplicate_effects",
        "Scores without near-duplicates",
        columns,
        tuple(rows),
        "Over the neurons that were scored on at least one near-duplicate and have both scores: the mean as"
        " reported, and with those excerpts left out. Simulation metrics alone.",
    )


def duplicate_examples(results: RunResults) -> Table:
    columns = (
        Column("model", "model"),
        Column("fit_document", "document explained from", "d"),
        Column("held_out_document", "document scored on", "d"),
        Column("similarity", "similarity", ".2f"),
    )
    rows = tuple(
        (found.label(m.name), pair["fit_document"], pair["held_out_document"], pair["similarity"])
        for m, found in _audited(results)
        for pair in found.near_duplicates["examples"]
    )
    return Table(
        "duplicate_examples",
        "Pairs of near-duplicates",
        columns,
        rows,
        "The first few of each model, by their numbers in tokens/documents.parquet.",
    )


def _audited(results: RunResults) -> list[tuple[ModelResults, ResultSet]]:
    """Sets whose near-duplicates were looked for."""
    return [(m, found) for m in results.models for found in m.sets if found.near_duplicates]
