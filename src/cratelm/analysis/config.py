"""What `cratelm analyze` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class AnalyzeConfig:
    """Measure on held-out text what CRATE's derivation promises, layer by layer, and what neurons do where.

    Every quantity that exists for the model is measured: all of them for CRATE; sparsity, dictionary,
    groups of neurons, consistency and distinctiveness for others.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the harvest, which is the model's name"""
    tokens: int = 50_000
    """held-out tokens that are read"""
    sequence_length: int | None = None
    """tokens that the model sees at once; left out: as in the harvest"""
    ista_steps: int = 10
    """steps along which the lasso objective is followed, beyond those that the model takes"""
    explainer: str | None = None
    """whose explanations say which tokens a neuron covers: trie or lookup; left out: trie where it is
    there. Without explanations consistency and distinctiveness are left out"""
    resamples: int = 2000
    """bootstrap resamples over neurons"""
    seed: int = 0
    """draws held-out sequences, shuffled explanations, random subspaces and resamples"""
    batch_tokens: int = not_in_identity(8192)
    """tokens a forward pass"""
    memory_mib: int = not_in_identity(512)
    """activations held at a time for consistency, in MiB; more neurons take more passes"""
    device: str = not_in_identity("auto")
    """cpu, cuda, ...; auto: as in the harvest. The precision is the harvest's, too"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        at_least(
            self,
            {"tokens": 1, "sequence_length": 2, "ista_steps": 1, "resamples": 100, "seed": 0,
             "batch_tokens": 1, "memory_mib": 1},
        )  # fmt: skip
