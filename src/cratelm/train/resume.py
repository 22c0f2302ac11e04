"""What an interrupted training leaves: checkpoints, and the curves up to the last of them."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from cratelm.runs import Draft, Stage
from cratelm.runs.atomic import remove_all_but, resumable_draft, sync
from cratelm.runs.stage import PLAN
from cratelm.train.log import METRICS, TIMING, UNHASHED

FOLDER = "checkpoints"
"""folder in the draft with a folder `step-N` for each checkpoint"""


def found(draft: Path) -> list[Path]:
    """Return the complete checkpoints in the folder of a draft, oldest first."""
    return sorted((draft / FOLDER).glob("step-*"))


def step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_later_files(draft: Draft) -> None:
    """Remove what a killed attempt wrote after its last checkpoint, which is written again: maybe by other names.

    Only the curves up to the checkpoint can be used; `Log` drops their later lines. Without a checkpoint
    nothing can be used.
    """
    curves = {METRICS, *UNHASHED} if found(draft.path) else set()
    remove_all_but(draft.path, {PLAN, FOLDER, *curves})


def sync_curves(draft: Draft) -> None:
    """Write the curves to disk: a checkpoint stands for their lines up to its step, which come only once."""
    for name in (METRICS, TIMING):
        if (draft.path / name).is_file():
            sync(draft.path / name)


@contextlib.contextmanager
def without_worthless_draft(stage: Stage) -> Iterator[None]:
    """Remove the stage's draft if an error is raised before the first checkpoint: nothing in it can be used."""
    draft = resumable_draft(stage.path)
    with stage.lock():
        try:
            yield
        except BaseException:
            if not found(draft):
                shutil.rmtree(draft, ignore_errors=True)
            raise
