"""Compare two layers or two neurons side by side."""

import re
from dataclasses import dataclass

from cratelm.results.views import LayerPage, LayerQuery, NeuronView, NotFound, ScoreHistogram
from cratelm.viewer.run_reader import Library

_BEST = 25
"""number of neurons shown per layer"""


@dataclass(frozen=True)
class Side:
    """A neuron, a layer with the distribution of its scores, or the reason why there is neither."""

    name: str
    problem: str = ""
    neuron: NeuronView | None = None
    layer: LayerPage | None = None
    histograms: tuple[ScoreHistogram, ...] = ()
    firing: float | None = None
    """mean firing rate of the layer, 0 to 1"""
    dead: int = 0
    """number of dead neurons of the layer"""

    def histogram(self, metric: str) -> ScoreHistogram | None:
        """Return the distribution of the layer's scores under a metric; None if there are no scores."""
        return next((h for h in self.histograms if h.metric == metric), None)


@dataclass(frozen=True)
class SideBySide:
    """Two sides to compare, or one if there is no counterpart."""

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
        """Return the distribution of the scores of each side under a metric."""
        return tuple(side.histogram(metric) for side in self.sides)


def compare(library: Library, key: str, left: str, right: str) -> SideBySide:
    """Return two sides, each named MODEL/LAYER or MODEL/LAYER/NEURON.

    An empty `right` stands for the counterpart of `left` in the twin, and the name of a model for that in this model. A
    side that does not exist has a `problem`.
    """
    note = ""
    models = {card.name for card in library.run(key).models if card.neurons}
    if left and (not right or right in models):
        right, note = _counterpart(library, key, left, right)
    sides = tuple(_side(library, key, name) for name in (left, right) if name)
    return SideBySide(left, right, sides, note)


def _side(library: Library, key: str, name: str) -> Side:
    try:
        model, layer, number = _parse(name)
        if number is not None:
            index = library.index_named(key, model, number)
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


def _counterpart(library: Library, key: str, left: str, other: str = "") -> tuple[str, str]:
    """Return the name of the counterpart in the model `other`, by default the twin, and a note on how it was chosen.

    For a layer, this is its layer with the same number; for a neuron, its neuron with the most similar profile. The name is empty if there is no counterpart, and the note gives the reason.
    """
    try:
        model, layer, number = _parse(left)
        twin = other or library.run(key).twin(model)
        if not twin or number is None:
            no_twin = (
                f"{model} has no twin in this run: name a model, layer or neuron on the right."
            )
            return (f"{twin}/{layer}", "") if twin else ("", no_twin)
        index = library.index_named(key, model, number)
        near_ones = library.nearest(key, model, layer, index, n=1, other=twin)
        nearest = [n for n in near_ones if n.model == twin]
    except NotFound:
        return "", ""
    if not nearest:
        return (
            "",
            f"No neuron of {twin} is known to fire on the same tokens: name one on the right.",
        )
    near = nearest[0]
    note = f"Right: the most similar neuron of {twin}, cosine {near.similarity:.2f}."
    return f"{twin}/{near.layer}/{library.neuron_name(key, twin, near.index)}", note


def _parse(name: str) -> tuple[str, int, str | None]:
    """Return model, layer and neuron as written (None for a layer).

    Raises `NotFound` if `name` is neither MODEL/LAYER nor MODEL/LAYER/NEURON.
    """
    model, *numbers = name.split("/")
    forms = (r"[0-9]{1,8}", r"[0-9]{1,8}[+-]?")
    if len(numbers) not in (1, 2) or not all(map(re.fullmatch, forms, numbers)):
        raise NotFound(
            f"{name!r} is neither a layer nor a neuron: type MODEL/LAYER or MODEL/LAYER/NEURON, such as"
            " crate-2l/0/17"
        )
    return model, int(numbers[0]), numbers[1] if len(numbers) == 2 else None
