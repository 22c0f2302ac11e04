"""cratelm: white-box language models whose neurons can be read.

Every verb of the command line is a function here, with the same arguments (`import records` is
`import_records`):

    import cratelm

    cratelm.tokenize(run="runs/mine", corpus="texts/", vocab_size=2048)
    cratelm.train(run="runs/mine", model="crate-2l", steps=500)
    cratelm.harvest(run="runs/mine", model="crate-2l")

Models are Hugging Face models: `cratelm.build`, `cratelm.load`, `cratelm.CrateForCausalLM`.
Nothing heavy is imported before it is used.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

_MODELS = (
    "CrateConfig",
    "CrateForCausalLM",
    "CrateModel",
    "build",
    "capture",
    "load",
    "load_authors_checkpoint",
    "site_of",
)
_VERB_ROOMS = ("train", "evaluate", "explain", "score", "report", "steer")
"""rooms that bear the name of a verb"""


class _Room(ModuleType):
    """A room that is a verb too: `cratelm.train(...)` trains, `cratelm.train.config` is a module.

    `cratelm.steer(model, Edit(...), ...)`, with a model, is the context manager
    `cratelm.steer.steering.steering`; with the verb's fields it is the verb.
    """

    def __call__(self, *given: Any, **fields: Any) -> Any:
        if given and self.__name__ == "cratelm.steer":
            return importlib.import_module("cratelm.steer.steering").steering(*given, **fields)
        return _verb(self)(*given, **fields)

    @property
    def __signature__(self) -> Any:
        return _verb(self).__signature__


class _Package(ModuleType):
    """The package: importing a room of `_VERB_ROOMS` makes it callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERB_ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


def _verb(room: ModuleType) -> Any:
    from cratelm.cli import verb_function

    return verb_function(room.__name__.removeprefix("cratelm."))


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _MODELS:
        return getattr(importlib.import_module("cratelm.models"), name)
    if name in _VERB_ROOMS:
        return importlib.import_module(f"cratelm.{name}")
    from cratelm.cli import VERBS, function_name, verb_function

    for verb in VERBS:
        if function_name(verb) == name:
            return verb_function(verb)
    raise AttributeError(f"module 'cratelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    from cratelm.cli import VERBS, function_name

    return sorted({*globals(), *_MODELS, *map(function_name, VERBS)})


sys.modules[__name__].__class__ = _Package
