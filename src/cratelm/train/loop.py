"""The training loop, top to bottom.

Shape legend: B sequences a step over all ranks, b of one micro-batch, T tokens of a sequence.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, set_seed
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.models import build, count_parameters
from cratelm.runs import Draft, Run, Stage
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenizer import hf_tokenizer
from cratelm.train import checkpoints
from cratelm.train.config import TrainConfig
from cratelm.train.data import BatchSampler
from cratelm.train.log import UNHASHED, Log, draw, import_wandb, last, read_metrics
from cratelm.train.losses import NextTokenLoss, Validation
from cratelm.train.optimizers import learning_rate, make_optimizers, set_learning_rate


@dataclass(frozen=True)
class TrainResult:
    """A trained model: where it lies and how far it came."""

    name: str
    path: Path
    steps: int
    tokens: int
    """tokens seen, repeats counted"""
    parameters: int
    """trainable, position embedding left out"""
    loss: float | None
    """of the last step's batch, nats a token; None where no step was taken"""
    validation_loss: float
    """on the fixed held-out sequences, nats a token"""
    validation_standard_error: float
    """over those sequences"""


@dataclass(frozen=True, eq=False)
class Ready:
    """What the loop works with, each part ready for the devices at hand."""

    accelerator: Accelerator
    model: torch.nn.Module
    """`NextTokenLoss` of the model, as Accelerate wraps it"""
    optimizers: list[torch.optim.Optimizer]
    feed: BatchSampler
    validation: Validation
    parameters: int


def train(config: TrainConfig) -> TrainResult:
    """Trains a model on the train split of a run and saves it in `model/NAME`.

    Raises `InputError` for a configuration that cannot be run, and where loss or gradient stop being
    numbers (the checkpoints are kept).
    """
    run = Run(config.run)
    stage = run.stage("model", config.folder)
    inputs = {"tokens": run.stage("tokens").require("tokenize")}
    if stage.is_finished(config.settings(), inputs, force=config.force):
        return _read_result(stage)

    if config.wandb:
        import_wandb()  # a missing package is told before anything is written
    store = TokenStore(run.stage("tokens").path)
    ready = _prepare(config, store)
    if ready.accelerator.is_main_process and not config.quiet:
        print(_plan(config, ready, stage.label))
    with checkpoints.shared_draft(ready.accelerator, stage, config.settings(), inputs) as draft:
        _take_steps(ready, config, draft, stage.label)
        checkpoints.save_model(ready.accelerator, ready.model, draft.path)
        if ready.accelerator.is_main_process:
            hf_tokenizer(store.tokenizer).save_pretrained(draft.path)
            draw(draft.path, stage.label)
            draft.unhashed.update(UNHASHED)
            draft.results = _results(config, ready, draft.path)
    return _read_result(stage)


def _take_steps(ready: Ready, config: TrainConfig, draft: Draft, label: str) -> None:
    """All steps that are not taken yet, from the last checkpoint on."""
    numbers, feed, model = config.numbers(), ready.feed, ready.model
    accelerator, optimizers = ready.accelerator, ready.optimizers
    main = accelerator.is_main_process

    first = checkpoints.restore(accelerator, draft)
    log = Log(
        draft.path if main else None,
        first,
        tensorboard=config.tensorboard,
        wandb_name=label if config.wandb else None,
    )
    if first == 0:
        log.write(0, 0, **ready.validation.measure(model))
    model.train()
    log.time(first, first * numbers.tokens_per_step)
    steps = range(first, numbers.steps)
    bar = tqdm(
        steps, label, numbers.steps, initial=first, unit="step", disable=config.quiet or not main
    )
    for step in bar:
        rate = learning_rate(step, numbers, config.minimum_ratio)
        set_learning_rate(optimizers, rate)
        loss, norm = torch.zeros((), device=accelerator.device), torch.zeros(())
        for tokens, targets in feed.micro_batches(step, accelerator.device):  # [b, T] each
            with accelerator.accumulate(model):
                part = model(tokens, targets)
                accelerator.backward(part)
                loss += part.detach() / feed.n_micro
                if accelerator.sync_gradients:
                    limit = config.clip or math.inf
                    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

        done, seen = step + 1, (step + 1) * numbers.tokens_per_step
        logs, validates, keeps = (
            done % every == 0 or done == numbers.steps
            for every in (numbers.log_every, numbers.validate_every, numbers.checkpoint_every)
        )
        if logs or keeps:  # checked before a checkpoint, too: none holds weights gone bad
            figures = _figures(accelerator, loss, norm)
            _check_finite(figures, done, config, draft)
            bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
            if logs:
                log.write(done, seen, **figures, learning_rate=rate)
                log.time(done, seen)
        if validates:
            log.write(done, seen, **ready.validation.measure(model))
        if keeps:
            checkpoints.save(accelerator, draft, done)
    log.close()


