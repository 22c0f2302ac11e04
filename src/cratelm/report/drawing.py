"""Figures, drawn once with matplotlib and written as PNG, PDF and SVG for the page.

A figure is a row of panels. In PNG and PDF they stand side by side; on the page each panel is an
SVG of its own, so that they wrap on a narrow screen, and its colours are those of the page's theme.
The same data gives the same bytes: no dates, and SVG names from a fixed salt.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

INK, RULE = "#1b1f24", "#c9d1d9"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, told apart by colour-blind readers; marker and dash differ as well"""
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_PANEL = (3.5, 2.7)
"""inches"""
_STYLE: Any = {
    "svg.hashsalt": "cratelm",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """How one model, or one of its nulls, looks in every figure."""

    label: str
    place: int
    """which model: sets colour, marker and dash"""
    null: str = ""
    """empty for the model itself, else the name of the null: hollow marker, dotted line"""

    @property
    def colour(self) -> str:
        return COLOURS[self.place % len(COLOURS)]

    def style(self) -> dict[str, Any]:
        """Keywords for matplotlib's lines."""
        marker = {"": _MARKERS[self.place % len(_MARKERS)], "shuffled": "x", "init": "+"}[self.null]
        return {
            "color": self.colour,
            "marker": marker,
            "linestyle": ":" if self.null else _DASHES[self.place % len(_DASHES)],
            "linewidth": 1.0 if self.null else 1.5,
            "markersize": 6 if self.null else 5,
            "markeredgewidth": 1.3 if self.null else 0.8,
        }


@dataclass(frozen=True)
class Panel:
    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    series: tuple[Series, ...]
    """for the legend; none where the panels name their lines themselves"""

    def write(self, folder: Path) -> None:
        """`NAME.png` and `NAME.pdf`."""
        with mpl.rc_context(_STYLE):
            width, height = _PANEL
            canvas = Canvas(figsize=(width * len(self.panels), height + 0.4), layout="constrained")
            for axes, panel in zip(
                np.ravel(canvas.subplots(1, len(self.panels))), self.panels, strict=True
            ):
                _draw(axes, panel)
            handles = [Line2D([], [], label=s.label, **s.style()) for s in self.series]
            if handles:
                columns = min(len(handles), 2 * len(self.panels))
                canvas.legend(handles=handles, loc="outside lower center", ncols=columns)
            canvas.savefig(folder / f"{self.name}.png", dpi=160, metadata={"Software": None})
            canvas.savefig(
                folder / f"{self.name}.pdf", metadata={"CreationDate": None, "Producer": None}
            )

    def svgs(self) -> list[Markup]:
        """Each panel for the page."""
        return [self._svg(place, panel) for place, panel in enumerate(self.panels)]

    def swatches(self) -> list[tuple[str, Markup]]:
        """The legend for the page: label and a small drawing of line and marker."""
        return [(s.label, self._swatch(place, s)) for place, s in enumerate(self.series)]

    def _svg(self, place: int, panel: Panel) -> Markup:
        with mpl.rc_context(_STYLE):
            canvas = Canvas(figsize=_PANEL, layout="constrained")
            _draw(canvas.subplots(), panel)
            return _themed(canvas, f"{self.name}-{place}", f"{self.title}: {panel.title}")

    def _swatch(self, place: int, series: Series) -> Markup:
        with mpl.rc_context(_STYLE):
            canvas = Canvas(figsize=(0.42, 0.16))
            axes = canvas.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            axes.set(xlim=(0, 2), ylim=(-1, 1))
            axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **series.style())
            return _themed(canvas, f"{self.name}-key-{place}", "")


def curves(
    series: Sequence[Series], points: Sequence[tuple[Any, Any, Any, Any]], y: str
) -> Callable[[Axes], None]:
    """Losses over tokens: for each series tokens and loss of each step, tokens and loss of each validation."""

    def draw(axes: Axes) -> None:
        for s, (steps, loss, validated, validation_loss) in zip(series, points, strict=True):
            style = s.style()
            axes.plot(steps, loss, color=s.colour, linewidth=0.6, alpha=0.45)
            axes.plot(validated, validation_loss, **style)
        axes.set(xlabel="training tokens", ylabel=y)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return draw


