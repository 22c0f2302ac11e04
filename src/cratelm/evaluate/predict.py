"""`cratelm predict`: what models expect after each token of the same text, as a page and a figure.

The text stands alone, after the token that texts begin with, and each model reads it in its own
tokens. Memory: the logits of one text, at most the model's longest sequence times its vocabulary.

Shape legend: n tokens of a text, k likeliest next tokens shown, V vocabulary.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from cratelm.errors import InputError
from cratelm.evaluate.predict_config import PredictConfig
from cratelm.evaluate.scoring import next_logits
from cratelm.models.open import Encoder, LoadedModel, encoder_of, open_model
from cratelm.runs import Run, atomic_path
from cratelm.text.display import visible
from cratelm.tokens.shards import TokenStore

PAGE = "predictions.html"
AHEAD = 32
"""tokens of how the document goes on that are read; the page shows their beginning"""


@dataclass(frozen=True)
class Candidate:
    """A token that may come next."""

    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One token of the text, and what the model expected in its place."""

    token: str
    probability: float
    """that the model gave to it"""
    rank: int
    """its place among the model's expectations, from 1"""
    expected: tuple[Candidate, ...]
    """[k] the likeliest, in order"""


@dataclass(frozen=True)
class Prediction:
    """One model on the text."""

    model: str
    steps: tuple[Step, ...]
    """[n]"""
    after: tuple[Candidate, ...]
    """[k] what it expects after the end of the text"""
    loss: float
    """nats a token"""
    bits_per_byte: float


@dataclass(frozen=True)
class Text:
    """What is read, and where it is from."""

    text: str
    origin: str
    """in words"""
    goes_on: str
    """how the document goes on, empty for a text of one's own"""


@dataclass(frozen=True)
class PredictResult:
    """The page, and what it shows."""

    page: Path
    figures: tuple[Path, ...]
    """PNG and PDF"""
    text: Text
    predictions: tuple[Prediction, ...]

    def __str__(self) -> str:
        cut = "… " if len(self.text.text) > 60 else ""
        lines = [self.text.origin, cut + visible(self.text.text[-60:])]
        if self.text.goes_on:
            lines.append(f"goes on: {visible(self.text.goes_on[:40])}")
        for found in self.predictions:
            after = "  ".join(f"{visible(c.token)} {c.probability:.1%}" for c in found.after)
            told = f"loss {found.loss:.3f} nats a token, {found.bits_per_byte:.3f} bits per byte"
            lines += ["", f"{found.model}: {told}", f"  next: {after}"]
        return "\n".join([*lines, "", f"page  {self.page}"])


def predict(config: PredictConfig) -> PredictResult:
    """Writes the page, and a PNG and a PDF of it beside it.

    Raises `InputError` where a model or the text is missing, or the text is longer than a model takes.
    """
    from cratelm.evaluate.predict_figure import draw
    from cratelm.evaluate.predict_page import page

    run = Run(config.run)
    subjects = [
        open_model(run, name, device=config.device, dtype=config.dtype) for name in config.models
    ]
    encoders = [encoder_of(subject, run) for subject in subjects]
    text = _text(config, run, subjects)
    predictions = tuple(
        read(subject, encoder, text.text, config.top)
        for subject, encoder in zip(subjects, encoders, strict=True)
    )
    html = page(text, predictions)
    out = Path(config.out or run.path / PAGE)
    figures = tuple(out.with_suffix(suffix) for suffix in (".png", ".pdf"))
    for path in figures:
        with atomic_path(path) as temporary:
            draw(text, predictions, temporary, path.suffix[1:])
    with atomic_path(out) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return PredictResult(out, figures, text, predictions)


