"""Options of `cratelm harvest`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity


def last_name(option: str, path: str) -> str:
    """Return the last name of a path or Hub id, by which results are called.

    Raises `InputError` where it has none, as `.`, `..` and `/`.
    """
    name = Path(path).name
    if name in ("", ".."):
        whole = Path(path).resolve()
        instead = f"type {option} {whole}" if whole.name else "name another folder"
        raise InputError(f"{option} {path} has no name to call results by: {instead}")
    return name


@dataclass(frozen=True)
class HarvestConfig:
    """Collect, in one pass over held-back tokens, the excerpts and statistics of every neuron."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """a model of the run by name, or any Hugging Face causal language model by folder or Hub id"""
    name: str | None = None
    """name of the harvest in the run. Default: the model's name; of latents `MODEL+SAE`"""
    site: str | None = None
    """where neurons live: ista, mssa, heads, mlp, or a module path such as
    'gpt_neox.layers.*.mlp.dense_4h_to_h:input'. Default: ista for CRATE, mlp for others"""
    sae: str | None = None
    """latents of sparse autoencoders instead of neurons: their name in the run (see `cratelm sae train`),
    or a folder in SAELens' format; needs the extra `sae`"""
    tokens: int = 8_192_000
    """most tokens to search in each of the splits fit and held_out (the paper: 8,192,000)"""
    sequence_length: int | None = None
    """tokens the model sees at once. Default: the most that it takes, at most 2,048; 1,024 where it names
    no limit"""
    top: int = 50
    """excerpts with the highest activation, one per document"""
    random: int = 50
    """excerpts around random tokens"""
    per_bin: int = 20
    """excerpts from each bin of both binnings"""
    context: int = 32
    """tokens before the chosen token in a long excerpt, and as many from it on"""
    short_context: int = 4
    """the same in a short excerpt (Anthropic metric)"""
    pilot_tokens: int = 8_192
    """tokens of the pilot sample that sets the edges of the bins"""
    seed: int = 0
    """draws random excerpts and the order within bins; twins need the same"""
    batch_tokens: int = not_in_identity(8_192)
    """tokens per forward pass; more is faster and takes more memory"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the model; statistics are always kept in float32 or more"""
    device: str = not_in_identity("auto")
    """cpu, cuda, ...; auto takes an accelerator where there is one"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        at_least(
            self,
            {"tokens": 1, "top": 1, "random": 1, "per_bin": 1, "context": 1, "short_context": 1,
             "pilot_tokens": 16},
        )  # fmt: skip
        if self.short_context > self.context:
            raise InputError(
                f"--short-context {self.short_context} is above --context {self.context}:"
                " short excerpts are cut from long ones"
            )
        if self.sae and self.site:
            raise InputError(
                f"--site {self.site} and --sae cannot be combined: autoencoders say what site they read"
            )
