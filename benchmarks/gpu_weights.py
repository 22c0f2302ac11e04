"""Weights that `gpu.sh` brings back: bf16, with the configuration inside, below 16 MB a file.

    python benchmarks/gpu_weights.py out/weights/crate-2l.safetensors models/crate-2l

writes a folder that `cratelm.load` and transformers read. It has no tokenizer: copy `tokenizer.json` of the run whose
tokens were carried. Give all files of a model that has more than one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cratelm import models  # registers CRATE with transformers
from cratelm.errors import InputError
from cratelm.runs.atomic import atomic_path

FILE_BYTES = 16_000_000
HEADER_BYTES = 100_000
"""more than the header of a file takes: names and shapes of the weights, and the configuration"""
MODELS = models.SIZES


def save(model: Any, folder: Path, name: str, about: dict[str, Any]) -> list[Path]:
    """Write the weights of a model in bf16, each file below 16 MB; return the files.

    Tied weights are written once. Raises `ValueError` if one weight alone is too large.
    """
    groups = _groups(_weights(model))
    texts = {
        "format": "pt",
        "config": model.config.to_json_string(use_diff=False),
        "about": json.dumps(about),
    }
    paths = []
    for number, group in enumerate(groups, 1):
        part = f"-{number}-of-{len(groups)}" if len(groups) > 1 else ""
        path = folder / f"{name}{part}.safetensors"
        with atomic_path(path) as temporary:
            save_file(group, temporary, texts)
        paths.append(path)
    return paths


def size_of(model: Any) -> int:
    """Return the bytes that `save` writes, at most."""
    weights = _weights(model)
    return sum(2 * w.numel() for w in weights.values()) + HEADER_BYTES * len(_groups(weights))


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights in bf16 on the CPU by name, one name for tied ones."""
    names = [name for name, _ in model.named_parameters()]  # has each parameter once
    state = model.state_dict()
    return {name: state[name].detach().to("cpu", torch.bfloat16).contiguous() for name in names}


def _groups(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the weights in order, in groups that fit into a file each."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    room = FILE_BYTES - HEADER_BYTES
    used = 0
    for name, weight in weights.items():
        size = 2 * weight.numel()
        if size > room:
            raise ValueError(
                f"{name} takes {size:,} bytes, more than one file of {FILE_BYTES:,} may"
            )
        if used + size > room:
            groups.append({})
            used = 0
        groups[-1][name] = weight
        used += size
    return groups


def load(paths: Sequence[Path]) -> Any:
    """Return the model, in float32, whose files are `paths`. Raises `InputError` if they are not all of one model."""
    state, configurations = {}, set()
    for path in paths:
        with safe_open(path, "pt") as file:
            configurations.add((file.metadata() or {}).get("config"))
            state |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if len(configurations) != 1 or None in configurations:
        raise InputError(f"{', '.join(map(str, paths))} are not the weights of one model of gpu.sh")
    fields = json.loads(configurations.pop())
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    needed = {name for name, _ in model.named_parameters()}
    if missing := sorted(needed - state.keys()):
        raise InputError(f"{paths[0]} lacks {missing[0]}: name all files of the model")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="all files of one model")
    parser.add_argument("folder", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        load(options.files).save_pretrained(options.folder)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{options.folder}: {', '.join(sorted(p.name for p in options.folder.iterdir()))}")


if __name__ == "__main__":
    main()
