"""Options of `cratelm train`. Imports nothing heavy, so that `--help` is quick."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cratelm.errors import InputError
from cratelm.runs import (
    Completion,
    Options,
    Settings,
    at_least,
    check_memory,
    config_dict,
    not_in_identity,
    options_of,
)
from cratelm.runs.names import DerivedNull, check_name, model_name

Part = Literal["dictionary", "mlp", "attention", "embeddings"]
"""parts of a model that can be frozen; `cratelm.models.parts` names their weights"""


@dataclass(frozen=True)
class Recipe:
    """Settings that differ between a training run on a cluster and on a laptop."""

    steps: int
    batch_size: int
    """sequences per step, over all devices"""
    micro_batch_size: int
    """most sequences that one device processes at once"""
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
        """Return the number of tokens per step, over all devices."""
        return self.batch_size * self.sequence_length


PAPER = Recipe(
    steps=600_000,
    batch_size=256,  # x 1,024 tokens x 600,000 steps = 157B tokens, the paper's figure for 12l
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
"""learning rate of a recipe with another optimizer than the recipe's own"""
WITH_ADAMW = "sparse-gpt-"
"""first part of the names of models for which every recipe uses AdamW: the source's optimizer, after whose steps
small entries are set to 0, where Muon would make all singular values of the update equal"""


