"""`tokenize --executor`: tasks of datatrove write the parts, and the shards are those of one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tokenize_workers import files, left_over, lines, sentences

from cratelm.errors import BudgetReached, InputError
from cratelm.tokens import tokenize as verb
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.parts import Work
from cratelm.tokens.tokenize import tokenize
from cratelm.tokens.tokenizer import train_tokenizer

pytest.importorskip("datatrove", reason="the extra `cluster` is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(5):
        (folder / f"{number}.jsonl").write_bytes(lines([*sentences(40, number), ""]))
    train_tokenizer(sentences(50, 0), 300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def parts_of_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "GROUP_BYTES", 1)


def make(folder: Path, corpus: Path, **fields: Any) -> Any:
    config = TokenizeConfig(run=folder / "run", corpus=str(corpus), tokenizer=str(corpus / "tokenizer.json"), sequence_length=16, quiet=True, fit=0.2, held_out=0.2, **fields)  # fmt: skip
    return tokenize(config)


def toml(folder: Path, text: str) -> Path:
    path = folder / "executor.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("options", ["workers = 1\ntasks = 2", "workers = 2\ntasks = 100"])
def test_local_tasks_give_the_same_files(tmp_path: Path, corpus: Path, options: str) -> None:
    one = make(tmp_path / "one", corpus)
    executor = toml(tmp_path, f'executor = "local"\n[local]\n{options}\n[slurm]\ntime = "1:00"\n')
    result = make(tmp_path / "tasks", corpus, executor=executor)
    assert {**vars(result), "path": 0} == {**vars(one), "path": 0}
    assert files(tmp_path / "tasks" / "run") == files(tmp_path / "one" / "run")
    assert not left_over(tmp_path / "tasks" / "run")


@pytest.mark.fault(
    "a task of `tokenize --executor` fails",
    "one line that names the folder of the logs; the same command continues after the parts that are written",
)
def test_a_task_that_fails_leaves_the_parts_of_the_others(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    executor = toml(tmp_path, 'executor = "local"\n[local]\nworkers = 1\n')
    real = Work.write

    def write(self: Work, index: int, *arguments: Any) -> None:
        if index == 3:
            raise OSError("the node has no such disk")
        real(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write", write)
        with pytest.raises(InputError, match=r"OSError: the node has no such disk.*/logs; type"):
            make(tmp_path, corpus, executor=executor)
    capsys.readouterr()
    make(tmp_path, corpus)
    assert "3 of 5 parts are already there" in capsys.readouterr().out
    make(tmp_path / "one", corpus)
    assert files(tmp_path / "run") == files(tmp_path / "one" / "run")


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_tasks_on_slurm_are_submitted_run_and_merged(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of Slurm are stand-ins: sbatch stores the job, and the test runs its array of tasks."""
    commands, queue = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    queue.mkdir()
    last = 'for file; do :; done; n=$(ls "$QUEUE" | wc -l)'
    script(commands / "sbatch", f'{last}; cp "$file" "$QUEUE/$n"; echo Submitted batch job $n')
    script(commands / "squeue", 'test "$3" = 0 && cat "$QUEUE/../running"')
    script(commands / "scontrol", "echo node1")
    script(commands / "launch_pickled_pipeline", f'exec {sys.executable} -m datatrove.tools.launch_pickled_pipeline "$@"')  # fmt: skip
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(queue))
    options = (
        'time = "1:00:00"\npartition = "cpu"\ntasks = 2\nwith_srun = false\ncpus_per_task = 3\n'
    )
    executor = toml(tmp_path, f'executor = "slurm"\n[slurm]\n{options}')

    with pytest.raises(BudgetReached, match="2 tasks are submitted as job 0: type the same"):
        make(tmp_path, corpus, executor=executor)
    job = (queue / "0").read_text()
    assert "--array=0-1\n" in job
    assert "--cpus-per-task=3\n" in job
    (tmp_path / "running").write_text("0 cpu")
    with pytest.raises(
        BudgetReached, match="job 0 is waiting or running, 0 of 5 parts are written"
    ):
        make(tmp_path, corpus, executor=executor)
    (tmp_path / "running").write_text("")
    for rank in "01":
        task = {"SLURM_ARRAY_TASK_ID": rank, "RUN_OFFSET": "0", "SLURM_NODELIST": "node1"}
        done = subprocess.run(["sh", queue / "0"], env={**os.environ, **task}, capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
    result = make(tmp_path, corpus, executor=executor)
    assert len(list(queue.iterdir())) == 2  # the second job collects datatrove's statistics
    one = make(tmp_path / "one", corpus)
    assert {**vars(result), "path": 0} == {**vars(one), "path": 0}
    assert files(tmp_path / "run") == files(tmp_path / "one" / "run")


def test_ray_gets_its_options(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray: its executor is made with the options of the file, and its tasks run here."""
    from datatrove.executor import RayPipelineExecutor

    made = []

    def run(self: Any) -> None:
        made.append((self.tasks, self.workers, self.mem_per_cpu_gb))
        for rank in range(self.world_size - 1):
            for step in self.pipeline:
                step(None, rank, self.world_size)

    monkeypatch.setattr(RayPipelineExecutor, "run", run)
    executor = toml(tmp_path, 'executor = "ray"\n[ray]\nworkers = 2\nmem_per_cpu_gb = 4\n')
    with pytest.raises(InputError, match=r"1 of 5 parts are not written: .*/logs has the logs"):
        make(tmp_path, corpus, executor=executor)
    assert made == [(5, 2, 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("executor = slurm", "is not a TOML file"),
        ("", 'names no executor: write executor = "local", "slurm" or "ray"'),
        ('executor = "lsf"', "names executor 'lsf'"),
        ('executor = "local"\nworkers = 3', r"has 'workers', but .* only the tables \[local\]"),
        ('executor = "local"\n[local]\nworker = 3', "option 'worker' in .local.: choose from tasks, workers"),
        ('executor = "local"\n[local]\nworkers = 0', r"workers in \[local\] must be at least 1, not 0"),
        ('executor = "slurm"\n[slurm]\ntime = "1:00"', r"lacks partition in \[slurm\]"),
        ('executor = "slurm"\n[slurm]\ntime = "1"\npartition = "a"', "there is no command sbatch"),
        ('executor = "local"\n[local]\nstart_method = "none"', "cannot find context for 'none'"),
    ],
)  # fmt: skip
def test_files_of_an_executor_that_will_not_do(
    tmp_path: Path, corpus: Path, text: str, expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        make(tmp_path, corpus, executor=toml(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"nowhere\.toml cannot be read"):
        make(tmp_path, corpus, executor=tmp_path / "nowhere.toml")
