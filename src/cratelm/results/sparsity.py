"""How often the neurons of each layer fire, read from three columns of the summaries of a harvest.

Shape legend: n neurons of a layer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cratelm.activations.store import summaries_path
from cratelm.runs.reading import read_parquet


@dataclass(frozen=True, eq=False)
class LayerSparsity:
    """Statistics of the neurons of one layer over the held-out split."""

    firing_rate: NDArray[np.float64]
    """[n] fraction of tokens with an activation above 0"""
    dead: NDArray[np.bool_]
    """[n] never above 0"""
    kurtosis: NDArray[np.float64]
    """[n] NaN if the variance is 0"""


def read_sparsity(harvest: Path) -> dict[int, LayerSparsity]:
    """Return the statistics of all neurons of a harvest by layer, in ascending order."""
    columns = ["layer", "firing_rate", "maximum", "kurtosis"]
    table = read_parquet(summaries_path(harvest, "held_out"), columns)
    layer, rate, maximum, kurtosis = (table[name].to_numpy() for name in columns)
    return {
        number: LayerSparsity(rate[here], maximum[here] <= 0, kurtosis[here])
        for number in np.unique(layer).tolist()
        for here in [layer == number]
    }
