"""Checkpoints of autoencoders in training, which remain usable if the process is killed at any moment.

A checkpoint is written under a temporary name and renamed when it is complete; then the previous one is
removed. It contains the weights and trainer of each layer as SAELens saves them, and the position in the
stream of activations; there is no other state between steps.
"""

import json
import shutil
from dataclasses import asdict
from typing import Any

from cratelm.runs import Draft, write_json
from cratelm.runs.atomic import put_in_place
from cratelm.runs.storage import storage_errors
from cratelm.sae.activations import StreamPosition
from cratelm.train.resume import FOLDER, remove_later_files, sync_curves

_POSITION = "place.json"


def save(
    draft: Draft,
    step: int,
    trainers: list[Any],
    position: StreamPosition,
    resampled: list[int],
) -> None:
    """Write the state after `step` steps, then remove older checkpoints.

    After an error, such as a full disk, the earlier checkpoint is as it was.
    `trainers` are SAELens' trainers, one per layer; `resampled` is the number of latents reinitialised so far
    in each layer.
    """
    folder = draft.path / FOLDER
    partial, whole = folder / "partial", folder / f"step-{step:09d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with storage_errors(draft.path):  # now, while the disk is as full as it was
            for index, trainer in enumerate(trainers):
                trainer.sae.save_model(partial / str(index))
                trainer.save_trainer_state(partial / str(index))
        write_json(partial / _POSITION, {"place": asdict(position), "resampled": resampled})
        sync_curves(draft)
        put_in_place(partial, whole)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in folder.glob("step-*"):
        if old != whole:
            shutil.rmtree(old)


def restore(draft: Draft, trainers: list[Any]) -> tuple[StreamPosition, list[int]] | None:
    """Load weights and trainers from the last complete checkpoint.

    Returns the position in the stream and the number of latents reinitialised so far in each layer, or None
    if there is no checkpoint.
    """
    remove_later_files(draft)
    last = max((draft.path / FOLDER).glob("step-*"), default=None)
    if last is None:
        return None
    for index, trainer in enumerate(trainers):
        trainer.sae.load_weights_from_checkpoint(last / str(index))
        trainer.load_trainer_state(last / str(index))
    state = json.loads((last / _POSITION).read_text(encoding="utf-8"))
    return StreamPosition(**state["place"]), state["resampled"]
