"""`cratelm tune`: the same search of a learning rate for every family of models."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs import Run, write_json
from cratelm.runs.reading import read_json
from cratelm.text.table import Column, Table
from cratelm.train.loop import DivergedError, train_briefly
from cratelm.train.tune_config import TuneConfig
from cratelm.train.tuned import SUMMARY, Trial, Tuning, read_tuning

_TRAININGS = "trainings"
"""folder of a draft with a folder for each rate: checkpoints, curve, and `trial.json` when it is finished"""


@dataclass(frozen=True)
class TuneResult:
    """Result of `cratelm tune`: the best rate, and what it cost to find it."""

    path: Path
    """folder of `summary.json`"""
    model: str
    learning_rate: float
    """peak rate with the lowest validation loss"""
    validation_loss: float
    """at that rate, nats per token"""
    validation_standard_error: float
    """over the validation sequences"""
    edge: str
    """`lowest` or `highest` if the best rate is at that end of those that were tried; otherwise empty"""
    seconds: float
    """duration of all trainings"""
    tokens: int
    """number of tokens that they saw, all together"""
    trials: tuple[Trial, ...]
    """trainings, by rate"""
    advice: str
    """what to type if the best rate is at an edge; otherwise empty"""

    def __str__(self) -> str:
        rows = tuple(
            (t.learning_rate, t.cell(), "best" if t.learning_rate == self.learning_rate else "")
            for t in self.trials
        )
        columns = (
            Column("learning_rate", "learning rate", ".4g"),
            Column("validation_loss", "validation loss ± se", ".3f"),
            Column("best", ""),
        )
        lines = [
            Table("tuning", "", columns, rows).to_text(),
            "",
            f"{self.model}: best at {self.learning_rate:g}, {self.seconds / 60:.1f} minutes,"
            f" {self.tokens:,} tokens: {self.path}",
        ]
        return "\n".join([*lines, *([self.advice] if self.advice else [])])


def tune(config: TuneConfig) -> TuneResult:
    """Train a model briefly at each rate, and write `tuning/NAME/`. A finished search is not repeated.

    Raises `InputError` for a configuration that `train` would refuse, and if every training diverges.
    """
    run = Run(config.run)
    stage = run.stage("tuning", config.folder)
    inputs = {"tokens": run.stage("tokens").require("tokenize")}
    if not stage.is_finished(config, inputs, force=config.force):
        with stage.write(config, inputs, resume=True) as draft:
            draft.scratch.add(_TRAININGS)
            trials = [_trial(draft.path, config, rate) for rate in config.all_rates()]
            tuning = _tuning(config, trials)
            write_json(draft.path / SUMMARY, asdict(tuning))
            draft.results = {"learning_rate": tuning.best.learning_rate, "edge": tuning.edge}
    return _result(stage.path, config, read_tuning(stage.path))


def _trial(folder: Path, config: TuneConfig, rate: float) -> Trial:
    """Return the training at one rate; one that an interrupted command has finished is read."""
    of_rate = folder / _TRAININGS / f"{rate:g}"
    finished = of_rate / "trial.json"
    if finished.exists():
        return Trial.of(read_json(finished))
    of_rate.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    training = config.training(rate)
    tokens = config.steps * training.resolved().tokens_per_step
    try:
        figures = train_briefly(training, of_rate, f"{config.folder} at {rate:g}")
        loss, error = figures["validation_loss"], figures["validation_standard_error"]
    except DivergedError:
        loss = error = None
    trial = Trial(rate, loss, error, round(time.monotonic() - started, 1), tokens)
    write_json(finished, asdict(trial))
    return trial


def _tuning(config: TuneConfig, trials: Sequence[Trial]) -> Tuning:
    if all(trial.validation_loss is None for trial in trials):
        raise InputError(
            f"training diverged at every rate, {', '.join(f'{t.learning_rate:g}' for t in trials)}: give lower --rates"
        )
    recipe = config.training(None).resolved()
    return Tuning(
        model=config.model,
        optimizer=recipe.optimizer,
        batch_size=recipe.batch_size,
        sequence_length=recipe.sequence_length,
        model_overrides=config.model_overrides,
        freeze=config.freeze,
        l1=config.l1,
        steps=config.steps,
        trials=tuple(trials),
    )


def _result(path: Path, config: TuneConfig, tuning: Tuning) -> TuneResult:
    best = tuning.best
    assert best.validation_loss is not None
    assert best.validation_standard_error is not None
    return TuneResult(
        path=path,
        model=config.folder,
        learning_rate=best.learning_rate,
        validation_loss=best.validation_loss,
        validation_standard_error=best.validation_standard_error,
        edge=tuning.edge,
        seconds=round(sum(trial.seconds for trial in tuning.trials), 1),
        tokens=sum(trial.tokens for trial in tuning.trials),
        trials=tuning.trials,
        advice=_advice(config, tuning),
    )


def _advice(config: TuneConfig, tuning: Tuning) -> str:
    """Return what to type if the best rate is at the edge of those that were tried."""
    if not tuning.edge:
        return ""
    power = -1 if tuning.edge == "lowest" else 1
    rates = [tuning.best.learning_rate * config.factor ** (power * n) for n in range(-1, 3)]
    words = ["cratelm", "tune", "--run", str(config.run), "--model", config.model]
    words += ["--name", config.name] if config.name else []
    words += ["--rates", *(f"{rate:.4g}" for rate in sorted(rates)), "--force"]
    return (
        f"the {tuning.edge} rate is the best: the best of all may lie beyond; add to the options of this search, as in"
        f" `{shlex.join(words)}`"
    )
