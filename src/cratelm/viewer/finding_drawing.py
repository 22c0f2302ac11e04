"""The picture of a run's finding: a scale per model, as SVG whose places are percentages.

Text keeps its size on any screen, because the drawing has no view box: its height is fixed and its width is that of
the page.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from cratelm.records import Interval
from cratelm.results.finding import Finding, LossFigure, ScoreFigure
from cratelm.viewer.drawings import ticks

_ROW, _TOP, _BOTTOM = 62, 6, 24
"""pixels: height of a model's scale, space above the first, and space for the axis below the last"""
_LEFT, _RIGHT = 3.0, 94.0
"""percent of the width: ends of the axis"""
_MOST = 8
"""models in a picture"""


def finding_picture(finding: Finding) -> Markup:
    """Return the picture of a finding: losses, or scores; empty if it has neither."""
    if finding.losses:
        return _losses(finding.losses[:_MOST])
    return _scores(finding.scores[:_MOST]) if finding.scores else Markup("")


class _Axis:
    """Places on a horizontal axis, in percent of the width."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        share = (value - self.low) / max(self.high - self.low, 1e-9)
        return _LEFT + (_RIGHT - _LEFT) * min(1.0, max(0.0, share))

    def ticks(self, height: int) -> str:
        """Return grid lines with their values."""
        lines = []
        for value in ticks(self.low, self.high):
            x = self.at(value)
            lines.append(
                f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="{_TOP}" y2="{height - _BOTTOM + 4}"/>'
                f'<text class="axis" x="{x:.2f}%" y="{height - 6}" text-anchor="middle">{value:g}</text>'
            )
        return "".join(lines)


def _losses(rows: Sequence[LossFigure]) -> Markup:
    high = max(r.row.loss_mean.value for r in rows)
    low = min(r.row.loss_true.value for r in rows)
    axis = _Axis(max(0.0, low - 0.08 * (high - low)), high)
    height = _height(rows)
    parts, words = [axis.ticks(height)], []
    for number, r in enumerate(rows):
        y = _line(number)
        true, mean, replaced = r.row.loss_true, r.row.loss_mean, r.row.loss_replaced
        parts += [
            _name(r.label, y),
            f'<g class="c{r.place % 6}">',
            _bar("span", axis, mean.value, replaced.value, y),
            _bar("gap", axis, replaced.value, true.value, y),
            _tick(axis, mean.value, y),
            _interval(axis, replaced, y),
            _ring(axis, replaced.value, y),
            _dot(axis, true.value, y),
            "</g>",
            _value(axis, true.value, y + 22, f"{true.value:.2f}", "middle"),
            _value(axis, replaced.value, y - 12, f"{replaced.value:.2f}", "start"),
            _value(axis, mean.value, y + 22, f"{mean.value:.2f}", "middle"),
        ]
        words.append(
            f"{r.label}: {true.value:.2f} with its own codes, {replaced.value:.2f} on its explanations,"
            f" {mean.value:.2f} with codes at their means"
        )
    return _drawing(height, f"loss in nats per token. {'; '.join(words)}", parts)


def _scores(rows: Sequence[ScoreFigure]) -> Markup:
    values = [v.value for r in rows for v in (r.own, r.look_up, r.untrained) if v is not None]
    axis = _Axis(min(0.0, *values), max(100.0, *values))
    height = _height(rows)
    parts, words = [axis.ticks(height)], []
    for number, r in enumerate(rows):
        y = _line(number)
        parts += [_name(r.label, y), f'<g class="c{r.place % 6}">']
        told = [f"{r.label}: {r.own.value:.1f}"]
        if r.untrained is not None:
            parts += [_bar("span", axis, r.untrained.value, r.own.value, y), _tick(axis, r.untrained.value, y)]  # fmt: skip
            told.append(f"untrained {r.untrained.value:.1f}")
        if r.look_up is not None:
            parts.append(_ring(axis, r.look_up.value, y))
            told.append(f"look-up of the last token {r.look_up.value:.1f}")
        parts += [_interval(axis, r.own, y), _dot(axis, r.own.value, y), "</g>"]
        parts.append(_value(axis, r.own.value, y - 12, f"{r.own.value:.1f}", "middle"))
        if r.untrained is not None:
            parts.append(_value(axis, r.untrained.value, y + 22, f"{r.untrained.value:.1f}", "middle"))  # fmt: skip
        words.append(", ".join(told))
    return _drawing(height, f"mean scores × 100. {'; '.join(words)}", parts)


def _drawing(height: int, label: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="finding" width="100%" height="{height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _height(rows: Sequence[object]) -> int:
    return _TOP + _ROW * len(rows) + _BOTTOM


def _line(number: int) -> int:
    """Return the height of a model's scale, in pixels from the top."""
    return _TOP + _ROW * number + 32


def _name(label: str, y: int) -> str:
    return f'<text class="name" x="0" y="{y - 14}">{escape(label)}</text>'


def _value(axis: _Axis, value: float, y: int, text: str, anchor: str) -> str:
    return f'<text x="{axis.at(value):.2f}%" y="{y}" text-anchor="{anchor}">{text}</text>'


def _bar(kind: str, axis: _Axis, a: float, b: float, y: int) -> str:
    low, high = sorted((axis.at(a), axis.at(b)))
    return f'<rect class="{kind}" x="{low:.2f}%" y="{y - 4}" width="{high - low:.2f}%" height="8"/>'


def _tick(axis: _Axis, value: float, y: int) -> str:
    x = axis.at(value)
    return f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y - 9}" y2="{y + 9}"/>'


def _ring(axis: _Axis, value: float, y: int) -> str:
    return f'<circle class="ring" cx="{axis.at(value):.2f}%" cy="{y}" r="7.5"/>'


def _dot(axis: _Axis, value: float, y: int) -> str:
    return f'<circle class="own" cx="{axis.at(value):.2f}%" cy="{y}" r="4.5"/>'


def _interval(axis: _Axis, of: Interval, y: int) -> str:
    if of.low is None or of.high is None:
        return ""
    low, high = axis.at(of.low), axis.at(of.high)
    return f'<line class="mark" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'
