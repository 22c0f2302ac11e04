"""What `cratelm train` can be told. Imports nothing heavy, so that `--help` is quick."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cratelm.errors import InputError
from cratelm.runs import Settings, at_least, config_dict, not_in_identity, options_of
from cratelm.runs.names import untrained_name


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run that differ between a cluster and a laptop."""

    steps: int
    batch_size: int
    """sequences a step, over all devices"""
    micro_batch_size: int
    """sequences that one device takes through the model at once, at most"""
    sequence_length: int
    """T, in tokens"""
    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    warmup: int
    """steps"""
    precision: Literal["fp32", "bf16"]
    log_every: int
    """steps"""
    validate_every: int
    """steps"""
    validation_sequences: int
    checkpoint_every: int
    """steps"""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


PAPER = Recipe(
    steps=600_000,
    batch_size=256,  # x 1,024 tokens x 600,000 steps = 157B tokens, as the paper counts for 12l
    micro_batch_size=16,
    sequence_length=1024,
    optimizer="adamw",
    learning_rate=6e-4,
    warmup=2000,
    precision="bf16",
    log_every=10,
    validate_every=1000,
    validation_sequences=1024,
    checkpoint_every=1000,
)
LAPTOP = Recipe(
    steps=600,
    batch_size=16,
    micro_batch_size=16,
    sequence_length=256,
    optimizer="muon",
    learning_rate=1.5e-2,
    warmup=60,
    precision="fp32",
    log_every=1,
    validate_every=100,
    validation_sequences=128,
    checkpoint_every=50,
)
RECIPES = {"paper": PAPER, "laptop": LAPTOP}
OTHER_LEARNING_RATES = {"paper": 6e-4, "laptop": 3e-3}
"""of a recipe where `--optimizer` names the optimizer that it does not take itself"""


