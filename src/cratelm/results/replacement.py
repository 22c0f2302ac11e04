"""Read the results of `cratelm replace` for the models of a run."""

from cratelm.errors import InputError
from cratelm.replace.store import (
    CurvePoint,
    ReplacementRow,
    ReplacementSummary,
    read_curve,
    read_replacement_summary,
)
from cratelm.runs import Run
from cratelm.runs.names import set_name, sets_of

ReplacementResults = ReplacementSummary


def read_replacement(run: Run, model: str) -> ReplacementResults | None:
    """Return the results of a model; None if it was not run on its explanations.

    MODEL@NAME names results of explanations that a language model read.
    """
    stage = run.stage("replacement", model)
    return None if stage.completion() is None else read_replacement_summary(stage.path)


def read_replacement_sets(run: Run, model: str) -> list[ReplacementResults]:
    """Return the results of a model in which language models simulated explanations, by name."""
    names = sets_of(run.models("replacement"), model)
    found = (read_replacement(run, set_name(model, name)) for name in names)
    return [of for of in found if of is not None]


def read_stored_explainer(run: Run, model: str) -> str:
    """Return the explainer on whose stored explanations the model loses the fewest nats with all layers replaced.

    Raises `InputError`, which says what to type, if the results are missing or stale, or if no explanations are stored.
    """
    stage = run.stage("replacement", model)
    stage.require("replace")
    summary = read_replacement_summary(stage.path)
    rows = [row for row in summary.rows if (row.layers, row.control) == ("all", "none")]
    stored = [row for row in rows if row.explainer in summary.simulators]
    if not stored:
        raise InputError(
            f"{stage.path} has no stored explanations with which all layers were replaced: type"
            f" `cratelm replace --run {run.path} --model {model} --force`"
        )
    return min(stored, key=lambda row: row.loss_replaced.value).explainer


def read_replacement_curve(run: Run, model: str) -> list[CurvePoint]:
    """Return the losses with only the best-explained neurons replaced; none if there are no results."""
    stage = run.stage("replacement", model)
    return [] if stage.completion() is None else read_curve(stage.path)


__all__ = [
    "CurvePoint",
    "ReplacementResults",
    "ReplacementRow",
    "read_replacement",
    "read_replacement_curve",
    "read_replacement_sets",
    "read_stored_explainer",
]
