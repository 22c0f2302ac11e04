"""Where in their sequences the top excerpts of neurons have their peaks: at one position if they are artefacts.

A neuron that responds to text peaks anywhere in a sequence. One that has half or more of its top excerpts at one
position responds to the position, mostly as a part of an attention sink (`cratelm.tokens.beginning`).

Shape legend: H neurons, n top excerpts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.tables import top_rows

FIRST = 8
"""number of first positions of which the share of top excerpts is stored"""
FEWEST = 5
"""fewest top excerpts of a neuron that can crowd"""

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class TopPositions:
    """Where the peaks of the top excerpts of all neurons are. Positions count from 0, without a begin token."""

    excerpts: int
    """number of top excerpts"""
    first_shares: tuple[float, ...]
    """[8] fraction of them with their peak at each of the first positions of a sequence"""
    neurons: int
    """number of neurons with 5 top excerpts or more"""
    crowded: int
    """number of these with half or more of their top excerpts at one position, whichever it is"""
    crowded_first: int
    """number of these with half or more at the first position"""
    position: int | None
    """the position at which most neurons crowd; None if none do"""


def top_positions(layers: Sequence[LayerHarvest], room: int) -> TopPositions:
    """Return where the top excerpts of all layers peak; sequence i begins at token i * `room` of the split."""
    n_first, n_excerpts, n_neurons = np.zeros(FIRST, np.int64), 0, 0
    crowded: list[Int64] = []
    for layer in layers:
        rows = top_rows(layer, 0, layer.n_neurons)
        at = rows.position % room
        n_first += np.bincount(at[at < FIRST], minlength=FIRST)
        n_excerpts += len(at)
        of_neuron = np.bincount(rows.neuron, minlength=layer.n_neurons)
        n_neurons += int((of_neuron >= FEWEST).sum())
        crowded.append(_crowded(rows.neuron, at, of_neuron, room))
    positions = np.concatenate([np.zeros(0, np.int64), *crowded])
    shares = n_first / max(1, n_excerpts)
    return TopPositions(
        excerpts=n_excerpts,
        first_shares=tuple(shares.tolist()),
        neurons=n_neurons,
        crowded=len(positions),
        crowded_first=int((positions == 0).sum()),
        position=int(np.bincount(positions).argmax()) if len(positions) else None,
    )


def _crowded(neuron: Int64, at: Int64, of_neuron: Int64, room: int) -> Int64:
    """Return the position of each neuron that has half or more of its excerpts [n] there; the first, if there are two."""
    pairs, counts = np.unique(neuron * room + at, return_counts=True)
    which, position = np.divmod(pairs, room)
    enough = (of_neuron[which] >= FEWEST) & (2 * counts >= of_neuron[which])
    _, first = np.unique(which[enough], return_index=True)
    return position[enough][first]
