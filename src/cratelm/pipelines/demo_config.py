"""What `cratelm demo` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class DemoConfig:
    """The whole line on a laptop: train CRATE and its GPT-2 twin, then compare their neurons.

    Tokenizes, trains both on the same tokens in the same order, harvests, explains, scores, measures
    what neurons write to the vocabulary and reports, with two randomly initialised models as controls;
    with --sae, autoencoders beside them. Killed and started again with the same command, it goes on
    where it was.
    """

    run: Path = not_in_identity(Path("runs/demo"))
    """run directory"""
    corpus: str = "builtin"
    """`builtin` (the Python standard library's sources), a file, a folder or `hub:ID`; see
    `cratelm tokenize --help`"""
    size: Literal["1l", "2l", "3l"] = "2l"
    """layers of the twins (width 128, 512 neurons a layer)"""
    vocab_size: int = 4096
    """tokens of the vocabulary, trained on the corpus"""
    steps: int = 600
    """training steps of 16 sequences of 256 tokens, for each twin"""
    tokens: int = 200_000
    """tokens searched in each of the splits fit and held_out"""
    neurons: int = 256
    """neurons explained and scored in each layer, drawn at random; 0 = all"""
    sae: bool = False
    """also train a small sparse autoencoder on both twins and compare its latents with the neurons; needs
    the extra `sae`"""
    seed: int = 0
    """of initial weights, order of the data, samples and intervals"""
    force: bool = not_in_identity(False)
    """redo every stage"""
    quiet: bool = not_in_identity(False)
    """no progress bars, and no word of what is to be done and at which step it is"""

    def __post_init__(self) -> None:
        at_least(self, {"steps": 1, "tokens": 1, "neurons": 0, "seed": 0})
