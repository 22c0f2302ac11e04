"""What `cratelm sae evaluate` can be told. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import SPLITS, Split
from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class SaeEvaluateConfig:
    """Measure sparse autoencoders on tokens they have not seen, beside the site's own activations."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory: its tokens, and the model where it is one of the run"""
    model: str = "crate-2l"
    """a model of the run, or a folder or Hub id with a causal language model of transformers"""
    sae: str = ""
    """NAME or MODEL@NAME of `cratelm sae train`, or a folder in SAELens' format, or one with folders
    layer-0, layer-1, ...; left out: the model's only ones in the run"""
    split: Split = "held_out"
    """train, fit or held_out"""
    tokens: int = 100_000
    """tokens measured on, a seeded sample of whole sequences; fewer where the split holds fewer"""
    sequence_length: int | None = None
    """T in tokens; left out: the model's longest, 2,048 at most, 1,024 where it names none"""
    batch_tokens: int = 8192
    """tokens that go through the model at once, fewer where their logits would pass 1 GiB"""
    steered: int = 8
    """latents, and neurons of the site below, of each layer that are set to their maximum one at a time
    to see how faithful steering is; 0: leave this out"""
    steered_tokens: int = 2048
    """tokens that they are steered at, a seeded sample of whole sequences"""
    seed: int = 0
    """of the samples of sequences, and of what is steered"""
    device: str = not_in_identity("auto")
    """auto: the GPU where there is one; cpu, cuda, cuda:1, mps"""
    output: Path | None = not_in_identity(None)
    """also write the figures to this JSON file; the run keeps them in any case, as
    sae/MODEL@NAME/evaluation.json, those of a folder from elsewhere as sae/MODEL@FOLDER.json"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"--split is {self.split!r}: choose from {', '.join(SPLITS)}")
        at_least(
            self,
            {"tokens": 1, "sequence_length": 2, "batch_tokens": 1, "steered": 0,
             "steered_tokens": 1, "seed": 0},
        )  # fmt: skip
