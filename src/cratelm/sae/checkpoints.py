"""Checkpoints of autoencoders in training that a kill at any moment leaves usable.

A checkpoint is written under a temporary name and renamed when it is whole; then the one before it
is removed. It holds each layer's weights and trainer as SAELens saves them, and the place in the
stream of activations; nothing else is remembered between steps.
"""

import json
import shutil
from dataclasses import asdict
from typing import Any

from cratelm.runs import Draft, write_json
from cratelm.runs.atomic import put_in_place
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
    put_in_place(partial, whole)
    for old in folder.glob("step-*"):
        if old != whole:
            shutil.rmtree(old)


def restore(draft: Draft, trainers: list[Any]) -> tuple[Place, list[int]] | None:
    """Weights and trainers from the last whole checkpoint; None where there is none.

    Returned: the place in the stream, and of each layer the latents resampled so far.
    """
    last = max((draft.path / FOLDER).glob("step-*"), default=None)
    if last is None:
        return None
    for index, trainer in enumerate(trainers):
        trainer.sae.load_weights_from_checkpoint(last / str(index))
        trainer.load_trainer_state(last / str(index))
    told = json.loads((last / _PLACE).read_text(encoding="utf-8"))
    return Place(**told["place"]), told["resampled"]
