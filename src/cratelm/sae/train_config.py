"""What `cratelm sae train` can be told. Imports nothing heavy, so that `--help` is quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.activations.config import last_name
from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity
from cratelm.runs.names import set_name

Architecture = Literal["l1", "topk", "batchtopk", "jumprelu", "gated"]
ARCHITECTURES: tuple[Architecture, ...] = ("l1", "topk", "batchtopk", "jumprelu", "gated")
L1, K, L0_COEFFICIENT = 3e-4, 32, 1e-3
"""what is taken where nothing is given; the first is the paper's"""
_SPARSITY: dict[str, tuple[Architecture, ...]] = {
    "l1": ("l1", "gated"),
    "k": ("topk", "batchtopk"),
    "l0_coefficient": ("jumprelu",),
}
"""which of the sparsity's numbers belongs to which architectures"""
_MOST_TOKENS_UNTIL_DEAD = 10_000_000


@dataclass(frozen=True)
class SaeTrainConfig:
    """Train sparse autoencoders on a site of a model, one a layer, from one pass over train tokens.

    Killed and started again with the same command, training goes on where it was.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory"""
    model: str = "crate-2l"
    """a model of the run, or a folder or Hub id with a causal language model of transformers"""
    site: str | None = None
    """ista, mssa, heads, mlp, or a module path with * for the layer: `model.layers.*` is CRATE's
    residual stream, `model.layers.*.ista` what its sparse block puts out; `transformer.h.*` and
    `transformer.h.*.mlp` are GPT-2's. Left out: ista for CRATE, mlp for the rest"""
    layers: tuple[int, ...] = ()
    """layers, from 0; left out: all. One forward pass serves them all"""
    name: str = ""
    """folder of the autoencoders in the run, MODEL@NAME; left empty it says architecture, size and
    site, such as l1-16x"""
    architecture: Architecture = "l1"
    """l1 (the paper's), topk (Gao et al. 2024), batchtopk (Bussmann et al. 2024), jumprelu
    (Rajamanoharan et al. 2024b), gated (2024a)"""
    expansion: int = 16
    """latents by inputs; the paper: 1, 4 and 16"""
    d_sae: int | None = None
    """latents, instead of --expansion"""
    l1: float | None = None
    """of l1 and gated: weight of the sum of the latents against the mean squared error of an input
    (paper and default 3e-4)"""
    k: int | None = None
    """of topk: latents on at a token; of batchtopk: on average (default 32)"""
    l0_coefficient: float | None = None
    """of jumprelu: weight of the number of latents that are on, likewise (default 1e-3)"""
    tokens: int = 20_000_000
    """tokens trained on, repeats counted, rounded down to whole batches (paper 2,000,000,000)"""
    lr: float = 1e-4
    """learning rate of Adam"""
    lr_decay: float = 0.2
    """last part of the steps, in which the learning rate falls to 0; 0: it stays"""
    batch_size: int = 4096
    """tokens of a step"""
    normalize: bool = True
    """train on activations scaled to a mean norm of the root of their number, so that one l1 means
    the same for every model and layer; the scale is folded into the weights in the end"""
    dead_after: int | None = None
    """tokens without a firing after which a latent counts as dead, is told so in the curve, and is
    revived; left out: a twentieth of --tokens, at most 10 million"""
    sequence_length: int | None = None
    """T in tokens; left out: the model's longest, 2,048 at most, 1,024 where it names none"""
    buffer_mib: int = 512
    """MiB of activations that are shuffled together, at least two batches"""
    batch_tokens: int = 8192
    """tokens that go through the model at once"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: products in 16 bits, weights stay in float32"""
    seed: int = 0
    """of the initial weights, the order of the tokens, and what dead latents start from again"""
    log_every: int | None = None
    """steps between two points of the curve; left out: a hundredth of the steps"""
    checkpoint_minutes: float = not_in_identity(2.0)
    """minutes between two checkpoints; 0: one after every step"""
    device: str = not_in_identity("auto")
    """auto: the GPU where there is one; cpu, cuda, cuda:1, mps"""
    force: bool = not_in_identity(False)
    """train again where this was finished already"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"--architecture is {self.architecture!r}: choose from {', '.join(ARCHITECTURES)}"
            )
        at_least(
            self,
            {"expansion": 1, "d_sae": 1, "k": 1, "batch_size": 1, "dead_after": 1,
             "sequence_length": 1, "buffer_mib": 1, "batch_tokens": 1, "log_every": 1,
             "l1": 0, "l0_coefficient": 0, "seed": 0, "checkpoint_minutes": 0},
        )  # fmt: skip
        if not self.lr > 0:
            raise InputError(f"--lr is {self.lr}, above 0 was expected")
        if not 0 <= self.lr_decay < 1:
            raise InputError(f"--lr-decay is {self.lr_decay}, 0 to below 1 was expected")
        if self.tokens < self.batch_size:
            raise InputError(
                f"--tokens {self.tokens} is less than one batch: lower --batch-size"
                f" (now {self.batch_size}) or raise --tokens"
            )
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0:
            raise InputError(f"--layers {' '.join(map(str, self.layers))}: name each once, from 0")
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        for field, owners in _SPARSITY.items():
            if getattr(self, field) is not None and self.architecture not in owners:
                own = next(f for f, names in _SPARSITY.items() if self.architecture in names)
                raise InputError(
                    f"--{field.replace('_', '-')} is of {' and '.join(owners)}, --architecture is"
                    f" {self.architecture}: give --{own.replace('_', '-')}"
                )

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_size

    @property
    def dead_steps(self) -> int:
        """Steps without a firing after which a latent counts as dead."""
        tokens = self.dead_after or min(self.tokens // 20, _MOST_TOKENS_UNTIL_DEAD)
        return max(1, tokens // self.batch_size)

    @property
    def log_steps(self) -> int:
        return self.log_every or max(1, self.steps // 100)

    @property
    def folder(self) -> str:
        """Name of the stage in its run: MODEL@NAME."""
        size = f"d{self.d_sae}" if self.d_sae is not None else f"{self.expansion}x"
        place = re.sub(r"[^a-z0-9]+", "-", (self.site or "").lower()).strip("-")
        name = self.name or "-".join(filter(None, [self.architecture, size, place]))
        return set_name(last_name("--model", self.model), name)
