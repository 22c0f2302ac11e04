"""Figures, drawn with matplotlib and written as PNG and PDF, and as SVG for pages.

A figure is a row of panels. In PNG and PDF files they are side by side. On a page, each panel is a separate
SVG, so that panels wrap on a narrow screen, in the colours of the page's theme. The browser draws its curves
with the same panels. The same data gives the same bytes: files contain no dates, and SVG ids use a fixed salt.
"""

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from cratelm.records import Interval

INK, RULE = "#1b1f24", "#c9d1d9"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind readers can distinguish; markers and dashes differ as well"""
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NULL_MARKERS = {"shuffled": "x", "init": "+", "permuted": "1", "embeddings": "2"}
"""marker of each null control: shuffled explanations, and the kinds of `cratelm.runs.names.NULLS`"""
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


_PAGE_COLOURS = {
    INK: "currentColor",
    RULE: "var(--rule)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)},
}
"""colour of the page's theme for each colour of a figure"""
_settings = threading.Lock()
"""matplotlib's settings are global to the process, and the browser draws in several threads"""


@dataclass(frozen=True)
class Series:
    """Label and appearance of one model, or of one of its null controls, in every figure."""

    label: str
    place: int
    """number of the model, which sets colour, marker and dash"""
    null: str = ""
    """empty for the model itself, else the null control: a key of `_NULL_MARKERS`, drawn with dotted lines"""

    @property
    def colour(self) -> str:
        """Return the colour of the model."""
        return COLOURS[self.place % len(COLOURS)]

    def style(self) -> dict[str, Any]:
        """Return keyword arguments for matplotlib's lines."""
        turn = self.place // len(
            COLOURS
        )  # from the seventh model on, another marker for each colour
        own = _MARKERS[(self.place + turn) % len(_MARKERS)]
        return {
            "color": self.colour,
            "marker": _NULL_MARKERS[self.null] if self.null else own,
            "linestyle": ":" if self.null else _DASHES[self.place % len(_DASHES)],
            "linewidth": 1.0 if self.null else 1.5,
            "markersize": 6 if self.null else 5,
            "markeredgewidth": 1.3 if self.null else 0.8,
        }


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    draw: Callable[[Axes], None]

    def svg(self, name: str, label: str) -> Markup:
        """Return the panel as SVG for a page; `name` prefixes its ids, `label` is the text for screen readers."""
        with _matplotlib_settings():
            canvas = Canvas(figsize=_PANEL, layout="constrained")
            _draw(canvas.subplots(), self)
            _lay_out(canvas)
            return _page_svg(canvas, name, label)


@dataclass(frozen=True)
class Figure:
    """A row of panels with one legend and one caption."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    series: tuple[Series, ...]
    """series of the legend; empty if the panels label their lines themselves"""

    def write(self, folder: Path) -> None:
        """Write `NAME.png` and `NAME.pdf` into `folder`."""
        self._write(folder, pdf=True)

    def write_png(self, folder: Path) -> None:
        """Write `NAME.png` into `folder`."""
        self._write(folder, pdf=False)

    def _write(self, folder: Path, *, pdf: bool) -> None:
        with _matplotlib_settings():
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
            _lay_out(canvas)
            canvas.savefig(folder / f"{self.name}.png", dpi=160, metadata={"Software": None})
            if pdf:
                canvas.savefig(
                    folder / f"{self.name}.pdf", metadata={"CreationDate": None, "Producer": None}
                )

    def svgs(self) -> list[Markup]:
        """Return the panels as SVG for a page."""
        return [
            panel.svg(f"{self.name}-{number}", f"{self.title}: {panel.title}")
            for number, panel in enumerate(self.panels)
        ]

    def swatches(self) -> list[tuple[str, Markup]]:
        """Return the legend for a page: the label and a small drawing of line and marker for each series."""
        return [(s.label, self._swatch(number, s)) for number, s in enumerate(self.series)]

    def _swatch(self, number: int, series: Series) -> Markup:
        with _matplotlib_settings():
            canvas = Canvas(figsize=(0.42, 0.16))
            axes = canvas.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            axes.set(xlim=(0, 2), ylim=(-1, 1))
            axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **series.style())
            return _page_svg(canvas, f"{self.name}-key-{number}", "")


def scores_panel(
    title: str, series: Sequence[Series], lines: Sequence[Mapping[int, Interval]]
) -> Panel:
    """Return a panel of scores by layer under one metric, one line per series."""
    return Panel(title, by_layer(series, lines, "mean score × 100", zero=True))


def curves(
    series: Sequence[Series], points: Sequence[tuple[Any, Any, Any, Any]], y: str
) -> Callable[[Axes], None]:
    """Return a function that draws losses over training tokens.

    The points of a series are tokens and loss of each step, then tokens and loss of each validation.
    """

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
    lines: Sequence[Mapping[int, Interval]],
    y: str,
    *,
    log: bool = False,
    zero: bool = False,
    floor: bool = False,
) -> Callable[[Axes], None]:
    """Return a function that draws values by layer with error bars; points of one layer are side by side.

    `log`: logarithmic axis; `zero`: a line at 0; `floor`: the axis starts at 0.
    """

    def draw(axes: Axes) -> None:
        layers = sorted({layer for line in lines for layer in line})
        for number, (s, line) in enumerate(zip(series, lines, strict=True)):
            shift = 0.4 * ((number + 0.5) / len(series) - 0.5)
            values, low, high = np.array([_ends(v) for v in line.values()], float).reshape(-1, 3).T
            bars = np.maximum([values - low, high - values], 0)
            bar = axes.errorbar(np.array(list(line)) + shift, values, bars, capsize=2, **s.style())
            for part in bar[2]:
                part.set(linewidth=1.0, linestyle="-")
        axes.set(xlabel="layer", ylabel=y, xticks=layers)
        if layers:
            axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
        # if all neurons are dead, all values are 0, for which there is no logarithmic axis
        if log and any(v.value > 0 for line in lines for v in line.values()):
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
    series: Sequence[Series], points: Sequence[Interval | None], x: str
) -> Callable[[Axes], None]:
    """Return a function that draws a value with its error bar for each series, from top to bottom.

    A row without a point stays empty.
    """

    def draw(axes: Axes) -> None:
        for row, (s, point) in enumerate(zip(series, points, strict=True)):
            if point is None:
                continue
            value, low, high = _ends(point)
            style = {**s.style(), "linestyle": "none"}
            bars = np.maximum([[value - low], [high - value]], 0)
            axes.errorbar([value], [row], xerr=bars, capsize=2, **style)
        axes.set_yticks(range(len(series)), [s.label for s in series])
        axes.set(xlabel=x, ylim=(len(series) - 0.5, -0.5))
        axes.axvline(0, color=INK, linewidth=0.7)
        axes.grid(False, axis="y")

    return draw


def scatter(
    series: Sequence[Series],
    points: Sequence[tuple[Interval, Interval] | None],
    x: str,
    y: str,
) -> Callable[[Axes], None]:
    """Return a function that draws a point per series with error bars along x and y, omitting None."""

    def draw(axes: Axes) -> None:
        for s, point in zip(series, points, strict=True):
            if point is None:
                continue
            (a, a_low, a_high), (b, b_low, b_high) = map(_ends, point)
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


def cloud(
    series: Sequence[Series], points: Sequence[Any], x: str, y: str
) -> Callable[[Axes], None]:
    """Return a function that draws the points [n, 2] of each series, in %, later ones on top."""

    def draw(axes: Axes) -> None:
        for s, of_series in zip(series, points, strict=True):
            look = {"linestyle": "none", "markersize": 3, "markeredgewidth": 0.7, "alpha": 0.6}
            axes.plot(of_series[:, 0], of_series[:, 1], **{**s.style(), **look})
        lowest = min((of_series[:, 1].min() for of_series in points), default=0)
        axes.set(xlabel=x, ylabel=y, xlim=(-3, 103), ylim=(min(-3, lowest - 3), 103))
        axes.axhline(0, color=INK, linewidth=0.7)

    return draw


def distributions(
    series: Sequence[Series], values: Sequence[Any], edges: Any, x: str
) -> Callable[[Axes], None]:
    """Return a function that draws the percentage of each series' values in each bin, as steps."""

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


