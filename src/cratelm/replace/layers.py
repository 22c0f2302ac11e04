"""Sets of layers that are replaced together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Extent = Literal["all", "one", "up-to"]
EXTENTS: tuple[Extent, ...] = ("all", "one", "up-to")
ALL = "all"
"""label of the set of all layers"""


@dataclass(frozen=True)
class LayerSet:
    """Layers that are replaced at once."""

    label: str
    """`all`, the number of one layer, or `0-3` for all layers up to one"""
    places: tuple[int, ...]
    """numbers of the layers among those of the site, ascending"""


def layer_sets(layers: Sequence[int], extents: Sequence[Extent]) -> list[LayerSet]:
    """Return the sets of the extents: all layers; each one alone; all up to each one. No set comes twice.

    `layers` are the numbers of the layers of the site, in order; they name the sets.
    """
    places = tuple(range(len(layers)))
    sets: dict[tuple[int, ...], LayerSet] = {}
    if "all" in extents:
        sets[places] = LayerSet(ALL, places)
    for place, layer in enumerate(layers):
        if "one" in extents:
            sets.setdefault((place,), LayerSet(str(layer), (place,)))
        if "up-to" in extents:
            up_to = places[: place + 1]
            label = str(layer) if place == 0 else f"{layers[0]}-{layer}"
            sets.setdefault(up_to, LayerSet(label, up_to))
    return list(sets.values())
