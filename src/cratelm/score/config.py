"""Configuration of `cratelm score`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import METRICS, Metric
from cratelm.runs import aside


@dataclass(frozen=True)
class ScoreConfig:
    """Score the explanations of one model on held-out excerpts, with null controls."""

    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest and the explanations of `--model`"""
    model: str = "crate-2l"
    """name of the model in the run"""
    metrics: tuple[Metric, ...] = METRICS
    """`top_and_random`, `random_only` (64-token excerpts), `anthropic` (8-token excerpts)"""
    resamples: int = 2000
    """bootstrap resamples behind the intervals of `summary.json`"""
    seed: int = 0
    """seed of the shuffled control and of the bootstrap"""
    force: bool = aside(False)
    """score again where it was done before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown or not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise InputError(
                f"--metrics {' '.join(self.metrics) or '(none)'}:"
                f" expected one or more of {', '.join(METRICS)}, each once"
            )
        if self.resamples < 100:
            raise InputError(f"--resamples {self.resamples}: 100 or more was expected")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: 0 or more was expected")
