"""Tasks of a cluster that write parts: datatrove's executors, configured in one TOML file.

```toml
executor = "slurm"          # local, slurm or ray

[slurm]                     # arguments of datatrove's SlurmPipelineExecutor; a file may have all three tables
tasks = 30                  # default: one for each part
time = "12:00:00"
partition = "cpu"
```
The folder of the run and the corpus must be at the same paths on all machines. Each task writes some of the
parts; the command merges them. Slurm's executor returns when the tasks are submitted, so that the same
command is typed again when they have ended.
"""

import contextlib
import inspect
import json
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.errors import BudgetReached, InputError, missing_extra, one_line
from cratelm.runs import write_json
from cratelm.runs.worker_processes import n_cores
from cratelm.tokens.parts import PartError, Work
from cratelm.tokens.workers import limit_threads

CLASSES = {
    "local": "LocalPipelineExecutor",
    "slurm": "SlurmPipelineExecutor",
    "ray": "RayPipelineExecutor",
}
_RESERVED = {"self", "pipeline", "depends", "skip_completed", "job_id_retriever"}
"""arguments of the executors that a file cannot set"""
_LONGEST_FILE = 1_000_000
_SUBMITTED = "submitted.json"


@dataclass(frozen=True)
class Executor:
    """An executor and its options, as a TOML file names them."""

    kind: str
    options: dict[str, Any]

    @property
    def workers(self) -> int:
        """Return the number of tasks that the local executor runs at a time."""
        return self.options.get("workers", n_cores())

    @property
    def threads(self) -> int:
        """Return the number of threads of a task."""
        if self.kind == "local":
            return n_cores() // max(1, self.workers)
        return self.options.get("cpus_per_task", 1)


def read_executor(path: Path) -> Executor:
    """Return the executor in a TOML file.

    Raises `InputError` if the file cannot be read or has other options than its executor, or if what the
    executor needs is not installed.
    """
    try:
        with path.open("rb") as stream:
            content = tomllib.loads(stream.read(_LONGEST_FILE).decode("utf-8"))
    except OSError as error:
        raise InputError(f"--executor {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"--executor {path} is not a TOML file ({one_line(error)})") from None
    kind = content.get("executor")
    if kind not in CLASSES:
        found = "no executor" if kind is None else f"executor {kind!r}"
        raise InputError(
            f'{path} names {found}: write executor = "local", "slurm" or "ray" into it'
        )
    tables = {name: value for name, value in content.items() if name != "executor"}
    for name, table in tables.items():
        if name not in CLASSES or not isinstance(table, dict):
            raise InputError(
                f"{path} has {name!r}, but beside `executor` only the tables [local], [slurm] and [ray] are used"
            )
    options = tables.get(kind, {})
    _check_options(path, kind, options)
    return Executor(kind, options)


def run_tasks(work: Work, indexes: Sequence[int], executor: Executor) -> None:
    """Write parts by tasks of an executor.

    Raises `BudgetReached` if the tasks are submitted and have not ended, and `PartError` if they have ended and
    a part is not written.
    """
    _check_queue(work, indexes)
    options = {"logging_dir": str(work.folder / "logs"), "tasks": len(indexes), **executor.options}
    options["tasks"] = min(options["tasks"], len(indexes))
    if executor.kind == "local":
        options["workers"] = min(executor.workers, options["tasks"])
    task = PartsTask(work, tuple(indexes), executor.threads)
    pipeline = _class(executor.kind)(pipeline=[task], skip_completed=False, **options)
    try:
        pipeline.run()
    except InputError:
        raise
    except Exception as error:
        raise PartError(
            f"a task of the executor has failed ({type(error).__name__}: {one_line(error)}): its log is in"
            f" {options['logging_dir']}; type the same command again, which continues after the parts that"
            " are written"
        ) from None
    left = work.unwritten()
    if left and executor.kind == "slurm":
        write_json(work.folder / _SUBMITTED, {"job": str(pipeline.job_id)})
        raise BudgetReached(
            f"{options['tasks']} tasks are submitted as job {pipeline.job_id}: type the same command again when"
            " they have ended, which merges their parts"
        )
    if left:
        raise PartError(
            f"{len(left)} of {len(work.groups)} parts are not written: {options['logging_dir']} has the logs of"
            " the tasks; type the same command again, which continues after the parts that are written"
        )


class PartsTask:
    """Step of a datatrove pipeline that writes every n-th of some parts, n being the number of tasks."""

    def __init__(self, work: Work, indexes: tuple[int, ...], threads: int):
        self.work, self.indexes, self.threads = work, indexes, threads
        self.folder = str(Path.cwd())
        """working directory of the command: paths of the corpus may be relative to it"""

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the parts of a task; those that are already written are skipped."""
        limit_threads(self.threads)
        with contextlib.chdir(self.folder):
            for index in self.indexes[rank::world_size]:
                if not self.work.is_written(index):
                    self.work.write(index, lambda _: None)

    def __repr__(self) -> str:
        return f"write {len(self.indexes)} parts of {self.work.config.corpus}"


def _class(kind: str) -> Any:
    try:
        import datatrove.executor  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("cluster", "--executor", "datatrove") from None
    return getattr(datatrove.executor, CLASSES[kind])


def _check_options(path: Path, kind: str, options: dict[str, Any]) -> None:
    parameters = inspect.signature(_class(kind)).parameters
    usable = [name for name in parameters if name not in _RESERVED]
    for name in options:
        if name not in usable:
            raise InputError(
                f"{path} has the option {name!r} in [{kind}]: choose from {', '.join(usable)}"
            )
    counts = ("tasks", "cpus_per_task", *(["workers"] if kind == "local" else []))
    for name in counts:
        value = options.get(name, 1)
        if not (isinstance(value, int) and value >= 1):
            raise InputError(f"{path}: {name} in [{kind}] must be at least 1, not {value}")
    needed = [
        n for n in usable if parameters[n].default is inspect.Parameter.empty and n != "tasks"
    ]
    missing = [name for name in needed if name not in options]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)} in [{kind}], which that executor needs"
        )
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise InputError(
            f"{path} names Slurm, but there is no command sbatch: type the command on a login node, or name"
            " another executor"
        )


def _check_queue(work: Work, indexes: Sequence[int]) -> None:
    """Raise `BudgetReached` if tasks that were submitted earlier are still waiting or running."""
    try:
        job = str(json.loads((work.folder / _SUBMITTED).read_text(encoding="utf-8"))["job"])
        command = ["squeue", "--noheader", "--jobs", job]
        queue = subprocess.run(command, capture_output=True, check=False)
    except (OSError, ValueError, KeyError, TypeError):
        return
    if queue.returncode == 0 and queue.stdout.strip():  # an unknown job is an error of squeue
        raise BudgetReached(
            f"job {job} is waiting or running, {len(work.groups) - len(indexes)} of {len(work.groups)} parts are"
            " written: type the same command again when it has ended"
        )
