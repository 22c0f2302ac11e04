"""Two layers, or two neurons, side by side."""

from dataclasses import dataclass

from cratelm.results.views import LayerPage, LayerQuery, NeuronView, NotFound, ScoreHistogram
from cratelm.viewer.run_reader import Library

_BEST = 25
"""neurons of a layer that are shown"""


@dataclass(frozen=True)
class Side:
    """A neuron, a layer with how its scores are spread, or why there is neither."""

    name: str
    problem: str = ""
    neuron: NeuronView | None = None
    layer: LayerPage | None = None
    spreads: tuple[ScoreHistogram, ...] = ()
    firing: float | None = None
    """mean firing rate of the layer, 0 to 1"""
    dead: int = 0

    def spread(self, metric: str) -> ScoreHistogram | None:
        return next((s for s in self.spreads if s.metric == metric), None)


@dataclass(frozen=True)
class Compared:
    left: str
    right: str
    sides: tuple[Side, ...]
    note: str
    """how the right side was chosen, where it was not named"""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Under which layers have scores."""
        return tuple(dict.fromkeys(s.metric for side in self.sides for s in side.spreads))

    def spreads(self, metric: str) -> tuple[ScoreHistogram | None, ...]:
        return tuple(side.spread(metric) for side in self.sides)


def compared(library: Library, key: str, left: str, right: str) -> Compared:
    """MODEL/LAYER or MODEL/LAYER/NEURON, twice; without `right` what the twin has for it."""
    note = ""
    if left and not right:
        right, note = _counterpart(library, key, left)
    sides = tuple(_side(library, key, name) for name in (left, right) if name)
    return Compared(left, right, sides, note)


def _side(library: Library, key: str, name: str) -> Side:
    try:
        model, layer, index = _place(name)
        if index is not None:
            return Side(name, neuron=library.neuron(key, model, layer, index, shown="top"))
        page = library.layer(key, model, layer, LayerQuery(per_page=_BEST))
        card = library.run(key).model(model)
        return Side(
            name,
            layer=page,
            spreads=library.spreads(key, model, layer),
            firing=card.firing.get(layer),
            dead=card.dead.get(layer, 0),
        )
    except NotFound as error:
        return Side(name, problem=str(error))


def _counterpart(library: Library, key: str, left: str) -> tuple[str, str]:
    """The twin's layer of the same number; of a neuron, the twin's that fires most alike."""
    try:
        model, layer, index = _place(left)
        twin = library.run(key).twin(model)
        if not twin or index is None:
            return (f"{twin}/{layer}", "") if twin else ("", f"{model} has no twin in this run.")
        found = [n for n in library.nearest(key, model, layer, index, n=1) if n.model == twin]
    except NotFound:
        return "", ""
    if not found:
        return "", f"No neuron of {twin} is known to fire on the same tokens: name one."
    near = found[0]
    told = f"Right: the neuron of {twin} that fires most alike, cosine {near.similarity:.2f}."
    return f"{twin}/{near.layer}/{near.index}", told


def _place(name: str) -> tuple[str, int, int | None]:
    """Raises `NotFound` for what is neither MODEL/LAYER nor MODEL/LAYER/NEURON."""
    model, *rest = name.split("/")
    if len(rest) not in (1, 2) or not all(p.isascii() and p.isdigit() and len(p) < 9 for p in rest):
        raise NotFound(
            f"{name!r}: MODEL/LAYER or MODEL/LAYER/NEURON was expected, such as crate-2l/0/17"
        )
    return model, int(rest[0]), int(rest[1]) if len(rest) == 2 else None
