"""How often the neurons of each layer fire, read from the summaries of a harvest.

A neuron with both ends counts once: it fires where either end does, and is dead if neither ever does.

Shape legend: n neurons of a layer, r rows of a table (ends, if the neurons have both).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cratelm.activations.store import summaries_path
from cratelm.records import has_both_ends
from cratelm.runs.reading import read_parquet

Float64 = NDArray[np.float64]
_MOMENTS = ("mean", "variance", "skew", "kurtosis")


@dataclass(frozen=True, eq=False)
class LayerSparsity:
    """Statistics of the neurons of one layer over the held-out split."""

    firing_rate: NDArray[np.float64]
    """[n] fraction of tokens on which the neuron fires, at either end"""
    dead: NDArray[np.bool_]
    """[n] never fires"""
    kurtosis: NDArray[np.float64]
    """[n] NaN if the variance is 0"""


def read_sparsity(harvest: Path) -> dict[int, LayerSparsity]:
    """Return the statistics of all neurons of a harvest by layer, in ascending order."""
    columns = ["site", "layer", "firing_rate", "maximum", *_MOMENTS]
    table = read_parquet(summaries_path(harvest, "held_out"), columns)
    layer, rate, dead = neurons_of(table)
    kurtosis = table["kurtosis"].to_numpy()
    if has_ends(table):
        kurtosis = _kurtosis_of_ends(*(table[name].to_numpy() for name in _MOMENTS))
    return {
        number: LayerSparsity(rate[here], dead[here], kurtosis[here])
        for number in np.unique(layer).tolist()
        for here in [layer == number]
    }


def has_ends(table: pa.Table) -> bool:
    """Return whether the rows of a table with a column `site` are ends of neurons."""
    return len(table) > 0 and has_both_ends(str(table["site"][0]))


def neurons_of(
    table: pa.Table,
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.bool_]]:
    """Return layer, firing rate and whether it is dead of each neuron in summaries, sorted by layer and index.

    `table` needs the columns `site`, `layer`, `firing_rate` and `maximum`.
    """
    columns = (table[name].to_numpy() for name in ("layer", "firing_rate", "maximum"))
    layer, rate, maximum = columns
    if not has_ends(table):
        return layer, rate, maximum <= 0
    # at a token, only one of the two ends can be above 0
    return layer[0::2], rate[0::2] + rate[1::2], dead_rows(maximum, has_ends=True)[0::2]


def dead_rows(maximum: NDArray[np.float32], *, has_ends: bool) -> NDArray[np.bool_]:
    """Return which rows [r] belong to dead neurons; an end is dead only if the other end, next to it, is too."""
    silent = maximum <= 0
    return silent.reshape(-1, 2).all(1).repeat(2) if has_ends else silent


def _kurtosis_of_ends(
    mean: Float64, variance: Float64, skew: Float64, kurtosis: Float64
) -> Float64:
    """Return the kurtosis [n] of neurons from the moments [2 n] of their ends.

    The activation is one end minus the other, and one of the two is always 0, so its k-th raw moment is that of the
    one end plus (-1)^k times that of the other.
    """
    deviation = np.sqrt(variance)
    third = np.nan_to_num(skew) * deviation**3
    fourth = np.nan_to_num(kurtosis) * deviation**4
    raw = (
        mean,
        variance + mean**2,
        third + 3 * mean * variance + mean**3,
        fourth + 4 * mean * third + 6 * mean**2 * variance + mean**4,
    )
    m1, m2, m3, m4 = (of[0::2] + (-1) ** k * of[1::2] for k, of in enumerate(raw, 1))
    spread = m2 - m1**2
    spread = np.where(spread > 1e-12 * m2, spread, np.nan)
    return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / spread**2
