"""Options of `cratelm seeds`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity
from cratelm.runs.model_options import HarvestedModelOptions
from cratelm.runs.names import seed_of


@dataclass(frozen=True)
class SeedsConfig(HarvestedModelOptions):
    """Match the neurons of models that differ only in their seed, and test explanations on the matches."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory, holding harvests of at least two seeds of `--model`"""
    model: str = "crate-2l"
    """name of the model with seed 0; crate-2l stands for crate-2l, crate-2l-seed1, crate-2l-seed2 ..."""
    tokens: int = 50_000
    """held-out tokens to read"""
    seed: int = 0
    """seed of the held-out sequences and of the random neurons of the null control"""
    batch_tokens: int = not_in_identity(8192)
    """tokens per forward pass"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"tokens": 1, "seed": 0, "batch_tokens": 1})
        base, seed = seed_of(self.model)
        if seed:
            raise InputError(
                f"--model is {self.model}, one seed, but all seeds of a model are compared: type --model {base}"
            )
