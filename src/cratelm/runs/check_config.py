"""Options of `cratelm check`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.runs import Options, not_in_identity


@dataclass(frozen=True)
class CheckConfig(Options):
    """Verify a run: every file against its recorded hash, and whether anything is stale or left over.

    Reads every file and changes no result. The exit status is 0 if all is well, 4 if something is stale or left
    over, and 5 if something is damaged.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]] = not_in_identity(
        Path("runs/default")
    )
    """run directory"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""
