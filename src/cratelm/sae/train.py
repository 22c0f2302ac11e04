"""`cratelm sae train`: train sparse autoencoders on the activations of a model.

SAELens' trainers take the steps; the activations, the loop, the log and the checkpoints are cratelm's.
Writes the folder `sae/MODEL@NAME/` of the run; `cratelm.sae.store` documents its files and reads them.

Shape legend: B tokens of a batch, H inputs, S latents.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.models.begin import announce, choose_beginning
from cratelm.models.open import LoadedModel, find_model, sequence_length
from cratelm.models.sites import Site, site_of
from cratelm.runs import Draft, Run, Stage, identity_of, write_json
from cratelm.sae import checkpoints
from cratelm.sae.activations import ActivationBuffer
from cratelm.sae.architectures import (
    build_sae,
    check_training_memory,
    freeze_matrix,
    import_sae_lens,
    keep_rows_at_norm_one,
    keep_rows_near_start,
    n_latents,
    resample,
    resampling_steps,
    revived_by,
)
from cratelm.sae.store import SaeLayerTraining, SaeTraining, read_training, write_training
from cratelm.sae.train_config import SaeTrainConfig
from cratelm.tokens.beginning import Beginning
from cratelm.tokens.shards import TokenStore, check_vocabulary
from cratelm.train.log import METRICS, TIMING, Log, read_metrics
from cratelm.train.resume import without_worthless_draft


@dataclass(frozen=True, kw_only=True)
class SaeTrainResult(SaeTraining):
    """Result of `cratelm sae train`; `cratelm sae evaluate` measures the autoencoders."""

    name: str
    """MODEL@NAME"""
    path: Path
    """folder of the autoencoders"""

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.site}, {self.tokens:,} tokens: {self.path}"]
        lines += [
            f"layer {r.layer}: {r.inputs:,} inputs, {r.latents:,} latents; last batch: explained"
            f" variance {r.explained_variance:.1%}, {r.l0:.1f} active per token, {r.dead:,} dead"
            for r in self.layers
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Training:
    """State and settings of the training loop."""

    config: SaeTrainConfig
    site: Site
    layers: tuple[int, ...]
    activations: ActivationBuffer
    trainers: list[Any]
    """SAELens' trainer of each layer"""
    resampled: list[int]
    """number of latents reinitialised so far, by layer"""
    draft: Draft


def sae_train(config: SaeTrainConfig) -> SaeTrainResult:
    """Train the autoencoders of a site, save them in `sae/MODEL@NAME` of the run, and return their description.

    Raises `InputError` if the model, the site or a layer does not exist, or if activations or the loss are no
    longer finite numbers (checkpoints are kept).
    """
    import_sae_lens()  # before anything is written
    run = Run(config.run)
    tokens = run.stage("tokens").require("tokenize")
    source = find_model(run, config.model, config).pinned()
    stage = run.stage("sae", config.folder)
    inputs = {"tokens": tokens, "model": source.record or source.identity}
    settings = config.settings()
    if stage.is_finished(settings, inputs, force=config.force):
        return _result(stage)
    loaded = source.load(config.device, config.dtype)
    model = loaded.model
    chosen = choose_beginning(loaded, run, config.begin_token, config.skip_first)
    announce(chosen, loaded)
    store = TokenStore(run.stage("tokens").path)
    check_vocabulary(store, model.config.get_text_config().vocab_size)
    site = site_of(model, config.site, config.layers)
    layers = _layers(config, site)
    check_training_memory(config, list(site.n_neurons), model.device)
    # created before the draft, so that invalid input is rejected before anything is written
    activations = _activations(config, loaded, store, site, chosen.beginning)
    with without_worthless_draft(stage), stage.write(settings, inputs, resume=True) as draft:
        draft.scratch.add(checkpoints.FOLDER)
        draft.unhashed.add(TIMING)
        training = _prepare(config, site, layers, activations, draft)
        _take_steps(training, stage.label)
        _write(training, {role: identity_of(value) for role, value in inputs.items()})
    return _result(stage)


def _layers(config: SaeTrainConfig, site: Site) -> tuple[int, ...]:
    """Return the numbers of the layers to train on, ascending. Raises `InputError` for too many latents."""
    for width in site.n_neurons:
        n_latents(config, width)
    return site.layer_numbers


def _activations(
    config: SaeTrainConfig,
    loaded: LoadedModel,
    store: TokenStore,
    site: Site,
    beginning: Beginning,
) -> ActivationBuffer:
    length = sequence_length(loaded, config.sequence_length)
    return ActivationBuffer(
        loaded.model,
        site,
        tuple(range(site.n_layers)),
        store.split("train"),
        store.eot_id,
        sequence_length=length,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        buffer_bytes=config.buffer_mib * 2**20,
        most_rows=config.steps * config.batch_size,
        seed=config.seed,
        beginning=beginning,
    )


