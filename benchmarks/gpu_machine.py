"""First part of `gpu.sh`: what the machine is, and whether its device works at all."""

import platform
import subprocess
from importlib import metadata

import torch
from gpu_part import Figures, PartOptions

from cratelm.runs import git_commit

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "triton")


def measure(options: PartOptions, figures: Figures) -> None:
    """Record versions, card and driver. Raises an error if the device cannot multiply two matrices."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    figures.record("versions", versions)
    figures.record("commit", git_commit())
    figures.record("device", options.device)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch sees no GPU: type `bash benchmarks/gpu.sh --device cpu --tiny` to try the script without one"
            )
        card = torch.cuda.get_device_properties(0)
        figures.record("card", card.name)
        figures.record("memory_bytes", card.total_memory)
        figures.record("cuda", torch.version.cuda)
        figures.record("driver", _driver())
    else:
        figures.record("card", platform.processor() or platform.machine())
    ones = torch.ones(64, 64, device=options.device)
    if float((ones @ ones).sum()) != 64**3:
        raise ArithmeticError("a product of two matrices of ones is wrong on this device")


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None if nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        answer.stdout.strip().splitlines()[0]
        if answer.returncode == 0 and answer.stdout.strip()
        else None
    )
