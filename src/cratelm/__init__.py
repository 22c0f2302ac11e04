"""cratelm: white-box language models whose neurons can be read.

Every verb of the command line is a function here, with the same arguments:

    import cratelm

    cratelm.tokenize(run="runs/mine", corpus="texts/", vocab_size=2048)
    cratelm.train(run="runs/mine", model="crate-2l", steps=500)
    cratelm.harvest(run="runs/mine", model="crate-2l")

Models are Hugging Face models: `cratelm.build`, `cratelm.load`, `cratelm.CrateForCausalLM`.
Nothing heavy is imported before it is used.
"""

from typing import Any

_MODELS = (
    "CrateConfig",
    "CrateForCausalLM",
    "CrateModel",
    "build",
    "load",
    "load_authors_checkpoint",
    "site_of",
    "capture",
)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _MODELS:
        from cratelm import models

        return getattr(models, name)
    from cratelm.cli import VERBS, verb_function

    if name in VERBS:
        return verb_function(name)
    raise AttributeError(f"module 'cratelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    from cratelm.cli import VERBS

    return sorted([*globals(), *_MODELS, *VERBS])
