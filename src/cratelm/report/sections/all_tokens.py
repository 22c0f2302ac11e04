"""What the last token alone explains, and scores over all held-out tokens.

`cratelm score` measures both without a language model. A run of an earlier version, or one whose model cannot run again,
has neither: then nothing is shown.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cratelm.records import SIMULATION_METRICS, Metric, NeuronKey
from cratelm.report.cells import INTERVAL_NOTE, METRIC_NAMES, interval_cell, series_of
from cratelm.report.drawing import Figure, Panel, Series, cloud
from cratelm.results.run_results import ModelResults, RunResults
from cratelm.score.whole_summary import ALL_TOKENS
from cratelm.text.table import Cell, Column, Table

NOTE = (
    " Token share: fraction of the variance of a neuron's activation, over all held-out tokens, that its mean activation"
    " on the last token predicts; context share: the rest. Token entropy: 0 if a neuron fires on one token. Gain: score"
    " minus that of the look-up, which knows only the last token, paired over neurons. Average precision: of finding"
    " the highest 1% of a neuron's activations above 0; chance is the share of such tokens."
)
_SHARES = {
    "token_share": ("token share, % [95%]", ".1f", 100),
    "context_share": ("context share, % [95%]", ".1f", 100),
    "token_entropy": ("token entropy, nats [95%]", ".2f", 1),
}
"""heading, format and factor of each figure on the last token"""
_FIGURES = {
    "correlation": "correlation × 100 [95%]",
    "cosine": "cosine × 100",
    "precision_top": "average precision × 100, top 1%",
    "chance_top": "its chance",
    "precision_tenth": "average precision × 100, above a tenth",
    "chance_tenth": "its chance",
    "f1": "F1 × 100",
    "iou": "IoU × 100",
    "auc": "AUC × 100",
    "auc_hard": "AUC × 100, hard negatives",
}
"""heading of each figure over all held-out tokens"""
_GAINS = {ALL_TOKENS: "all tokens", **{m: METRIC_NAMES[m] for m in SIMULATION_METRICS}}
_DRAWN = 400
"""neurons per model in the figure: more make the page larger and the picture no clearer"""
_SEED = 0
Line = tuple[Column, Cell]
"""a line of the comparison, and its cell for one model"""


def tables(results: RunResults) -> list[Table]:
    """Return the tables of this section, which are empty if nothing was measured."""
    return [token_shares_table(results), all_tokens_table(results)]


def figures(results: RunResults) -> list[Figure | None]:
    """Return the figures of this section, with None for a figure without data."""
    return [context_share_figure(results)]


# ---- lines of the comparison ----------------------------------------------------------------------


def is_measured(results: RunResults) -> bool:
    """Return whether any model of the report has figures over all held-out tokens."""
    return any(m.all_tokens for m in results.models)


def share_lines(results: RunResults, m: ModelResults) -> list[Line]:
    """Return the lines on the last token; none if it was not measured."""
    if not is_measured(results):
        return []
    null, lines = results.null(m), []
    for name, (label, form, _) in _SHARES.items():
        lines += [
            (Column(name, label, form, "head"), _share(m, name)),
            (Column(f"{name}_init", "null: random init", form, "minor"), _share(null, name)),
        ]
        if name == "token_share" and _are_misled(results):
            lines += _median_lines(m, null)
    return lines


def _median_lines(m: ModelResults, null: ModelResults | None) -> list[Line]:
    """Return the lines next to the mean token share that a few neurons cannot move."""
    of_model = m.all_tokens.n_misled if m.all_tokens else None
    return [
        (Column("token_share_median", "median over neurons", ".1f", "minor"), median_share(m)),
        (
            Column("token_share_median_init", "median, random init", ".1f", "minor"),
            median_share(null),
        ),
        (Column("misled", "neurons below 0", ",d", "minor"), of_model),
    ]


def _are_misled(results: RunResults) -> bool:
    """Return whether any neuron of the report has a token share below 0."""
    return any(m.all_tokens and m.all_tokens.n_misled for m in results.models)


def median_share(m: ModelResults | None) -> Cell:
    """Return the median token share of a model in percent, with its interval."""
    median = m.all_tokens.token_share_median if m and m.all_tokens else None
    return interval_cell(median.mean, 100) if median else None


def gain_lines(results: RunResults, m: ModelResults, metric: Metric) -> list[Line]:
    """Return the line on the gain over the look-up under a metric; none if no model has it."""
    if not _have_gain(results, metric):
        return []
    column = Column(f"{metric}_gain", "gain over look-up", "+.1f", "minor")
    return [(column, _gain(m, results.explainer, metric))]


def score_lines(results: RunResults, m: ModelResults) -> list[Line]:
    """Return the lines on the scores over all held-out tokens; none if the explainer has none."""
    explainer, null = results.explainer, results.null(m)
    if all(_mean(of, explainer, "correlation") is None for of in results.models):
        return []

    def head(key: str, label: str, figure: str) -> Line:
        return Column(key, label, ".1f", "head"), _mean(m, explainer, figure)

    def minor(key: str, label: str, cell: Cell, form: str = ".1f") -> Line:
        return Column(key, label, form, "minor"), cell

    correlation = [
        head(ALL_TOKENS, "all tokens, correlation × 100 [95%]", "correlation"),
        minor(
            "all_tokens_shuffled",
            "null: shuffled explanations",
            _mean(m, explainer, "correlation", "shuffled"),
        ),
        minor("all_tokens_init", "null: random init", _mean(null, explainer, "correlation")),
    ]
    if _have_gain(results, ALL_TOKENS):
        own, of_null = (_gain(of, explainer, ALL_TOKENS) for of in (m, null))
        correlation += [
            minor("all_tokens_gain", "gain over look-up", own, "+.1f"),
            minor("all_tokens_gain_init", "gain, random init", of_null, "+.1f"),
        ]
    own, of_null = (_mean(of, explainer, "chance_top") for of in (m, null))
    return [
        *correlation,
        head("precision", "average precision × 100 [95%]", "precision_top"),
        minor("precision_chance", "chance", own, ".2f"),
        minor("precision_init", "null: random init", _mean(null, explainer, "precision_top")),
        minor("precision_init_chance", "chance, random init", of_null, ".2f"),
    ]


# ---- tables ---------------------------------------------------------------------------------------


def token_shares_table(results: RunResults) -> Table:
    """Return what the last token explains of each model, trained and untrained."""
    columns = (
        Column("model", "model"),
        *(Column(name, label, form) for name, (label, form, _) in _SHARES.items()),
        Column("token_share_median", "token share, median [95%]", ".1f"),
        Column("neurons", "neurons", ",d"),
        Column("constant", "constant", ",d"),
        Column("misled", "token share below 0", ",d"),
        Column("lowest", "lowest token share, %", ",.0f"),
        Column("tokens", "held-out tokens", ",d"),
    )
    rows = [
        (
            m.name,
            *(_share(m, name) for name in _SHARES),
            median_share(m),
            m.all_tokens.token_share.defined,
            m.all_tokens.token_share.undefined,
            m.all_tokens.n_misled,
            100 * min(m.token_shares.values(), default=np.nan),
            m.all_tokens.n_tokens,
        )
        for m in results.models
        if m.all_tokens is not None
    ]
    return Table(
        "token_shares",
        "What the last token explains",
        columns,
        tuple(rows),
        "Over all neurons of the model, explained or not. Token share: fraction of the variance of the activation, over"
        " all held-out tokens, that the mean activation on the last token predicts; the means are those of the fit"
        " split. Context share: the rest. Token entropy: of the share of the activation that falls on each token; 0 if"
        " a neuron fires on one token. Constant: neurons that do not vary on the held-out tokens, which have no token"
        " share. A token share has no lower bound: it is below 0 where the fit split misleads, and very low for a neuron"
        " that fired on a few tokens of the fit split and hardly on the held-out ones. A few such neurons can"
        " outweigh all others in the mean, and not in the median over neurons (mean over layers of the medians)."
        f" {INTERVAL_NOTE}",
    )


def all_tokens_table(results: RunResults) -> Table:
    """Return the scores over all held-out tokens of each model, explainer and control."""
    columns = (
        Column("model", "model"),
        Column("explainer", "explainer"),
        Column("explanations", "explanations"),
        *(
            Column(name, label, ".2f" if name.startswith("chance") else ".1f")
            for name, label in _FIGURES.items()
        ),
        *(
            Column(f"gain_{metric}", f"gain over look-up, {label}", "+.1f")
            for metric, label in _GAINS.items()
        ),
    )
    rows: list[tuple[Cell, ...]] = []
    for m in results.models:
        scores = m.all_tokens.scores if m.all_tokens else ()
        for explainer, control in dict.fromkeys((s.explainer, s.control) for s in scores):
            is_own = control == "none"
            means = (_mean(m, explainer, figure, control) for figure in _FIGURES)
            gains = (_gain(m, explainer, metric) if is_own else None for metric in _GAINS)
            rows.append((m.name, explainer, "own" if is_own else control, *means, *gains))
    return Table(
        "all_tokens",
        "Scores over all held-out tokens",
        columns,
        tuple(rows),
        "Excerpts that are chosen for their peak do not notice an explanation that is too broad; all tokens do"
        " (Oikarinen, Yan and Weng 2025, arXiv 2506.05774). Top 1%: tokens among the highest 1% of a neuron's activations"
        " above 0 on the fit split. Above a tenth: tokens above a tenth of its maximum on the fit split. Chance: the"
        " share of such tokens. F1 and IoU: of tokens above a tenth with those simulated at half the highest simulated"
        " value or more. AUC: of the same tokens; hard negatives are tokens with the id of such a token, on which the"
        " neuron is silent. Gain: score × 100 minus that of the look-up, paired over neurons."
        f" {INTERVAL_NOTE}",
    )


# ---- figure ---------------------------------------------------------------------------------------


def context_share_figure(results: RunResults) -> Figure | None:
    """Return each neuron's score over its context share, a panel per trained model with its untrained control.

    None if no model has both.
    """
    metric = results.metrics[0] if results.metrics else "top_and_random"
    panels: list[Panel] = []
    legend: list[Series] = []
    medians: list[str] = []
    for m in results.principal:
        clouds = [(series_of(m), _points(m, results.explainer, metric))]
        if null := results.null(m):
            # unlike elsewhere not in the colour of its model, since two clouds of one colour look like one
            series = Series(null.name, len(results.principal) + m.place, "init")
            clouds.append((series, _points(null, results.explainer, metric)))
        clouds = [(series, points) for series, points in clouds if len(points)]
        if clouds:
            panels.append(Panel(m.name, _drawn(clouds, METRIC_NAMES[metric])))
            legend += [series for series, _ in clouds]
            medians += [f"{s.label} {100 * np.median(points[:, 0]):.0f}%" for s, points in clouds]
    if not panels:
        return None
    return Figure(
        "context_share",
        "Score against what the last token leaves to explain",
        f"Each marker is a neuron: its score by {results.explainer} over its context share, the part of its variance over"
        " all held-out tokens that the last token does not explain. A neuron at the left is nearly a function of the last"
        " token: a list of tokens explains it, and a high score says no more than that. Only at the right does a high"
        " score need the context. Where the trained and the untrained model cover each other, the score does not tell"
        f" them apart. Median context share: {', '.join(medians)}. At most {_DRAWN} neurons per model are drawn, at"
        " random. A context share above 100%, for which the fit split misleads, is drawn at 100%.",
        tuple(panels),
        tuple(legend),
    )


def _points(m: ModelResults, explainer: str, metric: Metric) -> NDArray[np.float64]:
    """Return context share and score [n, 2] of the neurons that have both."""
    scores = m.scores.select(explainer=explainer, metric=metric, status="defined")
    columns = (scores.numbers(name).tolist() for name in ("layer", "index", "value"))
    points = [
        (1 - share, value)
        for layer, index, value in zip(*columns, strict=True)
        if (share := m.token_shares.get(NeuronKey(layer, index))) is not None
    ]
    return np.array(points, float).reshape(-1, 2)


def _drawn(
    clouds: Sequence[tuple[Series, NDArray[np.float64]]], metric: str
) -> Callable[[Axes], None]:
    """Return a function that draws clouds of points [n, 2], the first one on top, a sample of each."""
    rng = np.random.default_rng(_SEED)
    samples = [points[rng.permutation(len(points))[:_DRAWN]] for _, points in clouds]
    percent = [np.column_stack([100 * of[:, 0].clip(0, 1), 100 * of[:, 1]]) for of in samples]
    series = [series for series, _ in clouds]
    return cloud(series[::-1], percent[::-1], "context share, %", f"{metric} score × 100")


# ---- cells ----------------------------------------------------------------------------------------


def _share(m: ModelResults | None, name: str) -> Cell:
    """Return the mean of a figure on the last token, with its interval."""
    if m is None or m.all_tokens is None:
        return None
    return interval_cell(getattr(m.all_tokens, name).mean, _SHARES[name][2])


def _mean(m: ModelResults | None, explainer: str, figure: str, control: str = "none") -> Cell:
    """Return the mean of a figure over all held-out tokens × 100, with its interval."""
    if m is None or m.all_tokens is None:
        return None
    return interval_cell(m.all_tokens.mean(explainer, figure, control), 100)


def _gain(m: ModelResults | None, explainer: str, metric: str) -> Cell:
    """Return the mean gain over the look-up × 100, with its interval."""
    if m is None or m.all_tokens is None:
        return None
    return interval_cell(m.all_tokens.gain(explainer, metric), 100)


def _have_gain(results: RunResults, metric: str) -> bool:
    return any(_gain(m, results.explainer, metric) is not None for m in results.models)