def _prepare(
    config: SaeTrainConfig,
    site: Site,
    layers: tuple[int, ...],
    activations: ActivationBuffer,
    draft: Draft,
) -> _Training:
    """Return activations and trainers as of the last checkpoint, or ready for the first step."""
    if not config.quiet:
        print(_plan(config, site, activations), flush=True)
    saes = [
        build_sae(config, width, layer, activations.device)
        for layer, width in zip(layers, site.n_neurons, strict=True)
    ]
    trainers = [make_trainer(config, sae) for sae in saes]
    resampled = [0] * len(layers)
    restored = checkpoints.restore(draft, trainers)
    if restored is None:
        _start_from_data(config, activations, trainers)
    else:
        position, resampled = restored
        activations.seek(position)
    return _Training(config, site, layers, activations, trainers, resampled, draft)


def _plan(config: SaeTrainConfig, site: Site, activations: ActivationBuffer) -> str:
    """Return the line that is printed before the first step."""
    sizes = ", ".join(f"{width} -> {n_latents(config, width)}" for width in site.n_neurons)
    return (
        f"{config.folder}: {config.architecture} on {site.name}, inputs -> latents {sizes};"
        f" {config.steps:,} steps of {config.batch_size:,} tokens, buffer"
        f" {activations.n_bytes / 2**20:,.0f} MiB"
    )


def make_trainer(config: SaeTrainConfig, sae: Any) -> Any:
    """Return SAELens' trainer for an autoencoder with its initial weights, of which only the steps are used.

    Its loop, logging and checkpoints are not used: they would log to wandb and resume from other states.
    """
    lens = import_sae_lens()
    freeze_matrix(config, sae)
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings = SAETrainerConfig(
        total_training_samples=config.steps * config.batch_size,
        train_batch_size_samples=config.batch_size,
        lr=config.lr,
        lr_end=config.lr,
        lr_decay_steps=int(config.lr_decay * config.steps),
        device=str(sae.device),
        autocast=config.precision == "bf16",
        dead_feature_window=config.dead_steps,
        logger=lens.LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, sae, iter(()))
    if config.architecture == "l1" and config.freeze != "decoder":
        keep_rows_at_norm_one(sae, trainer.optimizer)
    if config.freeze == "soft-decoder":  # after the norm, which it preserves
        keep_rows_near_start(sae, trainer.optimizer)
    return trainer


def _start_from_data(
    config: SaeTrainConfig, activations: ActivationBuffer, trainers: list[Any]
) -> None:
    """Set the scale and `b_dec` from the first buffer; `b_dec` is its mean (Bricken et al. use the median)."""
    means, norms = activations.means(), activations.mean_norms()
    for trainer, mean, norm in zip(trainers, means, norms, strict=True):
        if config.normalize:  # to a mean norm of sqrt(H)
            trainer.activation_scaler.scaling_factor = math.sqrt(len(mean)) / max(norm, 1e-12)
        with torch.no_grad():
            trainer.sae.b_dec.copy_(trainer.activation_scaler(mean))


def _take_steps(training: _Training, label: str) -> None:
    """Take the remaining steps, with logs, checkpoints and resampling."""
    config, trainers = training.config, training.trainers
    first = trainers[0].n_training_steps
    log = Log(training.draft.path, first, tensorboard=False, wandb_name=None)
    log.time(first, first * config.batch_size)
    resampled_after, saved_at = resampling_steps(config), time.monotonic()
    bar = tqdm(total=config.steps, initial=first, desc=label, unit="step", disable=config.quiet)
    for step in range(first, config.steps):
        done = step + 1
        batch = training.activations.batch()  # [B, H] of each layer
        outputs = [trainer.step(x) for trainer, x in zip(trainers, batch, strict=True)]
        for trainer in trainers:
            trainer.n_training_steps = done
        logs = done % config.log_steps == 0 or done == config.steps
        due = time.monotonic() >= saved_at + 60 * config.checkpoint_minutes
        saves = due and done < config.steps
        if (
            logs or saves
        ):  # also checked before a checkpoint, so that none contains diverged weights
            figures = [_figures(t, o) for t, o in zip(trainers, outputs, strict=True)]
            _check(figures, training, done)
            if logs:
                _log(log, training, done, figures)
                bar.set_postfix(explained=f"{figures[-1]['explained_variance']:.3f}", refresh=False)
        if done in resampled_after:
            _resample(training, batch, done)
        if saves:
            saved_at = time.monotonic()
            position = training.activations.position
            checkpoints.save(training.draft, done, trainers, position, training.resampled)
        bar.update()
    bar.close()
    log.close()


