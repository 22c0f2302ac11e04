"""Options of `cratelm view`. Imports nothing heavy, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.errors import InputError
from cratelm.runs import at_least, not_in_identity
from cratelm.runs.model_options import HarvestedModelOptions


@dataclass(frozen=True)
class ViewConfig(HarvestedModelOptions):
    """Browse the neurons of one or several runs in a web browser on this machine.

    Serves pages until Ctrl-C, or writes them into a folder with --static.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUNS")]] = (
        not_in_identity((Path("runs/demo"),))
    )
    """run directories"""
    host: str = not_in_identity("127.0.0.1")
    """address to listen on. With an address other than this machine's own (127.0.0.1), everyone who can reach
    it can read the runs and use the model: there is no password"""
    port: int = not_in_identity(8000)
    """port to listen on"""
    live: bool = not_in_identity(True)
    """enable the live page, which runs the model: activations on a text that you type, and steering"""
    static: Path | None = not_in_identity(None)
    """write the pages into this new folder and exit. Any web host can serve the folder, and a browser can
    open it from disk"""
    neurons: int = not_in_identity(64)
    """with --static: number of neurons per layer that get a page, the best explained first; 0: all"""
    force: bool = not_in_identity(False)
    """with --static: replace the pages of an earlier export"""
    quiet: bool = not_in_identity(False)
    """with --static: no progress bar"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise InputError("no run is named: type `cratelm view runs/NAME`")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port is {self.port}: it must be between 0 and 65535")
        at_least(self, {"neurons": 0})
