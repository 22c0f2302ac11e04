"""`cratelm probe`: what can a family of models do, on tasks whose answers are known?"""

import difflib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.models import FAMILIES, SIZES, count_parameters
from cratelm.models.families import different_families, import_outside_families
from cratelm.probes.config import ProbeConfig
from cratelm.probes.store import (
    ProbeSummary,
    TaskAccuracy,
    TaskTraining,
    read_summary,
    write_summary,
)
from cratelm.probes.tasks import TASKS, Task
from cratelm.probes.training import new_model, recipe_of, tested, train_on
from cratelm.records import Interval
from cratelm.runs import Run, write_json
from cratelm.runs.reading import read_json
from cratelm.stats.intervals import wilson
from cratelm.stats.seeds import mean_over_seeds
from cratelm.text.table import Column, Table

_SIZE = "2l"
_TRAININGS = "trainings"
"""folder of a draft with the results of the finished trainings"""
_LAST = 0.1
"""fraction of the steps over which the recorded loss is averaged"""


@dataclass(frozen=True)
class ProbeResult:
    """Result of `cratelm probe`."""

    path: Path
    """folder with one folder per model"""
    models: tuple[ProbeSummary, ...]
    table: str
    """accuracy of each model on each task, as text"""

    def __str__(self) -> str:
        return f"{self.table}\n\nresults: {self.path}"


def probe(config: ProbeConfig) -> ProbeResult:
    """Train and test each model on each task, and write `probes/MODEL/`. Finished models are skipped.

    Raises `InputError` for a name that is neither a family nor a model of a named size, for a model that was probed
    with other options, and for a training that diverges.
    """
    run, names = Run(config.run), model_names(config.models)
    summaries = tuple(_probe_model(run, config, name) for name in names)
    table = accuracy_table(summaries, config.tasks).to_text()
    return ProbeResult(run.path / "probes", summaries, table)


def model_names(named: Sequence[str]) -> list[str]:
    """Return the names of models for families and names of models; for none, all families that differ, at 2l.

    Raises `InputError` for a name that is neither.
    """
    import_outside_families()
    names = []
    for name in named or different_families():
        of_size = f"{name}-{_SIZE}" if name in FAMILIES else name
        if of_size not in SIZES:
            near = difflib.get_close_matches(name, [*FAMILIES, *SIZES], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(
                f"--models names {name!r}, which is neither a family nor a model of a named size{hint}: choose from"
                f" {', '.join(FAMILIES)}, also with a size, such as crate-1l"
            )
        names.append(of_size)
    if len(set(names)) < len(names):
        raise InputError(f"--models {' '.join(named)}: name each model once")
    return names


def _probe_model(run: Run, config: ProbeConfig, name: str) -> ProbeSummary:
    """Return the results of one model; those that are finished are read."""
    stage, settings = run.stage("probes", name), config.settings(name)
    if stage.is_finished(settings, {}, force=config.force):
        return read_summary(stage.path)
    with stage.write(settings, {}, resume=True) as draft:
        draft.scratch.add(_TRAININGS)
        (draft.path / _TRAININGS).mkdir(exist_ok=True)
        trainings, correct = [], {}
        for task in config.tasks:
            for seed in range(config.seeds):
                training, of_training = _training(draft.path, config, name, TASKS[task], seed)
                trainings.append(training)
                correct.setdefault(task, []).append(of_training)
        recipe = recipe_of(name, config.steps, config.batch_size, config.learning_rate)
        summary = ProbeSummary(
            model=name,
            parameters=count_parameters(new_model(name, TASKS[config.tasks[-1]], 0)),
            optimizer=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            tasks=tuple(
                TaskAccuracy(task, accuracy(of), TASKS[task].chance) for task, of in correct.items()
            ),
            trainings=tuple(trainings),
        )
        write_summary(draft.path, summary)
        draft.results = {of.task: of.accuracy.value for of in summary.tasks}
    return read_summary(stage.path)


def _training(
    folder: Path, config: ProbeConfig, name: str, task: Task, seed: int
) -> tuple[TaskTraining, np.ndarray]:
    """Return one training, and which sequences [n] it answers right; one that an interrupted command ended is read."""
    path = folder / _TRAININGS / f"{task.name}-{seed}.json"
    if path.exists():
        record = read_json(path)
        return TaskTraining(**record["training"]), np.array(record["correct"], bool)
    started = time.monotonic()
    recipe = recipe_of(name, config.steps, config.batch_size, config.learning_rate)
    model, losses = new_model(name, task, seed), []
    label = f"{name} {task.name}" + (f" seed {seed}" if config.seeds > 1 else "")
    with tqdm(total=recipe.steps, desc=label, unit="step", disable=config.quiet) as bar:

        def progress(loss: float) -> None:
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        train_on(model, task, recipe, seed, progress)
    is_right = tested(model, task, config.sequences, seed)
    training = TaskTraining(
        task.name,
        seed,
        int(is_right.sum()),
        len(is_right),
        float(np.mean(losses[-max(1, int(_LAST * len(losses))) :])),
        round(time.monotonic() - started, 1),
    )
    write_json(path, {"training": asdict(training), "correct": is_right.astype(int).tolist()})
    return training, is_right


def accuracy(correct: Sequence[np.ndarray]) -> Interval:
    """Return the accuracy of trainings, each with [n] whether a sequence was answered right; see `TaskAccuracy`."""
    if len(correct) == 1:
        return wilson(int(correct[0].sum()), len(correct[0]))
    return mean_over_seeds([{0: of} for of in correct])


def accuracy_table(summaries: Sequence[ProbeSummary], tasks: Sequence[str]) -> Table:
    """Return the table that the verb prints: a row per model, with chance in the heading of each task."""
    of_tasks = [
        Column(task, f"{task}, % [95%] (chance {100 * TASKS[task].chance:.1f})", ".1f")
        for task in tasks
    ]
    rows = []
    for summary in summaries:
        found = [summary.of_task(task) for task in tasks]
        cells = [None if of is None else _percent(of.accuracy) for of in found]
        rows.append((summary.model, summary.parameters, *cells, summary.seconds / 60))
    columns = (Column("model", "model"), Column("parameters", "parameters", ",d"), *of_tasks)
    return Table(
        "probes",
        "Synthetic tasks",
        (*columns, Column("minutes", "minutes", ".1f")),
        tuple(rows),
        "Accuracy on fresh sequences. Chance: a guess among the tokens of the sequence that can be the answer.",
    )


def _percent(of: Interval) -> Interval:
    low, high = (None if bound is None else 100 * bound for bound in (of.low, of.high))
    return Interval(100 * of.value, low, high, of.n)
