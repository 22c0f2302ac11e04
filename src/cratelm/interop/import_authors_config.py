"""Configuration of `cratelm import authors`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.errors import InputError
from cratelm.runs import not_in_identity


@dataclass(frozen=True)
class ImportAuthorsConfig:
    """Write a checkpoint of the paper's authors, CRATE or GPT-2, as a Hugging Face folder."""

    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
    """local file, or `hub:OWNER/REPO[@REVISION][/FILE]`; OWNER/REPO[/FILE] is of the Hub where no
    local file has that name. Nothing that the file carries is executed"""
    out: Path
    """folder to write: config.json, model.safetensors, the tokenizer, README.md"""
    tokenizer: str = "gpt2"
    """`gpt2` (fetched from the Hub, else through tiktoken; what the authors' models use), the path of
    a tokenizer.json, or `none`"""
    force: bool = not_in_identity(False)
    """replace what an import or export wrote to `--out` before"""

    def __post_init__(self) -> None:
        if not self.checkpoint.strip():
            raise InputError("the checkpoint is empty: a file or a name of the Hub was expected")
        if not self.tokenizer.strip():
            raise InputError("--tokenizer is empty: gpt2, a tokenizer.json or none was expected")
