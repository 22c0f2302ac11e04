"""The map of a layer: a point per neuron, coloured by its group, and labels where neighbours share a token or concept.

The drawing is SVG with classes and attributes only, and can be read without JavaScript. `assets/map.js` adds zoom,
keys, and the details of a neuron on hover and focus, from `details`.

Shape legend: n neurons of the layer, c neurons of a cluster.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from cratelm.results.neuron_groups import OTHER_TOKENS, TOKEN_CLASSES
from cratelm.results.views import MapPoint
from cratelm.text.display import visible
from cratelm.text.units import TokenStrings, units_in
from cratelm.viewer.drawings import shortened
from cratelm.viewer.peaks import BEFORE, Peaks

WIDTH, HEIGHT, _MARGIN = 640, 520, 24
COLOURS = 9
"""number of groups with a colour of their own; all others are grey"""
_WITH_TEXT = 1024
"""largest layer whose drawing contains the explanations; in larger layers they would be most of the page"""
_LONGEST = 160
"""characters of an explanation among the details"""
_NEAR = 0.05
"""neurons that share a token form one cluster if each is at most this far from another, as a fraction of the map"""
_LEAST = 3
"""neurons of a cluster with a label"""
_MOST_LABELS, _AT_ONCE = 150, 30
"""labels, and labels that are visible at zoom 1; at zoom z it is z^2 times as many on the whole map"""
_ZOOMS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""zooms from which on a label may be visible; at zoom 1 the map is as wide as `WIDTH` pixels"""
_LETTER, _BESIDE, _LINE, _ABOVE = 7.3, 6.0, 19.0, 15.0
"""pixels: width of a character of a label, space on each side of it, height of a label, and its distance above the middle
of its cluster"""

_DIGITS = np.frombuffer(b"0123456789a", np.uint8)
"""hexadecimal digits of the levels 0 to 10"""


@dataclass(frozen=True)
class Label:
    """What the neurons of a cluster share, at their middle."""

    text: str
    x: float
    """units of the drawing"""
    y: float
    neurons: int
    zoom: float
    """smallest zoom at which the label overlaps no label of a larger cluster"""


@dataclass(frozen=True)
class Legend:
    """One group of the legend."""

    name: str
    colour: int
    """0 to `COLOURS` - 1, or `COLOURS` for grey"""
    neurons: int


@dataclass(frozen=True)
class DrawnMap:
    """The drawing of a layer's map and its legend."""

    svg: Markup
    legend: tuple[Legend, ...]


def colours(families: Sequence[str]) -> Mapping[str, int]:
    """Return the colour of each family that has one of its own, from the families of all neurons of a model.

    Classes of tokens have fixed colours, so that maps of several models can be compared; concepts, of which there
    are many, get them by their number of neurons.
    """
    present = Counter(f for f in families if f)
    if present.keys() <= {*TOKEN_CLASSES, OTHER_TOKENS}:
        return {name: colour for colour, name in enumerate(TOKEN_CLASSES[:COLOURS])}
    ranked = sorted(present, key=lambda name: (-present[name], name))
    return {name: colour for colour, name in enumerate(ranked[:COLOURS])}


def draw_map(
    points: Sequence[MapPoint], colour_of: Mapping[str, int], address: Callable[[int], str]
) -> DrawnMap:
    """Return the map; each point is linked to `address(index)` unless that is empty.

    Its accessible name has the number and score of the neuron, and in layers of up to 1,024 neurons its explanation.
    """
    numbers = Counter(p.group.family if p.group.family in colour_of else "" for p in points)
    legend = [
        Legend(name, colour_of[name], n)
        for name, n in sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
        if name
    ]
    if numbers[""]:
        other = "other groups, or none" if legend else "no group"
        legend.append(Legend(other, COLOURS, numbers[""]))
    dots = (_dot(p, colour_of, address(p.index), len(points) <= _WITH_TEXT) for p in points)
    labels = map(_label, place_labels(points))
    svg = (
        f'<svg class="map" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="map of {len(points):,} neurons">'
        f'<g>{"".join(dots)}</g><g class="labels" aria-hidden="true">{"".join(labels)}</g></svg>'
    )
    return DrawnMap(Markup(svg), tuple(legend))


def details(points: Sequence[MapPoint], peaks: Peaks | None, strings: Sequence[str]) -> Any:
    """Return what a page shows of a neuron on hover, as JSON values, in the order of `points`.

    `strings` maps token ids to text. `words` holds each unit of text in the excerpts once (`cratelm.text.units`); an
    excerpt is a list of positions in it, and a string of levels in hexadecimal (`a` is 10); `peak` is the position of
    the unit with the strongest token.
    """
    if peaks is None:
        peaks = Peaks.empty(0)
    inside = peaks.tokens >= 0  # one run of columns in each row
    digits = _DIGITS[peaks.levels]
    joining = strings.joining if isinstance(strings, TokenStrings) else frozenset[int]()
    # almost all tokens are units of their own: these are made visible once each
    ids, at = np.unique(peaks.tokens[inside], return_inverse=True)
    words: dict[str, int] = {}
    position = [words.setdefault(visible(strings[int(i)]), len(words)) for i in ids]
    word_at = np.zeros(inside.shape, np.int64)
    word_at[inside] = np.array(position, np.int64)[at]
    joins = np.any(np.isin(peaks.tokens, list(joining)) & inside, axis=1)
    excerpts, levels, at_peak = [], [], []
    spans = zip(inside.argmax(1).tolist(), inside.sum(1).tolist(), joins.tolist(), strict=True)
    for row, (low, length, is_joined) in enumerate(spans):
        of_row = digits[row, low : low + length]
        if not is_joined:
            excerpts.append(word_at[row, low : low + length].tolist())
            levels.append(of_row.tobytes().decode())
            at_peak.append(BEFORE - low if low <= BEFORE < low + length else 0)
            continue
        units = units_in(peaks.tokens[row, low : low + length].tolist(), strings)
        excerpts.append([words.setdefault(visible(unit.text), len(words)) for unit in units])
        # hexadecimal digits ascend as their codes do
        levels.append("".join(chr(of_row[unit.start : unit.stop].max()) for unit in units))
        at_peak.append(next((n for n, unit in enumerate(units) if BEFORE - low < unit.stop), 0))
    return {
        "score": [None if p.score is None else round(p.score, 1) for p in points],
        "text": [shortened(p.label, _LONGEST) for p in points],
        "family": [p.group.family for p in points],
        "words": list(words),
        "excerpts": excerpts,
        "levels": levels,
        "peak": at_peak,
    }


