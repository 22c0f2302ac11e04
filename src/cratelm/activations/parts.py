"""Parts of a harvest: shares of the tokens that are collected separately, on several machines or one after another.

A part is a stage, `parts/NAME@I-of-N/`, so that it is written, hashed, skipped and found stale as every other. It holds
for each split and layer what the batches of the part added (`LayerHarvest.state`), and the calibration, in safetensors.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cratelm.activations.calibration import Calibration
from cratelm.activations.config import check_part
from cratelm.activations.layer_harvest import STATISTICS, LayerHarvest
from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.runs import Run, Stage
from cratelm.runs.names import set_name, split_set
from cratelm.runs.ranks import Share
from cratelm.runs.reading import reading

_CALIBRATION = "calibration."
"""begins the names of the tensors that are not of the harvest's state"""


def part_share(part: str) -> Share:
    """Return the share of the tokens that `I/N` names."""
    number, of = map(int, part.split("/"))
    return Share(number - 1, of)


def part_stage(run: Run, harvest: str, part: str) -> Stage:
    """Return the stage of the part `I/N` of a harvest."""
    return run.stage("parts", set_name(harvest, part.replace("/", "-of-")))


def parts_of(run: Run, harvest: str) -> dict[str, Stage]:
    """Return the finished parts of a harvest, by `I/N`, in their order."""
    found = []
    for name in run.models("parts"):
        of, part = split_set(name)
        part = part.replace("-of-", "/")
        if of == harvest and _is_part(part):
            found.append(part)
    found.sort(key=lambda part: (part_share(part).of, part_share(part).number))
    return {part: part_stage(run, harvest, part) for part in found}


def _is_part(part: str) -> bool:
    try:
        check_part(part)
    except InputError:
        return False
    return True


def write_part(folder: Path, split: Split, layers: list[LayerHarvest]) -> None:
    """Write what a part has of a split: a file per layer. Memory: one layer."""
    for place, layer in enumerate(layers):
        calibration = {
            f"{_CALIBRATION}{f.name}": getattr(layer.calibration, f.name).cpu().contiguous()
            for f in dataclasses.fields(layer.calibration)
        }
        save_file({**layer.state(), **calibration}, _file(folder, split, place))


def read_part(
    folder: Path, split: Split, place: int
) -> tuple[dict[str, torch.Tensor], Calibration]:
    """Return the state of a part's harvest in one layer, and its calibration. Memory: this layer."""
    path = _file(folder, split, place)
    with reading(path, "the tensors of a part of a harvest") as sound:
        tensors = load_file(sound)
        names = [f.name for f in dataclasses.fields(Calibration)]
        calibration = Calibration(*(tensors.pop(f"{_CALIBRATION}{name}") for name in names))
        tensors.setdefault("octaves", torch.zeros(0, dtype=torch.int64))  # of older versions
        for name in STATISTICS:
            tensors[name]  # of older versions: some have fewer
    return tensors, calibration


def _file(folder: Path, split: Split, place: int) -> Path:
    return folder / f"{split}-{place}.safetensors"
