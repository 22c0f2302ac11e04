"""Part of `gpu.sh`: CRATE and GPT-2 trained as twins, on carried or generated tokens, for the time that is left.

Each pair of twins takes the same number of steps over the same sequences in the same order. The number is what fits
into the pair's share of the time, by the speed of a few steps that are undone again. The recipe is `laptop` with
longer sequences, larger batches and bf16; sampler, loss, optimizers and schedule are those of `cratelm train`.

Shape legend: B sequences per step, b of one micro-batch, T tokens of a sequence.
"""

import json
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from common import synchronise
from gpu_part import Figures, PartOptions, free_memory, is_out_of_memory
from gpu_tokens import Tokens, generate, read
from gpu_weights import save, size_of

from cratelm.models import build, count_parameters
from cratelm.runs import write_text
from cratelm.train.config import LAPTOP, Recipe, TrainConfig
from cratelm.train.data import BatchSampler
from cratelm.train.losses import NextTokenLoss, Validation
from cratelm.train.optimizers import learning_rate, make_optimizers, set_learning_rate

WEIGHT_BYTES = 50_000_000
"""weights of all models together: those that would exceed it are not written"""
LEAST_STEPS = 20
CONFIG = TrainConfig()
"""weight decay, clipping and the end of the schedule are its defaults"""


class Training:
    """One model while it is trained."""

    def __init__(self, name: str, tokens: Tokens, recipe: Recipe, options: PartOptions):
        self.name, self.recipe, self.tokens = name, recipe, tokens
        self.accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="bf16")
        length = recipe.sequence_length
        self.bare = build(name, vocab_size=tokens.rows, max_position_embeddings=length)
        wrapped = NextTokenLoss(self.bare)
        wrapped.compile(backend=options.backend)
        self.model: Any = self.accelerator.prepare(wrapped)
        # A second wrapper of the same weights that is not compiled: validation would need another graph.
        self.eager: Any = self.accelerator.prepare_model(
            NextTokenLoss(self.bare), evaluation_mode=True
        )
        self.initial = {name: value.clone() for name, value in self.bare.state_dict().items()}
        self.micro = recipe.micro_batch_size
        self.restart(recipe)

    def restart(self, recipe: Recipe) -> None:
        """Return to the initial weights, with fresh optimizers."""
        self.recipe = recipe = replace(recipe, micro_batch_size=self.micro)
        self.bare.load_state_dict(self.initial)
        optimizers = make_optimizers(self.bare, recipe.optimizer, CONFIG.weight_decay)
        self.optimizers: list[Any] = [self.accelerator.prepare_optimizer(o) for o in optimizers]
        self.sampler = BatchSampler(
            self.tokens.train,
            batch_size=recipe.batch_size,
            micro_batch_size=recipe.micro_batch_size,
            sequence_length=recipe.sequence_length,
            seed=CONFIG.seed,
        )
        self.accelerator.gradient_accumulation_steps = self.sampler.n_micro
        self.model.train()

    def step(self, step: int) -> tuple[torch.Tensor, Any, float]:
        """Update the weights by one batch; return its mean loss, the norm of the gradient, and the rate."""
        rate = learning_rate(step, self.recipe, CONFIG.minimum_ratio)
        set_learning_rate(self.optimizers, rate)
        loss, norm = torch.zeros((), device=self.accelerator.device), None
        for tokens, targets in self.sampler.micro_batches(
            step, self.accelerator.device
        ):  # [b, T] each
            with self.accelerator.accumulate(self.model):
                part = self.model(tokens, targets)
                self.accelerator.backward(part)
                loss += part.detach() / self.sampler.n_micro
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), CONFIG.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        return loss, norm, rate

    def seconds_per_step(self, count: int) -> float:
        """Return the speed of a few steps, which are undone; halve the micro-batch until it fits into memory."""
        while True:
            try:
                float(self.step(0)[0])  # compiles
                break
            except Exception as error:
                if not is_out_of_memory(error) or self.micro == 1:
                    raise
            self.micro //= 2
            self.restart(self.recipe)
            free_memory(self.accelerator.device.type)
        start = time.perf_counter()
        for step in range(1, 1 + count):
            self.step(step)
        synchronise(self.accelerator.device)
        return (time.perf_counter() - start) / count

    def validate(self) -> dict[str, float]:
        """Return the loss on fixed held-out sequences, with its standard error."""
        return Validation(self.tokens.held_out, self.recipe, self.accelerator).measure(self.eager)


