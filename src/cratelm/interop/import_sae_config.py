"""Configuration of `cratelm import sae`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.errors import InputError
from cratelm.runs import not_in_identity


@dataclass(frozen=True)
class ImportSaeConfig:
    """Write a sparse autoencoder of the paper's authors as a folder that SAELens reads too."""

    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]]
    """local file NAME.pt, or `hub:OWNER/REPO[@REVISION][/FILE]`. Nothing that it carries is executed"""
    out: Path
    """folder to write: cfg.json, sae_weights.safetensors, README.md"""
    config: Path | None = None
    """its settings; left out: NAME_cfg.json beside the file"""
    site: str = ""
    """where in the model its inputs live, as `cratelm harvest --site` takes it; left out: from the
    settings' act_name"""
    force: bool = not_in_identity(False)
    """replace what an import or export wrote to `--out` before"""

    def __post_init__(self) -> None:
        if not self.file.strip():
            raise InputError("the file is empty: NAME.pt or a name of the Hub was expected")
