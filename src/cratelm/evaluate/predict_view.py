"""Predictions as a page and as a figure.

The page opens from disk, loads nothing, and everything in it is escaped. The figure has each model's
shaded text and its predictions after the end; without dates, the same text gives the same bytes.
"""

import bisect
import math
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cratelm.evaluate.predictions import PredictedText, Prediction
from cratelm.text.display import laid_out, visible

LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9)
"""lowest probability of each shade from 1 on; below the first a token has no shade"""


def level(probability: float) -> int:
    """Return the shade of a token, 0 to 7, in steps of a factor of about 3."""
    return bisect.bisect_right(LEVELS, probability)


class ShownUnit(NamedTuple):
    """The tokens of a text that are shown as one: several if they make a character together."""

    text: str
    probability: float
    """probability that the model gave to all of its tokens, in their order"""
    positions: range


def shown_units(prediction: Prediction) -> list[ShownUnit]:
    """Return the units of a text; a token without a text of its own belongs to the one before it."""
    steps = prediction.steps
    starts = [at for at, step in enumerate(steps) if at == 0 or step.text or not step.token]
    units = []
    for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True):
        probability = math.prod(step.probability for step in steps[start:stop])
        units.append(ShownUnit(steps[start].text, probability, range(start, stop)))
    return units


def percent(probability: float) -> str:
    """Return a probability as a rounded percentage: 38%, 2.1%, 0.03%."""
    value = 100 * probability
    return "<0.01%" if value < 0.01 else f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f}%"


def page(text: PredictedText, predictions: Sequence[Prediction]) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        visible=visible,
        laid_out=laid_out,
        level=level,
        percent=percent,
        width=_width,
        units=shown_units,
    )
    template = resources.files("cratelm.evaluate") / "predict.html.j2"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=f"Next-token predictions of {_listed([p.model for p in predictions])}",
        text=text,
        predictions=predictions,
        groups=_groups(predictions),
        levels=LEVELS,
    )


def _groups(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Return the models grouped by how they tokenize the text, so that their tokens line up."""
    groups: dict[tuple[str, ...], list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(tuple(s.token for s in prediction.steps), []).append(prediction)
    return list(groups.values())


def _width(probability: float) -> str:
    return f"{100 * probability:.1f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the figure ------------------------------------------------------------------------------------

INK, SOFT, BAR, SHADE = "#1b1f24", "#57606a", "#0072b2", "#ff9224"
_ALPHA = (0.0, 0.12, 0.22, 0.34, 0.46, 0.6, 0.78, 1.0)
"""opacity of each shade, as on the page"""
_COLUMNS = 100
"""characters per line"""
_LINE, _CHARACTER = 0.2, 0.078
"""height of a line and width of a character, in inches, of the monospaced font at 9 points"""
_MARGIN = 0.15
_STYLE: Any = {
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def draw(text: PredictedText, predictions: Sequence[Prediction], path: Path, form: str) -> None:
    """Write the figure as `form`, `png` or `pdf`."""
    layouts = [_lines(p) for p in predictions]
    heights = [_LINE * (1 + max(row for row, *_ in lines)) for lines in layouts]
    bars = 0.35 + 0.22 * len(predictions[0].after)
    width = _COLUMNS * _CHARACTER + 2 * _MARGIN
    tall = sum(heights) + 0.42 * len(heights) + bars + 0.85
    undated = {"CreationDate": None, "Producer": None} if form == "pdf" else {"Software": None}
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box; the page has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, tall))
        top = tall - 0.1
        for prediction, lines, height in zip(predictions, layouts, heights, strict=True):
            _shaded(figure, prediction, lines, top, height)
            top -= height + 0.42
        _ends(figure, text, predictions, top)
        figure.savefig(path, dpi=160, format=form, metadata=undated)


def _lines(prediction: Prediction) -> list[tuple[int, int, str, int]]:
    """Return line, column, text and shade of each token; a token that does not fit begins a new line."""
    lines: list[tuple[int, int, str, int]] = []
    row = column = 0
    for unit in shown_units(prediction):
        text = visible(unit.text)
        if column and column + len(text) > _COLUMNS:
            row, column = row + 1, 0
        lines.append((row, column, text, level(unit.probability)))
        column += len(text)
    return lines


def _shaded(
    figure: Figure,
    prediction: Prediction,
    lines: Sequence[tuple[int, int, str, int]],
    top: float,
    height: float,
) -> None:
    """Draw one model's text; `top` and `height` in inches."""
    axes = _axes(figure, _MARGIN, top - 0.28 - height, _COLUMNS * _CHARACTER, height)
    axes.set(xlim=(0, _COLUMNS), ylim=(height / _LINE, 0))
    axes.set_axis_off()
    title = f"{prediction.model}: {prediction.loss:.3f} nats per token"
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=5)
    for row, column, text, shade in lines:
        box = (column + 0.05, row + 0.08)
        axes.add_patch(
            Rectangle(box, len(text) - 0.1, 0.84, color=SHADE, alpha=_ALPHA[shade], linewidth=0)
        )
        # one character per column, whatever its width in the font
        for offset, character in enumerate(text):
            axes.text(
                column + offset + 0.5,
                row + 0.54,
                character,
                family="monospace",
                fontsize=9,
                ha="center",
                va="center",
                color="#9aa1a9" if character in "␣⏎⇥" else INK,
            )


def _ends(
    figure: Figure, text: PredictedText, predictions: Sequence[Prediction], top: float
) -> None:
    """Draw each model's predictions after the end, side by side; `top` in inches."""
    width, height = figure.get_size_inches()
    tail = ("… " if len(text.text) > 48 else "") + visible(text.text[-48:])
    figure.text(
        _MARGIN / width, (top - 0.2) / height, f"After {tail}", fontsize=9.5, fontweight="bold"
    )
    key = ", ".join(percent(least) for least in LEVELS)
    legend = f"Shade: probability of the token, steps at {key}"
    figure.text(_MARGIN / width, 0.1 / height, legend, fontsize=7.5, color=SOFT)
    each = (width - 2 * _MARGIN) / len(predictions)
    label = min(1.3, each / 2)
    for number, p in enumerate(predictions):
        bars = 0.22 * len(p.after)
        left = _MARGIN + number * each + label
        axes = _axes(figure, left, top - 0.55 - bars, each - label - 0.55, bars)
        _bars(axes, p, max(c.probability for q in predictions for c in q.after))


def _bars(axes: Axes, prediction: Prediction, most: float) -> None:
    """Draw the bars of one model; the most likely token of all models fills the width."""
    after = prediction.after
    axes.barh(range(len(after)), [c.probability for c in after], height=0.7, color=BAR)
    axes.set(xlim=(0, most), ylim=(len(after) - 0.5, -0.5))
    names = [visible(c.token)[:14] for c in after]
    axes.set_yticks(range(len(after)), names, family="monospace", fontsize=8.5)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(prediction.model, loc="left", fontsize=9, pad=3)
    for row, c in enumerate(after):
        axes.text(c.probability, row, f" {percent(c.probability)}", va="center", fontsize=8)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return axes at a position in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))
