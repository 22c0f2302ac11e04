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
_MOST_LABELS = 200
_ZOOMS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""zooms from which on a label may be visible; at zoom 1 the map is as wide as `WIDTH` pixels"""
_LETTER, _BESIDE, _LINE = 7.3, 6.0, 19.0
"""pixels: width of a character of a label, space on each side of it, and height of a label"""


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

    `strings` maps token ids to text. `words` holds each token of the excerpts once; an excerpt is a list of positions
    in it, and a string of levels in hexadecimal (`a` is 10); `peak` is the position of the strongest token.
    """
    used: dict[int, int] = {}
    excerpts, levels, at = [], [], []
    for row in range(len(points) if peaks is not None else 0):
        assert peaks is not None
        ids = peaks.tokens[row].tolist()
        inside = [(t, level) for t, level in zip(ids, peaks.levels[row].tolist(), strict=True) if t >= 0]  # fmt: skip
        excerpts.append([used.setdefault(t, len(used)) for t, _ in inside])
        levels.append("".join(f"{level:x}" for _, level in inside))
        at.append(sum(t >= 0 for t in ids[:BEFORE]))
    return {
        "score": [None if p.score is None else round(p.score, 1) for p in points],
        "text": [shortened(p.label, _LONGEST) for p in points],
        "family": [p.group.family for p in points],
        "words": [visible(strings[t]) for t in used],
        "excerpts": excerpts,
        "levels": levels,
        "peak": at,
    }


def place_labels(points: Sequence[MapPoint]) -> list[Label]:
    """Return a label for each cluster of neurons that share a token or concept, the largest clusters first."""
    xy = np.array([_place(p) for p in points], np.float64).reshape(-1, 2)
    by_share: dict[str, list[int]] = {}
    for row, point in enumerate(points):
        if point.group.shares:
            by_share.setdefault(point.group.shares, []).append(row)
    clusters = [
        (text, members)
        for text, rows in by_share.items()
        if len(rows) >= _LEAST
        for members in _clusters(np.array(rows), xy)
    ]
    clusters.sort(key=lambda c: (-len(c[1]), c[0], c[1][0]))
    labels: list[Label] = []
    for text, members in clusters[:_MOST_LABELS]:
        x, y = np.median(xy[members], axis=0).tolist()
        half = _width(text) / 2
        x = min(max(x, half), max(half, WIDTH - half))  # the whole label is visible at zoom 1
        label = Label(text, x, y, len(members), 0.0)
        zoom = next((z for z in _ZOOMS if not _overlaps(label, labels, z)), None)
        if zoom is not None:
            labels.append(Label(text, x, y, len(members), zoom))
    return labels


def _clusters(rows: NDArray[Any], xy: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Return the clusters [c] of at least `_LEAST` of the neurons `rows` whose places [n, 2] are linked by near pairs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    pairs = KDTree(xy[rows]).query_pairs(_NEAR * WIDTH, output_type="ndarray")
    shape = (len(rows), len(rows))
    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape)
    number, of = connected_components(links, directed=False)
    members = (rows[of == c] for c in range(number))
    return [m for m in members if len(m) >= _LEAST]


def _overlaps(label: Label, others: Sequence[Label], zoom: float) -> bool:
    """Return whether a label overlaps one of `others` that is visible at `zoom`."""
    return any(
        abs(label.x - o.x) * zoom < (_width(label.text) + _width(o.text)) / 2 + 2
        and abs(label.y - o.y) * zoom < _LINE
        for o in others
        if o.zoom <= zoom
    )


def _place(p: MapPoint) -> tuple[float, float]:
    return _MARGIN + p.x * (WIDTH - 2 * _MARGIN), _MARGIN + p.y * (HEIGHT - 2 * _MARGIN)


def _dot(p: MapPoint, colour_of: Mapping[str, int], href: str, with_text: bool) -> str:
    x, y = _place(p)
    level = 0 if p.score is None else max(1, min(10, round(p.score / 10)))
    name = f"{p.index} ({'no score' if p.score is None else f'{p.score:.0f}'})"
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
        f'<rect x="{-width / 2:.1f}" y="{-height / 2:.1f}" width="{width:.1f}" height="{height:.0f}" rx="5"/>'
        f"<text>{escape(label.text)}</text></g></g>"
    )
