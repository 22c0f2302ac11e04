"""Configuration of `cratelm explain`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import aside

ExplainerName = Literal["lookup", "trie"]
EXPLAINERS: tuple[ExplainerName, ...] = ("lookup", "trie")


@dataclass(frozen=True)
class ExplainConfig:
    """Explain the neurons of one model from the excerpts of its fit split, without a language model."""

    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    model: str = "crate-2l"
    """name of the model in the run"""
    explainers: tuple[ExplainerName, ...] = EXPLAINERS
    """`lookup`: mean activation per token (Bills et al. 2023); `trie`: what it does after which tokens
    (Neuron-to-Graph, Foote et al. 2023)"""
    max_entries: int = 200
    """size of an explanation: rows of the look-up's table, nodes of the trie"""
    depth: int = 4
    """tokens of context in the trie, the activating one counted"""
    neurons: int = 0
    """neurons per layer, drawn at random; 0 = all. Models with as many neurons draw the same indices"""
    seed: int = 0
    """seed of that draw"""
    force: bool = aside(False)
    """explain again where it was done before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        unknown = [e for e in self.explainers if e not in EXPLAINERS]
        if unknown or not self.explainers or len(set(self.explainers)) != len(self.explainers):
            raise InputError(
                f"--explainers {' '.join(self.explainers) or '(none)'}:"
                f" expected one or more of {', '.join(EXPLAINERS)}, each once"
            )
        for name, lowest in (("max_entries", 1), ("depth", 1), ("neurons", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: {lowest} or more was expected")
