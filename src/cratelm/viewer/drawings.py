"""Small drawings as SVG: classes and attributes only, for pages that allow no inline style."""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from cratelm.results.views import (
    ExcerptView,
    MapPoint,
    NeuronView,
    RunCard,
    ScoreHistogram,
    Value,
)
from cratelm.text.display import printable, visible

_Scale = Callable[[float], float]
"""from a value to a place in the drawing"""
_PAD = 30
_TOLD = 1024
"""neurons of a layer whose explanations a map carries: of more they would be most of the page"""


def scores_by_layer(run: RunCard, metric: str) -> Markup:
    """Mean by layer of every trained model with its interval; dotted: the same model untrained."""
    shown = enumerate(c for c in run.models if not c.null_of)
    found = [(place, c, own) for place, c in shown if (own := c.metric(metric))]
    layers = sorted({n for _, _, own in found for n in own.by_layer})
    if not layers:
        return Markup("")
    width, height = 320, 170
    means = [v for _, _, own in found for v in own.by_layer.values()]
    bottom = min(0.0, *(v.mean for v in means))
    highest = max(v.high or v.mean for v in means)
    top = max(100.0 if highest > 60 else highest * 1.15, 1.0)

    def x(layer: float) -> float:
        place = layers.index(int(layer)) if layer in layers else 0
        return _PAD + (width - _PAD - 10) * (place + 0.5) / len(layers)

    def y(value: float) -> float:
        return 8 + (height - 28) * (top - value) / (top - bottom)

    parts = [_axes(width, height, layers, x, y, (bottom, top))]
    for number, (place, card, own) in enumerate(found):
        shift = (number - (len(found) - 1) / 2) * 5
        null = run.null(card)
        untrained = null.metric(metric) if null else None
        if untrained:
            parts.append(_line(untrained.by_layer, x, y, f"c{place} null", shift, bars=False))
        parts.append(_line(own.by_layer, x, y, f"c{place}", shift, bars=True))
    title = f"{metric} by layer: {', '.join(c.name for _, c, _ in found)}"
    return _svg(width, height, title, "".join(parts))


