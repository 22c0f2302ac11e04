"""The training loop, top to bottom.

Shape legend: B sequences per step over all ranks, b of one micro-batch, T tokens of a sequence.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, set_seed
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from cratelm.errors import InputError
from cratelm.models import build, count_parameters, load
from cratelm.models.nulls import null_control
from cratelm.models.parts import freeze
from cratelm.runs import Completion, Draft, Run, Settings, Stage, options_of
from cratelm.runs.devices import available_on
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenizer import hf_tokenizer, save_hf_tokenizer
from cratelm.train import checkpoints
from cratelm.train.config import TrainConfig
from cratelm.train.data import BatchSampler
from cratelm.train.log import (
    UNHASHED,
    Log,
    draw,
    import_tensorboard,
    import_wandb,
    last,
    read_metrics,
)
from cratelm.train.losses import NextTokenLoss, Validation
from cratelm.train.optimizers import learning_rate, make_optimizers, set_learning_rate
from cratelm.train.processes import reported_loss
from cratelm.train.sharding import is_sharded, shard, whole_number
from cratelm.train.tuned import with_tuned_rate
from cratelm.train.weight_sparsity import WeightSparsity, gradient_limit


@dataclass(frozen=True)
class TrainResult:
    """Result of `cratelm train`: where the model is, how long it was trained, how well it predicts."""

    name: str
    path: Path
    steps: int
    tokens: int
    """number of tokens seen, including repeats"""
    parameters: int
    """number of trainable parameters, without the position embedding"""
    loss: float | None
    """of the last step's batch, nats per token; None if no step was taken"""
    validation_loss: float
    """on the fixed held-out sequences, nats per token"""
    validation_standard_error: float
    """over those sequences"""