class Curves:
    """Loss curves of all models in one file, JSON lines, each with the name of its model."""

    def __init__(self, options: PartOptions):
        self.path, self.lines, self.written = options.out / "curves.jsonl", [], 0.0

    def add(self, **figures: Any) -> None:
        """Add a line; the file is written every five seconds, and by `write`."""
        self.lines.append(json.dumps(figures))
        if time.monotonic() - self.written > 5:
            self.write()

    def write(self) -> None:
        """Write all lines."""
        write_text(self.path, "".join(line + "\n" for line in self.lines))
        self.written = time.monotonic()


def measure(options: PartOptions, figures: Figures) -> None:
    """Train pairs of twins until the time is over; record each model, and what the tokens are."""
    if options.tokens is not None:
        tokens = read(options.tokens)
    else:
        tokens = generate(*((20_000, 320) if options.tiny else (20_000_000, 50_304)))
    figures.record("tokens", tokens.origin)
    curves, written = Curves(options), 0
    for number, size in enumerate(options.twins):
        free_memory(options.device)
        share = options.left() / (len(options.twins) - number)
        names = (f"crate-{size}", f"gpt2-{size}")
        try:
            pair = prepared(names, tokens, options, share)
        except Exception as error:
            for name in names:
                figures.record(name, {"error": f"{type(error).__name__}: {error}"[:500]})
            continue
        for training in pair:
            try:
                record = train(training, curves)
                record["files"], n_bytes = weights(training, options, figures, written)
                written += n_bytes
            except Exception as error:
                record = {"error": f"{type(error).__name__}: {error}"[:500]}
            curves.write()
            figures.record(training.name, record)
        del pair


def prepared(
    names: tuple[str, str], tokens: Tokens, options: PartOptions, seconds: float
) -> list[Training]:
    """Return both twins, ready for as many steps as fit into `seconds` together, compilation included.

    Raises `TimeoutError` if these are fewer than 20.
    """
    start = time.monotonic()
    batch, micro, length = (4, 2, 16) if options.tiny else (64, 32, 1024)
    recipe = replace(
        LAPTOP,
        batch_size=batch,
        micro_batch_size=micro,
        sequence_length=length,
        precision="bf16",
        validation_sequences=4 if options.tiny else 128,
    )
    pair = [Training(name, tokens, recipe, options) for name in names]
    per_step = sum(training.seconds_per_step(2 if options.tiny else 10) for training in pair)
    left = 0.85 * (seconds - (time.monotonic() - start))  # validation and writing take the rest
    steps = 4 if options.tiny else int(left / per_step)
    if steps < LEAST_STEPS and not options.tiny:
        raise TimeoutError(
            f"{left:.0f} s are left for both twins, which take {per_step:.2f} s per step"
        )
    recipe = replace(
        recipe,
        steps=steps,
        warmup=steps // 10,
        log_every=max(1, steps // 400),
        validate_every=max(1, steps // 8),
    )
    for training in pair:
        training.restart(recipe)
    return pair


def train(training: Training, curves: Curves) -> dict[str, Any]:
    """Take all steps and return what came of it. Raises `ArithmeticError` if the loss is no longer finite."""
    recipe, name = training.recipe, training.name
    curves.add(model=name, step=0, tokens=0, **training.validate())
    start, figures, validation = time.perf_counter(), {}, {}
    for step in range(recipe.steps):
        loss, norm, rate = training.step(step)
        done, seen = step + 1, (step + 1) * recipe.tokens_per_step
        if done % recipe.log_every == 0 or done == recipe.steps:
            figures = {"loss": float(loss), "gradient_norm": float(norm), "learning_rate": rate}
            curves.add(model=name, step=done, tokens=seen, **figures)
            if not figures["loss"] < float("inf"):
                raise ArithmeticError(f"the loss is {figures['loss']} at step {done}")
        if done % recipe.validate_every == 0 or done == recipe.steps:
            validation = training.validate()
            curves.add(model=name, step=done, tokens=seen, **validation)
    seconds = time.perf_counter() - start
    return {
        "parameters": count_parameters(training.bare),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.tokens_per_step,
        "batch_size": recipe.batch_size,
        "micro_batch_size": recipe.micro_batch_size,
        "sequence_length": recipe.sequence_length,
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate,
        "seconds": seconds,
        "tokens_per_s_with_validation": recipe.steps * recipe.tokens_per_step / seconds,
        "loss": figures["loss"],
        **validation,
    }


def weights(
    training: Training, options: PartOptions, figures: Figures, written: int
) -> tuple[list[str], int]:
    """Write the weights if there is room for them; return the names and the size of the files."""
    size = size_of(training.bare)
    if written + size > WEIGHT_BYTES and not options.tiny:
        return [], 0
    about = {
        "model": training.name,
        "tokens": figures.values["tokens"],
        "steps": training.recipe.steps,
    }
    paths = save(training.bare, options.out / "weights", training.name, about)
    return [str(p.relative_to(options.out)) for p in paths], sum(p.stat().st_size for p in paths)
