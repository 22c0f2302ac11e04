"""Excerpts of one neuron as shaded text, and the tokens it fires on, for the report and the browser.

Shape legend: n tokens of an excerpt.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.activations.excerpt_table import ExcerptTable
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.evidence import WEIGHT, evidence_of
from cratelm.records import EXCERPT_KINDS, Excerpt, ExcerptKind, levels
from cratelm.results.views import ExcerptChoice, ExcerptView, ShadedToken, TokenValue
from cratelm.score.simulators import SIMULATORS, simulate
from cratelm.text.units import Unit
from cratelm.tokens.shards import TokenStore

_FIRST: dict[ExcerptKind, int] = {
    "top": 12,
    "random": 6,
    "openai_bin": 2,
    "anthropic_bin": 1,
    "out_of_context": 3,
}
"""maximum number of excerpts per kind and bin on a page that does not show all of them"""
_FAVOURITES = 16
"""maximum number of tokens returned by `favourite_tokens`"""
_shaded_token: Callable[[tuple[str, float, int, str]], ShadedToken] = partial(
    tuple.__new__, ShadedToken
)
"""like ShadedToken._make but without its Python code: a page needs thousands of tokens, and this takes a
third of the time"""


def shade(
    store: TokenStore, token_ids: NDArray, activations: ArrayLike, maximum: float
) -> tuple[ShadedToken, ...]:
    """Return the units of a text with their activations and levels 0..10; level 10 is the activation `maximum`.

    `token_ids` and `activations` are [n]. A unit of several tokens has the largest of their activations.
    """
    return _shaded(store, token_ids, store.units(token_ids), activations, maximum)


def _shaded(
    store: TokenStore,
    token_ids: NDArray,
    units: Sequence[Unit],
    activations: ArrayLike,
    maximum: float,
) -> tuple[ShadedToken, ...]:
    values = np.asarray(activations, np.float64)
    if len(units) == len(values):
        parts = [""] * len(units)
        largest_ = values
    else:
        parts = [_parts(store, token_ids, values, unit) for unit in units]
        largest_ = np.maximum.reduceat(values, [unit.start for unit in units])
    texts, shades = (unit.text for unit in units), levels(largest_, maximum)
    columns = zip(texts, largest_.tolist(), shades.tolist(), parts, strict=True)
    return tuple(map(_shaded_token, columns))


def _parts(store: TokenStore, token_ids: NDArray, values: NDArray, unit: Unit) -> str:
    """Return the bytes and the activation of each token of a unit, in words; empty for one token."""
    if unit.n_tokens == 1:
        return ""
    of_bytes = store.bytes_of(token_ids[unit.start : unit.stop])
    pairs = zip(of_bytes, values[unit.start : unit.stop].tolist(), strict=True)
    return f"{unit.n_tokens} tokens: " + ", ".join(
        f"{b.hex(' ')} {value or 0:.3g}" for b, value in pairs
    )


def unit_at(store: TokenStore, token_ids: NDArray, offset: int) -> int:
    """Return the index of the unit that holds the token at `offset`."""
    return _unit_at(store.units(token_ids), offset)


def _unit_at(units: Sequence[Unit], offset: int) -> int:
    return next((at for at, unit in enumerate(units) if offset < unit.stop), offset)


def simulate_excerpts(
    explainer: str,
    payload: Mapping[str, Any] | None,
    excerpts: Sequence[Excerpt],
    concepts: ConceptReader | None,
) -> list[NDArray[np.float64]] | None:
    """Return the simulated activations [n] of each excerpt. `concepts` evaluates formulas.

    Returns None without excerpts or an explanation, and for explainers whose simulator is a language model.
    """
    if payload is None or explainer not in SIMULATORS or not excerpts:
        return None
    return simulate(explainer, payload, [e.token_ids for e in excerpts], concepts)


def largest(arrays: Sequence[ArrayLike] | None) -> float:
    """Return the largest value in several arrays; 0 if there are no values."""
    maxima = (np.max(a) for a in arrays or () if np.size(a))
    return max(map(float, maxima), default=0.0)


def excerpt_views(
    excerpts: Sequence[Excerpt],
    store: TokenStore | None,
    explainer: str,
    payload: Mapping[str, Any] | None,
    documents: Callable[[Collection[int]], Mapping[int, str]],
    choice: ExcerptChoice,
    concepts: ConceptReader | None = None,
) -> tuple[tuple[ExcerptView, ...], int]:
    """Return the chosen excerpts and the number of excerpts that were not chosen. `concepts` evaluates formulas.

    `documents` maps document ordinals to names. Without a `store` there is no text, so nothing is shown.
    """
    if store is None:
        return (), len(excerpts)
    chosen = list(excerpts) if choice == "all" else _first(excerpts, choice)
    simulated = simulate_excerpts(explainer, payload, chosen, concepts)
    top, simulated_top = largest([e.activations for e in chosen]), largest(simulated)
    names = documents({e.document for e in chosen})
    views = []
    for i, e in enumerate(chosen):
        units = store.units(e.token_ids)
        views.append(
            ExcerptView(
                kind=e.kind,
                bin=e.bin,
                rank=e.rank,
                peak=_unit_at(units, e.peak),
                document=names.get(e.document, f"document {e.document}"),
                true=_shaded(store, e.token_ids, units, e.activations, top),
                simulated=_shaded(store, e.token_ids, units, simulated[i], simulated_top)
                if simulated
                else (),
            )
        )
    return tuple(views), len(excerpts) - len(chosen)


def _first(excerpts: Sequence[Excerpt], choice: ExcerptChoice) -> Sequence[Excerpt]:
    """Return the first excerpts of each kind and bin, as many as `_FIRST` allows."""
    table = ExcerptTable.of(excerpts)  # only chosen excerpts are made into objects
    rows: list[int] = []
    for kind in EXCERPT_KINDS if choice == "some" else ("top",):
        of_kind = np.flatnonzero(table.is_kind(kind))
        for bin_ in np.unique(table.bins[of_kind]):
            rows += of_kind[table.bins[of_kind] == bin_][: _FIRST[kind]].tolist()
    return table.items(rows)


def favourite_tokens(
    excerpts: Sequence[Excerpt], store: TokenStore | None
) -> tuple[TokenValue, ...]:
    """Return the tokens with the highest mean activation; tokens that occur at least twice come first.

    Means are weighted as in the look-up explainer: each position counts once, and a token in an excerpt
    that was chosen for its peak counts half as much as a token in a random excerpt.
    """
    if store is None or not excerpts:
        return ()
    evidence = evidence_of(excerpts, 1, WEIGHT)
    ids, inverse, count = np.unique(
        evidence.contexts[:, 0], return_inverse=True, return_counts=True
    )
    total = np.bincount(inverse, evidence.activations * evidence.weights)
    mean = total / np.bincount(inverse, evidence.weights)
    order = np.lexsort((-mean, count < 2))
    best = [i for i in order[: 4 * _FAVOURITES] if mean[i] > 0][:_FAVOURITES]
    texts = store.decode_tokens(ids[best])
    return tuple(
        TokenValue(t, float(mean[i]), int(count[i])) for t, i in zip(texts, best, strict=True)
    )
