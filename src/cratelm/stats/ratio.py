"""Figures with their standard errors, from totals by document; pure NumPy.

Every figure is a ratio of two sums over documents, sum(x) / sum(y). Tokens of one document are not
independent, so that its standard error is taken over documents (ratio estimator; Cochran 1977,
Sampling Techniques, section 6.4):

    R = sum(x) / sum(y),    se(R)^2 = C / (C - 1) sum((x - R y)^2) / sum(y)^2

A perplexity is exp(R), with the error exp(R) se(R) (delta method). Two models on the same documents
are compared by the ratio of (x_a - x_b) to y, whose error leaves out what makes a document hard for both.

Shape legend: C documents.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cratelm.evaluate.scoring import Totals
from cratelm.records import Estimate


@dataclass(frozen=True)
class Measurement:
    """One model on one set."""

    model: str
    on: str
    """split of the run, or name of the set"""
    documents: int
    """documents that hold a predicted token"""
    unit: str
    """what they are"""
    tokens: int
    """tokens predicted; of shards <|endoftext|> is one"""
    bytes: int
    """UTF-8 bytes of the predicted text"""
    words: int | None
    """predicted words, between white space; None for shards"""
    sequence_length: int
    stride: int
    loss: Estimate
    """nats a token"""
    perplexity: Estimate
    """by token"""
    bits_per_byte: Estimate | None
    """of UTF-8 text, the bits of <|endoftext|> included; None for a text without a byte"""
    top_1: Estimate
    """part of the tokens that the model held for likeliest"""
    top_5: Estimate
    """part of the tokens among the model's five likeliest"""
    word_perplexity: Estimate | None
    """exp of the nats a word, None for shards; of LAMBADA: a last word"""
    last_word: Estimate | None
    """part of the last words whose every token the model held for likeliest; LAMBADA alone"""


@dataclass(frozen=True)
class Difference:
    """The first model less another, on the same documents; None where what they predict differs."""

    model: str
    less: str
    on: str
    documents: int
    loss: Estimate | None
    """nats a token; None for models of different tokenizers"""
    bits_per_byte: Estimate | None
    top_1: Estimate | None
    top_5: Estimate | None
    last_word: Estimate | None


@dataclass(frozen=True, eq=False)
class Counts:
    """One model on one set, by document; documents without a predicted token are left out."""

    totals: Totals
    bytes: NDArray[np.int64]
    """[C]"""
    words: NDArray[np.int64] | None
    """[C]"""
    whole: NDArray[np.float64] | None
    """[C] 1 where every token was the likeliest; LAMBADA alone"""
    vocabulary: str
    """identity of the tokens: only figures of the same are compared token by token"""


def ratio(x: ArrayLike, y: ArrayLike) -> Estimate:
    """sum(x) / sum(y) of documents [C], with its standard error."""
    over, under = np.asarray(x, np.float64), np.asarray(y, np.float64)
    total, n = under.sum(), len(under)
    value = over.sum() / total
    if n < 2:
        return Estimate(float(value), None)
    spread = n / (n - 1) * ((over - value * under) ** 2).sum()
    return Estimate(float(value), float(np.sqrt(spread) / total))


def perplexity(loss: Estimate) -> Estimate:
    """exp of a loss, infinite where the number is too large to write."""
    value = math.exp(loss.value) if loss.value < 700 else math.inf
    return Estimate(value, None if loss.error is None else value * loss.error)


def measurement(
    counts: Counts, *, model: str, on: str, unit: str, sequence_length: int, stride: int
) -> Measurement:
    """All figures of one model on one set."""
    totals, words = counts.totals, counts.words
    loss = ratio(totals.loss, totals.tokens)
    return Measurement(
        model=model,
        on=on,
        documents=len(totals.tokens),
        unit=unit,
        tokens=int(totals.tokens.sum()),
        bytes=int(counts.bytes.sum()),
        words=None if words is None else int(words.sum()),
        sequence_length=sequence_length,
        stride=stride,
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=_over(totals.loss / math.log(2), counts.bytes),
        top_1=ratio(totals.top_1, totals.tokens),
        top_5=ratio(totals.top_5, totals.tokens),
        word_perplexity=_word_perplexity(totals, words),
        last_word=_over(counts.whole, np.ones(len(totals.tokens))),
    )


def difference(a: Counts, b: Counts, *, model: str, less: str, on: str) -> Difference | None:
    """Model `a` less model `b`; None where they were not measured on the same documents."""
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
    """The ratio, None where a side is missing or the sum of `y` is 0."""
    return None if x is None or y is None or not y.sum() else ratio(x, y)


def _word_perplexity(totals: Totals, words: NDArray[np.int64] | None) -> Estimate | None:
    found = _over(totals.loss, words)
    return None if found is None else perplexity(found)
