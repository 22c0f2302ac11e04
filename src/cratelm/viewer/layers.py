"""The table of a layer: which neurons match, in which order."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cratelm.results.neuron_table import Columns
from cratelm.results.views import LayerPage, LayerQuery, NeuronRow

OnToken = Mapping[tuple[int, int], tuple[float, int]]
"""by layer and index: mean activation on a token over the maximum, and how often the token was seen"""


def layer_page(
    model: str,
    layer: int,
    columns: Columns,
    query: LayerQuery,
    on_token: OnToken | None,
    note: str,
) -> LayerPage:
    """The page of a layer's table that a query asks for."""
    query = _ordered(query, columns, on_token is not None)
    here = columns.rows_of(layer)
    rows = np.arange(here.start, here.stop)
    texts = columns.text()
    rows = _matching(rows, columns, query)
    if on_token is not None:
        rows = np.array([r for r in rows if (layer, int(columns.index[r])) in on_token], int)
    rows = _sorted(rows, layer, columns, query, on_token)
    first = (max(1, query.page) - 1) * query.per_page
    shown = rows[first : first + query.per_page].tolist()
    told = columns.principal
    return LayerPage(
        model=model,
        layer=layer,
        rows=tuple(_row(r, layer, columns, texts, on_token) for r in shown),
        total=len(rows),
        n_neurons=here.stop - here.start,
        query=query,
        metrics=columns.metrics,
        explainer=told[1] if told else "",
        note=note,
    )


def _ordered(query: LayerQuery, columns: Columns, by_token: bool) -> LayerQuery:
    """With an order: by the token that is searched for, else by the first metric, else by number."""
    if query.sort:
        return query
    best = "token" if by_token else next(iter(columns.metrics), "index")
    return replace(query, sort=best, descending=best != "index")


def _matching(rows: NDArray[np.int64], columns: Columns, query: LayerQuery) -> NDArray[np.int64]:
    if query.only in ("dead", "alive"):
        rows = rows[(columns.maximum[rows] <= 0) == (query.only == "dead")]
    if query.only == "explained" or query.text.strip():
        return columns.holding(query.text, rows.tolist())
    return rows


def _sorted(
    rows: NDArray[np.int64],
    layer: int,
    columns: Columns,
    query: LayerQuery,
    on_token: OnToken | None,
) -> NDArray[np.int64]:
    """Those without a value last, whichever the direction; ties by number."""
    if query.sort == "token" and on_token is not None:
        values = np.array([on_token[layer, int(columns.index[r])][0] for r in rows], float)
    elif query.sort in ("firing_rate", "maximum"):
        values = getattr(columns, query.sort)[rows].astype(float)
    else:
        column = columns.score(query.sort)
        values = columns.index[rows].astype(float) if column is None else column.values[rows]
    order = np.lexsort((rows, -values if query.descending else values, np.isnan(values)))
    return rows[order]


def _row(
    row: int,
    layer: int,
    columns: Columns,
    texts: NDArray[np.object_],
    on_token: OnToken | None,
) -> NeuronRow:
    index = int(columns.index[row])
    scores = {m: c for m in columns.metrics if (c := columns.score(m)) is not None}
    return NeuronRow(
        index=index,
        explanation=str(texts[row]),
        scores={
            m: None if np.isnan(c.values[row]) else float(c.values[row]) for m, c in scores.items()
        },
        status={m: str(c.status[row]) for m, c in scores.items()},
        firing_rate=float(columns.firing_rate[row]),
        maximum=float(columns.maximum[row]),
        on_token=on_token[layer, index][0] if on_token else None,
    )
