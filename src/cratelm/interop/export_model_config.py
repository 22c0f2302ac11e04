"""Configuration of `cratelm export model`. Imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError
from cratelm.runs import not_in_identity


@dataclass(frozen=True)
class ExportModelConfig:
    """Write a folder that transformers loads without cratelm, ready for the Hub."""

    out: Path
    """folder to write: config.json, model.safetensors, the model's code, the tokenizer, README.md"""
    model: str = ""
    """name of the model in the run"""
    run: Path = not_in_identity(Path("runs/default"))
    """run directory, holding `--model`"""
    path: Path | None = None
    """a model folder, in place of `--run` and `--model`"""
    dtype: Literal["fp32", "bf16"] | None = None
    """precision of the weights; left out: as they are"""
    push: str = not_in_identity("")
    """OWNER/REPO of the Hub to which the folder is sent as well; a repository that is not there is
    made, private"""
    force: bool = not_in_identity(False)
    """replace what an import or export wrote to `--out` before"""

    def __post_init__(self) -> None:
        if bool(self.model) == (self.path is not None):
            raise InputError("one of --model (with --run) and --path was expected")
        if self.push and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push):
            raise InputError(f"--push is {self.push!r}: OWNER/REPO was expected")
