"""Options of `cratelm analyze`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.runs import at_least, at_most, check_resamples, not_in_identity
from cratelm.runs.model_options import HarvestedModelOptions


@dataclass(frozen=True)
class AnalyzeConfig(HarvestedModelOptions):
    """Measure on held-out text the properties that CRATE's derivation predicts, and where its neurons fire.

    Every quantity that exists for the model is measured: all of them for CRATE; sparsity, dictionary,
    groups of neurons, consistency and distinctiveness for other models.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the harvest, which is the name of the model"""
    tokens: int = 50_000
    """held-out tokens to read"""
    sequence_length: int | None = None
    """tokens that the model reads at once; default: as in the harvest"""
    ista_steps: int = 10
    """number of ISTA steps at which the lasso objective is measured; at least those of the model"""
    explainer: str | None = None
    """explainer whose explanations determine the covered tokens, one without a language model; default: trie if the
    run has it. Without explanations, consistency and distinctiveness are not measured"""
    resamples: int = 2000
    """number of bootstrap resamples over neurons"""
    seed: int = 0
    """seed of the held-out sequences, shuffled explanations, random subspaces and the bootstrap"""
    batch_tokens: int = not_in_identity(8192)
    """tokens per forward pass"""
    memory_mib: int = not_in_identity(512)
    """MiB of activations in memory at a time for consistency; if this is not enough for all neurons of a
    layer, several passes are made"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"tokens": 1, "sequence_length": 2, "ista_steps": 1, "resamples": 100, "seed": 0,
             "batch_tokens": 1, "memory_mib": 1},
        )  # fmt: skip
        at_most(self, {"ista_steps": 10_000}, "the objective no longer changes after so many steps")
        check_resamples(self)
