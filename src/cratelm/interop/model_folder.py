"""Folders that imports and exports write: whole or not at all, and nothing of others is replaced."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.runs import atomic_folder, versions, write_json

PROVENANCE = "cratelm.json"
"""where a folder comes from; `--force` replaces no folder without it"""
CODE = "modeling_crate.py"
"""`crate.py` under the name that a model folder carries it"""


def check_out(out: Path, sources: tuple[Path, ...], *, force: bool) -> None:
    """Raises `InputError` where `out` cannot be written: before the work, not after it.

    `out` must not hold one of `sources`, which replacing it would remove, nor lie in one.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, a folder was expected: name another")
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {out} holds {source}, which is read: name another folder")
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--out {out} lies in {source}, which is read: name another folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / PROVENANCE).is_file():
            raise InputError(
                f"--out {out} is not empty and was not written by an import or export:"
                " name another folder"
            )
        if not force:
            raise InputError(
                f"--out {out} was written before: add --force to replace it, or name another folder"
            )


@contextlib.contextmanager
def new_folder(out: Path, provenance: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a temporary folder that becomes `out`, with `provenance`, where no error is raised."""
    with atomic_folder(out) as work:
        yield work
        write_json(work / PROVENANCE, {**provenance, "versions": versions()})


def save_model(model: Any, folder: Path) -> None:
    """`save_pretrained`, and for CRATE its code, by which transformers loads it without cratelm."""
    from transformers import logging as transformers_logging

    from cratelm.models import crate

    carries_code = isinstance(model, crate.CratePreTrainedModel)
    if carries_code:
        module = CODE.removesuffix(".py")
        model.config.auto_map = {
            "AutoConfig": f"{module}.{crate.CrateConfig.__name__}",
            "AutoModel": f"{module}.{crate.CrateModel.__name__}",
            "AutoModelForCausalLM": f"{module}.{crate.CrateForCausalLM.__name__}",
        }
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one file
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    if carries_code:
        shutil.copyfile(crate.__file__, folder / CODE)
