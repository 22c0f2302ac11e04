"""Training in several processes, with and without sharding, and checkpoints that change their number.

Each number of processes is started once, with all trainings that need it. They are forked, because a start takes
seconds; those of the test that kills one are started by `torchrun`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from safetensors.torch import load_file
from test_train import TINY, T, make_run
from train_jobs import take, take_all

from cratelm.train.log import read_metrics

JOBS = Path(__file__).with_name("train_jobs.py")
MODELS = ("crate-1l", "gpt2-1l")
FROZEN = ["dictionary", "embeddings"]
pytestmark = pytest.mark.timeout(900)  # four starts, of up to four processes


def fields(name: str, model: str = "crate-1l", **others: Any) -> dict[str, Any]:
    return {
        "name": name, "model": model, "steps": 6, "batch_size": 8, "micro_batch_size": 1, "sequence_length": T,
        "validate_every": 2, "validation_sequences": 8, "checkpoint_every": 2, "learning_rate": 0.01,
        "model_overrides": list(TINY), "quiet": True, **others,
    }  # fmt: skip


def job(run: str, fields: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"run": run, "fields": fields, **others}


def launch(processes: int, folder: Path, jobs: list[dict[str, Any]]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         str(JOBS), str(folder), json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors[-9000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in which drafts of 1, 2 and 4 processes, sharded and whole, were resumed by another number."""
    folder = tmp_path_factory.mktemp("shard")
    run = make_run(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for model in MODELS:
        take(run, fields(f"one-{model}", model))
    take(run, fields("one-bf16", precision="bf16"))
    take(run, fields("from-1"), stop=4)
    shutil.copytree(run, folder / "run-2")
    bf16 = fields("two-bf16", precision="bf16", shard=True, gradient_checkpointing=True)
    jobs = [job("run", fields(f"two-{model}", model, shard=True)) for model in MODELS]
    jobs += [job("run", bf16), job("run-2", fields("from-1", shard=True)), {}]
    take(run, fields("one-frozen", freeze=FROZEN))
    jobs += [job("run", fields("two-frozen", shard=True, freeze=FROZEN))]
    drafts = (fields("from-2", shard=True), fields("whole-from-2"))
    jobs += [job("run", draft, stop=4) for draft in drafts]
    run_ranks(2, folder, take_all, folder, jobs)
    for name in ("run-1", "run-4"):
        shutil.copytree(run, folder / name)
    for name in ("from-2", "whole-from-2"):
        take(folder / "run-1", fields(name))
    jobs = [job("run-4", fields(f"four-{model}", model, shard=True)) for model in MODELS]
    names = ("from-1", "from-2", "whole-from-2")
    jobs += [job("run-4", fields(name, shard=True)) for name in names]
    run_ranks(4, folder, take_all, folder, [*jobs, {}])
    torch.set_num_threads(before)
    return folder


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("run", "two-crate-1l"),
        ("run", "two-gpt2-1l"),
        ("run-4", "four-crate-1l"),
        ("run-4", "four-gpt2-1l"),
        ("run-1", "from-2"),
        ("run-1", "whole-from-2"),
        ("run-2", "from-1"),
        ("run-4", "from-1"),
        ("run-4", "from-2"),
        ("run-4", "whole-from-2"),
    ],
)
def test_losses_and_weights_are_those_of_one_process(folder: Path, run: str, name: str) -> None:
    """At the same global batch; `from-2` was stopped in two processes, and resumed in those of its run."""
    twin = "gpt2-1l" if "gpt2" in name else "crate-1l"
    one, other = folder / "run" / "model" / f"one-{twin}", folder / run / "model" / name
    lines = list(zip(read_metrics(one), read_metrics(other), strict=True))
    assert len(lines) == 6 + 4
    for alone, shared in lines:
        assert alone.keys() == shared.keys()
        for key in alone:
            margin = 1e-3 if key in ("gradient_norm", "validation_standard_error") else 1e-4
            assert shared[key] == pytest.approx(alone[key], rel=margin), key
    expected, weights = (load_file(path / "model.safetensors") for path in (one, other))
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-2, atol=1e-3)
    assert not (other / "checkpoints").exists()


def test_frozen_parts_keep_their_bits_when_sharded(folder: Path) -> None:
    one, two, free = (
        load_file(folder / "run" / "model" / name / "model.safetensors")
        for name in ("one-frozen", "two-frozen", "one-crate-1l")
    )
    frozen = {key for key in one if "embed" in key or "dictionary" in key}
    assert len(frozen) == 3
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-3)
        if key in frozen:
            assert torch.equal(two[key], one[key])
            assert not torch.equal(free[key], one[key])


def test_bf16_is_that_of_one_process(folder: Path) -> None:
    """Sums over processes round apart in 32 bits, and products of what they change in 8."""
    one, two = (read_metrics(folder / "run" / "model" / name) for name in ("one-bf16", "two-bf16"))
    exact = read_metrics(folder / "run" / "model" / "one-crate-1l")
    for alone, shared in zip(one, two, strict=True):
        for key in {"loss", "validation_loss"} & alone.keys():
            assert shared[key] == pytest.approx(alone[key], rel=1e-3)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (two, exact)]
    assert losses[0] != losses[1]  # else it was fp32


def test_a_sharded_checkpoint_is_written_in_shares(folder: Path) -> None:
    steps = sorted((folder / "run" / "model" / ".from-2.partial" / "checkpoints").iterdir())
    assert [step.name for step in steps] == ["step-000000002", "step-000000004"]
    shares = [path.stat().st_size for path in steps[1].glob("*.distcp")]
    assert len(shares) == 2
    assert max(shares) < 0.7 * sum(shares)
    assert not (steps[1] / "model.safetensors").exists()


@pytest.mark.fault(
    "one of several processes of a training is killed",
    "one line names the step at which the same command resumes; the curve is that of a run that was not killed",
)
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    options = {"shard": True, "steps": 20, "validate_every": 10, "checkpoint_every": 3}
    options |= {"micro_batch_size": 4}
    killed, whole = (job("run", fields(name, **options)) for name in ("killed", "whole"))
    process = launch(2, tmp_path, [killed])
    draft = run / "model" / ".killed.partial" / "checkpoints"
    while not (saved := sorted(draft.glob("step-*"))) or saved[-1].name < "step-000000006":
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.kill(int((tmp_path / "rank-1.pid").read_text()), signal.SIGKILL)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if "another process of this training" in line]
    left = max(draft.glob("step-*")).name.removeprefix("step-").lstrip("0")
    assert int(left) < 20
    assert len(lines) == 1
    assert lines[0].endswith(f"type the command again, it resumes from step {left}")

    finish(launch(2, tmp_path, [killed, whole]))
    unbroken, resumed = run / "model" / "whole", run / "model" / "killed"
    assert (resumed / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()
    weights = load_file(resumed / "model.safetensors")
    for name, weight in load_file(unbroken / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    assert not (resumed / "ended").exists()
