"""Read files that `torch.save` wrote without running any code that they contain."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar

from cratelm.errors import InputError

# NumPy numbers, which a training script may store in addition to tensors and plain Python values
ALLOWED_GLOBALS = [
    np.ndarray,
    np.dtype,
    _reconstruct,
    scalar,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]
_WRAPPERS = re.compile(
    r"^(?:module\.)+|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_forward_module|_checkpoint_wrapped_module)\."
)
"""what wrappers of a module put into its keys: DistributedDataParallel and DataParallel `module.` in front;
torch.compile, FSDP, Lightning's strategies and activation checkpointing a name of their own, at any depth"""


def read_torch_file(path: Path) -> Any:
    """Return the contents of a torch file, read by a loader that creates only tensors and plain values.

    Raises `InputError` if the file does not exist, is damaged, or contains anything else.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file: name a file saved by torch, such as ckpt.pt")
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the error that follows
            mapped = zipfile.is_zipfile(path)  # then optimizer states are not read into memory
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(_refused(path, str(error))) from None
    except Exception as error:  # a corrupt file can make the reader raise any exception
        message = (str(error).splitlines() or [""])[0][:120]
        raise InputError(
            f"{path} cannot be read as a torch file ({type(error).__name__}: {message}):"
            " it may be truncated or damaged; download it again"
        ) from None


def _refused(path: Path, message: str) -> str:
    """Return the error for a file that torch refused, with the name of the refused object if torch names it."""
    named = re.search(r"GLOBAL (\S+)", message) or re.search(
        r"(\S+\.\S+) was not an allowed", message
    )
    if named:
        return (
            f"{path} was refused: it contains more than tensors and plain values ({named[1]}), which"
            " could run code; ask the authors for a file of tensors"
        )
    reason = next(
        (line.strip() for line in message.splitlines() if "Unsupported" in line), "no tensors"
    )
    return f"{path} was refused: it is not a file of tensors saved by torch ({reason}); download it again"


def without_wrappers(tensors: Mapping[Any, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors by their keys without the names of wrappers, and these names, sorted.

    `module._orig_mod.transformer.wte.weight`, as DistributedDataParallel and torch.compile write it, becomes
    `transformer.wte.weight`. Raises `InputError` if two keys of the file `path` become the same.
    """
    plain: dict[str, Any] = {}
    wrappers: set[str] = set()
    for key, tensor in tensors.items():
        name, removed = str(key), True
        while removed:  # a name that becomes the first one may be `module.`, too
            found = [match[0] for match in _WRAPPERS.finditer(name)]
            wrappers.update("module." if of.startswith("module.") else of for of in found)
            name, removed = _WRAPPERS.sub("", name), bool(found)
        if name in plain:
            raise InputError(
                f"{path} has weight {name} twice, with and without the name of a wrapper ({key}): keep one"
            )
        plain[name] = tensor
    return plain, sorted(wrappers)


def check_tensor(tensor: Any, key: str, path: Path) -> None:
    """Raise `InputError` for anything but a plain tensor of finite floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"{path}: {key} is a {type(tensor).__name__}, but must be a plain tensor")
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {key} has type {tensor.dtype}, but must be floating point")
    if not tensor.isfinite().all():
        raise InputError(
            f"{path}: {key} contains numbers that are not finite: no model can compute with them"
        )
