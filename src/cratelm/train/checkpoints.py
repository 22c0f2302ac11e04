"""Checkpoints that stay usable if the process is killed at any moment.

A checkpoint is written under a temporary name and renamed when it is complete; the last two are kept.
The batch sampler needs only the step number, so a checkpoint consists of model, optimizers and random
states. There are two kinds, and each resumes on any number of processes, sharded or not:

    whole     model.safetensors, optimizer.bin: written by one process (Accelerate)
    sharded   *.distcp, .metadata: each process writes its share (torch.distributed.checkpoint)

Random states are those of a process: on another number of processes, a model with dropout draws anew.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from transformers import logging as transformers_logging

from cratelm.runs import Completion, Draft, Settings, Stage
from cratelm.runs.atomic import put_in_place
from cratelm.runs.storage import storage_errors
from cratelm.train.resume import (
    FOLDER,
    found,
    remove_later_files,
    step_of,
    sync_curves,
    without_worthless_draft,
)
from cratelm.train.sharding import is_sharded, load_whole_weights, split_like, whole_weights

KEPT = 2

# Accelerate warns at each checkpoint that only one of two tied tensors is saved, which is intended.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


@contextlib.contextmanager
def shared_draft(
    accelerator: Accelerator,
    stage: Stage,
    settings: Settings,
    inputs: Mapping[str, Completion | str],
) -> Iterator[Draft]:
    """Open the stage's draft on the main process, which also finishes it; the others receive its path."""
    if accelerator.is_main_process:
        with (
            without_worthless_draft(stage),
            stage.write(settings, inputs, resume=True) as draft,
        ):
            draft.scratch.add(FOLDER)
            broadcast_object_list([str(draft.path)])
            yield draft
    else:
        (path,) = broadcast_object_list([""])
        yield Draft(Path(path), fresh=False)
    accelerator.wait_for_everyone()


def save(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[Optimizer],
    draft: Draft,
    step: int,
) -> None:
    """Write the state after `step` steps, then drop the oldest checkpoints.

    After an error, such as a full disk, the earlier checkpoints are as they were.
    """
    folder = draft.path / FOLDER
    partial = folder / "partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with storage_errors(draft.path):  # now, while the disk is as full as it was
            accelerator.save_state(str(partial))  # of a sharded model, the random states only
            if is_sharded(model):
                dcp.save(_state(model, optimizers), checkpoint_id=partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sync_curves(draft)
            put_in_place(partial, folder / f"step-{step:09d}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        for old in found(draft.path)[:-KEPT]:
            shutil.rmtree(old)


def restore(
    accelerator: Accelerator, model: nn.Module, optimizers: list[Optimizer], draft: Draft
) -> int:
    """Load the last complete checkpoint and return its number of steps; 0 if there is none."""
    checkpoints = found(draft.path)
    accelerator.wait_for_everyone()  # all have seen the same
    if accelerator.is_main_process:
        remove_later_files(draft)
    if not checkpoints:
        return 0
    folder = checkpoints[-1]
    if not (folder / ".metadata").is_file() and not is_sharded(model):
        accelerator.load_state(str(folder))
        return step_of(folder)
    if (folder / ".metadata").is_file():
        _load_shares(folder, model, optimizers)
    else:
        _load_whole(folder, model, optimizers)
    load_accelerator_state(
        str(folder), [], [], [], [], accelerator.process_index
    )  # the random states
    return step_of(folder)


def _state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Return model and optimizers as `torch.distributed.checkpoint` saves them: by the names of the weights."""
    weights, states = get_state_dict(model, [_bare(optimizer) for optimizer in optimizers])
    return {"model": weights, "optimizers": states}


def _load_shares(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Load a sharded checkpoint: each process reads its tensors, or parts of them, from all shares."""
    state = _state(model, optimizers)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        [_bare(optimizer) for optimizer in optimizers],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizers"],
    )


def _load_whole(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Load a whole checkpoint into a sharded model."""
    load_whole_weights(model, load_file(folder / "model.safetensors"))
    for number, optimizer in enumerate(optimizers):
        name = f"optimizer_{number}.bin" if number else "optimizer.bin"
        saved = torch.load(folder / name, map_location="cpu", weights_only=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, values in saved["state"].items():
            for key, value in values.items():
                values[key] = split_like(value, parameters[index])
        optimizer.load_state_dict(saved)


def _bare(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def save_model(accelerator: Accelerator, model: torch.nn.Module, folder: Path) -> None:
    """Save the model of a `NextTokenLoss` with `save_pretrained`, its weights gathered from all ranks."""
    state: Any = whole_weights(model) if is_sharded(model) else accelerator.get_state_dict(model)
    state = {name.removeprefix("model."): weight for name, weight in state.items()}
    bare: Any = accelerator.unwrap_model(model).model
    assert state.keys() <= bare.state_dict().keys(), "weights would be saved under other names"
    if accelerator.is_main_process:
        transformers_logging.disable_progress_bar()  # one file, and the verb has its own bar
        bare.save_pretrained(folder, state_dict=state)
        transformers_logging.enable_progress_bar()