def _prepare(config: TrainConfig, store: TokenStore) -> Ready:
    """Devices, model, optimizers and data, in this order."""
    numbers = config.numbers()
    accelerator = _accelerator(config)
    feed = BatchSampler(
        store.split("train"),
        batch_size=numbers.batch_size,
        micro_batch_size=numbers.micro_batch_size,
        sequence_length=numbers.sequence_length,
        seed=config.seed,
        rank=accelerator.process_index,
        n_ranks=accelerator.num_processes,
    )
    accelerator.gradient_accumulation_steps = feed.n_micro
    validation = Validation(store.split("held_out"), numbers, accelerator)
    bare = build(
        config.model,
        vocab_size=store.padded_vocab_size,
        max_position_embeddings=numbers.sequence_length,
        seed=config.seed,
        **{"eos_token_id": store.eot_id, **config.overrides()},
    )
    parameters = count_parameters(bare)
    optimizers = make_optimizers(bare, numbers.optimizer, config.weight_decay)
    wrapped = NextTokenLoss(bare)
    if config.compile:
        wrapped.compile()  # in place: Accelerate's own way renames the weights
    model, *optimizers = accelerator.prepare(wrapped, *optimizers)
    return Ready(accelerator, model, optimizers, feed, validation, parameters)


def _plan(config: TrainConfig, ready: Ready, label: str) -> str:
    """One line on what is about to be done."""
    numbers = config.numbers()
    epochs = numbers.steps * numbers.batch_size / ready.feed.n_sequences
    return (
        f"{label}: {ready.parameters:,} parameters, {numbers.steps:,} steps of"
        f" {numbers.batch_size} x {numbers.sequence_length:,} tokens ({epochs:.2f} epochs),"
        f" {numbers.optimizer} at {numbers.learning_rate:g}"
    )


def _accelerator(config: TrainConfig) -> Accelerator:
    """Devices as found, or as `torchrun` and `accelerate launch` say.

    Accelerate keeps one state for the whole process and refuses another precision later; each
    training is a world of its own, so that state is cleared first (process groups stay).
    """
    numbers = config.numbers()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        # Without being told, Accelerate does not form a group of processes that have no GPU.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision="bf16" if numbers.precision == "bf16" else "no",
    )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and numbers.optimizer == "muon":
        raise InputError(
            "--optimizer muon needs whole matrices, FSDP splits them:"
            " take --optimizer adamw, or launch without FSDP"
        )
    set_seed(config.seed, device_specific=True)  # dropout, where a model has it
    return accelerator


def _figures(
    accelerator: Accelerator, loss: torch.Tensor, norm: torch.Tensor | float | None
) -> dict[str, float]:
    """Loss of the whole batch and norm of its gradient."""
    mean = accelerator.reduce(loss, "mean")
    assert isinstance(mean, torch.Tensor)
    assert norm is not None
    return {"loss": float(mean), "gradient_norm": float(norm)}


def _check_finite(figures: dict[str, float], step: int, config: TrainConfig, draft: Draft) -> None:
    bad = next((name for name, value in figures.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    kept = checkpoints.found(draft)
    where = f" (the last good state is {kept[-1]})" if kept else ""
    numbers = config.numbers()
    bf16 = ", or --precision fp32" if numbers.precision == "bf16" else ""
    raise InputError(
        f"{bad.replace('_', ' ')} is {figures[bad]} at step {step}{where}: training has diverged,"
        f" lower --learning-rate (now {numbers.learning_rate:g}), raise --warmup (now"
        f" {numbers.warmup}){bf16}"
    )


def _results(config: TrainConfig, ready: Ready, folder: Path) -> dict:
    """Figures for the completion record, out of the curve, which outlives a kill."""
    numbers, metrics = config.numbers(), read_metrics(folder)
    return {
        "steps": numbers.steps,
        "tokens": numbers.steps * numbers.tokens_per_step,
        "parameters": ready.parameters,
        "loss": last(metrics, "loss"),
        "validation_loss": last(metrics, "validation_loss"),
        "validation_standard_error": last(metrics, "validation_standard_error"),
    }


def _read_result(stage: Stage) -> TrainResult:
    return TrainResult(stage.name, stage.path, **stage.require("train").results)
