"""Configurations of `cratelm export`. Imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import InputError
from cratelm.records import parse_neuron_ids
from cratelm.runs import aside

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class ExportRecordsConfig:
    """Write the excerpts of a harvest as OpenAI's NeuronRecord JSON, a file a neuron."""

    model: str
    """name of the model in the run"""
    out: Path
    """folder to write, as LAYER/NEURON.json"""
    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest of `--model`"""
    layers: tuple[int, ...] = ()
    """layers to write, from 0; left out: all"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX, such as 0:17 1:5"""
    force: bool = aside(False)
    """replace what an export wrote to `--out` before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        _check_layers(self.layers, self.only)


@dataclass(frozen=True)
class ExportNeuronpediaConfig:
    """Write neurons, excerpts, explanations and scores in the format of Neuronpedia's exports."""

    model: str
    """name of the model in the run"""
    out: Path
    """folder to write, as MODEL_ID/SOURCE_ID/..., and config/"""
    run: Path = aside(Path("runs/default"))
    """run directory, holding the harvest of `--model` and what explains and scores it"""
    layers: tuple[int, ...] = ()
    """layers to write, from 0; left out: all"""
    only: tuple[str, ...] = ()
    """these neurons alone, as LAYER:INDEX, such as 0:17 1:5"""
    model_id: str = ""
    """id of the model in Neuronpedia: letters, digits, `-` and `_`; left out: the model's name, with
    other characters as `-`, in small letters"""
    source_set: str = ""
    """name of the neurons' set; a layer of it is the source LAYER-SET; left out: the site"""
    excerpts: int = 20
    """excerpts written of each kind, bin and split: the highest, or the first drawn"""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """id of a user in the Neuronpedia that imports; the default is the one that Neuronpedia's own
    conversion of dashboards falls back to"""
    creator_name: str = "cratelm"
    """who is shown as the creator"""
    force: bool = aside(False)
    """replace what an export wrote to `--out` before"""
    quiet: bool = aside(False)
    """no progress bar"""

    def __post_init__(self) -> None:
        _check_layers(self.layers, self.only)
        if self.excerpts < 1:
            raise InputError(f"--excerpts is {self.excerpts}: 1 or more was expected")
        for name in ("model_id", "source_set"):
            value = getattr(self, name)
            if value and not _ID.fullmatch(value):
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} is {value!r}: 1 to 128 letters, digits, '-' or '_' were expected"
                )


def _check_layers(layers: tuple[int, ...], only: tuple[str, ...]) -> None:
    """Raises `InputError` for a choice that no harvest can have."""
    if layers and only:
        raise InputError("--layers and --only: one of the two was expected")
    wrong = [layer for layer in layers if layer < 0]
    if wrong:
        raise InputError(f"--layers {wrong[0]}: numbers from 0 were expected")
    parse_neuron_ids("--only", only)
