"""What a search of the learning rate found, as `cratelm tune` writes it and `cratelm train --tuned` reads it."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cratelm.errors import InputError
from cratelm.records import Estimate
from cratelm.runs import Run, known_fields
from cratelm.runs.reading import read_json
from cratelm.train.config import TrainConfig

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Trial:
    """A short training at one learning rate."""

    learning_rate: float
    """peak"""
    validation_loss: float | None
    """after the last step, nats per token; None if the training diverged"""
    validation_standard_error: float | None
    """over the validation sequences, which are the same for all rates"""
    seconds: float
    tokens: int
    """number of tokens seen"""

    def cell(self) -> Estimate | str:
        """Return the loss with its standard error, for a table."""
        if self.validation_loss is None:
            return "diverged"
        return Estimate(self.validation_loss, self.validation_standard_error)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Trial":
        """Return a trial from JSON."""
        return cls(**known_fields(cls, record))


@dataclass(frozen=True)
class Tuning:
    """A search: how the model was trained, and the trial at each rate."""

    model: str
    optimizer: str
    batch_size: int
    sequence_length: int
    model_overrides: tuple[str, ...]
    freeze: tuple[str, ...]
    l1: float
    steps: int
    """of each trial"""
    trials: tuple[Trial, ...]
    """by rate, ascending; at least one did not diverge"""

    @property
    def best(self) -> Trial:
        """Return the trial with the lowest validation loss."""
        finished = [t for t in self.trials if t.validation_loss is not None]
        return min(finished, key=lambda t: t.validation_loss or 0.0)

    @property
    def edge(self) -> Literal["", "lowest", "highest"]:
        """Return which end of the rates is the best; an empty string if it is neither."""
        rates = [t.learning_rate for t in self.trials]
        if self.best.learning_rate == rates[0]:
            return "lowest"
        return "highest" if self.best.learning_rate == rates[-1] else ""


def read_tuning(folder: Path) -> Tuning:
    """Return a search. Raises `InputError` if its file is damaged."""
    record = read_json(folder / SUMMARY)
    try:
        values = known_fields(Tuning, record)
        values |= {name: tuple(values[name]) for name in ("model_overrides", "freeze")}
        return Tuning(**{**values, "trials": tuple(map(Trial.of, values["trials"]))})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / SUMMARY} is not what `cratelm tune` writes ({error!r}): type the command again with --force"
        ) from None


def with_tuned_rate(config: TrainConfig) -> TrainConfig:
    """Return the options of a training at the rate that was found for its model.

    Raises `InputError`, which says what to type, if there is no search, if it is stale, or if it was made for another
    model or another kind of training.
    """
    stage = Run(config.run).stage("tuning", config.name or config.model)
    if stage.completion() is None:
        words = ["cratelm", "tune", "--run", str(config.run), "--model", config.model]
        words += ["--name", config.name] if config.name else []
        raise InputError(
            f"{stage.path} is missing or not finished: type `{shlex.join(words)}` first"
        )
    stage.require()
    tuning, recipe = read_tuning(stage.path), config.resolved()
    here = {
        "model": config.model,
        "optimizer": recipe.optimizer,
        "batch_size": recipe.batch_size,
        "sequence_length": recipe.sequence_length,
        "model_overrides": config.model_overrides,
        "freeze": config.freeze,
        "l1": config.l1,
    }
    for name, value in here.items():
        searched = getattr(tuning, name)
        if searched != value:
            raise InputError(
                f"{stage.path} is a search with {name} {searched}, but the training has {value}: give `cratelm tune`"
                f" the same --{name.replace('_', '-')}, or omit --tuned"
            )
    return replace(config, tuned=False, learning_rate=tuning.best.learning_rate)
