"""`cratelm predict`: show what models predict after each token of the same text, as a page and a figure.

The text is read by itself, after the token that begins a text, and in each model's own tokens.
"""

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path

from cratelm.corpus.formats import text_of_file
from cratelm.errors import InputError
from cratelm.evaluate.config import PredictConfig
from cratelm.evaluate.predictions import PredictedText, Prediction, predict_text
from cratelm.models.begin import announced, opening
from cratelm.models.open import LoadedModel, encoder_of, open_model
from cratelm.runs import Run, atomic_path
from cratelm.runs.reading import read_parquet
from cratelm.runs.storage import check_target
from cratelm.text.display import visible
from cratelm.tokens.beginning import Beginning
from cratelm.tokens.shards import TokenStore

PAGE = "predictions.html"
AHEAD = 32
"""number of tokens of the document's continuation to read; the page shows their beginning"""


@dataclass(frozen=True)
class PredictResult:
    """The page and its content."""

    page: Path
    figures: tuple[Path, ...]
    """PNG and PDF"""
    text: PredictedText
    predictions: tuple[Prediction, ...]

    def __str__(self) -> str:
        cut = "… " if len(self.text.text) > 60 else ""
        lines = [self.text.origin, cut + visible(self.text.text[-60:])]
        if self.text.continuation:
            lines.append(f"continues: {visible(self.text.continuation[:40])}")
        for p in self.predictions:
            after = "  ".join(f"{visible(c.token)} {c.probability:.1%}" for c in p.after)
            figures = f"loss {p.loss:.3f} nats per token, {p.bits_per_byte:.3f} bits per byte"
            lines += ["", f"{p.model}: {figures}", f"  next: {after}"]
        return "\n".join([*lines, "", f"page  {self.page}"])


def predict(config: PredictConfig) -> PredictResult:
    """Write the page, and a PNG and a PDF of it in the same folder; return what they show.

    Raises `InputError` if a model or the text is missing, or if the text is too long for a model.
    """
    from cratelm.evaluate.predict_view import draw, page  # matplotlib: slow to import

    run = Run(config.run)
    out = Path(config.out or run.path / PAGE)
    check_target(out, "--out", "file")
    subjects = [open_model(run, name, config) for name in config.models]
    encoders = [encoder_of(subject, run) for subject in subjects]
    begun = [announced(subject, run, config.begin_token) for subject in subjects]
    text = _text(config, run, subjects, begun[0])
    predictions = tuple(
        predict_text(subject, encoder, text.text, config.top, opening(encoder, beginning))
        for subject, encoder, beginning in zip(subjects, encoders, begun, strict=True)
    )
    html = page(text, predictions)
    figures = tuple(out.with_suffix(suffix) for suffix in (".png", ".pdf"))
    with contextlib.ExitStack() as files:  # the three appear together, or none does
        for path in figures:
            draw(text, predictions, files.enter_context(atomic_path(path)), path.suffix[1:])
        files.enter_context(atomic_path(out)).write_text(html, encoding="utf-8")
    return PredictResult(out, figures, text, predictions)


def _text(
    config: PredictConfig, run: Run, subjects: list[LoadedModel], beginning: Beginning
) -> PredictedText:
    if config.text is not None:
        return PredictedText(config.text, "Your own text", "")
    if config.text_file is not None:
        text = text_of_file(Path(config.text_file))
        return PredictedText(text, f"The text of {config.text_file}", "")
    run.stage("tokens").require("tokenize")
    longest = [subject.longest - 1 for subject in subjects if subject.longest is not None]
    store = TokenStore(run.stage("tokens").path)
    return _document(config, store, min([config.tokens, *longest]), beginning)


def _document(
    config: PredictConfig, store: TokenStore, most: int, beginning: Beginning
) -> PredictedText:
    """Return the beginning of a document. Raises `InputError` for a number that the split does not have."""
    split = store.split(config.split)
    number = config.document
    if number is None and split.n_documents:
        number = random.Random(config.seed).randrange(split.n_documents)
    if number is None or number >= split.n_documents:
        raise InputError(
            f"--document is {number}, but the {config.split} split has {split.n_documents} documents,"
            " numbered from 0"
        )
    # without its end-of-text token
    start, stop = int(split.starts[number]), int(split.starts[number + 1]) - 1
    first_ids = split.read(start, min(stop, start + most))
    next_ids = split.read(start + len(first_ids), min(stop, start + len(first_ids) + AHEAD))
    shown_ids = beginning.without(first_ids)
    text, continuation = (_decoded(store, ids.tolist()) for ids in (shown_ids, next_ids))
    row = read_parquet(
        store.path / "documents.parquet",
        columns=["source", "name", "line"],
        filters=[("ordinal", "=", int(split.ordinals[number]))],
    ).to_pylist()[0]
    location = " ".join(str(v) for v in (row["source"], row["name"], row["line"] or "") if v)
    drawn = "" if config.document is not None else f", drawn with seed {config.seed}"
    part = f"its first {len(first_ids):,} of {stop - start:,} tokens"
    return PredictedText(
        text, f"Document {number} of {config.split} ({location}){drawn}: {part}", continuation
    )


def _decoded(store: TokenStore, ids: list[int]) -> str:
    """Return the text of tokens, without incomplete characters at its ends."""
    return store.tokenizer.decode(ids, skip_special_tokens=False).strip("\ufffd")