@dataclass(frozen=True)
class TrainConfig:
    """Train one model on the tokens of a run.

    Twins are trained by the same command with another `--model`: they see the same tokens in the
    same order. Killed and started again with the same command, training goes on where it was.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory; its tokens must have been made by `cratelm tokenize`"""
    model: str = "crate-2l"
    """size by name: crate-1l, -2l, -3l, -6l, -12l, gpt2-1l, -2l, -3l, -6l, -12l"""
    name: str = ""
    """folder of the model in the run; left empty it is --model, with `-init` where --steps is 0"""
    recipe: Literal["paper", "laptop"] | None = None
    """where the numbers below come from that are not given; left out: `paper` for the sizes 6l and
    12l, `laptop` for 1l, 2l and 3l (the paper trained those, too, with its one recipe)"""
    steps: int | None = None
    """steps, one batch each (paper 600,000; laptop 600); 0 saves the model as initialised"""
    batch_size: int | None = None
    """sequences a step, over all devices (paper 256; laptop 16)"""
    micro_batch_size: int | None = None
    """sequences that one device takes through the model at once; gradients of several are summed
    (paper 16; laptop 16)"""
    sequence_length: int | None = None
    """T, tokens of a sequence (paper 1,024; laptop 256)"""
    optimizer: Literal["adamw", "muon"] | None = None
    """muon: torch.optim.Muon for the matrices inside the blocks, AdamW for the embeddings, the head
    and the vectors (paper adamw; laptop muon)"""
    learning_rate: float | None = None
    """at its peak (paper 6e-4; laptop 1.5e-2, with adamw 3e-3); one rate for all parameters"""
    minimum_ratio: float = 0.1
    """learning rate of the last step, as a part of the peak; a cosine leads there"""
    warmup: int | None = None
    """steps in which the learning rate rises (paper 2,000; laptop 60; the same share of a run of
    other length)"""
    weight_decay: float = 0.1
    """on tensors of 2 or more dimensions"""
    clip: float = 1.0
    """largest norm of the gradient over all parameters; 0: no limit"""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: mixed precision, weights stay in float32 (paper bf16; laptop fp32)"""
    compile: bool = False
    """torch.compile: slow to start, faster steps, most of all on GPUs"""
    log_every: int | None = None
    """steps between two points of the training curve (paper 10; laptop 1)"""
    validate_every: int | None = None
    """steps between two points of the validation curve (paper 1,000; laptop 100)"""
    validation_sequences: int | None = None
    """sequences of the held-out split, always the same ones (paper 1,024; laptop 128)"""
    checkpoint_every: int | None = not_in_identity(None)
    """steps between two checkpoints (paper 1,000; laptop 50)"""
    seed: int = 0
    """of the initial weights, and of the order of the sequences"""
    model_overrides: tuple[str, ...] = ()
    """fields of the model's configuration as key=value, such as ista_residual=true ista_steps=3"""
    device: Literal["auto", "cpu"] = not_in_identity("auto")
    """auto: the GPU where there is one; several by `torchrun` or `accelerate launch`"""
    tensorboard: bool = not_in_identity(True)
    """curves for TensorBoard in the model's folder"""
    wandb: bool = not_in_identity(False)
    """curves to Weights & Biases as well (needs cratelm[wandb])"""
    force: bool = not_in_identity(False)
    """train again where this was finished already"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        numbers = self.numbers()
        at_least(
            numbers,
            {"batch_size": 1, "micro_batch_size": 1, "sequence_length": 1, "log_every": 1,
             "validate_every": 1, "validation_sequences": 1, "checkpoint_every": 1,
             "steps": 0, "warmup": 0},
        )  # fmt: skip
        at_least(self, {"weight_decay": 0, "clip": 0, "seed": 0})
        if not numbers.learning_rate > 0:
            raise InputError(f"--learning-rate is {numbers.learning_rate}, above 0 was expected")
        if not 0 <= self.minimum_ratio <= 1:
            raise InputError(f"--minimum-ratio is {self.minimum_ratio}, 0 to 1 was expected")
        if numbers.warmup > numbers.steps:
            raise InputError(
                f"--warmup {numbers.warmup} is longer than --steps {numbers.steps}: lower --warmup"
            )
        self.overrides()

    def numbers(self) -> Recipe:
        """The recipe with what was given in place of its own values."""
        large = self.model.endswith(("-6l", "-12l"))
        recipe = self.recipe or ("paper" if large else "laptop")
        base = RECIPES[recipe]
        given = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("optimizer", base.optimizer) != base.optimizer:
            given.setdefault("learning_rate", OTHER_LEARNING_RATES[recipe])
        if "steps" in given and "warmup" not in given:
            given["warmup"] = base.warmup * given["steps"] // base.steps
        return replace(base, **given)

    def overrides(self) -> dict[str, Any]:
        """`model_overrides` as values: JSON where it reads as JSON, else the text."""
        found = {}
        for pair in self.model_overrides:
            key, equals, text = pair.partition("=")
            if not key.isidentifier() or not equals or not text:
                raise InputError(
                    f"--model-overrides has {pair!r}, key=value was expected, such as ista_steps=3"
                )
            found[key] = _value(text)
        return found

    @property
    def folder(self) -> str:
        """Name of the model in its run."""
        usual = untrained_name(self.model) if self.numbers().steps == 0 else self.model
        return self.name or usual

    def settings(self) -> Settings:
        """What a completion record keeps: `identity`, and what it is where nothing is given."""
        usual = TrainConfig(model=self.model, recipe=self.recipe)
        return Settings(self.identity(), usual.identity(), options_of(self))

    def identity(self) -> dict[str, Any]:
        """All that decides the weights, each number by its value wherever it came from."""
        numbers = asdict(self.numbers())
        del numbers["checkpoint_every"]
        plain = {k: v for k, v in config_dict(self).items() if k not in ("recipe", "name")}
        return {**plain, **numbers}


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
