"""Options of `cratelm harvest`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.records import has_both_ends
from cratelm.runs import at_least, not_in_identity
from cratelm.runs.minis import PREFIX
from cratelm.runs.model_options import Dtype, ModelOptions, SourceOptions, model_option
from cratelm.runs.names import check_name
from cratelm.tokens.beginning import BeginningOptions


def last_name(option: str, path: str) -> str:
    """Return the last name in a path or Hub id, which names the results; `option` is for messages.

    Raises `InputError` if there is none, as in `.`, `..` and `/`.
    """
    name = Path(path.removeprefix(PREFIX)).name
    if "/" in path and not Path(path).is_dir():
        name = name.partition("@")[0]  # OWNER/NAME@REVISION of the Hub
    if name in ("", ".."):
        whole = Path(path).resolve()
        instead = f"type {option} {whole}" if whole.name else "name another folder"
        raise InputError(f"{option} {path} has no name that could name the results: {instead}")
    return name


PARTS = 240
"""most parts of a harvest"""


def check_part(part: str) -> None:
    """Raise `InputError` if `part` is not I/N with 1 <= I <= N."""
    match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", part, re.ASCII)
    if not match or not int(match[1]) <= int(match[2]) <= PARTS:
        raise InputError(
            f"--part is {part!r}: expected the number of a part and how many there are, such as 1/4 to 4/4"
            f" (at most {PARTS})"
        )


@dataclass(frozen=True)
class HarvestConfig(ModelOptions, BeginningOptions):
    """Collect excerpts and statistics of every neuron in one pass over the fit and held-out tokens."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """a model of the run by name, `mini:NAME` for one that comes with cratelm, or any Hugging Face causal language model
    by folder or Hub id"""
    name: str | None = None
    """name of the harvest in the run. Default: the model's name; for latents `MODEL+SAE`"""
    site: str | None = None
    """where neurons live: ista, mssa, heads, mlp, or a module path such as
    'gpt_neox.layers.*.mlp.dense_4h_to_h:input', or a name of TransformerLens such as blocks.*.hook_resid_post.
    Default: ista for CRATE, mlp for others. With --sae, the site that the autoencoders read, if their files
    do not name it"""
    layers: tuple[int, ...] = ()
    """numbers of the layers in the model, from 0. Default: all that have the site"""
    sae: str | None = None
    """harvest latents of sparse autoencoders instead of neurons: their name in the run (see
    `cratelm sae train`), a folder of SAELens, sparsify or dictionary_learning, or RELEASE/ID of SAELens'
    registry, which needs the extra `sae`"""
    polarity: Literal["auto", "positive", "both"] = "auto"
    """which activations count: `positive` those above 0; `both` the two ends of each neuron, `17+` and `17-`, which are
    explained and scored by themselves; `auto` both where the site's activations go as far below 0 as above it (gated
    MLPs, attention, the residual stream), else positive (ReLU, GELU, CRATE's code, latents)"""
    part: str | None = None
    """harvest only one part of the tokens, such as 2/4 for the second of four, so that several machines can share
    the work; `cratelm merge harvest` then makes the harvest from all parts"""
    tokens: int = 8_192_000
    """most tokens to search in each of the splits fit and held_out, to within one sequence (the paper: 8,192,000)"""
    sequence_length: int | None = None
    """tokens per sequence, with the begin token. Default: the model's maximum, but at most 2,048; 1,024 if the model
    states no maximum"""
    top: int = 50
    """excerpts with the highest activation, one per document"""
    random: int = 50
    """excerpts around random tokens"""
    per_bin: int = 20
    """excerpts from each bin of both binnings"""
    context: int = 32
    """tokens of a long excerpt before the chosen token, and as many again from the chosen token on"""
    short_context: int = 4
    """the same for a short excerpt (Anthropic metric)"""
    pilot_tokens: int = 8_192
    """tokens of the pilot sample that sets the edges of the bins"""
    seed: int = 0
    """seed of the random excerpts and of the order within bins; twins need the same one"""
    batch_tokens: int = not_in_identity(8_192)
    """tokens per forward pass; more are faster and take more memory"""
    dtype: Dtype = model_option("float32")
    """precision of the model; auto: that of its files. Statistics are always kept in float32 or more"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            {"tokens": 1, "top": 1, "random": 1, "per_bin": 1, "context": 1, "short_context": 1,
             "pilot_tokens": 16, "batch_tokens": 1, "seed": 0, "sequence_length": 1},
        )  # fmt: skip
        if self.name is not None:
            check_name("--name", self.name, reserved="@")
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0:
            raise InputError(f"--layers {' '.join(map(str, self.layers))}: name each once, from 0")
        if self.part is not None:
            check_part(self.part)
        if self.short_context > self.context:
            raise InputError(
                f"--short-context {self.short_context} is above --context {self.context}:"
                " short excerpts are cut from long ones"
            )
        both = "--polarity both" if self.polarity == "both" else f"--site {self.site}"
        if self.sae and (self.polarity == "both" or (self.site and has_both_ends(self.site))):
            raise InputError(f"{both} and --sae cannot be combined: latents have one end")
        if self.site and has_both_ends(self.site) and self.polarity == "positive":
            raise InputError(
                f"--site {self.site} names both ends, and --polarity positive one: omit one of them"
            )


@dataclass(frozen=True)
class MergeHarvestConfig(SourceOptions):
    """Make a harvest from its parts, which `cratelm harvest --part` collected, and remove the parts."""

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """name of the harvest: that of the model, or what `--name` of the parts says"""
    device: str = model_option("auto", identity=False)
    """cpu, cuda, ...; auto uses an accelerator if there is one. The precision is that of the parts"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
