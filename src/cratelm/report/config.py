"""What `cratelm report` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import METRICS, Metric
from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class ReportConfig:
    """Write one page, tables and figures about all models of a run that have been scored."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    models: tuple[str, ...] = ()
    """models to show, by name; left out: all that are scored. `crate-X` and `gpt2-X` are compared as
    twins, and `NAME-init` is shown as the randomly initialised null of NAME"""
    explainer: str | None = None
    """the explainer of the comparison table and of the neurons shown; left out: `trie` where it was
    scored, else the first by name. The other tables show every explainer"""
    rank_by: Metric = "top_and_random"
    """metric by which the best neurons are chosen: top_and_random, random_only or anthropic"""
    neurons: int = 10
    """neurons shown of each model: so many with the highest score, and so many drawn at random"""
    excerpts: int = 3
    """held-out excerpts shown of each neuron, true activations beside simulated ones"""
    resamples: int = 2000
    """bootstrap and permutation resamples behind the comparison of twins; the other intervals are those
    that `cratelm score` wrote"""
    seed: int = 0
    """draws the random neurons, and those resamples"""
    force: bool = not_in_identity(False)
    """write the report again where it was finished already"""
    quiet: bool = not_in_identity(False)
    """no progress bar: this verb has none, and takes the option as all verbs do"""

    def __post_init__(self) -> None:
        at_least(self, {"neurons": 0, "excerpts": 0, "resamples": 100, "seed": 0})
        if self.rank_by not in METRICS:
            raise InputError(f"--rank-by is {self.rank_by!r}: choose from {', '.join(METRICS)}")
