"""Options of `cratelm sae train`. Imports nothing heavy, so that `--help` is quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.activations.config import last_name
from cratelm.errors import InputError
from cratelm.records import BOTH_ENDS, has_both_ends
from cratelm.runs import Settings, at_least, config_dict, not_in_identity, options_of
from cratelm.runs.model_options import Dtype, ModelOptions, model_option
from cratelm.runs.names import check_name, set_name
from cratelm.tokens.beginning import BeginningOptions

Architecture = Literal["l1", "topk", "batchtopk", "jumprelu", "gated"]
ARCHITECTURES: tuple[Architecture, ...] = ("l1", "topk", "batchtopk", "jumprelu", "gated")
Freeze = Literal["decoder", "soft-decoder", "encoder"]
L1, K, L0_COEFFICIENT = 3e-4, 32, 1e-3
"""defaults of --l1 (as in the paper), --k and --l0-coefficient"""
_SPARSITY: dict[str, tuple[Architecture, ...]] = {
    "l1": ("l1", "gated"),
    "k": ("topk", "batchtopk"),
    "l0_coefficient": ("jumprelu",),
}
"""architectures to which each sparsity option belongs"""
_MOST_TOKENS_UNTIL_DEAD = 10_000_000


@dataclass(frozen=True)
class SaeTrainConfig(ModelOptions, BeginningOptions):
    """Train sparse autoencoders on a site of a model, one per layer, in one pass over train tokens.

    After an interruption the same command resumes.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """a model of the run, or a folder or Hub id of a causal language model of transformers"""
    site: str | None = None
    """ista, mssa, heads, mlp, or a module path with * for the layer: `model.layers.*` is CRATE's
    residual stream, `model.layers.*.ista` the output of its sparse block; `transformer.h.*` and
    `transformer.h.*.mlp` are those of GPT-2. Default: ista for CRATE, mlp for other models"""
    layers: tuple[int, ...] = ()
    """layers to train on, from 0; default: all. All layers share the forward passes"""
    name: str = ""
    """NAME of the folder sae/MODEL@NAME in the run; default: architecture, size and site, such as l1-16x"""
    architecture: Architecture = "l1"
    """l1 (the paper's), topk (Gao et al. 2024), batchtopk (Bussmann et al. 2024), jumprelu
    (Rajamanoharan et al. 2024b), gated (2024a)"""
    expansion: int = 16
    """latents per input; the paper uses 1, 4 and 16"""
    d_sae: int | None = None
    """number of latents, instead of --expansion"""
    l1: float | None = None
    """for l1 and gated: weight of the sum of the latents, relative to the mean squared error of an input
    (default 3e-4, as in the paper)"""
    k: int | None = None
    """for topk: number of latents that are not 0 at a token; for batchtopk: their mean number (default 32)"""
    l0_coefficient: float | None = None
    """for jumprelu: weight of the number of latents that are not 0, relative to the mean squared error of an
    input (default 1e-3)"""
    freeze: Freeze | None = None
    """make a random control (Korznikov et al. 2026). decoder: its rows, the atoms, keep their random start;
    soft-decoder: each atom keeps a cosine of at least 0.8 to its start; encoder: its matrix keeps its random
    start. The other weights are trained; in l1 and gated no latent is resampled"""
    tokens: int = 20_000_000
    """tokens to train on, including repeats, rounded down to whole batches (paper 2,000,000,000)"""
    lr: float = 1e-4
    """learning rate of Adam"""
    lr_decay: float = 0.2
    """fraction of the steps, at the end, over which the learning rate falls to 0; 0: it stays constant"""
    batch_size: int = 4096
    """tokens per step"""
    normalize: bool = True
    """scale activations to a mean norm of sqrt(inputs), so that the same --l1 has the same meaning for every
    model and layer; the scale is folded into the weights at the end"""
    dead_after: int | None = None
    """number of tokens without firing after which a latent counts as dead, in the curves and for revival;
    default: a twentieth of --tokens, at most 10 million"""
    sequence_length: int | None = None
    """T in tokens; default: the maximum of the model, but at most 2,048; 1,024 if it specifies no maximum"""
    buffer_mib: int = 512
    """MiB of activations that are shuffled together, but at least two batches"""
    batch_tokens: int = 8192
    """tokens per forward pass of the model"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in 16 bits; weights stay in float32"""
    seed: int = 0
    """seed of the initial weights, the order of the tokens, and the reinitialisation of dead latents"""
    log_every: int | None = None
    """steps between two points of the curves; default: a hundredth of the steps"""
    checkpoint_minutes: float = not_in_identity(2.0)
    """minutes between two checkpoints; 0: a checkpoint after every step"""
    dtype: Dtype = model_option("float32")
    """precision of the model; auto: that of its files. Autoencoders are in float32"""
    force: bool = not_in_identity(False)
    """train again even if the stage is finished"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name:
            check_name("--name", self.name, reserved="@+")
        if self.site and has_both_ends(self.site):
            raise InputError(
                f"--site {self.site}: autoencoders read activations, above and below 0: type --site"
                f" {self.site.removesuffix(BOTH_ENDS)}"
            )
        at_least(
            self,
            {"expansion": 1, "d_sae": 1, "k": 1, "batch_size": 1, "dead_after": 1,
             "sequence_length": 1, "buffer_mib": 1, "batch_tokens": 1, "log_every": 1,
             "l1": 0, "l0_coefficient": 0, "seed": 0, "checkpoint_minutes": 0},
        )  # fmt: skip
        if not self.lr > 0:
            raise InputError(f"--lr is {self.lr}: it must be above 0")
        if not 0 <= self.lr_decay < 1:
            raise InputError(f"--lr-decay is {self.lr_decay}: it must be at least 0 and below 1")
        if self.tokens < self.batch_size:
            raise InputError(
                f"--tokens is {self.tokens}, less than one batch of {self.batch_size}: lower --batch-size or raise"
                " --tokens"
            )
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0:
            raise InputError(f"--layers {' '.join(map(str, self.layers))}: name each once, from 0")
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        for field, owners in _SPARSITY.items():
            if getattr(self, field) is not None and self.architecture not in owners:
                right = next(f for f, names in _SPARSITY.items() if self.architecture in names)
                raise InputError(
                    f"--{field.replace('_', '-')} is an option of {' and '.join(owners)}, but --architecture"
                    f" is {self.architecture}: give --{right.replace('_', '-')} instead"
                )

    def settings(self) -> Settings:
        """Return the settings for a completion record, without newer options unless they were given.

        So the identities are those of versions without these options.
        """
        given, usual = config_dict(self), config_dict(SaeTrainConfig())
        for values in (given, usual):
            for name in ("freeze", "dtype", "begin_token", "skip_first"):
                if values[name] == getattr(SaeTrainConfig, name):
                    del values[name]
        return Settings(given, usual, options_of(self))

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.tokens // self.batch_size

    @property
    def dead_steps(self) -> int:
        """Number of steps without firing after which a latent counts as dead."""
        tokens = self.dead_after or min(self.tokens // 20, _MOST_TOKENS_UNTIL_DEAD)
        return max(1, tokens // self.batch_size)

    @property
    def log_steps(self) -> int:
        """Number of steps between two points of the curves."""
        return self.log_every or max(1, self.steps // 100)

    @property
    def folder(self) -> str:
        """Name of the stage in its run: MODEL@NAME."""
        size = f"d{self.d_sae}" if self.d_sae is not None else f"{self.expansion}x"
        site = re.sub(r"[^a-z0-9]+", "-", (self.site or "").lower()).strip("-")
        frozen = self.freeze and f"frozen-{self.freeze}"
        name = self.name or "-".join(filter(None, [self.architecture, size, site, frozen]))
        return set_name(last_name("--model", self.model), name)
