"""Measurements as text for a terminal: a block a set, a line a model, each figure ± its error."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from cratelm.evaluate.measurements import Difference, Measurement
from cratelm.records import Estimate
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
"""a perplexity from here on is written with an exponent"""


def measurements_table(measurements: Sequence[Measurement]) -> str:
    """A block a set: what was predicted, and a line a model."""
    blocks = []
    for on, group in groupby(measurements, key=lambda m: m.on):
        found = list(group)
        told = list(dict.fromkeys(_told(m) for m in found))
        heading = [f"{on}: {told[0]}"] if len(told) == 1 else [on, *map(_for_model, found)]
        blocks.append("\n".join([*heading, _grid(found, lambda m: m.model, "")]))
    return "\n\n".join(blocks)


def differences_table(differences: Sequence[Difference]) -> str:
    """A line a pair and set: the first model less the other."""
    shown = _grid(differences, lambda d: f"{d.on}: {d.model} - {d.less}", "+")
    return "\n".join(["difference on the same documents, ± standard error over them", shown])


def _for_model(m: Measurement) -> str:
    return f"  {m.model}: {_told(m)}"


def _told(m: Measurement) -> str:
    words = "" if m.words is None else f", {m.words:,} words"
    moved = "" if m.stride == m.sequence_length else f", stride {m.stride}"
    return (
        f"{m.tokens:,} tokens{words}, {m.bytes:,} bytes in {m.documents:,} {m.unit},"
        f" T = {m.sequence_length}{moved}"
    )


def _grid(rows: Sequence[Any], label: Callable[[Any], str], sign: str) -> str:
    """Columns of the figures that any row has, aligned."""
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