@dataclass(frozen=True)
class TrainConfig(Options):
    """Train one model on the tokens of a run.

    Twins are trained by the same command with another `--model`: they see the same tokens in the
    same order. After an interruption the same command resumes from the last checkpoint.
    """

    run: Path = not_in_identity(Path("runs/default"))
    """run directory; its tokens must have been made by `cratelm tokenize`"""
    model: str = "crate-2l"
    """FAMILY-SIZE, a family and one of the sizes 1l, 2l, 3l, 6l, 12l. Families: crate, crate-alpha, crate-query,
    crate-mlp, crate-attention, crate-mssa, crate-tssa, gpt2, gpt2-relu, gpt2-gelu, gpt2-solu, gpt2-topk, sparse-gpt.
    With --null, name of a trained model of the run"""
    name: str = ""
    """name of the model's folder in the run. Default: --model, with `-frozen-PART` for --freeze PART, with
    `-seedN` for --seed N above 0, with `-init` if --steps is 0; --model with `-KIND` for --null KIND, whatever the
    seed"""
    recipe: Literal["paper", "laptop"] | None = None
    """defaults of the options below. Default: `paper` for the sizes 6l and 12l, `laptop` for 1l, 2l and
    3l (the paper trained these sizes, too, with its one recipe)"""
    steps: int | None = None
    """number of steps, of one batch each (paper 600,000; laptop 600); 0 saves the model as initialised"""
    batch_size: int | None = None
    """sequences per step, over all devices (paper 256; laptop 16)"""
    micro_batch_size: int | None = None
    """sequences that one device processes at once; gradients are accumulated over the micro-batches of a
    step (paper 16; laptop 16)"""
    sequence_length: int | None = None
    """T, tokens per sequence (paper 1,024; laptop 256)"""
    optimizer: Literal["adamw", "muon"] | None = None
    """muon: torch.optim.Muon for the matrices inside the blocks, AdamW for the embeddings, the head
    and the vectors (paper adamw; laptop muon, for sparse-gpt adamw)"""
    learning_rate: float | None = None
    """peak learning rate, the same for all parameters (paper 6e-4; laptop 1.5e-2, with adamw 3e-3)"""
    tuned: bool = not_in_identity(False)
    """use the learning rate that `cratelm tune` found for this model in this run"""
    minimum_ratio: float = 0.1
    """learning rate of the last step as a fraction of the peak; it falls along a cosine"""
    warmup: int | None = None
    """steps over which the learning rate rises (paper 2,000; laptop 60; with another --steps the same
    fraction of the steps)"""
    weight_decay: float = 0.1
    """applied to tensors of 2 or more dimensions"""
    clip: float = 1.0
    """largest norm of the gradient over all parameters (for sparse-gpt its largest root mean square); 0 means no
    limit"""
    l1: float = 0.0
    """weight of an L1 penalty on the neurons, added to the loss in training: the sum of the absolute values of a
    layer's neurons, averaged over tokens and layers. The validation loss is without it"""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: mixed precision, weights stay in float32 (paper bf16; laptop fp32)"""
    compile: bool = False
    """use torch.compile: slow to start, but faster steps, above all on GPUs"""
    gradient_checkpointing: bool = not_in_identity(False)
    """recompute the activations of each block in the backward pass instead of keeping them: less memory, for
    one more forward pass of the blocks in each step"""
    shard: bool = not_in_identity(False)
    """split weights, gradients and optimizer states over the processes (FSDP2) instead of keeping all of them in
    each (DDP); checkpoints resume on any number of processes"""
    log_every: int | None = None
    """steps between two points of the training curve (paper 10; laptop 1)"""
    validate_every: int | None = None
    """steps between two points of the validation curve (paper 1,000; laptop 100)"""
    validation_sequences: int | None = None
    """number of held-out sequences to validate on, always the same ones (paper 1,024; laptop 128)"""
    checkpoint_every: int | None = not_in_identity(None)
    """steps between two checkpoints (paper 1,000; laptop 50)"""
    seed: int = 0
    """seed of the initial weights and of the order of the sequences"""
    model_overrides: tuple[str, ...] = ()
    """fields of the model's configuration as key=value, such as ista_residual=true ista_steps=3"""
    freeze: tuple[Part, ...] = ()
    """parts that keep their initial weights: dictionary (CRATE's), mlp (the counterpart in other families, the first
    matrix of their MLP), attention (its matrices), embeddings (of tokens and positions, with the head)"""
    null: DerivedNull | None = None
    """make a null control of the trained model --model instead of training. permuted: each matrix and vector of
    its blocks is permuted inside itself; embeddings: all weights but the embeddings and the head are drawn anew.
    Sequence length, validation and precision are those of the trained model unless given"""
    device: Literal["auto", "cpu"] = not_in_identity("auto")
    """auto uses a GPU if there is one; for several, launch with `torchrun` or `accelerate launch`"""
    tensorboard: bool = not_in_identity(False)
    """also write curves for TensorBoard to the model's folder (needs the extra `tensorboard`)"""
    wandb: bool = not_in_identity(False)
    """also send curves to Weights & Biases (needs the extra `wandb`)"""
    force: bool = not_in_identity(False)
    """redo the stage even if it is finished"""
    quiet: bool = not_in_identity(False)
    """show no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name:
            check_name("--name", self.name, reserved="@+")
        if self.null:
            self._check_null()
        object.__setattr__(self, "freeze", tuple(sorted(set(self.freeze))))
        recipe = self.resolved()
        at_least(
            recipe,
            {"batch_size": 1, "micro_batch_size": 1, "sequence_length": 1, "log_every": 1,
             "validate_every": 1, "validation_sequences": 1, "checkpoint_every": 1,
             "steps": 0, "warmup": 0},
        )  # fmt: skip
        at_least(self, {"weight_decay": 0, "clip": 0, "l1": 0, "seed": 0})
        if not recipe.learning_rate > 0:
            raise InputError(f"--learning-rate is {recipe.learning_rate}: it must be above 0")
        if self.tuned and (self.learning_rate is not None or self.null):
            other = "--null" if self.null else "--learning-rate"
            raise InputError(f"--tuned and {other} cannot be combined: omit one of them")
        if not 0 <= self.minimum_ratio <= 1:
            raise InputError(f"--minimum-ratio is {self.minimum_ratio}: it must be between 0 and 1")
        if recipe.warmup > recipe.steps:
            raise InputError(
                f"--warmup {recipe.warmup} is longer than --steps {recipe.steps}: lower --warmup"
            )
        self.overrides()

    def _check_null(self) -> None:
        """Raise `InputError` for options of a training, which a null control does not have."""
        for name, given in (
            ("steps", bool(self.steps)),
            ("freeze", bool(self.freeze)),
            ("model_overrides", bool(self.model_overrides)),
            ("l1", bool(self.l1)),
        ):
            if given:
                raise InputError(
                    f"--null makes a control of {self.model} without training it: omit"
                    f" --{name.replace('_', '-')}"
                )

    def with_recipe_of(self, trained: Completion) -> "TrainConfig":
        """Return the options of a null control, those that were not given as in the record of its trained model."""
        names = {f.name for f in fields(Recipe)} & trained.config.keys()
        missing = {name: trained.config[name] for name in names if getattr(self, name) is None}
        return replace(self, **{**missing, "steps": 0, "warmup": 0})

    def resolved(self) -> Recipe:
        """Return the recipe, with its values replaced by the options that were given."""
        large = self.model.endswith(("-6l", "-12l"))
        name = self.recipe or ("paper" if large else "laptop")
        base = RECIPES[name]
        options = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        options = {name: value for name, value in options.items() if value is not None}
        if self.null:
            options |= {"steps": 0, "warmup": 0}
        default = "adamw" if self.model.startswith(WITH_ADAMW) else base.optimizer
        options.setdefault("optimizer", default)
        if options["optimizer"] != base.optimizer:
            options.setdefault("learning_rate", OTHER_LEARNING_RATES[name])
        if "steps" in options and "warmup" not in options:
            options["warmup"] = base.warmup * options["steps"] // base.steps
        return replace(base, **options)

    def check_memory(self, hidden_size: int, layers: int, available: int | None) -> None:
        """Raise `InputError` if the activations of one micro-batch exceed the `available` bytes.

        `hidden_size` and `layers` are those of the model. Each layer keeps at least its input, in 16 bits.
        """
        recipe = self.resolved()
        tokens = min(recipe.micro_batch_size, recipe.batch_size) * recipe.sequence_length
        parts: dict[str | tuple[str, ...], float] = {
            ("micro_batch_size", "sequence_length"): tokens * hidden_size * layers * 2,
            "batch_size": 8 * 4 * recipe.batch_size,
        }
        check_memory(recipe, parts, "one step", available=available)

    def overrides(self) -> dict[str, Any]:
        """Return `model_overrides` as values: parsed as JSON if possible, else as text.

        Raises `InputError` for a pair that is not key=value.
        """
        values = {}
        for pair in self.model_overrides:
            key, equals, text = pair.partition("=")
            if not key.isidentifier() or not equals or not text:
                raise InputError(
                    f"--model-overrides has {pair!r}: it must be key=value, such as ista_steps=3"
                )
            values[key] = _value(text)
        return values

    @property
    def folder(self) -> str:
        """Return the name of the model's folder in its run."""
        steps = self.resolved().steps
        return self.name or model_name(
            self.model, steps=steps, freeze=self.freeze, null=self.null, seed=self.seed
        )

    def settings(self) -> Settings:
        """Return the settings for a completion record: `identity`, with and without the given options."""
        usual = TrainConfig(model=self.model, recipe=self.recipe)
        return Settings(self.identity(), usual.identity(), options_of(self))

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the weights, each as its value, whether given or default."""
        recipe = asdict(self.resolved())
        del recipe[
            "checkpoint_every"
        ]  # decides no weight; an option that decides none is deleted here
        plain = {k: v for k, v in config_dict(self).items() if k not in ("recipe", "name")}
        for later in (
            "freeze",
            "null",
            "l1",
        ):  # absent unless given: identities are those of versions without them
            if not plain[later]:
                del plain[later]
        return {**plain, **recipe}


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text
