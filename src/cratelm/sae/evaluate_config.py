"""Options of `cratelm sae evaluate`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.records import Split
from cratelm.runs import at_least, not_in_identity
from cratelm.runs.model_options import Dtype, ModelOptions, model_option
from cratelm.tokens.beginning import BeginningOptions


@dataclass(frozen=True)
class SaeEvaluateConfig(ModelOptions, BeginningOptions):
    """Measure sparse autoencoders on tokens they were not trained on, and compare with the site's activations."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory with the tokens, and with the model if it is one of the run"""
    model: str = "crate-2l"
    """a model of the run, or a folder or Hub id of a causal language model of transformers"""
    sae: str = ""
    """NAME or MODEL@NAME of `cratelm sae train`, a folder of SAELens, sparsify or dictionary_learning, or
    RELEASE/ID of SAELens' registry; default: the model's autoencoders in the run, if there is only one set"""
    site: str | None = None
    """site that the autoencoders read, in place of the one that their files name; without * in it, one layer"""
    split: Split = "held_out"
    """split to measure on: train, fit or held_out"""
    tokens: int = 100_000
    """tokens to measure on, a random sample of whole sequences; fewer if the split has fewer"""
    sequence_length: int | None = None
    """T in tokens; default: the maximum of the model, but at most 2,048; 1,024 if it specifies no maximum"""
    batch_tokens: int = 8192
    """tokens per forward pass of the model; fewer if their logits would exceed 1 GiB"""
    steered: int = 8
    """number of latents per layer, and of neurons of the site, that are set to their maximum one at a time to
    measure how faithful steering is; 0: none"""
    steered_tokens: int = 2048
    """tokens at which they are steered, a random sample of whole sequences"""
    seed: int = 0
    """seed of the samples of sequences, latents and neurons"""
    dtype: Dtype = model_option("float32")
    """precision of the model; auto: that of its files. Autoencoders are in float32"""
    output: Path | None = not_in_identity(None)
    """also write the figures to this JSON file; they are always stored in the run, in
    sae/MODEL@NAME/evaluation.json, or in sae/MODEL@FOLDER.json for autoencoders from a folder elsewhere"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"tokens": 1, "sequence_length": 2, "batch_tokens": 1, "steered": 0,
             "steered_tokens": 1, "seed": 0},
        )  # fmt: skip
