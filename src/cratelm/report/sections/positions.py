"""Where in their sequences the top excerpts of neurons peak, and a warning where they crowd at one position."""

from collections.abc import Iterator, Mapping
from typing import Any

from cratelm.records import Split
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.text.table import Cell, Column, Table

SENSIBLE = 0.001
"""largest fraction of a model's neurons that may crowd without a warning. SmolLM2 run without a begin token has 0.5%,
and none if the first 4 tokens are left out (docs/pretrained.md)"""
SENSIBLE_SHARE = 0.05
"""largest fraction of all top excerpts that may peak at one of the first positions without a warning"""
_SPLITS: tuple[Split, ...] = ("fit", "held_out")


def tables(results: RunResults) -> list[Table]:
    """Return the table of this section; it has no rows for harvests of version 0.1.0."""
    columns = (
        Column("model", "model"),
        Column("split", "split"),
        Column("begin_token", "begin token", "d"),
        Column("skip_first", "first tokens left out", "d"),
        Column("excerpts", "top excerpts", ",d"),
        Column("first", "% at the first position", ".2f"),
        Column("neurons", "neurons", ",d"),
        Column("crowded", "crowded", ",d"),
        Column("crowded_first", "at the first position", ",d"),
    )
    rows: list[tuple[Cell, ...]] = []
    for model, split, top in _measured(results):
        harvest = model.completions["activations"].results
        begun = harvest.get("begin_token"), harvest.get("skip_first", 0)
        counts = top["neurons"], top["crowded"], top["crowded_first"]
        share = 100 * top["first_shares"][0]
        rows.append((model.name, split, *begun, top["excerpts"], share, *counts))
    return [
        Table(
            "top_positions",
            "Positions of top excerpts",
            columns,
            tuple(rows),
            "Positions in the sequences of the harvest, after the begin token and the first tokens that are left"
            " out. A neuron is crowded if half or more of its top excerpts, of at least 5, have their peak at the"
            " same position.",
        )
    ]


def warnings(results: RunResults) -> list[str]:
    """Return a line for each model whose top excerpts crowd at one position more than is sensible."""
    lines = []
    for model, split, top in _measured(results):
        share = max(top["first_shares"], default=0.0)
        if top["crowded"] <= SENSIBLE * top["neurons"] and share <= SENSIBLE_SHARE:
            continue
        place = "" if top["position"] is None else f", most at position {top['position']}"
        lines.append(
            f"{model.name}, {split}: {top['crowded']:,} of {top['neurons']:,} neurons have half or more of their top"
            f" excerpts at one position{place}; up to {share:.1%} of all top excerpts are at one of the first positions."
            f" Harvest again with a begin token (--begin-token) or without the first tokens (--skip-first)."
        )
    return lines


def _measured(results: RunResults) -> Iterator[tuple[ModelResults, Split, Mapping[str, Any]]]:
    """Yield where the top excerpts of each model and split peak, as its harvest recorded it."""
    for model in results.models:
        harvest = model.completions.get("activations")
        recorded = harvest.results.get("top_positions", {}) if harvest else {}
        for split in _SPLITS:
            if split in recorded:
                yield model, split, recorded[split]
