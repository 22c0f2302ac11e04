"""`cratelm sae compare`: compare the latents of autoencoders with the neurons of the models they are trained on.

Every option that affects a score is copied from the completion records of the neurons' stages.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest, harvest_name
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.models.sae_lens import import_sae_lens
from cratelm.pipelines.chains import Step
from cratelm.pipelines.config import SaeCompareConfig
from cratelm.report.config import ReportConfig
from cratelm.report.report import ReportResult, comparison_table, report
from cratelm.results.stages import MODEL_STAGES
from cratelm.runs import Completion, Run
from cratelm.runs.names import autoencoder_name, latents_name, set_name, split_latents, split_set
from cratelm.sae.evaluate import is_evaluated, sae_evaluate
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.train import sae_train
from cratelm.sae.train_config import Freeze
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score

_Config = TypeVar("_Config", HarvestConfig, ExplainConfig, ScoreConfig, ReportConfig)


@dataclass(frozen=True)
class SaeCompareResult:
    """Result of `cratelm sae compare`."""

    report: Path
    """page of the report; its section `autoencoders` contains the comparison"""
    models: tuple[str, ...]
    """names in the run of the neurons and latents that were compared"""
    table: str
    """comparison as text"""
    seconds: float
    """duration of the command"""

    def __str__(self) -> str:
        return (
            f"{self.table}\n\nreport: {self.report}#autoencoders  ({self.seconds / 60:.1f} minutes)"
        )


def sae_compare(config: SaeCompareConfig) -> SaeCompareResult:
    """Run the missing stages, rewrite the report, and return it.

    Raises `InputError` for a model that is not scored, and the same `InputError` as the commands of the stages.
    """
    started = time.monotonic()
    import_sae_lens()
    run = Run(config.run)
    models = scored_models(run, config.models)
    pending = steps(config, models)
    for number, step in enumerate(pending, 1):
        print(f"[{number}/{len(pending) + 1}] {step.label}", flush=True)
        step.work()
    print(f"[{len(pending) + 1}/{len(pending) + 1}] report", flush=True)
    written = _report(run)
    names = [name for m in models for name in (m, *_latents(config, m).values())]
    seconds = round(time.monotonic() - started, 1)
    return SaeCompareResult(written.page, tuple(names), comparison_table(written), seconds)


def scored_models(run: Run, named: Sequence[str]) -> list[str]:
    """Return the models to compare: `named`, or all models whose neurons are scored without a language model.

    Raises `InputError` if there are none, or if latents cannot be treated in the same way as the neurons.
    """
    if named:
        for name in named:
            run.stage("scores", name).require("score")
        models = list(named)
    else:
        without_llm = [n for n in run.models("scores") if not split_set(n)[1]]
        trained = [n for n in without_llm if n not in run.null_controls(without_llm)]
        models = [n for n in trained if not _config_of(run, "activations", n).get("sae")]
    if not models:
        raise InputError(
            f"no neurons of {run.path} are scored without a language model: type"
            f" `cratelm score --run {run.path} --model NAME` first (before it, harvest and explain)"
        )
    for name in models:
        _check_comparable(run, name)
    return models


def steps(config: SaeCompareConfig, models: Sequence[str]) -> list[Step]:
    """Return the stages to run, in order. Each reads its options from the run when it is executed.

    Raises `InputError` if one folder of autoencoders is to be used for several models.
    """
    if config.sae and "/" in config.sae and len(models) > 1:
        raise InputError(
            f"--sae {config.sae} is a folder of autoencoders for one model, but the models are"
            f" {', '.join(models)}: name one model with --models"
        )
    return [step for model in models for step in _steps_of(config, model)]


def _steps_of(config: SaeCompareConfig, model: str) -> Iterator[Step]:
    for freeze, latents in _latents(config, model).items():
        yield from _steps_of_latents(config, model, freeze, latents)


def _steps_of_latents(
    config: SaeCompareConfig, model: str, freeze: Freeze | None, latents: str
) -> Iterator[Step]:
    run, sae = Run(config.run), config.sae or split_latents(latents)[1]
    if not config.sae:
        label = set_name(model, sae) if freeze else model
        yield Step("sae", label, lambda: sae_train(_training(config, run, model, freeze, sae)))
    yield Step("evaluation", latents, lambda: _evaluate(config, run, model, sae))
    yield Step("activations", latents, lambda: harvest(_harvesting(config, run, model, sae)))
    yield Step("explanations", latents, lambda: explain(_explaining(config, run, model, latents)))
    yield Step("scores", latents, lambda: score(_scoring(config, run, model, latents)))


def _latents(config: SaeCompareConfig, model: str) -> dict[Freeze | None, str]:
    """Return the names of a model's latents in the run: the trained ones (None), then each random control."""
    if config.sae:
        return {None: latents_name(model, autoencoder_name(config.sae))}
    frozen: tuple[Freeze | None, ...] = (None, *config.freeze)
    return {
        freeze: latents_name(model, split_set(config.training(model, freeze).folder)[1])
        for freeze in frozen
    }


