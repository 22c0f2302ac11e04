"""Figures of models on sets, each with its standard error, and differences of two models.

Shape legend: C documents.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cratelm.evaluate.scoring import Totals
from cratelm.records import Estimate
from cratelm.stats.ratio import perplexity, ratio


@dataclass(frozen=True)
class Measurement:
    """All figures of one model on one set."""

    model: str
    on: str
    """split of the run, or name of the set"""
    documents: int
    """documents with at least one predicted token"""
    unit: str
    """what a document is, in the plural"""
    tokens: int
    """tokens predicted; of shards <|endoftext|> is one"""
    bytes: int
    """UTF-8 bytes of the predicted text"""
    words: int | None
    """predicted words, between white space; None for shards"""
    sequence_length: int
    stride: int
    loss: Estimate
    """nats per token"""
    perplexity: Estimate
    """by token"""
    bits_per_byte: Estimate | None
    """of UTF-8 text, the bits of <|endoftext|> included; None for a text without a byte"""
    top_1: Estimate
    """fraction of tokens that were the model's top prediction"""
    top_5: Estimate
    """fraction of tokens among the model's five most likely"""
    word_perplexity: Estimate | None
    """exp of the nats per word, None for shards; of LAMBADA: per last word"""
    last_word: Estimate | None
    """fraction of last words whose every token was the model's top prediction; only for LAMBADA"""


@dataclass(frozen=True)
class Difference:
    """The first model minus another on the same documents; a figure is None where they predict other things."""

    model: str
    less: str
    on: str
    documents: int
    loss: Estimate | None
    """nats per token; None for models of different tokenizers"""
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
    """[C] 1 where every token was the top prediction; only for LAMBADA"""
    vocabulary: str
    """identity of the tokenizer: models are compared token by token only where it is the same"""


def measurement(
    sums: DocumentTotals, *, model: str, on: str, unit: str, sequence_length: int, stride: int
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
    )


def difference(
    a: DocumentTotals, b: DocumentTotals, *, model: str, less: str, on: str
) -> Difference | None:
    """Return model `a` minus model `b`; None where they were not measured on the same documents."""
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
    """Return the ratio, None where a side is missing or the sum of `y` is 0."""
    return None if x is None or y is None or not y.sum() else ratio(x, y)


def _word_perplexity(totals: Totals, words: NDArray[np.int64] | None) -> Estimate | None:
    loss = _over(totals.loss, words)
    return None if loss is None else perplexity(loss)
