"""What `cratelm predict` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.records import SPLITS, Split
from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class PredictConfig:
    """Show what models predict after each token of the same text, as a page and a figure."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory: its models, and the documents of its splits"""
    models: tuple[str, ...] = ("crate-2l", "gpt2-2l")
    """names in the run, model folders, Hub ids (OWNER/NAME); each reads in its own tokens"""
    text: str | None = None
    """the text; left out: a document of the run"""
    text_file: Path | None = None
    """a UTF-8 file with the text"""
    document: int | None = None
    """number of a document in its split, from 0; left out: drawn by --seed"""
    split: Split = "held_out"
    """which documents: train, fit or held_out"""
    seed: int = 0
    """draws the document"""
    tokens: int = 96
    """first tokens of the document that are shown, in the first model's tokenizer; a text of your own
    is shown whole"""
    top: int = 5
    """likeliest next tokens shown at each place"""
    device: str = not_in_identity("auto")
    """cpu, cuda, ...; auto takes an accelerator where there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the models; auto: that of their files"""
    out: Path | None = not_in_identity(None)
    """the page; left out: predictions.html in the run. A PNG and a PDF of its name go beside it"""
    quiet: bool = not_in_identity(False)
    """no progress bar: this verb has none, and takes the option as all verbs do"""

    def __post_init__(self) -> None:
        given = [f for f in ("text", "text_file", "document") if getattr(self, f) is not None]
        if len(given) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{flags} are both given: one text was expected")
        if not self.models or len(set(self.models)) < len(self.models):
            raise InputError("--models is empty or names a model twice: name one, two or more")
        if self.split not in SPLITS:
            raise InputError(f"--split is {self.split!r}: choose from {', '.join(SPLITS)}")
        at_least(self, {"document": 0, "seed": 0, "tokens": 1, "top": 1})
        if self.out is not None and Path(self.out).suffix != ".html":
            raise InputError(f"--out is {self.out}, a name that ends in .html was expected")
