"""Trains models one after another in several processes, as `torchrun` or a test starts them: a start takes seconds.

    torchrun --nproc-per-node 2 tests/train_jobs.py FOLDER '[{"run": "run", "fields": {"name": "a"}, "stop": 4}]'

A job without fields checks the optimizer on split matrices. `fields` are those of `TrainConfig`; with `stop`, training ends after the checkpoint of that step, as if killed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cratelm.train import checkpoints
from cratelm.train.config import TrainConfig
from cratelm.train.loop import train
from cratelm.train.optimizers import Muon


class Stopped(Exception):
    pass


def take(run: Path, fields: dict[str, Any], stop: int | None = None) -> None:
    """Train one model."""
    save = checkpoints.save

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        if arguments[-1] == stop:
            raise Stopped

    fields["model_overrides"] = tuple(fields.get("model_overrides", ()))
    checkpoints.save = save_and_stop
    try:
        train(TrainConfig(run=run, **fields))
        assert stop is None
    except Stopped:
        pass
    finally:
        checkpoints.save = save


def check_muon() -> None:
    """Take steps on split and on whole matrices, also of rows that do not divide, with the same gradients."""
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=draw) for shape in ((7, 5), (8, 24), (24, 8))]
    split = [nn.Parameter(distribute_tensor(m.clone(), mesh, [Shard(0)])) for m in whole]
    whole = [nn.Parameter(m) for m in whole]
    optimizers = [Muon(matrices, lr=0.1, weight_decay=0.1) for matrices in (whole, split)]
    reference = torch.optim.Muon([nn.Parameter(m.detach().clone()) for m in whole], lr=0.1)
    for _ in range(3):
        for a, b, c in zip(whole, split, reference.param_groups[0]["params"], strict=True):
            a.grad = torch.randn(a.shape, generator=draw)
            b.grad = distribute_tensor(a.grad, mesh, [Shard(0)])
            c.grad = a.grad.clone()
        for optimizer in (*optimizers, reference):
            optimizer.step()
    state = optimizers[1].state
    for a, b, c in zip(whole, split, reference.param_groups[0]["params"], strict=True):
        assert torch.equal(a, c)
        assert torch.equal(a, b.full_tensor())
        assert state[b]["momentum_buffer"].placements == (Shard(0),)


def take_all(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Do the jobs in this process, which is one of several."""
    pid = folder / f"rank-{os.environ['RANK']}.pid"
    pid.write_text(str(os.getpid()))
    for job in jobs:
        take(folder / job.pop("run"), **job) if job else check_muon()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    take_all(Path(sys.argv[1]), json.loads(sys.argv[2]))
