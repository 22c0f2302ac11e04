"""Options of `cratelm tune`. Imports nothing heavy, so that `--help` is quick."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import Options, at_least, not_in_identity
from cratelm.runs.names import check_name
from cratelm.train.config import Part, TrainConfig

_MOST_RATES = 25


@dataclass(frozen=True)
class TuneConfig(Options):
    """Search the learning rate of a model: short trainings at several rates, on the same tokens in the same order.

    The rate with the lowest validation loss is written to the run, and `cratelm train --tuned` uses it. The search is
    the same for every family, so that none is compared at a rate that suits another.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory; its tokens must have been made by `cratelm tokenize`"""
    model: str = "crate-2l"
    """FAMILY-SIZE, as for `cratelm train`"""
    name: str = ""
    """name of the search in the run, for a model that `train` gets with --name; default: --model"""
    rates: tuple[float, ...] = ()
    """peak learning rates; default: --count rates around that of the recipe, each --factor times the one before"""
    count: int = 5
    """number of rates without --rates, an odd number"""
    factor: float = 2.0
    """ratio of neighbouring rates without --rates"""
    steps: int = 100
    """steps of each training, which has the whole schedule of the recipe: warm-up, and a cosine to its end"""
    batch_size: int | None = None
    """sequences per step; this option and all down to --l1 are those of `cratelm train`"""
    sequence_length: int | None = None
    """T, tokens per sequence"""
    optimizer: Literal["adamw", "muon"] | None = None
    """muon or adamw"""
    validation_sequences: int | None = None
    """number of held-out sequences to validate on, always the same ones"""
    seed: int = 0
    """seed of the initial weights and of the order of the sequences"""
    model_overrides: tuple[str, ...] = ()
    """fields of the model's configuration as key=value"""
    freeze: tuple[Part, ...] = ()
    """parts that keep their initial weights"""
    l1: float = 0.0
    """weight of an L1 penalty on the neurons in training"""
    device: Literal["auto", "cpu"] = not_in_identity("auto")
    """auto uses a GPU if there is one"""
    force: bool = not_in_identity(False)
    """redo the search even if it is finished"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name:
            check_name("--name", self.name, reserved="@+")
        at_least(self, {"steps": 1, "count": 3})
        if not self.count % 2 or self.count > _MOST_RATES:
            raise InputError(
                f"--count is {self.count}: it must be odd, so that the rate of the recipe is in the middle, and at most"
                f" {_MOST_RATES}"
            )
        if not self.factor > 1:
            raise InputError(f"--factor is {self.factor}: it must be above 1, such as 2 or 3")
        if self.rates and (len(set(self.rates)) < len(self.rates) or len(self.rates) < 2):
            raise InputError("--rates needs at least two different rates, each once")
        if len(self.rates) > _MOST_RATES:
            raise InputError(
                f"--rates has {len(self.rates)} rates: at most {_MOST_RATES} are possible"
            )
        object.__setattr__(self, "freeze", tuple(sorted(set(self.freeze))))
        for rate in self.all_rates():
            if not (math.isfinite(rate) and rate > 0):
                raise InputError(f"--rates has {rate}: rates must be above 0")
            self.training(rate)  # refuses what `train` would refuse

    @property
    def folder(self) -> str:
        """Return the name of the search in its run."""
        return self.name or self.model

    def all_rates(self) -> tuple[float, ...]:
        """Return the rates to train with, ascending."""
        if self.rates:
            return tuple(sorted(self.rates))
        middle = self.training(None).resolved().learning_rate
        half = self.count // 2
        return tuple(
            float(f"{middle * self.factor**power:.6g}") for power in range(-half, half + 1)
        )

    def training(self, rate: float | None) -> TrainConfig:
        """Return the options of the training at a rate; None stands for that of the recipe."""
        return TrainConfig(
            run=self.run,
            model=self.model,
            name=self.folder,
            steps=self.steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            optimizer=self.optimizer,
            learning_rate=rate,
            validate_every=self.steps,
            validation_sequences=self.validation_sequences,
            seed=self.seed,
            model_overrides=self.model_overrides,
            freeze=self.freeze,
            l1=self.l1,
            device=self.device,
            quiet=self.quiet,
        )
