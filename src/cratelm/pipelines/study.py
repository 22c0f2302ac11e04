"""`cratelm study`: train, measure and compare a grid of models, as recipes say."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from cratelm.activations.harvest import harvest
from cratelm.analysis.analyze import analyze
from cratelm.analysis.seeds import seeds
from cratelm.analysis.seeds_config import SeedsConfig
from cratelm.corpus.sources import open_corpus
from cratelm.errors import InputError
from cratelm.explain.explain import explain
from cratelm.pipelines.chains import Step, run_models
from cratelm.pipelines.demo import n_jobs
from cratelm.pipelines.study_config import StudyConfig
from cratelm.pipelines.study_cost import cost_table, costs, flops_of, measured_rate
from cratelm.pipelines.study_recipe import (
    FOLDERS,
    Cell,
    Recipe,
    configs_of,
    read_recipes,
    tokenize_config,
    train_config,
    tune_config,
)
from cratelm.replace.replace import replace as replace_codes
from cratelm.report.study.page import PAGE, study_page
from cratelm.results.study import StudyModel, study_inputs
from cratelm.runs import Run
from cratelm.score.score import score
from cratelm.tokens.tokenize import tokenize
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train
from cratelm.train.tune import tune
from cratelm.train.tuned import read_tuning

_WORK: dict[str, Any] = {
    "train": train,
    "harvest": harvest,
    "explain": explain,
    "score": score,
    "replace": replace_codes,
    "analyze": analyze,
}


@dataclass(frozen=True)
class StudyResult:
    """Result of `cratelm study`: the page, or what it would cost."""

    page: Path | None
    """Markdown, with its figures beside it; None for a dry run"""
    text: str
    """the claims and their verdicts, or the plan, as text"""
    missing: tuple[str, ...]
    """models of the recipes that are not finished, by name; they are not on the page"""
    seconds: float
    """duration of the command"""

    def __str__(self) -> str:
        lines = [self.text, ""]
        if self.page is not None:
            lines += [f"page  {self.page}"]
        if self.missing:
            lines += [
                f"{len(self.missing)} models are not finished as the recipe says: {', '.join(self.missing[:6])}"
                f"{' ...' if len(self.missing) > 6 else ''}; the command without --only makes them"
            ]
        return "\n".join([*lines, f"{self.seconds / 60:.1f} minutes"])


def study(config: StudyConfig) -> StudyResult:
    """Make all models of the recipes, and return the page that compares them. Finished stages are skipped.

    Raises `InputError` for recipes that cannot be read, before anything is made, and the errors of the stages.
    """
    started = time.monotonic()
    recipe = read_recipes(config.recipes).with_corpus(config.corpus)
    unknown = sorted(set(config.only) - {cell.name for cell in recipe.cells})
    if unknown:
        raise InputError(
            f"--only has {unknown[0]}, which is not a model of the recipe: they are"
            f" {', '.join(cell.name for cell in recipe.cells)}"
        )
    flops, run = flops_of(recipe), Run(config.run)
    if config.dry_run:
        return StudyResult(None, _plan(config, recipe, run, flops), (), _since(started))
    if config.force or run.stage("tokens").completion() is None:
        open_corpus(
            tokenize_config(recipe, config.run).corpus
        )  # a missing corpus is reported first
    for step in _run(config, recipe):
        if not config.quiet:
            print(step, flush=True)
    finished = [cell for cell in recipe.cells if _is_finished(config, recipe, cell, flops)]
    missing = tuple(cell.name for cell in recipe.cells if cell not in finished)
    if not any(not cell.control for cell in finished):
        raise InputError(
            f"no model of {recipe.name} is finished in {config.run}: type the command without --only"
        )
    models = [study_model(recipe, cell, flops) for cell in finished]
    written = _page(config, recipe, run, models, missing)
    return StudyResult(written[0], written[1], missing, _since(started))


def study_model(recipe: Recipe, cell: Cell, flops: dict[str, float]) -> StudyModel:
    """Return what the page has to know about a model that its results do not say."""
    return StudyModel(
        name=cell.name,
        base=cell.base,
        family=cell.family,
        size=cell.size,
        seed=cell.seed,
        switch=cell.switch,
        control=cell.control or "",
        budget=cell.budget,
        flops=flops[cell.name],
    )


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def _plan(config: StudyConfig, recipe: Recipe, run: Run, flops: dict[str, float]) -> str:
    """Return what the study would do and cost."""
    rate = config.tflops * 1e12 or measured_rate(recipe, flops)
    of_stages = costs(recipe, run, flops)
    n_controls = sum(bool(cell.control) for cell in recipe.cells)
    seeds_of = sorted({cell.seed for cell in recipe.cells})
    groups = dict.fromkeys(cell.base for cell in recipe.cells if not cell.control)
    how = "as --tflops says" if config.tflops else "measured on this machine, one model at a time"
    return "\n".join(
        [
            *recipe.questions,
            f"{recipe.name}: {len(groups)} kinds of models, seeds {', '.join(map(str, seeds_of))}:"
            f" {len(recipe.cells) - n_controls} models to train, {n_controls} null controls",
            ", ".join(groups),
            "",
            cost_table(of_stages, rate).to_text(),
            "",
            f"hours at {rate / 1e12:.3g} TFLOP/s ({how}), right to within a factor of two;"
            " explaining and scoring add about .04 s per neuron and core",
        ]
    )


def _run(config: StudyConfig, recipe: Recipe) -> Iterator[str]:
    """Run the stages of all models; yield the line that announces each."""
    common = {"force": config.force, "quiet": config.quiet}
    chains = study_chains(config)
    groups = recipe.seeded() if "seeds" in recipe.stages else {}
    if config.only:
        groups = {
            b: cells for b, cells in groups.items() if {c.name for c in cells} & set(config.only)
        }
    n_steps = sum(map(len, chains)) + len(tuning_chains(config))
    total, numbers = 1 + n_steps + len(groups), count(1)

    def line(label: str) -> str:
        return f"[{next(numbers)}/{total}] {label}"

    yield line("tokens")
    tokenize(tokenize_config(recipe, config.run, **common))
    # All rates first: a seed is trained at the rate that was found with the first.
    for of in (tuning_chains, study_chains):
        for step in run_models(of, config, n_jobs(config)):
            yield line(step.label)
    run = Run(config.run)
    for base, cells in groups.items():
        harvested = [cell.name for cell in cells if cell.name in run.models("activations")]
        if len(harvested) > 1:
            yield line(f"seeds {base}")
            options = {**recipe.options("seeds"), **common}
            seeds(SeedsConfig(run=config.run, model=base, **options))


def tuning_chains(config: StudyConfig) -> list[list[Step]]:
    """Return the steps that search the rates of families and sizes."""
    recipe = read_recipes(config.recipes).with_corpus(config.corpus)
    wanted = {c.architecture for c in recipe.cells if not config.only or c.name in config.only}
    common = {"force": config.force, "quiet": config.quiet}
    made = [
        (cell.architecture, tune_config(recipe, cell, config.run, **common))
        for cell in recipe.tuned()
        if cell.architecture in wanted
    ]
    return [[Step("tuning", name, lambda o=options: tune(o))] for name, options in made]


def study_chains(config: StudyConfig) -> list[list[Step]]:
    """Return the steps of each model, in order; those of one model need nothing of another.

    Null controls that are made from a trained model are steps of that model's chain.
    """
    recipe = read_recipes(config.recipes).with_corpus(config.corpus)
    flops = flops_of(recipe)
    chosen = [cell for cell in recipe.cells if not config.only or cell.name in config.only]
    chains: dict[str, list[Step]] = {}
    for cell in chosen:
        derived = cell.control in ("permuted", "embeddings")
        key = replace(cell, control=None).name if derived else cell.name
        chains.setdefault(key, []).extend(_steps(config, recipe, cell, flops))
    return list(chains.values())


def _steps(
    config: StudyConfig, recipe: Recipe, cell: Cell, flops: dict[str, float]
) -> Iterator[Step]:
    tuned = {of.architecture for of in recipe.tuned()}
    for stage, options in _options(config, recipe, cell, flops):
        if stage == "train" and not cell.control and cell.architecture in tuned:
            yield Step("model", cell.name, lambda o=options, c=cell: train(_at_tuned_rate(o, c)))
        else:
            yield Step(FOLDERS[stage], cell.name, lambda w=_WORK[stage], o=options: w(o))


def _options(
    config: StudyConfig, recipe: Recipe, cell: Cell, flops: dict[str, float]
) -> Iterator[tuple[str, Any]]:
    """Yield the stages of a model, each with its options; one that a recipe gives several times, as often."""
    common: Any = {"force": config.force, "quiet": config.quiet}
    for stage in recipe.stages_of(cell):
        if stage == "train":
            steps = recipe.steps(cell, flops) if cell.budget else None
            yield stage, train_config(recipe, cell, config.run, steps=steps, **common)
        else:
            made = configs_of(recipe, cell, stage, config.run, **common)
            yield from ((stage, options) for options in made)


def _at_tuned_rate(options: TrainConfig, cell: Cell) -> TrainConfig:
    """Return options with the rate that was found for the family and size, unless a switch gives one."""
    if options.learning_rate is not None:
        return options
    stage = Run(options.run).stage("tuning", cell.architecture)
    stage.require("tune")
    return replace(options, learning_rate=read_tuning(stage.path).best.learning_rate)


def _is_finished(config: StudyConfig, recipe: Recipe, cell: Cell, flops: dict[str, float]) -> bool:
    """Return whether all stages of a model were made as the recipe says, from what they depend on now.

    Results of other options, such as those of an earlier version of the recipe, are left off the page.
    """
    run, tuned = Run(config.run), {of.architecture for of in recipe.tuned()}
    for stage, options in _options(config, recipe, cell, flops):
        if getattr(options, "explainer", "") or getattr(options, "simulator", ""):
            continue  # of a language model: a set of its own, which the page does not need
        if stage == "train":
            if not cell.control and cell.architecture in tuned:
                if run.stage("tuning", cell.architecture).completion() is None:
                    return False
                options = _at_tuned_rate(options, cell)
            options = options.settings()
        if not run.stage(FOLDERS[stage], cell.name).is_current(options):
            return False
    return True


def _page(
    config: StudyConfig,
    recipe: Recipe,
    run: Run,
    models: list[StudyModel],
    missing: tuple[str, ...],
) -> tuple[Path, str]:
    """Write the page into the run, and beside `config.page`; return its path, and the claims as text."""
    stage = run.stage("study", recipe.name)
    settings = {
        "recipes": list(recipe.names),
        "corpus": tokenize_config(recipe, config.run).corpus,
        "stages": {s: [dict(of) for of in options] for s, options in recipe.stages.items()},
        "resamples": config.resamples,
        "missing": list(missing),
    }
    made = study_page(run, models, recipe.questions, settings, resamples=config.resamples)
    with stage.write(settings, study_inputs(run, models)) as draft:
        made.write(draft.path)
    if config.page is not None:
        config.page.parent.mkdir(parents=True, exist_ok=True)
        return made.write(config.page.parent, config.page.stem), made.verdicts
    return stage.path / f"{PAGE}.md", made.verdicts
