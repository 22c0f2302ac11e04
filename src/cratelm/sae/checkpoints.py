"""Checkpoints of autoencoders in training that a kill at any moment leaves usable.

A checkpoint is written under a temporary name and renamed when it is whole; then the one before it
is removed. It holds each layer's weights and trainer as SAELens saves them, and the place in the
stream of activations; nothing else is remembered between steps.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cratelm.runs import Draft, write_json
from cratelm.sae.activations import Place

FOLDER = "checkpoints"
_PLACE = "place.json"


def save(draft: Draft, step: int, trainers: list[Any], place: Place, resampled: list[int]) -> None:
    """Writes the state after `step` steps, then drops older checkpoints."""
    folder = draft.path / FOLDER
    partial, whole = folder / "partial", folder / f"step-{step:09d}"
    shutil.rmtree(partial, ignore_errors=True)
    for index, trainer in enumerate(trainers):
        trainer.sae.save_model(partial / str(index))
        trainer.save_trainer_state(partial / str(index))
    write_json(partial / _PLACE, {"place": asdict(place), "resampled": resampled})
    # Left by an attempt that was killed after the rename: the same state.
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)
    for old in folder.glob("step-*"):
        if old != whole:
            shutil.rmtree(old)


def read_place(draft: Draft, n_layers: int) -> tuple[Place, list[int]]:
    """Place in the stream, and latents resampled so far of each layer; the start without a checkpoint."""
    last = _last(draft)
    if last is None:
        return Place(), [0] * n_layers
    told = json.loads((last / _PLACE).read_text())
    return Place(**told["place"]), told["resampled"]


def restore(draft: Draft, trainers: list[Any]) -> bool:
    """Weights and trainers from the last whole checkpoint; False where there is none."""
    last = _last(draft)
    if last is None:
        return False
    for index, trainer in enumerate(trainers):
        trainer.sae.load_weights_from_checkpoint(last / str(index))
        trainer.load_trainer_state(last / str(index))
    return True


def _last(draft: Draft) -> Path | None:
    return max((draft.path / FOLDER).glob("step-*"), default=None)
