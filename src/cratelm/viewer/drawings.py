"""Small drawings as SVG, with classes and attributes only, for pages that forbid inline styles.

The curve of scores by layer is drawn as in the report. Histograms are written here without matplotlib, which takes
100 times as long: they are on the pages of single neurons, of which there are thousands. See also `layer_map`.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from cratelm.report.drawing import Series, scores_panel
from cratelm.results.views import NeuronView, RunCard, ScoreHistogram
from cratelm.runs.names import NULLS
from cratelm.text.display import printable

_PAD = 30


def scores_by_layer(run: RunCard, metric: str) -> Markup:
    """Return the mean score by layer of every trained model with its interval, and of its null controls, dotted.

    The colours are those of the table of models. Empty without scores.
    """
    trained = enumerate(card for card in run.models if not card.null_of)
    cards = [(number, card) for number, card in trained if card.metric(metric)]
    series, lines = [], []
    for number, card in cards:
        nulls = [(run.null(card, kind), kind) for kind in NULLS]
        for model, null in ((card, ""), *nulls):
            scores = model.metric(metric, card.explainer) if model else None
            if scores and scores.by_layer:
                series.append(Series(card.name, number, null))
                lines.append(scores.by_layer)
    if not lines:
        return Markup("")
    label = f"{metric} by layer: {', '.join(card.name for _, card in cards)}"
    return scores_panel("", series, lines).svg(f"run-{run.key.encode().hex()}-{metric}", label)


def ticks(bottom: float, top: float) -> list[float]:
    """Return round values between the ends of an axis, at most seven."""
    step = 10 ** math.floor(math.log10(max(top - bottom, 1e-9)))
    step = next(s for s in (step / 2, step, step * 2, step * 5) if (top - bottom) / s <= 6)
    first = math.ceil(bottom / step)
    return [round(i * step, 10) for i in range(first, math.floor(top / step) + 1)]


def score_histograms(sides: Sequence[ScoreHistogram | None], metric: str) -> Markup:
    """Return overlaid histograms of the scores of each side."""
    scored = [(number, s) for number, s in enumerate(sides) if s is not None and s.defined]
    if not scored:
        return Markup("")
    width, height = 320, 130
    top = max(max(s.shares) for _, s in scored) * 1.1
    parts = []
    for value in ticks(0.0, 100 * top):
        y = 8 + (height - 28) * (1 - value / (100 * top))
        parts.append(
            f'<line class="grid" x1="{_PAD}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_PAD - 5}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in (0, 25, 50, 75, 100):
        x = _PAD + (width - _PAD - 10) * value / 100
        parts.append(f'<text x="{x:.1f}" y="{height - 5}" text-anchor="middle">{value}</text>')
    for number, side in scored:
        step = (width - _PAD - 10) / len(side.shares)
        points = []
        for bin_, share in enumerate(side.shares):
            y = 8 + (height - 28) * (1 - share / top)
            x = _PAD + bin_ * step
            points += [f"{x:.1f},{y:.1f}", f"{x + step:.1f},{y:.1f}"]
        parts.append(f'<polyline class="line c{number}" points="{" ".join(points)}"/>')
    return _svg(width, height, f"distribution of {metric} scores of both layers", "".join(parts))


def histogram(view: NeuronView) -> Markup:
    """Return the histogram of a neuron's activation over tokens, with a logarithmic axis of counts."""
    counts = view.histogram
    if not counts or not max(counts):
        return Markup("")
    width, height = 340, 120
    top = math.log10(max(counts)) + 0.15
    step = (width - _PAD - 8) / len(counts)
    bars = []
    for bin_, count in enumerate(counts):
        if count:
            bar = (height - 26) * (math.log10(count) + 0.15) / top
            x, y = _PAD + bin_ * step, height - 18 - bar
            bars.append(
                f'<rect class="column" x="{x:.1f}" y="{y:.1f}" width="{step * 0.9:.2f}" height="{bar:.1f}"/>'
            )
    labels = []
    for power in range(math.floor(math.log10(max(counts))) + 1):
        y = height - 18 - (height - 26) * (power + 0.15) / top
        labels.append(
            f'<text x="{_PAD - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_short(10**power)}</text>'
        )
    for end, value in ((0.0, view.histogram_low), (1.0, view.histogram_high)):
        x = _PAD + end * (width - _PAD - 8)
        anchor = "start" if end == 0 else "end"
        beyond = " or more" if end and view.statistics.get("maximum", value) > value else ""
        labels.append(
            f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{value:.3g}{beyond}</text>'
        )
    n_tokens = sum(counts)
    return _svg(
        width,
        height,
        f"histogram of the activation over {n_tokens:,} tokens, logarithmic",
        "".join(bars + labels),
    )


def _short(n: int) -> str:
    return f"{n // 1_000_000}M" if n >= 1_000_000 else f"{n // 1000}k" if n >= 1000 else str(n)


def shortened(text: str, most: int) -> str:
    """Return `text` in printable form on one line, cut to `most` of its characters."""
    return printable(text) if len(text) <= most else printable(text[: most - 1]) + "…"


def _svg(width: int, height: int, title: str, inside: str) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{inside}</svg>'
    )
