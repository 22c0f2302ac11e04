"""What `cratelm effects` and `cratelm intervene` measured, read from their files for the report.

`steer/MODEL/summary.json` and `logit_effects.parquet` hold the effects, `steer/MODEL@NAME/summary.json` an
intervention scoring of the model (formats: `docs/steering.md`). A model without them has no row.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cratelm.records import Estimate, NeuronId
from cratelm.report.cells import interval_cell
from cratelm.report.drawing import Figure, Panel, Series, by_layer
from cratelm.runs import Run
from cratelm.text.table import Cell, Column, Table

_NAMES = {
    "none": "own explanation",
    "shuffled": "another neuron's explanation",
    "random": "another neuron steered",
}
_PANELS = (
    ("size", "Size of the change", "mean |change of the loss|, nats a token"),
    ("raises", "Neurons that the loss needs", "part that raise it, beyond 2 se"),
    ("agreement", "First order and exact", "rank correlation over the vocabulary"),
)


@dataclass(frozen=True)
class LogitEffect:
    """The tokens that a neuron promotes and suppresses most where it fires, strongest first."""

    promoted: tuple[str, ...]
    promoted_values: tuple[float, ...]
    """logits, less the mean over the vocabulary"""
    suppressed: tuple[str, ...]
    suppressed_values: tuple[float, ...]
    activation: float
    """mean activation at the tokens that it was measured at"""
    n_positions: int


def promoted(folder: Path, neuron: NeuronId, kind: str = "exact") -> LogitEffect | None:
    """The effect of one neuron, from the folder `steer/MODEL`; `kind` may be `first_order`.

    None where it was not measured: no such file, another neuron, a dead one.
    """
    path = folder / "logit_effects.parquet"
    if not path.is_file():
        return None
    wanted = [("layer", "=", neuron.layer), ("index", "=", neuron.index), ("kind", "=", kind)]
    rows = pq.read_table(path, filters=wanted).to_pylist()
    if not rows or rows[0]["site"] != neuron.site:
        return None
    row = rows[0]
    return LogitEffect(
        promoted=tuple(row["promoted"]),
        promoted_values=tuple(row["promoted_values"]),
        suppressed=tuple(row["suppressed"]),
        suppressed_values=tuple(row["suppressed_values"]),
        activation=row["activation"],
        n_positions=row["n_positions"],
    )


def effects_table(run: Run, models: Sequence[str]) -> Table | None:
    """A row a model and layer; None where none of the models was measured."""
    found = _effects(run, models)
    if not found:
        return None
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("neurons", "neurons", ",d"),
        Column("dead", "dead", ",d"),
        Column("loss", "loss, nats a token", ".4f"),
        Column("size", "mean |change| without one neuron", ".5f"),
        Column("firing_rise", "mean change where it fires", ".5f"),
        Column("raises", "raise the loss, %", ".0f"),
        Column("lowers", "lower it, %", ".0f"),
        Column("agreement", "first order and exact, rank correlation", ".2f"),
        Column("overlap", "promoted most by both, %", ".0f"),
        Column("named", "own tokens promoted", ".2f"),
        Column("named_shuffled", "another neuron's", ".2f"),
    )
    rows = tuple(
        _effects_row(name, told, layer) for name, told in found for layer in told["layers"]
    )
    put = "its mean" if found[0][1]["ablation"] == "mean" else "0"
    return Table(
        "effects",
        "Effect of single neurons on the output",
        columns,
        rows,
        f"Change: loss with a neuron put to {put} at every token, less the loss with it, on the same"
        " held-out tokens; dead neurons are left out and counted. Raise, lower: changes beyond two"
        " standard errors, which are over documents; of neurons without any effect about 2% would do"
        " either. First order: the neuron's column through the last norm and the unembedding, against"
        " the exact change of the logits where it fires. Own tokens promoted: chance that a token the"
        " neuron fires on is promoted more than another (0.5: no relation); beside it the same of"
        " another neuron's tokens. Tied embeddings favour it: compare with the untrained model."
        " [ ]: 95% bootstrap interval over neurons.",
    )


def _effects_row(name: str, told: dict[str, Any], layer: dict[str, Any]) -> tuple[Cell, ...]:
    loss = told["loss"]
    plain = loss["value"] if loss["error"] is None else Estimate(loss["value"], loss["error"])
    return (
        name,
        layer["layer"],
        layer["neurons"],
        layer["dead"],
        plain,
        _cell(layer["size"]),
        _cell(layer["firing_rise"]),
        _cell(layer["raises"], 100),
        _cell(layer["lowers"], 100),
        _cell(layer["agreement"]),
        _cell(layer["overlap"], 100),
        _cell(layer["named"]),
        _cell(layer["named_shuffled"]),
    )


def interventions_table(run: Run, models: Sequence[str]) -> Table | None:
    """A row a model, judge and control; None where no model has an intervention scoring."""
    found = _interventions(run, models)
    if not found:
        return None
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("judge", "judge"),
        Column("control", "control"),
        Column("neurons", "neurons", ",d"),
        Column("mean", "steered text named", ".3f"),
        Column("kl", "strength, KL in nats a token", ".3f"),
        Column("none", "undefined / dead / failed"),
    )
    rows = [
        (
            name,
            told["explainer"],
            told["judge"],
            _NAMES[control["control"]],
            told["n_neurons"],
            _cell(control["mean"]),
            _cell(told["kl"]) if control["control"] == "none" else None,
            f"{control['undefined']:,} / {control['dead']:,} / {control['failed']:,}",
        )
        for name, told in found
        for control in told["controls"]
    ]
    return Table(
        "interventions",
        "Does steering change the text as the explanation says?",
        columns,
        tuple(rows),
        "A language model is given the explanation of a neuron and two continuations of one text, with"
        " the neuron set to its maximum and without, in both orders: mean probability that it names"
        " the steered one. A judge that cannot tell is at 0.5, or where its liking for steered or plain"
        " text puts it: read a model's first row against the other two, which are another neuron's"
        " explanation of the same continuations, and continuations with another neuron steered as"
        " strongly. [ ]: 95% bootstrap interval over neurons.",
    )


def effects_figure(run: Run, models: Sequence[tuple[str, Series]]) -> Figure | None:
    """Ablation, share of neurons that matter and agreement by layer, a line a model; None without any."""
    series = dict(models)
    found = _effects(run, list(series))
    if not found:
        return None
    drawn = [series[name] for name, _ in found]

    def panel(key: str, title: str, y: str) -> Panel:
        points = [_points(told["layers"], key) for _, told in found]
        return Panel(title, by_layer(drawn, points, y, log=key == "size"))

    return Figure(
        "effects",
        "Effect of single neurons on the output",
        "Left: mean absolute change of the held-out loss without one neuron. Middle: part of the neurons"
        " without which the loss is higher by more than two standard errors. Right: rank correlation"
        " over the vocabulary of the first-order reading of a neuron with its exact effect. Bars: 95%"
        " bootstrap interval over neurons.",
        tuple(panel(*one) for one in _PANELS),
        tuple(drawn),
    )


def _points(
    layers: Sequence[dict[str, Any]], key: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Layers that have the figure, its values, and the ends of its bars."""
    known = [layer for layer in layers if layer[key] is not None]
    values = [layer[key]["value"] for layer in known]

    def end(name: str) -> list[float]:
        ends = (layer[key][name] for layer in known)
        return [v if e is None else e for v, e in zip(values, ends, strict=True)]

    return [layer["layer"] for layer in known], values, end("low"), end("high")


def _cell(found: dict[str, Any] | None, by: float = 1) -> Cell:
    """A mean with its interval, times `by`."""
    if found is None:
        return None
    value, low, high = (
        None if found[k] is None else by * found[k] for k in ("value", "low", "high")
    )
    return interval_cell(value, low, high)


def _effects(run: Run, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """What is measured of each model, in the order given."""
    there = set(run.models("steer"))
    return [(name, _summary(run, name)) for name in models if name in there]


def _interventions(run: Run, models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    there = run.models("steer")
    return [
        (model, _summary(run, name))
        for model in models
        for name in there
        if name.startswith(f"{model}@")
    ]


def _summary(run: Run, name: str) -> dict[str, Any]:
    return json.loads((run.stage("steer", name).path / "summary.json").read_text())
