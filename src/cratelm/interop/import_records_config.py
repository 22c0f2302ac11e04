"""Configuration of `cratelm import`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs import not_in_identity


@dataclass(frozen=True)
class ImportRecordsConfig:
    """Make a run of activations that were harvested elsewhere: OpenAI's NeuronRecord JSON files."""

    files: tuple[Path, ...]
    """files, or folders that are searched for .json files at any depth; one neuron a file"""
    model: str
    """name that the model gets in the run"""
    run: Path = not_in_identity(Path("runs/elsewhere"))
    """run directory, in which `tokens/` and `activations/MODEL/` are written; one import a run"""
    site: str = "mlp"
    """where in a layer these neurons live: the files do not say"""
    force: bool = not_in_identity(False)
    """import again where it was done before"""
    quiet: bool = not_in_identity(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("--files names nothing: a file or a folder of records was expected")
        for name in ("model", "site"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is empty: a name was expected")