@torch.no_grad()
def read(subject: LoadedModel, encoder: Encoder, text: str, k: int) -> Prediction:
    """What a model expects before each token of a text, and after the last.

    Raises `InputError` where the text has no token, or more than the model takes.
    """
    ids = encoder.encode(text)  # [n]
    most = subject.longest
    if not len(ids) or (most is not None and len(ids) >= most):
        raise InputError(
            f"the text has {len(ids)} tokens for {subject.name},"
            f" 1 to {'any number' if most is None else most - 1} were expected: give another --text"
        )
    tokens = torch.tensor([[encoder.start, *ids]], device=subject.model.device)
    logits = next_logits(subject.model, tokens, tokens.shape[1])[0].float()  # [n + 1, V]
    logs = logits.log_softmax(-1).cpu()
    targets = torch.from_numpy(ids)
    losses = -logs[:-1].gather(1, targets[:, None])[:, 0]  # [n]
    ranks = (logs[:-1] > -losses[:, None]).sum(-1) + 1  # [n]
    best, places = logs.topk(min(k, logs.shape[1]))  # [n + 1, k] each
    expected = [
        tuple(Candidate(_shown(encoder, i), math.exp(p)) for p, i in zip(*row, strict=True))
        for row in zip(best.tolist(), places.tolist(), strict=True)
    ]
    rows = zip(ids, losses.tolist(), ranks.tolist(), expected[:-1], strict=True)
    return Prediction(
        model=subject.name,
        steps=tuple(Step(_shown(encoder, i), math.exp(-x), rank, e) for i, x, rank, e in rows),
        after=expected[-1],
        loss=float(losses.mean()),
        bits_per_byte=float(losses.sum()) / math.log(2) / len(text.encode()),
    )


def _shown(encoder: Encoder, token: int) -> str:
    """The token as text; a row of the embedding that no token has by its number."""
    return encoder.display[token] if token < len(encoder.display) else f"[{token}]"


def _text(config: PredictConfig, run: Run, subjects: list[LoadedModel]) -> Text:
    if config.text is not None:
        return Text(config.text, "Your own text", "")
    if config.text_file is not None:
        try:
            found = Path(config.text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{config.text_file} cannot be read as UTF-8 text ({error})") from None
        return Text(found, f"The text of {config.text_file}", "")
    run.stage("tokens").require("tokenize")
    longest = [subject.longest - 1 for subject in subjects if subject.longest is not None]
    return _document(config, TokenStore(run.stage("tokens").path), min([config.tokens, *longest]))


def _document(config: PredictConfig, store: TokenStore, most: int) -> Text:
    """The beginning of a document. Raises `InputError` for a number that the split does not have."""
    split = store.split(config.split)
    number = config.document
    if number is None and split.n_documents:
        number = random.Random(config.seed).randrange(split.n_documents)
    if number is None or number >= split.n_documents:
        raise InputError(
            f"--document is {number}, the {config.split} split has {split.n_documents} documents,"
            " numbered from 0"
        )
    start, stop = int(split.starts[number]), int(split.starts[number + 1]) - 1  # less its end token
    shown = split.read(start, min(stop, start + most))
    rest = split.read(start + len(shown), min(stop, start + len(shown) + AHEAD))
    text, rest_text = (_decoded(store, ids.tolist()) for ids in (shown, rest))
    row = pq.read_table(
        store.path / "documents.parquet",
        columns=["source", "name", "line"],
        filters=[("ordinal", "=", int(split.ordinals[number]))],
    ).to_pylist()[0]
    place = " ".join(str(v) for v in (row["source"], row["name"], row["line"] or "") if v)
    drawn = "" if config.document is not None else f", drawn with seed {config.seed}"
    first = f"its first {len(shown):,} of {stop - start:,} tokens"
    return Text(text, f"Document {number} of {config.split} ({place}){drawn}: {first}", rest_text)


def _decoded(store: TokenStore, ids: list[int]) -> str:
    """Text of tokens, without the pieces of characters that the cut left at either end."""
    return store.tokenizer.decode(ids, skip_special_tokens=False).strip("\ufffd")