def by_layer(
    series: Sequence[Series],
    points: Sequence[tuple[Sequence[int], Any, Any, Any]],
    y: str,
    *,
    log: bool = False,
    zero: bool = False,
    floor: bool = False,
) -> Callable[[Axes], None]:
    """For each series layers, values, and lower and upper ends of their bars; beside each other.

    `log`: logarithmic axis; `zero`: a line at 0; `floor`: the axis starts at 0.
    """

    def draw(axes: Axes) -> None:
        layers = sorted({layer for p in points for layer in p[0]})
        for place, (s, (x, values, low, high)) in enumerate(zip(series, points, strict=True)):
            shift = 0.4 * ((place + 0.5) / len(series) - 0.5)
            values, low, high = (np.asarray(v, dtype=float) for v in (values, low, high))
            bars = np.maximum([values - low, high - values], 0)
            style = s.style()
            bar = axes.errorbar(np.asarray(x) + shift, values, bars, capsize=2, **style)
            for part in bar[2]:
                part.set(linewidth=1.0, linestyle="-")
        axes.set(xlabel="layer", ylabel=y, xticks=layers)
        if layers:
            axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
        # of neurons that are all dead there is nothing to show, and a logarithm has no axis for it
        if log and any(np.any(np.asarray(p[1], dtype=float) > 0) for p in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if zero:
            axes.axhline(0, color=INK, linewidth=0.7)
        if floor:
            axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))

    return draw


def rows(
    series: Sequence[Series], points: Sequence[tuple[float, float, float] | None], x: str
) -> Callable[[Axes], None]:
    """A line a series, from the top: its value and its bar; empty where there is None."""

    def draw(axes: Axes) -> None:
        for place, (s, point) in enumerate(zip(series, points, strict=True)):
            if point is None:
                continue
            value, low, high = point
            style = {**s.style(), "linestyle": "none"}
            bars = np.maximum([[value - low], [high - value]], 0)
            axes.errorbar([value], [place], xerr=bars, capsize=2, **style)
        axes.set_yticks(range(len(series)), [s.label for s in series])
        axes.set(xlabel=x, ylim=(len(series) - 0.5, -0.5))
        axes.axvline(0, color=INK, linewidth=0.7)
        axes.grid(False, axis="y")

    return draw


def scatter(
    series: Sequence[Series],
    points: Sequence[tuple[tuple[float, float, float], tuple[float, float, float]] | None],
    x: str,
    y: str,
) -> Callable[[Axes], None]:
    """A point a series with a bar each way: value and ends along x and along y; none where there is None."""

    def draw(axes: Axes) -> None:
        for s, point in zip(series, points, strict=True):
            if point is None:
                continue
            (a, a_low, a_high), (b, b_low, b_high) = point
            axes.errorbar(
                [a],
                [b],
                xerr=np.maximum([[a - a_low], [a_high - a]], 0),
                yerr=np.maximum([[b - b_low], [b_high - b]], 0),
                capsize=2,
                **{**s.style(), "linestyle": "none"},
            )
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return draw


def distributions(
    series: Sequence[Series], values: Sequence[Any], edges: Any, x: str
) -> Callable[[Axes], None]:
    """For each series the share of its values in each bin, as steps."""

    def draw(axes: Axes) -> None:
        for s, sample in zip(series, values, strict=True):
            counts, _ = np.histogram(sample, edges)
            share = 100 * counts / max(1, len(sample))
            style = s.style()
            axes.stairs(share, edges, color=s.colour, linestyle=style["linestyle"], linewidth=1.2)
            top = int(share.argmax())
            middle = (edges[top] + edges[top + 1]) / 2
            axes.plot([middle], [share[top]], **{**style, "linestyle": "none"})
        axes.axvline(0, color=INK, linewidth=0.7)
        lowest = min((min(sample) for sample in values if len(sample)), default=-1.0)
        axes.set(xlabel=x, ylabel="neurons, %", ylim=(0, None), xlim=(min(0, lowest) - 0.05, 1.02))

    return draw


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    panel.draw(axes)


def _themed(canvas: Canvas, name: str, title: str) -> Markup:
    """SVG for a page: colours as CSS variables, names of its own, sized by the page."""
    out = io.StringIO()
    canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    for place, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{place})")
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    label = (
        Markup(f'role="img" aria-label="{Markup.escape(title)}"') if title else 'aria-hidden="true"'
    )
    return Markup(re.sub(r"<svg ", f"<svg {label} ", svg, count=1))
