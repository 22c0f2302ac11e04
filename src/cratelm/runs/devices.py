"""Devices of this machine, and their memory. torch is imported on first use: `--help` needs none."""

from typing import TYPE_CHECKING, Any

from cratelm.errors import InputError
from cratelm.runs.memory import available_memory

if TYPE_CHECKING:
    import torch


def device_of(wanted: str) -> "torch.device":
    """Return the device called `wanted`; for `auto`, an accelerator if there is one, else the CPU.

    Raises `InputError`, which lists the devices, for one that this machine does not have.
    """
    import torch

    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        # Statistics are sums in float64, which MPS does not support.
        usable = accelerator is not None and accelerator.type != "mps"
        return torch.device(accelerator.type if accelerator is not None and usable else "cpu")
    names = devices()
    try:
        device = torch.device(wanted)
    except RuntimeError:  # its message lists all devices that torch has heard of
        device = None
    reason = "there is no such device"
    if device is not None and device.type in {name.partition(":")[0] for name in names}:
        try:
            torch.zeros(1, device=device)
            return device
        except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    raise InputError(
        f"--device {wanted} cannot be used on this machine ({reason}): choose from"
        f" {', '.join(names)}, or type --device auto"
    )


def devices() -> list[str]:
    """Return the devices of this machine, as `--device` names them: the CPU, then accelerators."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    return ["cpu", *(f"{accelerator.type}:{number}" for number in range(count))]


def available_on(device: Any) -> int | None:
    """Return the bytes that can still be allocated on a `torch.device`; None if that is unknown."""
    import torch

    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # torch keeps what was freed, and uses it for the next tensor
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
