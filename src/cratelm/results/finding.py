"""The finding of a run in one sentence, with its figures: for the browser's overview, the report and the demo.

With results of `cratelm replace`, it is the loss of the models when they run on their explanations; without them,
how well the neurons are explained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cratelm.records import METRICS, SIMULATION_METRICS, Interval
from cratelm.replace.store import ReplacementRow
from cratelm.results.run_summary import run_card
from cratelm.results.views import ModelCard, RunCard
from cratelm.runs import Run
from cratelm.runs.names import is_variant

_NAMES = {"crate": "CRATE", "gpt2": "GPT-2"}
_MOST = 3
"""models of a sentence; a picture shows more"""


@dataclass(frozen=True)
class LossFigure:
    """Losses of one model, nats per token."""

    model: str
    label: str
    """`CRATE`, `GPT-2`, or the name of the model if these are ambiguous"""
    place: int
    """number of the model among the trained ones: its colour"""
    row: ReplacementRow


@dataclass(frozen=True)
class ScoreFigure:
    """Mean scores of one model's explanations, x 100."""

    model: str
    label: str
    place: int
    own: Interval
    look_up: Interval | None
    """of a look-up of the last token alone; None if it was not scored, or if it is the explainer itself"""
    untrained: Interval | None
    """of the untrained model; None if it was not scored"""


_Figure = TypeVar("_Figure", LossFigure, ScoreFigure)


@dataclass(frozen=True)
class Finding:
    """What a run shows, in one sentence; either `losses` or `scores` is empty."""

    sentence: str
    losses: tuple[LossFigure, ...] = ()
    scores: tuple[ScoreFigure, ...] = ()
    metric: str = ""
    """of `scores`"""
    explainer: str = ""
    """of `scores`; explainers differ between models if it is empty"""


def read_finding(run: Run) -> Finding | None:
    """Return the finding of a run directory; see `finding`. Results that cannot be read count as missing."""
    return finding(run_card("", run))


def finding(card: RunCard) -> Finding | None:
    """Return the finding of a run, None if nothing is scored.

    Models whose scores, or losses on explanations, are stale are left out; null controls are only references. The
    sentence is about the first twins, or about up to three models if there are no twins.
    """
    trained = [m for m in card.models if not m.null_of]
    replaced = [
        (place, m, m.replaced)
        for place, m in enumerate(trained)
        if m.replaced is not None and not _is_stale(m, "replacement")
    ]
    if replaced:
        labels = _labels([m for _, m, _ in replaced])
        rows = [LossFigure(m.name, labels[m.name], place, row) for place, m, row in replaced]
        return Finding(_loss_sentence(_mentioned(rows, card)), losses=tuple(rows))
    models = [(place, m) for place, m in enumerate(trained) if not _is_stale(m, "scores")]
    metrics = [m for m in (*SIMULATION_METRICS, *METRICS) if any(c.metric(m) for _, c in models)]
    if not metrics:
        return None
    return _of_scores(card, models, metrics[0])


def _of_scores(
    card: RunCard, models: Sequence[tuple[int, ModelCard]], metric: str
) -> Finding | None:
    labels = _labels([m for _, m in models if _mean(m, metric)])
    rows = []
    for place, m in models:
        own, null = _mean(m, metric), card.null(m)
        if own is None:
            continue
        of_metric = m.metric(metric)
        look_up = of_metric.look_up if of_metric else None
        untrained = (
            _mean(null, metric, m.explainer) if null and not _is_stale(null, "scores") else None
        )
        rows.append(ScoreFigure(m.name, labels[m.name], place, own, look_up, untrained))
    if not rows:
        return None
    explainers = {m.explainer for _, m in models if m.name in labels}
    explainer = next(iter(explainers)) if len(explainers) == 1 else ""
    sentence = _score_sentence(_mentioned(rows, card))
    return Finding(sentence, scores=tuple(rows), metric=metric, explainer=explainer)


def _is_stale(card: ModelCard, stage: str) -> bool:
    return f"{stage}/{card.name}" in card.stale_stages


def _mean(card: ModelCard, metric: str, explainer: str = "") -> Interval | None:
    of_metric = card.metric(metric, explainer)
    return of_metric.mean if of_metric else None


def _labels(models: Sequence[ModelCard]) -> dict[str, str]:
    """Return the short label of each model: `CRATE` or `GPT-2` if it is the only one of these models, else its name.

    Variants, such as crate-tssa-2l and gpt2-solu-2l, have their own names.
    """
    families = [m.family for m in models]
    return {
        m.name: _NAMES[m.family]
        if families.count(m.family) == 1 and m.family in _NAMES and not is_variant(m.name)
        else m.name
        for m in models
    }


def _mentioned(rows: Sequence[_Figure], card: RunCard) -> list[_Figure]:
    """Return the rows of the first twins; without twins, the first rows."""
    by_name = {row.model: row for row in rows}
    for row in rows:
        twin = by_name.get(card.twin(row.model))
        if twin is not None:
            return [row, twin]
    return list(rows[:_MOST])


def _loss_sentence(rows: Sequence[LossFigure]) -> str:
    losses = [
        f"{r.label}{' reaches a loss of' if n == 0 else ''} {r.row.loss_replaced.value:.2f}"
        f" ({r.row.loss_true.value:.2f} without)"
        for n, r in enumerate(rows)
    ]
    carried = _listed([f"{r.row.carried.value:.2f}" for r in rows])
    given_back = _listed([f"{r.row.given_back.value:.2f}" for r in rows])
    whose = "its" if len(rows) == 1 else "their"
    return (
        f"On {whose} explanations {_listed(losses)}; the codes carry {carried} nats, the explanations"
        f" give back {given_back} of {'it' if len(rows) == 1 else 'them'}."
    )


def _score_sentence(rows: Sequence[ScoreFigure]) -> str:
    values = [f"{r.own.value:.1f}" for r in rows]
    if len(rows) == 2:
        a, b = rows
        start = (
            f"{a.label}'s neurons are explained {_compared(a.own, b.own)} {b.label}'s:"
            f" a score of {values[0]} against {values[1]}"
        )
    else:
        scores = "a score" if len(rows) == 1 else "scores"
        names = _listed([r.label for r in rows])
        start = f"The neurons of {names} are explained with {scores} of {_listed(values)}"
    for subject, of in (
        ("untrained, they reach", [r.untrained for r in rows]),
        ("a look-up of the last token alone reaches", [r.look_up for r in rows]),
    ):
        present = [f"{value.value:.1f}" for value in of if value is not None]
        if len(present) == len(rows):
            start += f"; {subject} {_listed(present)}"
    return f"{start}."


def _compared(a: Interval, b: Interval) -> str:
    """Return how `a` compares with `b` in words; where the intervals overlap, neither is called better."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return "better than" if a.value > b.value else "worse than"
    if a.low > b.high:
        return "better than"
    return "worse than" if a.high < b.low else "about as well as"


def _listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
