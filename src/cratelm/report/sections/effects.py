"""Tables and a figure of the results of `cratelm effects` and `cratelm intervene`.

A model without these results has no row.
"""

from collections.abc import Mapping, Sequence

from cratelm.records import Interval
from cratelm.report.cells import estimate_cell, interval_cell, series_of
from cratelm.report.drawing import Figure, Panel, Series, by_layer
from cratelm.results.run_results import RunResults
from cratelm.steer.store import EffectsSummary, InterventionSummary, LayerEffects
from cratelm.text.table import Cell, Column, Table

_CONTROL_NAMES = {
    "none": "own explanation",
    "shuffled": "another neuron's explanation",
    "random": "another neuron steered",
}
_PANELS = (
    ("size", "Size of the change", "mean |change of the loss|, nats per token"),
    ("raises", "Neurons that lower the loss", "fraction of neurons, beyond 2 se"),
    ("agreement", "First-order and exact effect", "rank correlation over the vocabulary"),
)


def tables(results: RunResults) -> list[Table]:
    """Return the tables of this section; a table has no rows if no model was measured."""
    return [effects_table(results.effects), interventions_table(results.interventions)]


def figures(results: RunResults) -> list[Figure | None]:
    """Return the figure of this section; None if no model was measured."""
    series = {m.name: series_of(m) for m in results.models}
    return [effects_figure(results.effects, series)]


def effects_table(effects: Sequence[EffectsSummary]) -> Table:
    """Return the effects of neurons, with a row per model and layer."""
    columns = (
        Column("model", "model"),
        Column("layer", "layer", "d"),
        Column("neurons", "neurons", ",d"),
        Column("dead", "dead", ",d"),
        Column("loss", "loss, nats per token", ".4f"),
        Column("size", "mean |change| without one neuron", ".5f"),
        Column("firing_rise", "mean change where it fires", ".5f"),
        Column("raises", "raise the loss, %", ".0f"),
        Column("lowers", "lower the loss, %", ".0f"),
        Column("agreement", "first-order and exact effect, rank correlation", ".2f"),
        Column("overlap", "most promoted in both, %", ".0f"),
        Column("named", "own tokens promoted", ".2f"),
        Column("named_shuffled", "another neuron's tokens promoted", ".2f"),
    )
    rows = tuple(_effects_row(m, layer) for m in effects for layer in m.layers)
    replaced_by = "its mean" if effects and effects[0].ablation == "mean" else "0"
    return Table(
        "effects",
        "Effect of single neurons on the output",
        columns,
        rows,
        f"Change: loss with a neuron set to {replaced_by} at every token, minus the loss without this edit, on"
        " the same held-out tokens. Dead neurons are excluded, and counted. Raise, lower: neurons whose removal"
        " raises or lowers the loss by more than two standard errors over documents; by chance, about 2% of"
        " neurons without any effect would appear in each column. First-order effect: the neuron's column passed"
        " through the last norm and the unembedding, compared with the exact change of the logits where the"
        " neuron fires. Own tokens promoted: probability that a token on which the neuron fires is promoted more"
        " than another token (0.5: no relation); the last column is the same for the tokens of another neuron."
        " Tied embeddings raise both: compare with the untrained model. [ ]: 95% bootstrap interval over neurons.",
    )


def _effects_row(of_model: EffectsSummary, layer: LayerEffects) -> tuple[Cell, ...]:
    return (
        of_model.model,
        layer.layer,
        layer.neurons,
        layer.dead,
        estimate_cell(of_model.loss),
        interval_cell(layer.size),
        interval_cell(layer.firing_rise),
        interval_cell(layer.raises, 100),
        interval_cell(layer.lowers, 100),
        interval_cell(layer.agreement),
        interval_cell(layer.overlap, 100),
        interval_cell(layer.named),
        interval_cell(layer.named_shuffled),
    )


def interventions_table(interventions: Sequence[InterventionSummary]) -> Table:
    """Return the intervention scores, with a row per model, judge and control."""
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("judge", "judge"),
        Column("control", "control"),
        Column("neurons", "neurons", ",d"),
        Column("mean", "steered text chosen", ".3f"),
        Column("kl", "strength, KL in nats per token", ".3f"),
        Column("none", "undefined / dead / failed"),
    )
    rows = [
        (
            scoring.model,
            scoring.explainer,
            scoring.judge,
            _CONTROL_NAMES[c.control],
            scoring.n_neurons,
            interval_cell(c.mean),
            interval_cell(scoring.kl) if c.control == "none" else None,
            f"{c.undefined:,} / {c.dead:,} / {c.failed:,}",
        )
        for scoring in interventions
        for c in scoring.controls
    ]
    return Table(
        "interventions",
        "Does steering change the text as the explanation says?",
        columns,
        tuple(rows),
        "A language model reads the explanation of a neuron and two continuations of the same text, one of them"
        " with the neuron set to its maximum, in both orders. Shown is the mean probability that it chooses the"
        " steered continuation. A judge that cannot tell them apart is at 0.5, or away from 0.5 if it prefers"
        " steered or plain text. Therefore compare a model's first row with the other two: the same"
        " continuations with another neuron's explanation, and continuations with another neuron steered equally"
        " strongly. [ ]: 95% bootstrap interval over neurons.",
    )


def effects_figure(
    effects: Sequence[EffectsSummary], series: Mapping[str, Series]
) -> Figure | None:
    """Return size of effects, neurons that lower the loss and agreement by layer; None if no model was measured."""
    if not effects:
        return None
    drawn = [series[m.model] for m in effects]

    def panel(key: str, title: str, y: str) -> Panel:
        lines = [_line(m, key) for m in effects]
        return Panel(title, by_layer(drawn, lines, y, log=key == "size"))

    return Figure(
        "effects",
        "Effect of single neurons on the output",
        "Left: mean absolute change of the held-out loss without one neuron. Middle: fraction of neurons whose"
        " removal raises the loss by more than two standard errors. Right: rank correlation, over the vocabulary,"
        " of a neuron's first-order effect with its exact effect. Bars: 95% bootstrap interval over neurons.",
        tuple(panel(*labels) for labels in _PANELS),
        tuple(drawn),
    )


def _line(effects: EffectsSummary, key: str) -> dict[int, Interval]:
    """Return a measure by layer, for the layers that have it."""
    return {layer.layer: v for layer in effects.layers if (v := getattr(layer, key)) is not None}
