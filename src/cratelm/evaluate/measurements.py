"""Figures of models on sets with their standard errors, differences of two models, and both as text.

Shape legend: C documents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.evaluate.windows import Totals
from cratelm.records import Estimate
from cratelm.stats.ratio import perplexity, ratio
from cratelm.text.table import MISSING, align

_FIGURES: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss (nats)", ".4f"),
    ("perplexity", "perplexity", ",.2f"),
    ("bits_per_byte", "bits per byte", ".4f"),
    ("top_1", "top-1", ".2%"),
    ("top_5", "top-5", ".2%"),
    ("word_perplexity", "word perplexity", ",.1f"),
    ("last_word", "last word", ".2%"),
)
"""field, heading, format"""
_LONG = 1e6
"""perplexities from this value on are written with an exponent"""


@dataclass(frozen=True)
class Measurement:
    """All figures of one model on one set."""

    model: str
    on: str
    """split of the run, or name of the set"""
    documents: int
    """number of documents with at least one predicted token"""
    unit: str
    """what a document is, in the plural"""
    tokens: int
    """number of predicted tokens, including <|endoftext|> in shards"""
    bytes: int
    """UTF-8 bytes of the predicted text"""
    words: int | None
    """number of predicted words, which white space separates; None for shards"""
    sequence_length: int
    stride: int
    loss: Estimate
    """nats per token"""
    perplexity: Estimate
    """per token"""
    bits_per_byte: Estimate | None
    """of UTF-8 text, including the bits of <|endoftext|>; None for a text without a byte"""
    top_1: Estimate
    """fraction of tokens that were the model's top prediction"""
    top_5: Estimate
    """fraction of tokens among the model's five most likely"""
    word_perplexity: Estimate | None
    """exp of the nats per word; for LAMBADA, per last word; None for shards"""
    last_word: Estimate | None
    """fraction of last words whose every token was the model's top prediction; only for LAMBADA"""
    begin_token: int | None = None
    """id of the begin token that was set before every sequence; None for none"""


@dataclass(frozen=True)
class Difference:
    """The first model minus another on the same documents.

    A figure is None if the models do not predict the same things.
    """

    model: str
    less: str
    on: str
    documents: int
    loss: Estimate | None
    """nats per token; None for models with different tokenizers"""
    bits_per_byte: Estimate | None
    top_1: Estimate | None
    top_5: Estimate | None
    last_word: Estimate | None


@dataclass(frozen=True, eq=False)
class DocumentTotals:
    """Sums of one model on one set, by document; only documents with a predicted token."""

    totals: Totals
    bytes: NDArray[np.int64]
    """[C]"""
    words: NDArray[np.int64] | None
    """[C]"""
    whole: NDArray[np.float64] | None
    """[C] 1 if every token was the top prediction, else 0; only for LAMBADA"""
    vocabulary: str
    """identity of the tokenizer: models are compared token by token only if it is the same"""


def measurement(
    sums: DocumentTotals,
    *,
    model: str,
    on: str,
    unit: str,
    sequence_length: int,
    stride: int,
    begin_token: int | None = None,
) -> Measurement:
    """Return all figures of one model on one set."""
    totals, words = sums.totals, sums.words
    loss = ratio(totals.loss, totals.tokens)
    return Measurement(
        model=model,
        on=on,
        documents=len(totals.tokens),
        unit=unit,
        tokens=int(totals.tokens.sum()),
        bytes=int(sums.bytes.sum()),
        words=None if words is None else int(words.sum()),
        sequence_length=sequence_length,
        stride=stride,
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=_over(totals.loss / math.log(2), sums.bytes),
        top_1=ratio(totals.top_1, totals.tokens),
        top_5=ratio(totals.top_5, totals.tokens),
        word_perplexity=_word_perplexity(totals, words),
        last_word=_over(sums.whole, np.ones(len(totals.tokens))),
        begin_token=begin_token,
    )


def difference(
    a: DocumentTotals, b: DocumentTotals, *, model: str, less: str, on: str
) -> Difference | None:
    """Return model `a` minus model `b`; None if they were not measured on the same documents."""
    if not np.array_equal(a.bytes, b.bytes):
        return None
    same = a.vocabulary == b.vocabulary and np.array_equal(a.totals.tokens, b.totals.tokens)
    tokens = a.totals.tokens if same else None
    last = None if a.whole is None or b.whole is None else a.whole - b.whole
    return Difference(
        model=model,
        less=less,
        on=on,
        documents=len(a.bytes),
        loss=_over(a.totals.loss - b.totals.loss, tokens),
        bits_per_byte=_over((a.totals.loss - b.totals.loss) / math.log(2), a.bytes),
        top_1=_over(a.totals.top_1 - b.totals.top_1, tokens),
        top_5=_over(a.totals.top_5 - b.totals.top_5, tokens),
        last_word=_over(last, np.ones(len(a.bytes))),
    )


def _over(x: NDArray[np.float64] | None, y: NDArray | None) -> Estimate | None:
    """Return the ratio; None if a side is missing or the sum of `y` is 0."""
    return None if x is None or y is None or not y.sum() else ratio(x, y)


def _word_perplexity(totals: Totals, words: NDArray[np.int64] | None) -> Estimate | None:
    loss = _over(totals.loss, words)
    return None if loss is None else perplexity(loss)


def measurements_table(measurements: Sequence[Measurement]) -> str:
    """Return a block per set: how much was predicted, and a line per model."""
    blocks = []
    for on, group in groupby(measurements, key=lambda m: m.on):
        models = list(group)
        amounts = list(dict.fromkeys(map(_amount, models)))
        heading = [f"{on}: {amounts[0]}"]
        if len(amounts) > 1:
            heading = [on, *(f"  {m.model}: {_amount(m)}" for m in models)]
        blocks.append("\n".join([*heading, _figures(models, lambda m: m.model, "")]))
    return "\n\n".join(blocks)


def differences_table(differences: Sequence[Difference]) -> str:
    """Return a line per pair and set: the first model minus the other."""
    figures = _figures(differences, lambda d: f"{d.on}: {d.model} - {d.less}", "+")
    return "\n".join(["difference on the same documents, ± standard error over them", figures])


def _amount(m: Measurement) -> str:
    """Return, in words, how much was predicted."""
    words = "" if m.words is None else f", {m.words:,} words"
    overlaps = m.stride < m.sequence_length - (m.begin_token is not None)
    stride = f", stride {m.stride}" if overlaps else ""
    return (
        f"{m.tokens:,} tokens{words}, {m.bytes:,} bytes in {m.documents:,} {m.unit},"
        f" T = {m.sequence_length}{stride}"
    )


def _figures(rows: Sequence[Any], label: Callable[[Any], str], sign: str) -> str:
    """Return aligned columns of the figures that any row has."""
    figures = [f for f in _FIGURES if any(getattr(row, f[0], None) for row in rows)]
    lines = [["", *(heading for _, heading, _ in figures)]]
    lines += [
        [label(row), *(_show(getattr(row, name), sign + form) for name, _, form in figures)]
        for row in rows
    ]
    return "\n".join(align(lines))


def _show(figure: Estimate | None, form: str) -> str:
    if figure is None:
        return MISSING
    return figure.show(form if abs(figure.value) < _LONG else ".3g")
