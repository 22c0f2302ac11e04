"""What `cratelm evaluate` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import SPLITS, Split
from cratelm.runs import aside


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's loss on one split of a run, every token once."""

    run: Path = aside(Path("runs/default"))
    """run directory, whose tokens are read"""
    model: str = "crate-2l"
    """name of a model in the run"""
    path: str | None = None
    """a model folder or a Hub id to measure instead; its tokenizer must be the run's"""
    split: Split = "held_out"
    """train, fit or held_out"""
    max_tokens: int | None = None
    """stop after so many tokens; left out: the whole split"""
    sequence_length: int | None = None
    """tokens of a sequence, the context a token can have; left out: the most that the model takes,
    1,024 where it names no limit"""
    batch_size: int = 16
    """sequences at a time"""
    output: Path | None = aside(None)
    """also write the figures to this JSON file"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"--split is {self.split!r}: choose from {', '.join(SPLITS)}")
        for field in ("max_tokens", "sequence_length", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(f"--{field.replace('_', '-')} is {value}, 1 or more was expected")
