"""Configuration of `cratelm import`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs import aside


@dataclass(frozen=True)
class ImportRecordsConfig:
    """Make a run of activations that were harvested elsewhere: OpenAI's NeuronRecord JSON files."""

    files: tuple[Path, ...]
    """files, or folders that are searched for .json files at any depth; one neuron a file"""
    model: str
    """name that the model gets in the run"""
    run: Path = aside(Path("runs/elsewhere"))
    """run directory, in which `tokens/` and `activations/MODEL/` are written; one import a run"""
    site: str = "mlp"
    """where in a layer these neurons live: the files do not say"""
    force: bool = aside(False)
    """import again where it was done before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("--files names nothing: a file or a folder of records was expected")
        for name in ("model", "site"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is empty: a name was expected")