def place_labels(points: Sequence[MapPoint]) -> list[Label]:
    """Return a label for each cluster of neurons that share a token or concept, the largest clusters first."""
    xy = np.array([_place(p) for p in points], np.float64).reshape(-1, 2)
    clusters = [(points[rows[0]].group.shares, rows) for rows in _clusters(points, xy)]
    clusters.sort(key=lambda c: (-len(c[1]), c[0], c[1][0]))
    labels: list[Label] = []
    placed = np.zeros((4, _MOST_LABELS))  # x, y, width and zoom of each label
    for text, rows in clusters[:_MOST_LABELS]:
        x, y = np.median(xy[rows], axis=0).tolist()
        width = _width(text)
        x = min(max(x, width / 2), max(width / 2, WIDTH - width / 2))  # whole at zoom 1
        zoom = _first_zoom(x, y, width, placed[:, : len(labels)])
        if zoom is not None:
            placed[:, len(labels)] = x, y, width, zoom
            labels.append(Label(text, x, y, len(rows), zoom))
    return labels


def _clusters(points: Sequence[MapPoint], xy: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Return the clusters: rows [c] of neurons that share a token or concept, linked by near pairs of `xy` [n, 2]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    if not points:
        return []
    numbers: dict[str, int] = {"": 0}
    share = np.array([numbers.setdefault(p.group.shares, len(numbers)) for p in points])
    pairs = KDTree(xy).query_pairs(_NEAR * WIDTH, output_type="ndarray")
    a, b = pairs[(share[pairs[:, 0]] == share[pairs[:, 1]]) & (share[pairs[:, 0]] > 0)].T
    links = coo_matrix((np.ones(len(a)), (a, b)), (len(points), len(points)))
    of = connected_components(links, directed=False)[1]
    order = np.argsort(of, kind="stable")
    clusters = np.split(order, np.flatnonzero(np.diff(of[order])) + 1)
    return [rows for rows in clusters if len(rows) >= _LEAST]


def _first_zoom(x: float, y: float, width: float, others: NDArray[np.float64]) -> float | None:
    """Return the first of `_ZOOMS` at which a label overlaps no visible one, and there are not too many.

    `others` [4, n] are x, y, width and zoom of the labels of larger clusters. None if there is no such zoom.
    """
    if not others.size:
        return _ZOOMS[0]
    dx, dy = np.abs(others[0] - x), np.abs(others[1] - y)
    wide = (others[2] + width) / 2 + 2
    zooms = np.array(_ZOOMS)[:, None]
    visible_there = others[3] <= zooms
    overlaps = (dx * zooms < wide) & (dy * zooms < _LINE) & visible_there
    crowded = visible_there.sum(1) >= _AT_ONCE * zooms[:, 0] ** 2
    free = np.flatnonzero(~overlaps.any(1) & ~crowded)
    return _ZOOMS[free[0]] if len(free) else None


def _place(p: MapPoint) -> tuple[float, float]:
    return _MARGIN + p.x * (WIDTH - 2 * _MARGIN), _MARGIN + p.y * (HEIGHT - 2 * _MARGIN)


def _dot(p: MapPoint, colour_of: Mapping[str, int], href: str, with_text: bool) -> str:
    x, y = _place(p)
    level = 0 if p.score is None else max(1, min(10, round(p.score / 10)))
    name = f"{p.name or p.index} ({'no score' if p.score is None else f'{p.score:.0f}'})"
    if with_text:
        name = escape(f"{name}: {shortened(p.label, 100) or 'not explained'}")
    colour = colour_of.get(p.group.family, COLOURS)
    inside = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><title>{name}</title>'
    shade = f'class="n g{colour} m{level}" tabindex="-1"'
    if href:
        return f'<a {shade} href="{escape(href)}">{inside}</a>'
    return f'<g {shade} role="img">{inside}</g>'


def _width(text: str) -> float:
    return len(text) * _LETTER + 2 * _BESIDE


def _label(label: Label) -> str:
    """Return a label as a text in a box; the class is the zoom in tenths: `z15` for 1.5.

    The inner group is scaled by the script, so that labels keep their size when the map is enlarged.
    """
    width, height = _width(label.text), _LINE - 2
    return (
        f'<g class="z{round(10 * label.zoom):02d}" transform="translate({label.x:.1f} {label.y:.1f})"><g>'
        f'<rect x="{-width / 2:.1f}" y="{-_ABOVE - height / 2:.1f}" width="{width:.1f}" height="{height:.0f}" rx="5"/>'
        f'<text y="{-_ABOVE:.0f}">{escape(label.text)}</text></g></g>'
    )
