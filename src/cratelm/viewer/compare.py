"""Two layers, or two neurons, side by side."""

from dataclasses import dataclass

from cratelm.results.views import LayerPage, LayerQuery, NeuronView, NotFound, ScoreHistogram
from cratelm.viewer.run_reader import Library

_BEST = 25
"""number of neurons of a layer that are shown"""


@dataclass(frozen=True)
class Side:
    """A neuron, a layer with the distribution of its scores, or why there is neither."""

    name: str
    problem: str = ""
    neuron: NeuronView | None = None
    layer: LayerPage | None = None
    histograms: tuple[ScoreHistogram, ...] = ()
    firing: float | None = None
    """mean firing rate of the layer, 0 to 1"""
    dead: int = 0

    def histogram(self, metric: str) -> ScoreHistogram | None:
        """Return the layer's scores under a metric; None without any."""
        return next((h for h in self.histograms if h.metric == metric), None)


@dataclass(frozen=True)
class SideBySide:
    """Two sides, or one."""

    left: str
    right: str
    sides: tuple[Side, ...]
    note: str
    """how the right side was chosen, if it was not named"""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics under which the layers have scores."""
        return tuple(dict.fromkeys(h.metric for side in self.sides for h in side.histograms))

    def histograms(self, metric: str) -> tuple[ScoreHistogram | None, ...]:
        """Return the scores of each side under a metric."""
        return tuple(side.histogram(metric) for side in self.sides)


def compare(library: Library, key: str, left: str, right: str) -> SideBySide:
    """Return two sides, each named MODEL/LAYER or MODEL/LAYER/NEURON; without `right` that of the twin."""
    note = ""
    if left and not right:
        right, note = _counterpart(library, key, left)
    sides = tuple(_side(library, key, name) for name in (left, right) if name)
    return SideBySide(left, right, sides, note)


def _side(library: Library, key: str, name: str) -> Side:
    try:
        model, layer, index = _parse(name)
        if index is not None:
            return Side(name, neuron=library.neuron(key, model, layer, index, excerpts="top"))
        page = library.layer(key, model, layer, LayerQuery(per_page=_BEST))
        card = library.run(key).model(model)
        return Side(
            name,
            layer=page,
            histograms=library.histograms(key, model, layer),
            firing=card.firing.get(layer),
            dead=card.dead.get(layer, 0),
        )
    except NotFound as error:
        return Side(name, problem=str(error))


def _counterpart(library: Library, key: str, left: str) -> tuple[str, str]:
    """The twin's layer of the same number; for a neuron, the twin's that fires most alike."""
    try:
        model, layer, index = _parse(left)
        twin = library.run(key).twin(model)
        if not twin or index is None:
            return (f"{twin}/{layer}", "") if twin else ("", f"{model} has no twin in this run.")
        nearest = [n for n in library.nearest(key, model, layer, index, n=1) if n.model == twin]
    except NotFound:
        return "", ""
    if not nearest:
        return "", f"No neuron of {twin} is known to fire on the same tokens: name one."
    near = nearest[0]
    note = f"Right: the neuron of {twin} that fires most alike, cosine {near.similarity:.2f}."
    return f"{twin}/{near.layer}/{near.index}", note


def _parse(name: str) -> tuple[str, int, int | None]:
    """Model, layer and index. Raises `NotFound` for neither MODEL/LAYER nor MODEL/LAYER/NEURON."""
    model, *numbers = name.split("/")
    digits = all(n.isascii() and n.isdigit() and len(n) < 9 for n in numbers)
    if len(numbers) not in (1, 2) or not digits:
        raise NotFound(
            f"{name!r} names no layer and no neuron: type MODEL/LAYER or MODEL/LAYER/NEURON, such as"
            " crate-2l/0/17"
        )
    return model, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else None
