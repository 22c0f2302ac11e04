"""Options of `cratelm evaluate` and `cratelm predict`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.runs import at_least, not_in_identity
from cratelm.runs.model_options import ModelOptions
from cratelm.tokens.beginning import BeginTokenOption


@dataclass(frozen=True)
class EvaluateConfig(ModelOptions, BeginTokenOption):
    """Measure models on a run's tokens and on named sets, every token once, and compare them."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory: its models, and the tokens of its splits"""
    model: str = "crate-2l"
    """name of a model in the run"""
    path: str | None = None
    """a model folder or Hub id to measure instead of --model"""
    models: tuple[str, ...] = ()
    """several models to compare, instead of --model: names in the run, model folders or Hub ids
    (OWNER/NAME). The first is compared with each of the others, document by document"""
    on: tuple[str, ...] = ()
    """one or more sets to measure on: the run's train, fit and held_out; lambada, lambada_raw,
    wikitext2, wikitext103, ptb, openwebtext, pile, pile:SUBSET from the Hub; NAME=PATH reads one of
    these, or documents under any other name, from a local file or folder. Default: --split"""
    split: Split = "held_out"
    """train, fit or held_out; used when --on is not given"""
    max_tokens: int | None = None
    """stop after this many tokens of a set (of texts: after the document that reaches this number).
    Default: all"""
    max_documents: int | None = None
    """read only this many documents of each set of texts. Default: all, but 1,000 of openwebtext and of
    the Pile, which are streamed"""
    text_field: str | None = None
    """field that holds the text in rows of local files. Default: the set's field on the Hub"""
    sequence_length: int | None = None
    """tokens per sequence, with the begin token, which limits the context of a token. Default: the model's maximum, but at most
    2,048; 1,024 if the model states no maximum"""
    stride: int | None = None
    """tokens by which the window moves: each token is still predicted once, from at least
    sequence_length - stride tokens. Default: sequence_length, no overlap"""
    batch_size: int = 16
    """sequences at a time; fewer if their logits would exceed 1 GiB"""
    output: Path | None = not_in_identity(None)
    """also write the figures to this JSON file"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"max_tokens": 1, "max_documents": 1, "sequence_length": 1, "stride": 1,
             "batch_size": 1},
        )  # fmt: skip
        if self.models and self.path is not None:
            raise InputError("--path and --models cannot be combined: name the folder in --models")
        for field in ("models", "on"):
            names = [
                value.split("=")[0] if field == "on" else value for value in getattr(self, field)
            ]
            if len(set(names)) < len(names):
                raise InputError(f"--{field} has the same name twice: {' '.join(names)}")

    @property
    def subjects(self) -> tuple[str, ...]:
        """Return the models to measure, as the user named them."""
        return self.models or (self.path or self.model,)

    @property
    def sets(self) -> tuple[str, ...]:
        """Return the sets to measure on, as the user named them."""
        return self.on or (self.split,)


@dataclass(frozen=True)
class PredictConfig(ModelOptions, BeginTokenOption):
    """Show what models predict after each token of the same text, as a page and a figure."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory: its models, and the documents of its splits"""
    models: tuple[str, ...] = ("crate-2l", "gpt2-2l")
    """names in the run, model folders, Hub ids (OWNER/NAME); each model reads in its own tokens"""
    text: str | None = None
    """the text itself. Default: a document of the run"""
    text_file: Path | None = None
    """a UTF-8 file with the text"""
    document: int | None = None
    """number of a document in its split, from 0. Default: drawn by --seed"""
    split: Split = "held_out"
    """which documents: train, fit or held_out"""
    seed: int = 0
    """seed of the random choice of the document"""
    tokens: int = 96
    """number of tokens of the document to show, in the run's tokenizer; your own text is shown whole"""
    top: int = 5
    """number of most likely next tokens to show for each token"""
    out: Path | None = not_in_identity(None)
    """path of the page. Default: predictions.html in the run. A PNG and a PDF of the same name are
    written to the same folder"""
    quiet: bool = not_in_identity(False)
    """no effect: `predict` has no progress bar, and accepts this option as every verb does"""

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = [f for f in ("text", "text_file", "document") if getattr(self, f) is not None]
        if len(texts) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in texts)
            raise InputError(f"{flags} cannot be combined: give one text")
        if not self.models or len(set(self.models)) < len(self.models):
            raise InputError("--models is empty or names a model twice: name one or more models")
        at_least(self, {"document": 0, "seed": 0, "tokens": 1, "top": 1})
        if self.out is not None and self.out.suffix != ".html":
            raise InputError(f"--out is {self.out}: its name must end in .html")
