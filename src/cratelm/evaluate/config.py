"""What `cratelm evaluate` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.records import SPLITS, Split
from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure models on a run's tokens and on named sets, every token once, and compare them."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory: its models, and the tokens of its splits"""
    model: str = "crate-2l"
    """name of a model in the run"""
    path: str | None = None
    """a model folder or a Hub id to measure instead"""
    models: tuple[str, ...] = ()
    """several to compare, instead of --model: names in the run, model folders, Hub ids (OWNER/NAME).
    The first is compared with each of the others, document by document"""
    on: tuple[str, ...] = ()
    """what to measure on, one or several: the run's train, fit and held_out; lambada, lambada_raw,
    wikitext2, wikitext103, ptb, openwebtext, pile, pile:SUBSET from the Hub; NAME=PATH reads a set
    from a local file or folder, and under any other NAME its documents. Left out: --split"""
    split: Split = "held_out"
    """train, fit or held_out, where --on is left out"""
    max_tokens: int | None = None
    """stop after so many tokens of a set (of texts: after the document that reaches it); left out: all"""
    max_documents: int | None = None
    """first documents of each set of texts; left out: all, and 1,000 of openwebtext and of the Pile,
    which are streamed"""
    text_field: str | None = None
    """field of local rows that holds the text; left out: the one that the set has on the Hub"""
    sequence_length: int | None = None
    """tokens of a sequence, the context a token can have; left out: the most that the model takes,
    2,048 at most, 1,024 where it names no limit"""
    stride: int | None = None
    """tokens that the window moves on by: each is still predicted once, from at least
    sequence_length - stride tokens; left out: sequence_length, no overlap"""
    batch_size: int = 16
    """sequences at a time, fewer where their logits would pass 1 GiB"""
    device: str = not_in_identity("auto")
    """cpu, cuda, ...; auto takes an accelerator where there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the models; auto: that of their files"""
    output: Path | None = not_in_identity(None)
    """also write the figures to this JSON file"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"--split is {self.split!r}: choose from {', '.join(SPLITS)}")
        at_least(
            self,
            {"max_tokens": 1, "max_documents": 1, "sequence_length": 1, "stride": 1,
             "batch_size": 1},
        )  # fmt: skip
        if self.models and self.path is not None:
            raise InputError("--path and --models are both given: name the folder in --models")
        for field in ("models", "on"):
            names = [
                given.split("=")[0] if field == "on" else given for given in getattr(self, field)
            ]
            if len(set(names)) < len(names):
                raise InputError(f"--{field} names the same thing twice: {' '.join(names)}")

    @property
    def subjects(self) -> tuple[str, ...]:
        """What is measured, as it was named."""
        return self.models or (self.path or self.model,)

    @property
    def sets(self) -> tuple[str, ...]:
        """What it is measured on, as it was named."""
        return self.on or (self.split,)