def _figures(trainer: Any, output: Any) -> dict[str, float]:
    """Return SAELens' figures of one step under plain names."""
    logged = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    losses = {k.removeprefix("losses/"): v for k, v in logged.items() if k.startswith("losses/")}
    losses["loss"] = losses.pop("overall_loss")
    return {
        "explained_variance": logged["metrics/explained_variance"],
        "l0": logged["metrics/l0"],
        "dead": logged["sparsity/dead_features"],
        "learning_rate": logged["details/current_learning_rate"],
        **losses,
    }


def _check(figures: list[dict[str, float]], training: _Training, step: int) -> None:
    """Raise `InputError` if a loss is not a finite number."""
    for layer, of_layer in zip(training.layers, figures, strict=True):
        if not math.isfinite(of_layer["loss"]):
            raise InputError(
                f"the loss of layer {layer} is {of_layer['loss']} at step {step}: training has diverged,"
                f" lower --lr (now {training.config.lr:g}); checkpoints so far are kept"
            )


def _log(log: Log, training: _Training, step: int, figures: list[dict[str, float]]) -> None:
    tokens = step * training.config.batch_size
    rows = zip(training.layers, figures, training.resampled, strict=True)
    for layer, of_layer, resampled in rows:
        log.write(step, tokens, layer=layer, resampled=resampled, **of_layer)
    log.time(step, tokens)


def _resample(training: _Training, batch: list[torch.Tensor], step: int) -> None:
    """Reinitialise the dead latents of each layer from a batch [B, H], with draws seeded by the step."""
    for index, (layer, x) in enumerate(zip(training.layers, batch, strict=True)):
        seed = np.random.SeedSequence((training.config.seed, layer, step)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        training.resampled[index] += resample(training.trainers[index], x, generator)


def _write(training: _Training, inputs: dict[str, str]) -> None:
    """Write the autoencoders in SAELens' format, and the description of the training, into the draft."""
    config, site, draft = training.config, training.site, training.draft
    last = {line["layer"]: line for line in read_metrics(draft.path, METRICS)}
    layers = []
    for layer, trainer in zip(training.layers, training.trainers, strict=True):
        sae = _fold_scales(config, trainer)
        for key, value in _provenance(config, site, layer, inputs).items():
            sae.cfg.metadata[key] = value
        if training.activations.beginning.token is not None:
            sae.cfg.metadata["prepend_bos"] = True
        _, settings = sae.save_inference_model(draft.path / f"layer-{layer}")
        # SAELens writes the keys in the order of a set, which differs between processes
        write_json(settings, json.loads(settings.read_text(encoding="utf-8")))
        line = {k: last[layer][k] for k in ("explained_variance", "l0", "dead", "resampled")}
        layers.append(
            SaeLayerTraining(layer=layer, inputs=sae.cfg.d_in, latents=sae.cfg.d_sae, **line)
        )
    description = SaeTraining(
        model=Path(config.model).name,
        site=site.name,
        architecture=config.architecture,
        tokens=config.steps * config.batch_size,
        revived_by=revived_by(config),
        layers=tuple(layers),
    )
    draft.results = write_training(draft.path, description, inputs)
    begin = training.activations.beginning
    draft.results.update(begin_token=begin.token, skip_first=begin.skip)


@torch.no_grad()
def _fold_scales(config: SaeTrainConfig, trainer: Any) -> Any:
    """Return the trained autoencoder with the inputs' scale folded into its weights and decoder rows at norm 1.

    It computes the same function of unscaled activations.
    """
    sae = trainer.sae.eval()
    if trainer.activation_scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    if config.architecture not in ("topk", "batchtopk"):  # SAELens folds these when it saves them
        sae.fold_W_dec_norm()
    return sae


def _provenance(
    config: SaeTrainConfig, site: Site, layer: int, inputs: dict[str, str]
) -> dict[str, Any]:
    """Return metadata for which SAELens' configuration has no field, with the keys of `cratelm import sae`."""
    side = "" if site.side == "output" else f":{site.side}"
    return {
        "model_name": Path(config.model).name,
        "site": site.name,
        "layer": layer,
        "hook_name": f"{site.paths[site.place(layer)]}{side}",
        "provenance": {
            "source": "cratelm sae train",
            "model_identity": inputs["model"],
            "tokens_identity": inputs["tokens"],
            "architecture": config.architecture,
            "tokens": config.steps * config.batch_size,
        },
    }


def _result(stage: Stage) -> SaeTrainResult:
    return SaeTrainResult(name=stage.name, path=stage.path, **vars(read_training(stage.path)))
