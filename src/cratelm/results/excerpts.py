"""Excerpts of one neuron as text, true activations beside simulated ones."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.records import EXCERPT_KINDS, Excerpt, ExcerptKind, NeuronRecord, levels
from cratelm.results.views import ExcerptView, ShadedToken, Shown, TokenValue
from cratelm.score.simulators import SIMULATORS, simulate
from cratelm.tokens.shards import TokenStore

_SHOWN: dict[ExcerptKind, int] = {
    "top": 12,
    "random": 6,
    "openai_bin": 2,
    "anthropic_bin": 1,
    "out_of_context": 3,
}
"""excerpts of each kind, and bin, on a page that does not show all"""
_FAVOURITES = 16
_shaded_token: Callable[[tuple[str, float, int]], ShadedToken] = partial(tuple.__new__, ShadedToken)
"""ShadedToken._make without its Python: thousands are made for a page"""


def excerpt_views(
    excerpts: Sequence[Excerpt],
    store: TokenStore | None,
    explainer: str,
    payload: Mapping[str, Any] | None,
    documents: Callable[[Collection[int]], Mapping[int, str]],
    shown: Shown,
) -> tuple[tuple[ExcerptView, ...], int]:
    """The excerpts shown, and how many are held back. `documents` names documents by their ordinals."""
    if store is None:
        return (), len(excerpts)
    taken = list(excerpts) if shown == "all" else list(_first(excerpts, shown))
    simulated: list[NDArray[np.float64]] | None = None
    if payload is not None and explainer in SIMULATORS and taken:
        simulated = simulate(explainer, payload, [e.token_ids for e in taken])
    top = max((float(e.activations.max()) for e in taken if len(e)), default=0.0)
    simulated_top = max((float(s.max()) for s in simulated or [] if len(s)), default=0.0)
    names = documents({e.document for e in taken})
    views = []
    for place, e in enumerate(taken):
        tokens = store.decode_tokens(e.token_ids)
        other = simulated[place] if simulated else None
        views.append(
            ExcerptView(
                kind=e.kind,
                bin=e.bin,
                rank=e.rank,
                peak=e.peak,
                document=names.get(e.document, f"document {e.document}"),
                true=_shaded(tokens, e.activations, top),
                simulated=() if other is None else _shaded(tokens, other, simulated_top),
            )
        )
    return tuple(views), len(excerpts) - len(taken)


def _first(excerpts: Sequence[Excerpt], shown: Shown) -> Iterator[Excerpt]:
    """By kind and bin, the first of each."""
    for kind in EXCERPT_KINDS if shown == "some" else ("top",):
        mine = [e for e in excerpts if e.kind == kind]
        for bin_ in sorted({e.bin for e in mine}):
            yield from [e for e in mine if e.bin == bin_][: _SHOWN[kind]]


def _shaded(tokens: Sequence[str], values: Any, top: float) -> tuple[ShadedToken, ...]:
    shown = levels(np.asarray(values, np.float64), top) if top > 0 else np.zeros(len(tokens), int)
    told = np.asarray(values, np.float64).tolist()
    return tuple(map(_shaded_token, zip(tokens, told, shown.tolist(), strict=True)))


def favourite_tokens(
    excerpts: Sequence[Excerpt], store: TokenStore | None
) -> tuple[TokenValue, ...]:
    """Tokens by mean activation, those that were seen twice or more first.

    As the look-up explainer takes means: each position once, a token of an excerpt that was chosen
    for its peak counts half of one in a random excerpt.
    """
    if store is None or not excerpts:
        return ()
    evidence = collect_evidence(NeuronRecord(None, tuple(excerpts)), 1, WEIGHT)  # type: ignore[arg-type]
    ids, place, count = np.unique(evidence.contexts[:, 0], return_inverse=True, return_counts=True)
    total = np.bincount(place, evidence.activations * evidence.weights)
    mean = total / np.bincount(place, evidence.weights)
    order = np.lexsort((-mean, count < 2))
    best = [i for i in order[: 4 * _FAVOURITES] if mean[i] > 0][:_FAVOURITES]
    texts = store.decode_tokens(ids[best])
    return tuple(
        TokenValue(t, float(mean[i]), int(count[i])) for t, i in zip(texts, best, strict=True)
    )
