"""Train a small model on a synthetic task, and test it on fresh sequences.

Optimizer, schedule, clipping and annealed weight sparsity are those of `cratelm train` for the same model.

Shape legend: B sequences, T tokens of a sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models import build
from cratelm.probes.tasks import IGNORED, TASKS, Task
from cratelm.train.config import Recipe, TrainConfig
from cratelm.train.optimizers import learning_rate, make_optimizers, set_learning_rate
from cratelm.train.weight_sparsity import WeightSparsity, gradient_limit

LEARNING_RATES = {"muon": 5e-3, "adamw": 3e-3}
"""peak by optimizer. With the 1.5e-2 of the laptop recipe, GPT-2 learns `induction` in three times as many steps"""
_TRAINING, _TESTING = 0, 1
"""streams of random numbers"""
_ROWS = 512
"""sequences that are tested at a time"""


def recipe_of(name: str, steps: int, batch_size: int, rate: float | None) -> Recipe:
    """Return the recipe of a training: optimizer and warm-up are those of the model's laptop recipe."""
    recipe = TrainConfig(model=name, recipe="laptop", steps=steps).resolved()
    return replace(
        recipe, batch_size=batch_size, learning_rate=rate or LEARNING_RATES[recipe.optimizer]
    )


def new_model(name: str, task: Task, seed: int) -> PreTrainedModel:
    """Return a model of a named size with fresh weights, for the tokens and the length of a task."""
    return build(name, vocab_size=task.vocabulary, max_position_embeddings=task.length, seed=seed)


def train_on(
    model: PreTrainedModel, task: Task, recipe: Recipe, seed: int, progress: Callable[[float], None]
) -> None:
    """Train a model in place; `progress` is called with the loss of each step.

    The sequences depend on the task and the seed alone, so that all families see the same ones. Raises `InputError` if
    the loss is no longer finite.
    """
    plain = TrainConfig(model="crate-2l")
    optimizers = make_optimizers(model, recipe.optimizer, plain.weight_decay)
    is_sparse = hasattr(model, "sparse_parameters")
    sparsity = WeightSparsity(model, recipe.steps) if is_sparse else None
    limit = gradient_limit(plain.clip, model, is_sparse=is_sparse)
    generator = _generator(task, seed, _TRAINING)
    model.train()
    for step in range(recipe.steps):
        set_learning_rate(optimizers, learning_rate(step, recipe, plain.minimum_ratio))
        drawn = task.draw(recipe.batch_size, generator)
        logits = model(torch.from_numpy(drawn.tokens), use_cache=False).logits  # [B, T, V]
        targets = torch.from_numpy(drawn.targets).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED)
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss on {task.name} is {float(loss)} at step {step + 1}: training has diverged; lower"
                f" --learning-rate (now {recipe.learning_rate:g})"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if sparsity is not None:
            sparsity.apply(step + 1)
        progress(float(loss.detach()))


@torch.no_grad()
def tested(model: PreTrainedModel, task: Task, n: int, seed: int) -> NDArray[np.bool_]:
    """Return for each of `n` fresh sequences [n] whether the first answer is the model's most likely next token.

    They are drawn from another stream than those of the training, and are the same for all models.
    """
    model.eval()
    drawn = task.draw(n, _generator(task, seed, _TESTING))
    tokens = torch.from_numpy(drawn.tokens[:, : drawn.first + 1])
    best = [
        model(part, use_cache=False).logits[:, -1].argmax(-1).numpy()
        for part in tokens.split(_ROWS)
    ]
    return np.concatenate(best) == drawn.answers


def _generator(task: Task, seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([list(TASKS).index(task.name), seed, stream])
