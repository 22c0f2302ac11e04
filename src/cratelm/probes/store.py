"""Results of `cratelm probe`: `summary.json` of each model."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import Interval
from cratelm.runs import known_fields, write_json
from cratelm.runs.reading import read_json

SUMMARY = "summary.json"


@dataclass(frozen=True)
class TaskTraining:
    """One training on one task."""

    task: str
    seed: int
    n_correct: int
    """fresh sequences whose first answer is the most likely next token"""
    n_sequences: int
    loss: float
    """mean over the last tenth of the training, nats per answer"""
    seconds: float
    """of training and test"""

    @property
    def accuracy(self) -> float:
        """Return the fraction of the fresh sequences that are answered right."""
        return self.n_correct / self.n_sequences


@dataclass(frozen=True)
class TaskAccuracy:
    """The accuracy of a model on a task, over all its trainings."""

    task: str
    accuracy: Interval
    """95%: Wilson's interval over sequences for one seed; for several, which are resampled with their sequences, a
    hierarchical bootstrap. `n` is the number of seeds"""
    chance: float
    """of a guess among the possible answers of a sequence"""


@dataclass(frozen=True)
class ProbeSummary:
    """Everything that `cratelm probe` measured of one model."""

    model: str
    parameters: int
    """trainable parameters with the vocabulary of the last task, without the position embedding"""
    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int
    """sequences per step"""
    tasks: tuple[TaskAccuracy, ...]
    trainings: tuple[TaskTraining, ...]

    @property
    def seconds(self) -> float:
        """Return the duration of all trainings."""
        return sum(training.seconds for training in self.trainings)

    def of_task(self, task: str) -> TaskAccuracy | None:
        """Return the accuracy on a task; None if the model was not trained on it."""
        return next((of for of in self.tasks if of.task == task), None)


def write_summary(folder: Path, summary: ProbeSummary) -> None:
    """Write `summary.json`."""
    write_json(folder / SUMMARY, asdict(summary))


def read_summary(folder: Path) -> ProbeSummary:
    """Return the results of one model. Raises `InputError` if the file is damaged."""
    record = read_json(folder / SUMMARY)
    try:
        tasks = tuple(
            TaskAccuracy(
                **known_fields(
                    TaskAccuracy,
                    {**of, "accuracy": Interval(**known_fields(Interval, of["accuracy"]))},
                )
            )
            for of in record["tasks"]
        )
        trainings = tuple(
            TaskTraining(**known_fields(TaskTraining, of)) for of in record["trainings"]
        )
        values = known_fields(ProbeSummary, record)
        return ProbeSummary(**{**values, "tasks": tasks, "trainings": trainings})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / SUMMARY} is not what `cratelm probe` writes ({error!r}): type the command again with --force"
        ) from None
