"""Options of `cratelm study`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.errors import InputError
from cratelm.runs import Options, at_least, check_resamples, not_in_identity


@dataclass(frozen=True)
class StudyConfig(Options):
    """Train, measure and compare a grid of models: families, sizes, seeds and switches, as a recipe says.

    All models see the same tokens in the same order, and pass through the same stages. A page then compares them, with
    intervals over seeds and neurons. After an interruption, the same command resumes; finished models are kept.
    """

    recipes: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RECIPES")]]
    """recipes: YAML files, or cratelm's own by name: laptop, frontier, small, paper. Those of one command share tokens
    and stages, and make one page"""
    run: Path = not_in_identity(Path("runs/study"))
    """run directory, the same for every recipe that shares tokens"""
    corpus: str | None = None
    """another corpus than the recipes name; see `cratelm tokenize --help`"""
    only: tuple[str, ...] = not_in_identity(())
    """make only these models now, by name, such as crate-2l-seed1; the page has all that are finished"""
    dry_run: bool = not_in_identity(False)
    """print models, stages, tokens, FLOPs, hours and calls to language models, and stop"""
    tflops: float = not_in_identity(0.0)
    """with --dry-run: TFLOP/s that the machine reaches in training, from which hours are computed. Default: measured on
    this machine, with one of the models"""
    jobs: int = not_in_identity(0)
    """models that are made at the same time, each in a process with its share of the cores. Default: 2 on a CPU
    with at least two cores, otherwise 1"""
    page: Path | None = not_in_identity(None)
    """also write the page to this Markdown file, with its figures beside it"""
    resamples: int = 5000
    """bootstrap resamples of every interval on the page; p-values cannot fall below 2 / (resamples + 1), which Holm's
    adjustment multiplies by the number of comparisons"""
    force: bool = not_in_identity(False)
    """redo every stage, even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bars and no stage names"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.recipes:
            raise InputError("no recipe is named: type `cratelm study laptop`")
        if len(set(self.recipes)) < len(self.recipes):
            raise InputError(f"{' '.join(map(str, self.recipes))}: name each recipe once")
        at_least(self, {"jobs": 0, "tflops": 0, "resamples": 100})
        check_resamples(self)
        if self.tflops and not self.dry_run:
            raise InputError("--tflops only converts FLOPs to hours: add --dry-run, or omit it")
        if self.page is not None and self.page.suffix != ".md":
            raise InputError(f"--page is {self.page}: it must be a Markdown file, such as study.md")
