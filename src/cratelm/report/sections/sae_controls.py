"""Latents of sparse autoencoders compared with random controls: a frozen part, or a model that is not trained.

Controls after Korznikov et al. 2026, "Sanity Checks for Sparse Autoencoders" (arXiv 2602.14111).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cratelm.report.cells import DERIVED_NULLS, without_score
from cratelm.report.sections.autoencoders import latent_models
from cratelm.report.sections.comparisons import (
    COMPARISON_COLUMNS,
    comparison_cells,
    comparisons,
)
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.runs import Completion
from cratelm.runs.names import NullKind
from cratelm.text.table import Cell, Column, Table

_FROZEN = {
    "decoder": "decoder frozen",
    "soft-decoder": "decoder near its start",
    "encoder": "encoder frozen",
}
"""by the option `--freeze` of `cratelm sae train`: what is random"""
_NULL_MODELS: dict[NullKind, str] = {
    "init": "untrained model",
    **{kind: words for kind, (words, _) in DERIVED_NULLS.items()},
}
"""by kind of null control: what is random"""


def tables(results: RunResults, resamples: int, seed: int) -> list[Table]:
    """Return the differences of latents and their random controls; without rows if there are none."""
    rows: list[tuple[Cell, ...]] = []
    for pair in _controls(results, latent_models(results)):
        sides = (pair.latents, pair.control)
        for c in comparisons(*sides, results.explainer, results.metrics, resamples, seed, False):
            own = [m.find(results.explainer, c.metric) for m in sides]
            counts = [without_score(s.counts) if s else None for s in own]
            rows.append((f"{c.model_a} − {c.model_b}", pair.kind, *comparison_cells(c), *counts))
    table = Table(
        "sae_controls",
        f"Latents minus those of random controls, explainer {results.explainer}",
        (
            Column("models", "a − b"),
            Column("control", "random in b"),
            *COMPARISON_COLUMNS,
            Column("none_a", "undefined / dead / failed a"),
            Column("none_b", "undefined / dead / failed b"),
        ),
        tuple(rows),
        "b: an autoencoder trained in the same way as a, in which a part stays random, or on a model that is not"
        " trained (Korznikov et al. 2026, arXiv 2602.14111). Where the difference is about 0, the score says nothing"
        " about what the training of a has found. Difference × 100 over the layers in which both have scores; [ ], p and"
        f" P(a > b) as in the table of twins; p is not corrected for the {len(rows)} comparisons here.",
    )
    return [table]


@dataclass(frozen=True, eq=False)
class _Control:
    """Latents and a random control for them."""

    latents: ModelResults
    control: ModelResults
    kind: str
    """what is random, in words"""


def _controls(results: RunResults, latents: Sequence[ModelResults]) -> Iterator[_Control]:
    """Yield the latents with each of their controls: autoencoders with a frozen part, and those on a null model."""
    trainings = {m.name: _training_of(results, m) for m in latents}
    frozen = {m: done.config["freeze"] for m, done in trainings.items() if done and done.config.get("freeze")}  # fmt: skip
    for m in latents:
        if m.name in frozen:
            continue
        for other in latents:
            if other.name in frozen and _differ_in_freeze(trainings[m.name], trainings[other.name]):
                yield _Control(m, other, _FROZEN[frozen[other.name]])
        for kind, words in _NULL_MODELS.items():
            null = results.null(m, kind)
            if null is not None:
                yield _Control(m, null, words)


def _training_of(results: RunResults, m: ModelResults) -> Completion | None:
    """Return the record of the training of latents; None if the run did not train them."""
    label = m.completions["activations"].input_stages.get("sae")
    return next((done for done in results.side_stages if done.label == label), None)


def _differ_in_freeze(a: Completion | None, b: Completion | None) -> bool:
    """Return whether two trainings, on the same model and tokens, differ in the frozen part alone."""
    if a is None or b is None:
        return False
    configs = [{k: v for k, v in c.config.items() if k not in ("freeze", "name")} for c in (a, b)]
    return configs[0] == configs[1] and a.inputs == b.inputs