class DivergedError(InputError):
    """The loss or the gradient of a training is no longer finite."""


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Objects that the loop works with, each prepared for the available devices."""

    accelerator: Accelerator
    model: torch.nn.Module
    """`NextTokenLoss` of the model, as Accelerate wraps it, or sharded"""
    optimizers: list[torch.optim.Optimizer]
    sampler: BatchSampler
    validation: Validation
    parameters: int
    gradient_limit: float
    """largest norm of the gradient over all parameters"""
    sparsity: WeightSparsity | None = None
    """of models whose weights are made sparse"""


def train(config: TrainConfig) -> TrainResult:
    """Train a model on the train split of a run and save it in `model/NAME`; with `null`, save a null control.

    Raises `InputError` for a configuration that cannot be run, and if the loss or the gradient is no
    longer finite (the checkpoints are kept).
    """
    run = Run(config.run)
    if config.tuned:
        config = with_tuned_rate(config)
    stage = run.stage("model", config.folder)
    inputs = {"tokens": run.stage("tokens").require("tokenize")}
    settings = config.settings()
    if config.null:
        inputs["model"] = _trained(run, config.model)
        config, settings = _null_settings(config, inputs["model"])
    if stage.is_finished(settings, inputs, force=config.force):
        return _read_result(stage)

    if config.tensorboard:
        import_tensorboard()  # a missing package is reported before anything is written
    if config.wandb:
        import_wandb()  # a missing package is reported before anything is written
    store = TokenStore(run.stage("tokens").path)
    setup = _prepare(config, store)
    if setup.accelerator.is_main_process and not config.quiet:
        print(_summary(config, setup, stage.label))
    opened = checkpoints.shared_draft(setup.accelerator, stage, settings, inputs)
    with opened as draft, reported_loss(setup.accelerator, draft):
        take_steps(setup, config, draft, stage.label)
        checkpoints.save_model(setup.accelerator, setup.model, draft.path)
        if setup.accelerator.is_main_process:
            save_hf_tokenizer(hf_tokenizer(store.tokenizer), draft.path)
            draw(draft.path, stage.label)
            draft.unhashed.update(UNHASHED)
            draft.results = _results(config, setup, draft.path)
    return _read_result(stage)


def _trained(run: Run, name: str) -> Completion:
    """Return the record of a trained model of the run; raise `InputError` if it is itself a null control."""
    done = run.stage("model", name).require("train")
    if done.is_untrained:
        raise InputError(
            f"{run.stage('model', name).path} was not trained, but --null makes a control of a trained model:"
            " name one with --model"
        )
    return done


def _null_settings(config: TrainConfig, trained: Completion) -> tuple[TrainConfig, Settings]:
    """Return the options of a null control completed from its trained model, and its settings.

    The command that redoes it has only the options that were given: the trained model may be another then.
    """
    completed = config.with_recipe_of(trained)
    return completed, replace(completed.settings(), options=options_of(config))


def train_briefly(config: TrainConfig, folder: Path, label: str) -> dict[str, Any]:
    """Train a model in one process without saving it, and return its figures, those of a completion record.

    `folder` holds curve and checkpoints, from which an interrupted call resumes. Raises `DivergedError` if the loss or
    the gradient is no longer finite.
    """
    store = TokenStore(Run(config.run).stage("tokens").path)
    setup = _prepare(config, store)
    take_steps(setup, config, Draft(folder, fresh=False), label)
    return _results(config, setup, folder)


def take_steps(setup: TrainingSetup, config: TrainConfig, draft: Draft, label: str) -> None:
    """Take all remaining steps, starting from the last checkpoint."""
    recipe, model, accelerator = config.resolved(), setup.model, setup.accelerator
    first = checkpoints.restore(accelerator, model, setup.optimizers, draft)
    log = Log(
        draft.path if accelerator.is_main_process else None,
        first,
        tensorboard=config.tensorboard,
        wandb_name=label if config.wandb else None,
    )
    if first == 0:
        log.write(0, 0, **setup.validation.measure(model))
    model.train()
    log.time(first, first * recipe.tokens_per_step)
    bar = tqdm(
        range(first, recipe.steps),
        label,
        recipe.steps,
        initial=first,
        unit="step",
        disable=config.quiet or not accelerator.is_main_process,
    )
    for step in bar:
        rate = learning_rate(step, recipe, config.minimum_ratio)
        set_learning_rate(setup.optimizers, rate)
        loss, norm = _update(setup, step)

        done, seen = step + 1, (step + 1) * recipe.tokens_per_step
        # the last step logs and validates whatever the intervals: `_results` reads the final figures there
        logs, validates, keeps = (
            done % every == 0 or done == recipe.steps
            for every in (recipe.log_every, recipe.validate_every, recipe.checkpoint_every)
        )
        if logs or keeps:  # also checked before each checkpoint, so that none has diverged weights
            figures = _figures(accelerator, loss, norm)
            _check_finite(figures, done, config, draft)
            bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
            if logs:
                log.write(done, seen, **figures, learning_rate=rate)
                log.time(done, seen)
        if validates:
            log.write(done, seen, **setup.validation.measure(model))
        if keeps:
            checkpoints.save(accelerator, model, setup.optimizers, draft, done)
    log.close()


def _update(setup: TrainingSetup, step: int) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """Update the weights by one batch; return this rank's mean loss and the norm of the gradient.

    Both stay tensors on the device: reading a number would make the host wait at each step.
    """
    accelerator, model, sampler = setup.accelerator, setup.model, setup.sampler
    loss, norm = torch.zeros((), device=accelerator.device), torch.zeros(())
    for tokens, targets in sampler.micro_batches(step, accelerator.device):  # [b, T] each
        with accelerator.accumulate(model):
            part = model(tokens, targets)
            accelerator.backward(part)
            loss += part.detach() / sampler.n_micro
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), setup.gradient_limit)
                for optimizer in setup.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                if setup.sparsity is not None:
                    setup.sparsity.apply(step + 1)
    return loss, norm


def _prepare(config: TrainConfig, store: TokenStore) -> TrainingSetup:
    """Return accelerator, model, optimizers and data, prepared in the order of their dependencies."""
    recipe = config.resolved()
    accelerator = open_accelerator(config)
    sampler = BatchSampler(
        store.split("train"),
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        sequence_length=recipe.sequence_length,
        seed=config.seed,
        rank=accelerator.process_index,
        n_ranks=accelerator.num_processes,
    )
    accelerator.gradient_accumulation_steps = sampler.n_micro
    validation = Validation(store.split("held_out"), recipe, accelerator)
    bare = _initial_model(config, store)
    text = bare.config.get_text_config()
    free = available_on(accelerator.device)
    config.check_memory(text.hidden_size, text.num_hidden_layers, free)
    parameters = count_parameters(bare)
    if config.gradient_checkpointing:
        checkpoint_blocks(bare)
    is_sparse = hasattr(bare, "sparse_parameters")
    sparsity = WeightSparsity(bare, recipe.steps) if is_sparse and recipe.steps else None
    limit = gradient_limit(config.clip, bare, is_sparse=is_sparse)
    wrapped = NextTokenLoss(bare, config.l1)
    if config.shard and accelerator.num_processes > 1:
        if sparsity is not None:
            raise InputError(
                f"--shard splits the tensors of {config.model}, whose largest entries are selected after each"
                " step over the whole tensor: omit --shard"
            )
        # Not prepared by Accelerate, which would wrap the model in DDP. The optimizers get the split tensors.
        model = shard(wrapped, accelerator, compiled=config.compile)
        optimizers = make_optimizers(bare, recipe.optimizer, config.weight_decay)
    else:
        if config.compile:
            wrapped.compile()  # in place: Accelerate's own way renames the weights
        optimizers = make_optimizers(bare, recipe.optimizer, config.weight_decay)
        model, *optimizers = accelerator.prepare(wrapped, *optimizers)
    return TrainingSetup(
        accelerator, model, optimizers, sampler, validation, parameters, limit, sparsity
    )


def _initial_model(config: TrainConfig, store: TokenStore) -> PreTrainedModel:
    """Return the model before the first step, its frozen parts excluded from training.

    Raises `InputError` for a part that the model lacks, and for a null control with longer sequences than its
    trained model has positions.
    """
    recipe = config.resolved()
    if config.null:
        trained = load(Run(config.run).stage("model", config.model).path)
        positions = trained.config.get_text_config().max_position_embeddings
        if recipe.sequence_length > positions:
            raise InputError(
                f"--sequence-length is {recipe.sequence_length}, longer than the {positions} positions of"
                f" {config.model}: lower --sequence-length"
            )
        return null_control(trained, config.null, config.seed)
    model = build(
        config.model,
        vocab_size=store.padded_vocab_size,
        max_position_embeddings=recipe.sequence_length,
        seed=config.seed,
        **{"eos_token_id": store.eot_id, **config.overrides()},
    )
    freeze(model, config.freeze)
    return model


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Make each block keep only its input [B, T, D] in training, and compute the rest again when it is needed."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23 renamed it
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _summary(config: TrainConfig, setup: TrainingSetup, label: str) -> str:
    """Return one line about the training that is about to start."""
    recipe = config.resolved()
    epochs = recipe.steps * recipe.batch_size / setup.sampler.n_sequences
    return (
        f"{label}: {setup.parameters:,} parameters, {recipe.steps:,} steps of"
        f" {recipe.batch_size} x {recipe.sequence_length:,} tokens ({epochs:.2f} epochs),"
        f" {recipe.optimizer} at {recipe.learning_rate:g}{_processes(setup)}"
    )


def _processes(setup: TrainingSetup) -> str:
    """Return in words over how many processes the training is spread; nothing for one."""
    n = setup.accelerator.num_processes
    return "" if n == 1 else f", {n} processes{', sharded' * is_sharded(setup.model)}"


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Return an accelerator on the available devices, or on those of `torchrun` or `accelerate launch`.

    Raises `InputError` for a sharding of Accelerate's own, which saves other checkpoints.
    """
    recipe = config.resolved()
    # Accelerate keeps one state for the whole process and rejects another precision later, but each
    # training run needs a fresh one. There is no public way: transformers' own trainer calls this, too.
    # Process groups stay.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        # Without `cpu`, Accelerate does not form a group of processes that have no GPU.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(
            "Accelerate's configuration asks for FSDP, but cratelm splits a model itself: launch with `torchrun`,"
            " or with `accelerate launch --multi_gpu`, and add --shard"
        )
    set_seed(config.seed, device_specific=True)  # for dropout, if the model has any
    return accelerator