def _ends(v: Interval) -> tuple[float, float, float]:
    """Return the value and the ends of its error bar, which has length 0 without an interval."""
    return v.value, v.value if v.low is None else v.low, v.value if v.high is None else v.high


def _draw(axes: Axes, panel: Panel) -> None:
    # a height given in advance: else every drawing measures all ticks to see if they are in the title's way
    axes.set_title(panel.title, y=1.0)
    panel.draw(axes)


def _lay_out(canvas: Canvas) -> None:
    """Place what the canvas holds, once; a layout engine that stays would do so again for every file, twice.

    Measuring needs a renderer, which only a canvas of a backend keeps from one measurement to the next.
    """
    FigureCanvasAgg(canvas)
    engine = canvas.get_layout_engine()
    assert engine is not None
    engine.execute(canvas)
    canvas.set_layout_engine("none")


@contextlib.contextmanager
def _matplotlib_settings() -> Iterator[None]:
    with _settings, mpl.rc_context(_STYLE):
        yield


def _page_svg(canvas: Canvas, name: str, label: str) -> Markup:
    """Return the canvas as an SVG element in the colours of the page's theme, with ids unique to the page.

    Styles become attributes, because a page may forbid inline styles. Coordinates are rounded, which
    halves the size of the element without a visible change.
    """
    out = io.BytesIO()
    canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # a style element would apply to the whole page
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {
        match
        for element in root.iter()
        for value in element.attrib.values()
        for match in re.findall(r"#([\w-]+)", value)
    }
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.tail = None
        element.text = element.text if element.text and element.text.strip() else None
        element.attrib = _page_attributes(element.attrib, name, used)
    root.attrib = {
        "class": "plot",
        "viewBox": root.attrib["viewBox"],
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
        **({"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}),
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _page_attributes(attributes: Mapping[str, str], name: str, used: set[str]) -> dict[str, str]:
    """Return the attributes of an element; only ids in `used` are kept, prefixed by `name`."""
    kept: dict[str, str] = {}
    for key, value in attributes.items():
        key = key.partition("}")[2] or key  # xlink:href has become href
        if key == "style":
            styles = (part.split(":", 1) for part in value.split(";") if ":" in part)
            for k, v in ((k.strip(), v.strip()) for k, v in styles):
                if k == "font":  # older matplotlib: weight, size and family in one
                    size = re.search(r"[\d.]+px", v)
                    kept |= {"font-size": size.group()} if size else {}
                elif k != "font-family":
                    kept[k] = _PAGE_COLOURS.get(v, v)
        elif key == "id":
            kept |= {"id": f"{name}-{value}"} if value in used else {}
        elif key in ("d", "x", "y", "transform"):
            value = re.sub(
                r"\d+\.\d+", lambda m: f"{float(m.group()):.2f}", " ".join(value.split())
            )
            if not value.startswith("rotate(-0 "):
                kept[key] = value
        else:
            kept[key] = value.replace("#", f"#{name}-") if "#" in value else value
    return kept