def _axes(
    width: int,
    height: int,
    layers: Sequence[int],
    x: _Scale,
    y: _Scale,
    ends: tuple[float, float],
) -> str:
    lines = []
    for value in _ticks(*ends):
        at = y(value)
        lines.append(
            f'<line class="grid" x1="{_PAD}" x2="{width - 8}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        lines.append(f'<text x="{_PAD - 5}" y="{at + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    every = max(1, math.ceil(len(layers) / 12))
    for layer in layers[::every]:
        lines.append(
            f'<text x="{x(layer):.1f}" y="{height - 5}" text-anchor="middle">{layer}</text>'
        )
    return "".join(lines)


def _ticks(bottom: float, top: float) -> list[float]:
    step = 10 ** math.floor(math.log10(max(top - bottom, 1e-9)))
    step = next(s for s in (step / 2, step, step * 2, step * 5) if (top - bottom) / s <= 6)
    first = math.ceil(bottom / step)
    return [round(i * step, 10) for i in range(first, math.floor(top / step) + 1)]


def _line(
    by_layer: Mapping[int, Value], x: _Scale, y: _Scale, kind: str, shift: float, *, bars: bool
) -> str:
    points = [(x(n) + shift, v) for n, v in sorted(by_layer.items())]
    path = " ".join(f"{a:.1f},{y(v.mean):.1f}" for a, v in points)
    parts = [f'<polyline class="line {kind}" points="{path}"/>']
    for a, v in points:
        if bars and v.low is not None and v.high is not None:
            ends = f'y1="{y(v.low):.1f}" y2="{y(v.high):.1f}"'
            parts.append(f'<line class="bar {kind}" x1="{a:.1f}" x2="{a:.1f}" {ends}/>')
        parts.append(f'<circle class="dot {kind}" cx="{a:.1f}" cy="{y(v.mean):.1f}" r="2.6"/>')
    return "".join(parts)


def spread(sides: Sequence[ScoreHistogram | None], metric: str) -> Markup:
    """Share of each side's neurons by score, as outlines over each other."""
    known = [(place, s) for place, s in enumerate(sides) if s is not None and s.defined]
    if not known:
        return Markup("")
    width, height = 320, 130
    top = max(max(s.shares) for _, s in known) * 1.1
    parts = []
    for value in _ticks(0.0, 100 * top):
        y = 8 + (height - 28) * (1 - value / (100 * top))
        parts.append(
            f'<line class="grid" x1="{_PAD}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_PAD - 5}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in (0, 25, 50, 75, 100):
        x = _PAD + (width - _PAD - 10) * value / 100
        parts.append(f'<text x="{x:.1f}" y="{height - 5}" text-anchor="middle">{value}</text>')
    for place, side in known:
        step = (width - _PAD - 10) / len(side.shares)
        points = []
        for number, share in enumerate(side.shares):
            y = 8 + (height - 28) * (1 - share / top)
            x = _PAD + number * step
            points += [f"{x:.1f},{y:.1f}", f"{x + step:.1f},{y:.1f}"]
        parts.append(f'<polyline class="line c{place}" points="{" ".join(points)}"/>')
    return _svg(width, height, f"spread of {metric} scores of both layers", "".join(parts))


def histogram(view: NeuronView) -> Markup:
    """Counts of tokens over equal bins of the activation, logarithmic; the last bin is open."""
    counts = view.histogram
    if not counts or not max(counts):
        return Markup("")
    width, height = 340, 120
    top = math.log10(max(counts)) + 0.15
    step = (width - _PAD - 8) / len(counts)
    bars = []
    for place, count in enumerate(counts):
        if count:
            tall = (height - 26) * (math.log10(count) + 0.15) / top
            x, y = _PAD + place * step, height - 18 - tall
            bars.append(
                f'<rect class="column" x="{x:.1f}" y="{y:.1f}" width="{step * 0.9:.2f}" height="{tall:.1f}"/>'
            )
    labels = []
    for power in range(math.floor(math.log10(max(counts))) + 1):
        y = height - 18 - (height - 26) * (power + 0.15) / top
        labels.append(
            f'<text x="{_PAD - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_short(10**power)}</text>'
        )
    for where, value in ((0.0, view.histogram_low), (1.0, view.histogram_high)):
        x = _PAD + where * (width - _PAD - 8)
        anchor = "start" if where == 0 else "end"
        beyond = " or more" if where and view.statistics.get("maximum", value) > value else ""
        labels.append(
            f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{value:.3g}{beyond}</text>'
        )
    rows = sum(counts)
    return _svg(
        width,
        height,
        f"histogram of the activation over {rows:,} tokens, logarithmic",
        "".join(bars + labels),
    )


def _short(n: int) -> str:
    return f"{n // 1_000_000}M" if n >= 1_000_000 else f"{n // 1000}k" if n >= 1000 else str(n)


def layer_map(points: Sequence[MapPoint], address: Callable[[int], str]) -> Markup:
    """A point a neuron, a link where it has an address; shade: its score.

    On hover its number and score, and in a layer of up to `_TOLD` neurons its explanation.
    """
    width = height = 560
    dots = []
    for p in points:
        x, y = 12 + p.x * (width - 24), 12 + p.y * (height - 24)
        level = 0 if p.score is None else max(0, min(10, round(p.score / 10)))
        label = f"{p.index} ({'no score' if p.score is None else f'{p.score:.0f}'})"
        if len(points) <= _TOLD:
            label = escape(f"{label}: {visible_line(p.label, 100) or 'not explained'}")
        dot = (
            f'<circle class="point m{level}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{label}</title></circle>"
        )
        where = address(p.index)
        dots.append(f'<a href="{where}" tabindex="-1">{dot}</a>' if where else dot)
    return _svg(width, height, f"map of {len(points):,} neurons", "".join(dots), kind="map")


def card(view: NeuronView) -> str:
    """A neuron as an SVG picture that stands alone: explanation, scores and its strongest excerpts."""
    shown = [e for e in view.excerpts if e.kind == "top"][:5]
    lines = [
        f'<text x="24" y="38" class="t">{escape(f"{view.model} · layer {view.layer} · neuron {view.index}")}</text>'
    ]
    told = view.explanations[0] if view.explanations else None
    text = visible_line(told.text, 104) if told and told.text else "not explained"
    lines.append(f'<text x="24" y="62" class="e">{escape(text)}</text>')
    scores = ", ".join(
        f"{s.metric.replace('_', '-')} {'–' if s.value is None else f'{s.value:.1f}'}"
        for s in (told.scores if told else ())
    )
    lines.append(f'<text x="24" y="84" class="s">{escape(scores or "no scores")}</text>')
    for place, excerpt in enumerate(shown):
        lines.append(_card_line(excerpt, 112 + 30 * place))
    height = 112 + 30 * len(shown) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" viewBox="0 0 860 {height}">'
        "<style>text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:14px;fill:#1b1f24}"
        ".t{font-family:system-ui,sans-serif;font-weight:600;font-size:18px}"
        ".e{font-family:system-ui,sans-serif}.s{font-family:system-ui,sans-serif;fill:#57606a;font-size:13px}</style>"
        f'<rect width="860" height="{height}" fill="#ffffff"/>{"".join(lines)}</svg>'
    )


def _card_line(excerpt: ExcerptView, y: int) -> str:
    """Tokens around the peak, 8.43 units a character of a monospaced font of 14."""
    wide, x, parts = 8.43, 24.0, []
    for token in excerpt.true[max(0, excerpt.peak - 14) : excerpt.peak + 12]:
        text = visible(token.text)
        length = wide * len(text)
        if x + length > 840:
            break
        if token.level:
            opacity = 0.08 + 0.07 * token.level
            parts.append(
                f'<rect x="{x:.1f}" y="{y - 15}" width="{length:.1f}" height="21" fill="#e8590c" fill-opacity="{opacity:.2f}"/>'
            )
        parts.append(
            f'<text x="{x:.1f}" y="{y}" textLength="{length:.1f}" xml:space="preserve">{escape(text)}</text>'
        )
        x += length
    return "".join(parts)


def visible_line(text: str, most: int) -> str:
    """`text` on one line, at most so many of its characters."""
    return printable(text) if len(text) <= most else printable(text[: most - 1]) + "…"


def _svg(width: int, height: int, title: str, inside: str, kind: str = "chart") -> Markup:
    role = "group" if kind == "map" else "img"
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="{role}" aria-label="{escape(title)}">{inside}</svg>'
    )