def _training(
    config: SaeCompareConfig, run: Run, model: str, freeze: Freeze | None, name: str
) -> Any:
    """Return options that train on the harvested neurons, at the sequence length of their harvest."""
    harvested = _config_of(run, "activations", model)
    return replace(
        config.training(harvested["model"], freeze),
        site=harvested.get("site"),
        sequence_length=harvested.get("sequence_length"),
        name=name,
    )


def _evaluate(config: SaeCompareConfig, run: Run, model: str, sae: str) -> None:
    harvested = _config_of(run, "activations", model)
    evaluating = SaeEvaluateConfig(
        run=run.path,
        model=harvested["model"],
        sae=sae,
        tokens=config.evaluate_tokens,
        sequence_length=harvested.get("sequence_length"),
        seed=config.seed,
        device=config.device,
        quiet=config.quiet,
    )
    if config.force or not is_evaluated(evaluating):
        sae_evaluate(evaluating)


def _harvesting(config: SaeCompareConfig, run: Run, model: str, sae: str) -> HarvestConfig:
    neurons = _config_of(run, "activations", model)
    config_of_latents = _read(HarvestConfig, {**neurons, "site": None, "name": None, "sae": sae})
    return replace(
        config_of_latents,
        run=run.path,
        device=config.device,
        force=config.force,
        quiet=config.quiet,
    )


def _explaining(config: SaeCompareConfig, run: Run, model: str, latents: str) -> ExplainConfig:
    neurons = _config_of(run, "explanations", model)
    explained = neurons["neurons"] or max(
        run.stage("activations", model).require("harvest").results["neurons"]
    )
    config_of_latents = _read(ExplainConfig, {**neurons, "model": latents, "neurons": explained})
    return replace(
        config_of_latents,
        run=run.path,
        device=config.device,
        force=config.force,
        quiet=config.quiet,
    )


def _scoring(config: SaeCompareConfig, run: Run, model: str, latents: str) -> ScoreConfig:
    recorded = _config_of(run, "scores", model)
    config_of_latents = _read(ScoreConfig, {**recorded, "model": latents})
    return replace(
        config_of_latents,
        run=run.path,
        device=config.device,
        force=config.force,
        quiet=config.quiet,
    )


def _report(run: Run) -> ReportResult:
    """Write the report of all models that the run has now, with the options of the last report."""
    done = run.stage("report").completion()
    options = {} if done is None else {**done.config, "models": ()}
    return report(replace(_read(ReportConfig, options), run=run.path, force=True))


def _check_comparable(run: Run, model: str) -> None:
    """Raise `InputError` if latents cannot be treated in the same way as these neurons."""
    harvested = _config_of(run, "activations", model)
    if "model" not in harvested:
        raise InputError(
            f"{model} was imported without a model that could be run: name a model that was harvested"
        )
    if harvested.get("sae"):
        raise InputError(
            f"{model} already consists of latents: name {Path(harvested['model']).name}"
        )
    if harvest_name(_read(HarvestConfig, {**harvested, "name": None})) != model:
        raise InputError(
            f"{model} is the --name of a harvest of {harvested['model']}: latents are named after their model,"
            " so harvest it without --name first"
        )
    if _config_of(run, "explanations", model).get("only"):
        raise InputError(
            f"{model} was explained with --only, which selects neurons but cannot select latents: type"
            f" `cratelm explain --run {run.path} --model {model} --neurons N --force`, then score"
        )


def _config_of(run: Run, stage: Any, model: str) -> dict[str, Any]:
    done: Completion = run.stage(stage, model).require(MODEL_STAGES[stage])
    return done.config


def _read(kind: type[_Config], recorded: dict[str, Any]) -> _Config:
    """Return a configuration of class `kind` from its record, ignoring unknown keys."""
    names = {f.name for f in fields(kind)}
    plain: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items() if k in names
    }
    return kind(**plain)
