"""Training with weights, gradients and optimizer states split over the processes (FSDP2).

Each tensor is split along its first dimension; the blocks and the rest of the model are gathered just before they
are used. A process holds 1 / R of 16 bytes per weight and one block's weights. The products are those of one
process: weights are gathered whole and in 32 bits, and autocast does the rest as it does without sharding.

Shape legend: R processes.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cratelm.errors import InputError
from cratelm.train.losses import NextTokenLoss

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: NextTokenLoss, accelerator: Accelerator, *, compiled: bool) -> NextTokenLoss:
    """Split the model's tensors over all processes, in place, and return it: blocks each, then all others.

    Raises `InputError` for more processes than the smallest matrix has rows.
    """
    least = min(len(p) for p in model.parameters() if p.ndim == 2)
    if accelerator.num_processes > least:
        raise InputError(
            f"--shard splits each matrix by rows, but the smallest of this model has {least} rows, and there are"
            f" {accelerator.num_processes} processes: omit --shard, or launch fewer processes"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(accelerator.device)
    for block in blocks(model):
        if compiled:
            block.compile()  # a graph over all blocks would break at each gathering
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if accelerator.mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    return model


def blocks(model: NextTokenLoss) -> list[nn.Module]:
    """Return the blocks of the language model: the modules that may not be split further."""
    names = set(model.model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has split the model."""
    return isinstance(model, FSDPModule)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Return the gathered weights of a sharded model, tied ones once; empty on all processes but the first."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in model.named_parameters()}
    weights = get_model_state_dict(model, options=WHOLE)
    return {name: weight for name, weight in weights.items() if name not in tied}


def load_whole_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole weights, which each process has, into a sharded model."""
    set_model_state_dict(model, weights, options=WHOLE)


def split_like(value: Any, parameter: torch.Tensor) -> Any:
    """Return a whole tensor of an optimizer's state split as its parameter is; other values as they are."""
    if isinstance(parameter, DTensor) and getattr(value, "shape", None) == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def whole_number(value: Any) -> Any:
    """Return a number that is a sum over processes, such as the norm of a gradient, as a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
