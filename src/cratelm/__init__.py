"""cratelm: white-box language models whose neurons can be read.

Every verb of the command line is a function of `cratelm.api`, with the same arguments:

    import cratelm

    cratelm.api.tokenize(run="runs/mine", corpus="texts/", vocab_size=2048)
    cratelm.api.train(run="runs/mine", model="crate-2l", steps=500)
    cratelm.api.harvest(run="runs/mine", model="crate-2l")

They are not functions of `cratelm` itself, because `cratelm.train` is the package of the training loop.
Models are Hugging Face models: `cratelm.build`, `cratelm.load`, `cratelm.CrateForCausalLM`;
`cratelm.steering(model, cratelm.Edit(...))` edits neurons while a model runs.
Nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cratelm import api
    from cratelm.interop.authors_checkpoint import load_authors_checkpoint
    from cratelm.models import (
        CrateConfig,
        CrateForCausalLM,
        CrateModel,
        build,
        capture,
        load,
        site_of,
    )
    from cratelm.steer.config import Edit
    from cratelm.steer.steering import steering

__all__ = [
    "CrateConfig",
    "CrateForCausalLM",
    "CrateModel",
    "Edit",
    "api",
    "build",
    "capture",
    "load",
    "load_authors_checkpoint",
    "site_of",
    "steering",
]
_MODULES = {
    "CrateConfig": "models",
    "CrateForCausalLM": "models",
    "CrateModel": "models",
    "Edit": "steer.config",
    "build": "models",
    "capture": "models",
    "load": "models",
    "load_authors_checkpoint": "interop.authors_checkpoint",
    "site_of": "models",
    "steering": "steer.steering",
}


if not TYPE_CHECKING:  # a type checker that sees `__getattr__` accepts any name

    def __getattr__(name: str) -> Any:
        """Import `name` on first use: torch and transformers take seconds, and `--help` needs neither."""

        if name == "api":
            return importlib.import_module("cratelm.api")
        if name in _MODULES:
            return getattr(importlib.import_module(f"cratelm.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'cratelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
