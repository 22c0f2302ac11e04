"""Tables and a figure of models that run on the explanations of their neurons (`cratelm replace`)."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from cratelm.records import Interval
from cratelm.report.cells import interval_cell, series_of
from cratelm.report.drawing import INK, Figure, Panel, Series
from cratelm.results.replacement import CurvePoint, ReplacementResults, ReplacementRow
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.text.table import Cell, Column, Table

COLUMNS = (
    Column("loss_true", "loss on held-out tokens, nats [95%]", ".3f", "head"),
    Column("loss_replaced", "loss on its explanations", ".3f", "head"),
    Column("replaced_explainer", "explanations", "", "minor"),
    Column("carried", "nats that the codes carry", ".3f", "minor"),
    Column("given_back", "nats given back", ".3f", "minor"),
)
"""columns of the cells that `comparison_cells` returns"""
COMPARISON_NOTE = (
    " The losses on held-out tokens and on explanations, and the nats of codes and explanations, have intervals over"
    " documents: all codes of the model are replaced by what its best explanations predict."
)
_REFERENCES = (
    ("mean", "codes at their means"),
    ("zero", "codes at 0"),
)


def comparison_cells(m: ModelResults) -> tuple[Cell, ...]:
    """Return the figures of a model on its best explanations, all layers replaced; empty cells without results."""
    row = m.replacement.headline if m.replacement else None
    if row is None:
        return (None,) * len(COLUMNS)
    return (
        interval_cell(row.loss_true),
        interval_cell(row.loss_replaced),
        row.explainer,
        interval_cell(row.carried),
        interval_cell(row.given_back),
    )


def tables(results: RunResults) -> list[Table]:
    """Return the tables of this section; a table has no rows if no model was run on explanations."""
    return [replacement_table(results), references_table(results), runnable_table(results)]


def figures(results: RunResults) -> list[Figure | None]:
    """Return the figure of this section; None if no model was run on explanations."""
    return [replacement_figure(results)]


def _measured(results: RunResults) -> list[tuple[ModelResults, ReplacementResults]]:
    return [(m, m.replacement) for m in results.models if m.replacement is not None]


def replacement_table(results: RunResults) -> Table:
    """Return the losses and what follows from them, with a row per model, set of layers, explainer and control."""
    sets = [(m, of) for m in results.models for of in m.replacement_sets]
    digits = ".5f" if sets else ".3f"  # a few of the neurons make small differences
    columns = (
        Column("model", "model"),
        Column("layers", "layers"),
        Column("explainer", "explainer"),
        Column("loss_true", "loss of the model", ".3f"),
        Column("loss_replaced", "loss on explanations", ".3f"),
        Column("nats_lost", "nats lost", digits),
        Column("carried", "the codes carry", digits),
        Column("carried_zero", "to codes at 0", digits),
        Column("given_back", "given back", digits),
        Column("recovered_mean", "recovered of the means, %", ".1f"),
        Column("recovered_unigram", "of the unigram model, %", ".1f"),
    )
    measured = [*_measured(results), *sets]
    rows = [(m.name, *_row(row, of)) for m, of in measured for row in of.rows]
    n = dict.fromkeys((of.n_tokens, of.n_documents) for _, of in measured)
    text = " and ".join(f"{tokens:,} tokens of {documents} documents" for tokens, documents in n)
    return Table(
        "replacement",
        "Models that run on their explanations",
        columns,
        tuple(rows),
        "The codes of these layers are replaced by what explanations predict from the tokens, and the rest of the"
        f" model runs on. Nats per token on held-out text ({text}); [ ]: 95% bootstrap interval over"
        " documents, and differences are paired by document. The codes carry: loss with the codes at their fit means,"
        " minus loss of the model. Given back: loss with the codes at their means, minus loss on explanations."
        " Recovered: given back / carried; and the same with the loss of a unigram model in place of the means."
        " Shuffled: each neuron is replaced by what the explanation of another neuron predicts."
        " Read all of them together: where a residual stream passes round the codes, little is lost because the codes"
        " matter little." + (_OF_SETS if sets else ""),
    )


_OF_SETS = (
    " Rows that name a number of neurons: a language model explained these, and all others stay what the model"
    " computes. On fewer tokens, the explanations are simulated by a language model (explainer/simulator); the other"
    " explainers are measured on the same neurons and tokens, and the codes carry what these neurons carry."
)


def _row(row: ReplacementRow, of: ReplacementResults) -> tuple[Cell, ...]:
    return (
        f"{of.n_replaced} neurons" if of.simulator else row.layers,
        row.explainer + (", shuffled" if row.control == "shuffled" else ""),
        interval_cell(row.loss_true),
        interval_cell(row.loss_replaced),
        interval_cell(row.nats_lost),
        interval_cell(row.carried),
        interval_cell(row.carried_zero),
        interval_cell(row.given_back),
        interval_cell(row.recovered_mean, 100),
        interval_cell(row.recovered_unigram, 100),
    )


def references_table(results: RunResults) -> Table:
    """Return the losses without any explanation: n-gram models of the same tokens, and codes at their means and at 0."""
    rows: list[tuple[Cell, ...]] = []
    for m, of in _measured(results):
        name = {0: "unigram model", 1: "bigram model"}
        rows += [
            (
                m.name,
                name.get(n.depth, f"n-gram model, {n.depth} tokens of context"),
                interval_cell(n.loss),
            )
            for n in of.ngrams
        ]
        row = of.headline
        if row is not None:
            rows += [
                (m.name, text, interval_cell(getattr(row, f"loss_{by}")))
                for by, text in _REFERENCES
            ]
        if of.reconstructed is not None:
            rows.append(
                (
                    m.name,
                    "true latents, without the autoencoders' error",
                    interval_cell(of.reconstructed),
                )
            )
    return Table(
        "replacement_references",
        "Losses without explanations",
        (
            Column("model", "model"),
            Column("of", "loss of"),
            Column("loss", "nats per token", ".3f"),
        ),
        tuple(rows),
        "On the same held-out tokens. N-gram models are made from the fit tokens that the explanations are made from.",
    )


def runnable_table(results: RunResults) -> Table:
    """Return which fraction of each model can run on its explanations."""
    budgets = sorted({r.nats for _, of in _measured(results) for r in of.runnable})
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        *(Column(f"within_{b:g}", f"neurons within {b:g} nats, %", ".0f") for b in budgets),
    )
    rows = []
    for m, of in _measured(results):
        for explainer in dict.fromkeys(r.explainer for r in of.runnable):
            by_budget = {r.nats: 100 * r.fraction for r in of.runnable if r.explainer == explainer}
            rows.append((m.name, explainer, *(by_budget.get(b) for b in budgets)))
    return Table(
        "replacement_runnable",
        "How much of a model can run on its explanations",
        columns,
        tuple(rows),
        "Fraction of the neurons that are replaced, the best-explained first, before the loss rises by more. Neurons are"
        " ranked on half of the documents, and the loss is measured on the other half.",
    )


def replacement_figure(results: RunResults) -> Figure | None:
    """Return the losses of the models, and the curves over the best-explained neurons; None without results."""
    measured = [(m, of.headline) for m, of in _measured(results) if of.headline is not None]
    if not measured:
        return None
    series = [series_of(m) for m, _ in measured]
    panels = [Panel("Loss", _losses([row for _, row in measured if row], series))]
    curves = [
        (s, [p for p in m.replacement_curve if p.explainer == row.explainer])
        for s, (m, row) in zip(series, measured, strict=True)
        if row is not None
    ]
    if any(points for _, points in curves):
        panels.append(Panel("Nats lost over neurons replaced", _curves(curves)))
    return Figure(
        "replacement",
        "Models that run on their explanations",
        "Left: loss of the model, on its explanations, and with all codes at their means, each with its 95% interval"
        " over documents. Right: loss above that of the model with only the best-explained neurons replaced.",
        tuple(panels),
        tuple(series),
    )


def _losses(rows: Sequence[ReplacementRow], series: Sequence[Series]) -> Callable[[Axes], None]:
    names = ("loss_true", "loss_replaced", "loss_mean")

    def draw(axes: Axes) -> None:
        for number, (row, s) in enumerate(zip(rows, series, strict=True)):
            shift = 0.3 * ((number + 0.5) / len(rows) - 0.5)
            losses: list[Interval] = [getattr(row, name) for name in names]
            style = {**s.style(), "linestyle": "none"}
            bars = [
                [of.value - (of.value if of.low is None else of.low) for of in losses],
                [(of.value if of.high is None else of.high) - of.value for of in losses],
            ]
            at = [place + shift for place in range(len(names))]
            axes.errorbar(at, [of.value for of in losses], bars, capsize=2, **style)
        axes.set(ylabel="nats per token", xticks=range(len(names)), xlim=(-0.5, len(names) - 0.5))
        axes.set_xticklabels(["model", "on explanations", "at means"])

    return draw


def _curves(
    curves: Sequence[tuple[Series, Sequence[CurvePoint]]],
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for s, points in curves:
            ordered = sorted(points, key=lambda p: p.fraction)
            axes.plot(
                [100 * p.fraction for p in ordered],
                [p.nats_lost.value for p in ordered],
                **s.style(),
            )
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.set(xlabel="neurons replaced, %", ylabel="nats lost per token")

    return draw
