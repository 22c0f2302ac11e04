"""Options of `cratelm probe`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import Options, Settings, at_least, config_dict, not_in_identity, options_of

TaskName = Literal["binding", "induction"]


@dataclass(frozen=True)
class ProbeConfig(Options):
    """Train models on synthetic tasks with known answers, and measure on fresh sequences what each family can do.

    binding: recall which value was paired with a key. induction: continue a random sequence as it went on before.
    Needs no tokens. Each model is a stage of its own: after an interruption the same command resumes.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory; results are written to `probes/MODEL/`"""
    models: tuple[str, ...] = ()
    """families, at 2l, or models of a named size, such as crate gpt2-solu crate-tssa-1l; default: all families that
    differ"""
    tasks: tuple[TaskName, ...] = ("binding", "induction")
    """tasks on which models are trained, each from new weights"""
    steps: int = 500
    """training steps for each task and seed"""
    batch_size: int = 64
    """sequences per step"""
    learning_rate: float | None = None
    """peak learning rate; default: 5e-3 with Muon, which all families but sparse-gpt use, and 3e-3 with AdamW"""
    seeds: int = 1
    """number of trainings of each model and task, with the seeds 0, 1, ..."""
    sequences: int = 2000
    """fresh sequences on which each training is tested, the same for all models"""
    force: bool = not_in_identity(False)
    """redo models even if they are finished"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"steps": 1, "batch_size": 1, "seeds": 1, "sequences": 1})
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(f"--learning-rate is {self.learning_rate}: it must be above 0")
        for option in ("models", "tasks"):
            values = getattr(self, option)
            if len(set(values)) < len(values):
                raise InputError(f"--{option} {' '.join(values)}: name each once")
        if not self.tasks:
            raise InputError("--tasks is empty: name binding, induction or both")

    def settings(self, model: str) -> Settings:
        """Return the settings of one model for its completion record."""
        of_model = replace(self, models=(model,))
        usual = ProbeConfig(models=(model,))
        return Settings(config_dict(of_model), config_dict(usual), options_of(of_model))
