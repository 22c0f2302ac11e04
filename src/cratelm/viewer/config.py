"""Options of `cratelm view`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity


@dataclass(frozen=True)
class ViewConfig:
    """Browse the neurons of one or several runs in a web browser on this machine.

    Serves pages until Ctrl-C, or writes them into a folder with --static.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUNS")]] = (
        not_in_identity((Path("runs/demo"),))
    )
    """run directories"""
    host: str = not_in_identity("127.0.0.1")
    """address to listen on. With any other than this machine's own, everyone who can reach it can read the
    runs and use the model: there is no password"""
    port: int = not_in_identity(8000)
    """port to listen on"""
    live: bool = not_in_identity(True)
    """enable the live page, which needs the model itself: activations of a typed text, steering"""
    static: Path | None = not_in_identity(None)
    """write the pages into this new folder and stop: for any web host, or to open from disk"""
    neurons: int = not_in_identity(64)
    """with --static: neurons per layer that get a page, the best explained first; 0: all"""
    force: bool = not_in_identity(False)
    """with --static: replace pages that an earlier export wrote"""
    quiet: bool = not_in_identity(False)
    """with --static: no progress bar"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run is named: type `cratelm view runs/NAME`")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port is {self.port}, 0 to 65535 was expected")
        at_least(self, {"neurons": 0})