def _figures(
    accelerator: Accelerator, loss: torch.Tensor, norm: torch.Tensor | float | None
) -> dict[str, float]:
    """Return the loss of the whole batch and the norm of its gradient."""
    mean = accelerator.reduce(loss, "mean")
    assert isinstance(mean, torch.Tensor)
    assert norm is not None
    return {"loss": float(mean), "gradient_norm": float(whole_number(norm))}


def _check_finite(figures: dict[str, float], step: int, config: TrainConfig, draft: Draft) -> None:
    diverged = next((name for name, value in figures.items() if not math.isfinite(value)), None)
    if diverged is None:
        return
    saved = checkpoints.found(draft.path)
    last_good = f" (the last good state is {saved[-1]})" if saved else ""
    recipe = config.resolved()
    bf16 = ", or use --precision fp32" if recipe.precision == "bf16" else ""
    raise DivergedError(
        f"the {diverged.replace('_', ' ')} is {figures[diverged]} at step {step}{last_good}: training"
        f" has diverged; lower --learning-rate (now {recipe.learning_rate:g}), raise --warmup (now"
        f" {recipe.warmup}){bf16}"
    )


def _results(config: TrainConfig, setup: TrainingSetup, folder: Path) -> dict:
    """Return figures for the completion record, from the curve, which survives an interruption."""
    recipe, metrics = config.resolved(), read_metrics(folder)
    return {
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.tokens_per_step,
        "parameters": setup.parameters,
        "loss": last(metrics, "loss"),
        "validation_loss": last(metrics, "validation_loss"),
        "validation_standard_error": last(metrics, "validation_standard_error"),
    }


def _read_result(stage: Stage) -> TrainResult:
    return stage.result(TrainResult, name=stage.name, path=stage.path)
