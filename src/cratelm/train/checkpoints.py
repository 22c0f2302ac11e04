"""Checkpoints that stay usable if the process is killed at any moment.

A checkpoint is written under a temporary name and renamed when it is complete; the last two are kept.
The batch sampler needs only the step number, so a checkpoint consists of model, optimizers and random
states.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import logging as transformers_logging

from cratelm.runs import Completion, Draft, Settings, Stage
from cratelm.runs.atomic import put_in_place
from cratelm.runs.storage import storage_errors
from cratelm.train.resume import (
    FOLDER,
    found,
    remove_later_files,
    sync_curves,
    without_worthless_draft,
)

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


def save(accelerator: Accelerator, draft: Draft, step: int) -> None:
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
            accelerator.save_state(str(partial))
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


def restore(accelerator: Accelerator, draft: Draft) -> int:
    """Load the last complete checkpoint and return its number of steps; 0 if there is none."""
    checkpoints = found(draft.path)
    if accelerator.is_main_process:
        remove_later_files(draft)
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    return int(checkpoints[-1].name.removeprefix("step-"))


def save_model(accelerator: Accelerator, model: torch.nn.Module, folder: Path) -> None:
    """Save the model of a `NextTokenLoss` with `save_pretrained`, its weights gathered from all ranks."""
    state = accelerator.get_state_dict(model)
    state = {name.removeprefix("model."): weight for name, weight in state.items()}
    bare: Any = accelerator.unwrap_model(model).model
    assert state.keys() <= bare.state_dict().keys(), "weights would be saved under other names"
    if accelerator.is_main_process:
        transformers_logging.disable_progress_bar()  # one file, and the verb has its own bar
        bare.save_pretrained(folder, state_dict=state)
        transformers_logging.enable_progress_bar()
