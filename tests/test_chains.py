"""Stages of several models at the same time, in processes of their own: order, errors, kills."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cratelm.errors import InputError
from cratelm.pipelines.chains import Step, run_chains


@dataclass(frozen=True)
class Given:
    folder: Path
    fault: str = ""


def chains(given: Given) -> list[list[Step]]:
    def work(name: str):
        def write():
            (given.folder / f"{name}.{os.getpid()}").touch()
            (given.folder / f"{name}-threads").write_text(os.environ["OMP_NUM_THREADS"])
            with (given.folder / "order").open("a") as file:
                file.write(name + "\n")

        return write

    def wait_or_fail(name: str):
        def wait():
            other = "b0" if name == "a0" else "a0"
            while not (given.folder / f"{other} waits").exists():
                (given.folder / f"{name} waits").touch()
                time.sleep(0.01)
            (given.folder / f"{name} waits").touch()
            if name == "a0" and given.fault == "raises":
                raise InputError("the corpus is gone: name another")
            if name == "a0" and given.fault == "breaks":
                raise KeyError("odd")
            if name == "a0" and given.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "b0" and given.fault:
                draft = given.folder / "draft"
                draft.touch()
                try:
                    time.sleep(60)
                finally:
                    draft.unlink()
            work(name)()

        return wait

    def steps(model: str, n: int) -> list[Step]:
        # each of the first steps waits for the other, so that they must run at the same time
        first = wait_or_fail if model in "ab" else work
        return [Step(f"{i}", model, (first if i == 0 else work)(f"{model}{i}")) for i in range(n)]

    return [steps("a", 3), steps("b", 1), steps("c", 2)]


def test_chains_run_side_by_side_and_each_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    given = Given(tmp_path)
    begun = [step.label for step in run_chains(chains, [given, given], 3)]
    assert sorted(begun) == ["0 a", "0 b", "0 c", "1 a", "1 c", "2 a"]
    order = (tmp_path / "order").read_text().split()
    for chain in (["a0", "a1", "a2"], ["b0"], ["c0", "c1"]):
        assert [name for name in order if name[0] == chain[0][0]] == chain
    processes = {path.suffix for path in tmp_path.glob("??.*")}
    assert len(processes) == 2
    assert {path.read_text() for path in tmp_path.glob("*-threads")} == {"3"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert f".{os.getpid()}" not in processes
    assert not multiprocessing.active_children()


@pytest.mark.fault(
    "a stage of one model fails in `demo`, or its process is killed",
    "one line; the stage of the other model is stopped and leaves nothing half written; no process is left",
)
@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("raises", InputError, "^the corpus is gone: name another$"),
        ("breaks", RuntimeError, "^0 a: KeyError: 'odd'$"),
        ("killed", InputError, "^a process of the demo was ended by signal 9.* --jobs 1 takes less memory$"),
    ],
)  # fmt: skip
def test_a_step_that_fails_ends_the_others_which_clean_up(tmp_path, fault, error, says):
    given = Given(tmp_path, fault)
    with pytest.raises(error, match=says):
        list(run_chains(chains, [given, given], 1))
    assert not (tmp_path / "draft").exists()
    assert not (tmp_path / "order").exists()
    assert not multiprocessing.active_children()
