"""`cratelm evaluate`: measure models on splits of a run and on named sets, each figure with its error.

A split is cut into sequences of T tokens as in training; the last one is shorter. Every token but
the first of the split is predicted exactly once, from what precedes it in its sequence, which may
include the end of another document. A model that was trained with a begin token reads it before every sequence. A text of a named set is read by itself, after the token that begins
a text, and in each model's own tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.evaluate.config import EvaluateConfig
from cratelm.evaluate.measurements import (
    Difference,
    DocumentTotals,
    Measurement,
    difference,
    differences_table,
    measurement,
    measurements_table,
)
from cratelm.evaluate.text_sets import NamedSet, Shards, Texts, TextSource, Windows, named_set
from cratelm.evaluate.windows import Totals, score
from cratelm.models.begin import announced
from cratelm.models.open import (
    LoadedModel,
    check_store,
    encoder_of,
    find_model,
    open_model,
    sequence_length,
)
from cratelm.records import SPLITS, Split
from cratelm.runs import Run, write_json
from cratelm.runs.storage import check_target
from cratelm.tokens.beginning import NONE, Beginning
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenizer import token_sizes


@dataclass(frozen=True)
class EvaluateResult:
    """Figures of every model on every set, and differences between the first model and the others."""

    measurements: tuple[Measurement, ...]
    """set by set, in the order of `--on` and `--models`"""
    differences: tuple[Difference, ...]
    """empty for a single model, and if the models were not measured on the same documents"""

    def __str__(self) -> str:
        tables = [measurements_table(self.measurements)]
        if self.differences:
            tables.append(differences_table(self.differences))
        return "\n\n".join(tables)


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measure models of a run, or any other causal language models, and return their figures.

    Raises `InputError` if a model, tokens or a set are missing or do not belong together, if there are
    too few tokens, and if a loss is not finite.
    """
    run = Run(config.run)
    if config.output is not None:
        check_target(Path(config.output), "--output", "file")
    sets: dict[str, Split | NamedSet] = {n: _split_or_set(n, config) for n in config.sets}
    store = None
    if any(isinstance(measured_on, str) for measured_on in sets.values()):
        run.stage("tokens").require("tokenize")
        store = TokenStore(run.stage("tokens").path)
    for name in config.subjects:  # a wrong name is reported before any model is measured
        find_model(run, name, config, from_run=config.path is None)
    measured: dict[tuple[str, str], tuple[DocumentTotals, Measurement]] = {}
    for name in config.subjects:
        subject = open_model(run, name, config, from_run=config.path is None)
        for on, documents in sets.items():
            measured[on, name] = _measure(subject, on, documents, run, store, config)
    result = EvaluateResult(
        tuple(measured[on, name][1] for on in sets for name in config.subjects),
        tuple(d for on in sets for d in _differences(on, config, measured)),
    )
    if config.output is not None:
        write_json(Path(config.output), _plain(asdict(result)))
    return result


def _split_or_set(name: str, config: EvaluateConfig) -> Split | NamedSet:
    for split in SPLITS:
        if name == split:
            return split
    return named_set(name, config.max_documents, config.text_field)


def _measure(
    subject: LoadedModel,
    on: str,
    documents: Split | NamedSet,
    run: Run,
    store: TokenStore | None,
    config: EvaluateConfig,
) -> tuple[DocumentTotals, Measurement]:
    """Return the sums by document and the figures of one model on one set."""
    length = sequence_length(subject, config.sequence_length)
    beginning = announced(subject, run, config.begin_token)
    room = beginning.room(length)
    stride = _stride(config, room, subject)
    if isinstance(documents, NamedSet):
        encoder = encoder_of(subject, run)
        source: TextSource = Texts(
            documents.passages(),
            encoder,
            documents.kind.unit,
            config.max_tokens,
            beginning,
            has_start=config.begin_token != NONE,
        )
        vocabulary, on = encoder.vocabulary, documents.name
        last_word = documents.kind.last_word
    else:
        assert store is not None
        check_store(subject, store, run)
        source = _shards(store, documents, config, beginning)
        vocabulary, last_word = "the run's", False
    label = f"{subject.name} on {on}"
    with tqdm(
        total=source.n_tokens, desc=label, unit="token", unit_scale=True, disable=config.quiet
    ) as bar:
        windows = source.windows(room, stride)
        totals = score(subject.model, label, windows, config.batch_size, bar)
    if not totals.tokens.any():
        raise InputError(f"{on} has no token to predict: name another set with --on")
    sums = _by_document(totals, windows, vocabulary, last_word)
    return sums, measurement(
        sums,
        model=subject.name,
        on=on,
        unit=source.unit,
        sequence_length=length,
        stride=stride,
        begin_token=beginning.token,
    )


def _stride(config: EvaluateConfig, length: int, subject: LoadedModel) -> int:
    if config.stride is not None and config.stride > length:
        raise InputError(
            f"--stride is {config.stride}, more than the {length} tokens of a sequence of"
            f" {subject.name}: tokens would be skipped"
        )
    return config.stride or length


def _shards(store: TokenStore, name: Split, config: EvaluateConfig, beginning: Beginning) -> Shards:
    split = store.split(name)
    if split.n_tokens < 2:
        raise InputError(f"the {name} split has {split.n_tokens} tokens, but needs at least 2")
    n = min(split.n_tokens - 1, config.max_tokens or split.n_tokens)
    sizes = token_sizes(store.tokenizer, store.eot_id)
    return Shards(split, n, sizes, beginning=beginning)


def _by_document(
    totals: Totals, windows: Windows, vocabulary: str, last_word: bool
) -> DocumentTotals:
    """Return the sums of the documents that have a predicted token."""
    counted = np.flatnonzero(totals.tokens)
    totals = Totals(*(getattr(totals, name)[counted] for name in Totals.__dataclass_fields__))
    words = windows.n_words()
    return DocumentTotals(
        totals=totals,
        bytes=windows.n_bytes()[counted],
        words=None if words is None else words[counted],
        whole=(totals.top_1 == totals.tokens).astype(np.float64) if last_word else None,
        vocabulary=vocabulary,
    )


def _differences(
    on: str,
    config: EvaluateConfig,
    measured: Mapping[tuple[str, str], tuple[DocumentTotals, Measurement]],
) -> list[Difference]:
    """Return the first model minus each of the others on one set."""
    first, *others = config.subjects
    sums, figures = measured[on, first]
    pairs = [
        difference(sums, measured[on, other][0], model=first, less=other, on=figures.on)
        for other in others
    ]
    return [pair for pair in pairs if pair is not None]


def _plain(value: Any) -> Any:
    """Return a value as JSON values: a number that JSON does not have becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
