"""`cratelm sae compare`: what autoencoders make of models, beside the models' own neurons.

Everything that decides about a score is copied from what was done with the neurons.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import harvest, harvest_name
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.pipelines.sae_compare_config import SaeCompareConfig
from cratelm.report.config import ReportConfig
from cratelm.report.report import ReportResult, comparison_table, report
from cratelm.results.stages import MODEL_STAGES
from cratelm.runs import Completion, Run
from cratelm.sae.architectures import import_sae_lens
from cratelm.sae.evaluate import is_evaluated, sae_evaluate
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.train import sae_train
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score

_Config = TypeVar("_Config", HarvestConfig, ExplainConfig, ScoreConfig, ReportConfig)


@dataclass(frozen=True)
class SaeCompareResult:
    """Where the comparison is."""

    report: Path
    """the page; its section `autoencoders`"""
    models: tuple[str, ...]
    """neurons and latents compared, by their names in the run"""
    table: str
    """the comparison, as text"""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.table}\n\nreport: {self.report}#autoencoders  ({self.seconds / 60:.1f} minutes)"
        )


@dataclass(frozen=True)
class Step:
    """A part of the comparison."""

    label: str
    work: Callable[[], Any]


def sae_compare(config: SaeCompareConfig) -> SaeCompareResult:
    """Does what is missing of the comparison, and writes the report of the run again.

    Raises `InputError` for a model that is not scored, and as the verbs do that it calls.
    """
    started = time.monotonic()
    import_sae_lens()
    run = Run(config.run)
    models = scored_models(run, config.models)
    work = steps(config, models)
    for number, step in enumerate(work, 1):
        print(f"[{number}/{len(work) + 1}] {step.label}", flush=True)
        step.work()
    print(f"[{len(work) + 1}/{len(work) + 1}] report", flush=True)
    made = _report(run)
    names = [name for m in models for name in (m, f"{m}+{_name(config, m)}")]
    seconds = round(time.monotonic() - started, 1)
    return SaeCompareResult(made.page, tuple(names), comparison_table(made), seconds)


def scored_models(run: Run, asked: Sequence[str]) -> list[str]:
    """Models whose neurons are scored without a language model. Raises `InputError` where there are none."""
    if asked:
        for name in asked:
            run.stage("scores", name).require("score")
        found = list(asked)
    else:
        scored = (n for n in run.models("scores") if "@" not in n and not n.endswith("-init"))
        found = [n for n in scored if not _config_of(run, "activations", n).get("sae")]
    if not found:
        raise InputError(
            f"no neurons of {run.path} are scored without a language model: type"
            f" `cratelm score --run {run.path} --model NAME` first (before it, harvest and explain)"
        )
    for name in found:
        _check_comparable(run, name)
    return found


def steps(config: SaeCompareConfig, models: Sequence[str]) -> list[Step]:
    """What is to be done, in order; configurations are read off the run when a step runs."""
    if config.sae and "/" in config.sae and len(models) > 1:
        raise InputError(
            f"--sae {config.sae} is a folder, for one model, and --models are {', '.join(models)}:"
            " name one model"
        )
    return [step for model in models for step in _steps_of(config, model)]


def _steps_of(config: SaeCompareConfig, model: str) -> Iterator[Step]:
    run, latents = Run(config.run), f"{model}+{_name(config, model)}"
    if not config.sae:
        yield Step(f"sae {model}", lambda: sae_train(_training(config, run, model)))
    yield Step(f"evaluation {latents}", lambda: _evaluate(config, run, model))
    yield Step(f"activations {latents}", lambda: harvest(_harvesting(config, run, model)))
    yield Step(f"explanations {latents}", lambda: explain(_explaining(config, run, model, latents)))
    yield Step(f"scores {latents}", lambda: score(_scoring(config, run, model, latents)))


def _name(config: SaeCompareConfig, model: str) -> str:
    """Of the autoencoders, in the names of stages."""
    if config.sae:
        return Path(config.sae).name
    return config.training(model).folder.partition("@")[2]


def _training(config: SaeCompareConfig, run: Run, model: str) -> Any:
    """On the neurons that were harvested, at the sequence length that they were harvested with."""
    harvested = _config_of(run, "activations", model)
    return replace(
        config.training(harvested["model"]),
        site=harvested.get("site"),
        sequence_length=harvested.get("sequence_length"),
        name=_name(config, model),
    )


def _evaluate(config: SaeCompareConfig, run: Run, model: str) -> None:
    harvested = _config_of(run, "activations", model)
    asked = SaeEvaluateConfig(
        run=run.path,
        model=harvested["model"],
        sae=config.sae or _name(config, model),
        tokens=config.evaluate_tokens,
        sequence_length=harvested.get("sequence_length"),
        seed=config.seed,
        device=config.device,
        quiet=config.quiet,
    )
    if config.force or not is_evaluated(asked):
        sae_evaluate(asked)


def _harvesting(config: SaeCompareConfig, run: Run, model: str) -> HarvestConfig:
    told = _config_of(run, "activations", model)
    sae = config.sae or _name(config, model)
    alike = _read(HarvestConfig, {**told, "site": None, "name": None, "sae": sae})
    return replace(alike, run=run.path, device=config.device, force=config.force)


def _explaining(config: SaeCompareConfig, run: Run, model: str, latents: str) -> ExplainConfig:
    told = _config_of(run, "explanations", model)
    explained = told["neurons"] or max(
        run.stage("activations", model).require("harvest").results["neurons"]
    )
    alike = _read(ExplainConfig, {**told, "model": latents, "neurons": explained})
    return replace(alike, run=run.path, device=config.device, force=config.force)


def _scoring(config: SaeCompareConfig, run: Run, model: str, latents: str) -> ScoreConfig:
    alike = _read(ScoreConfig, {**_config_of(run, "scores", model), "model": latents})
    return replace(alike, run=run.path, device=config.device, force=config.force)


def _report(run: Run) -> ReportResult:
    """As it was asked for last, of what there is now."""
    done = run.stage("report").completion()
    told = {} if done is None else {**done.config, "models": ()}
    return report(replace(_read(ReportConfig, told), run=run.path, force=True))


def _check_comparable(run: Run, model: str) -> None:
    """Raises `InputError` where latents cannot be done as these neurons were."""
    harvested = _config_of(run, "activations", model)
    if "model" not in harvested:
        raise InputError(
            f"{model} was imported, without a model that could be run: name one that was harvested"
        )
    if harvested.get("sae"):
        raise InputError(f"{model} are latents already: name {Path(harvested['model']).name}")
    if harvest_name(_read(HarvestConfig, {**harvested, "name": None})) != model:
        raise InputError(
            f"{model} is a name given by --name to a harvest of {harvested['model']}: latents are named"
            " after their model, harvest it under its own name"
        )
    if _config_of(run, "explanations", model).get("only"):
        raise InputError(
            f"{model} was explained with --only, which names neurons and no latents: type"
            f" `cratelm explain --run {run.path} --model {model} --neurons N --force`, then score"
        )


def _config_of(run: Run, stage: Any, model: str) -> dict[str, Any]:
    done: Completion = run.stage(stage, model).require(MODEL_STAGES[stage])
    return done.config


def _read(kind: type[_Config], told: dict[str, Any]) -> _Config:
    """A configuration from a record of it."""
    known = {f.name for f in fields(kind)}
    plain: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k in known
    }
    return kind(**plain)
