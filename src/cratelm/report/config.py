"""Options of `cratelm report`. Imports nothing heavy, so that `--help` is quick."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import SIMULATION_METRICS, Metric
from cratelm.runs import Options, at_least, check_resamples, not_in_identity


@dataclass(frozen=True)
class ReportConfig(Options):
    """Write one page, tables and figures about all models of a run that have been scored."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    models: tuple[str, ...] = ()
    """names of the models to show; default: all scored models. `crate-X` and `gpt2-X` are compared as
    twins, and `NAME-init` is shown as the randomly initialised null control of NAME"""
    explainer: str | None = None
    """explainer of the comparison table and of the neurons shown; default: `trie` if it was scored,
    else the first by name. The other tables show every explainer"""
    rank_by: Metric = "top_and_random"
    """metric that selects the best neurons: top_and_random, random_only or anthropic"""
    neurons: int = 10
    """neurons shown per model: this many with the highest scores, and as many drawn at random"""
    excerpts: int = 3
    """held-out excerpts shown per neuron, with true and simulated activations"""
    resamples: int = 2000
    """bootstrap and permutation resamples for the comparison of twins; all other intervals are those
    that `cratelm score` wrote"""
    seed: int = 0
    """random seed for the random neurons and the resamples"""
    force: bool = not_in_identity(False)
    """redo the report even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar; has no effect, because this command shows none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"neurons": 0, "excerpts": 0, "resamples": 100, "seed": 0})
        check_resamples(self)
        if self.rank_by not in SIMULATION_METRICS:
            raise InputError(
                f"--rank-by is {self.rank_by!r}: choose from {', '.join(SIMULATION_METRICS)}"
            )

    def ranking_metric(self, scored: Sequence[Metric]) -> Metric:
        """Return the metric that selects the best neurons: `rank_by`, or the first of `scored` if that lacks it."""
        return self.rank_by if self.rank_by in scored else scored[0]
