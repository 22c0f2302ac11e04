"""Names of models and of what is made of them, parsed here alone.

```
MODEL            a model of the run, and every stage of it without a language model
MODEL+SAE        latents of the autoencoders SAE on top of MODEL
MODEL@SET        explanations or scores by a language model called SET
MODEL-init       the usual name of MODEL with its initial weights: a null control
```
"""

from collections.abc import Iterable

FAMILIES = ("crate", "gpt2")
"""models of one size in both families are twins: `crate-2l` and `gpt2-2l`"""
_UNTRAINED = "-init"


def set_name(model: str, name: str) -> str:
    """Return `MODEL@NAME`; `MODEL` where `name` is empty, for results without a language model."""
    return f"{model}@{name}" if name else model


def split_set(name: str) -> tuple[str, str]:
    """Return MODEL and SET of `MODEL@SET`; SET is empty without one."""
    model, _, of_set = name.partition("@")
    return model, of_set


def sets_of(names: Iterable[str], model: str) -> list[str]:
    """Return the SETs, sorted and each once, of those of `names` that are `MODEL@SET` of `model`."""
    return sorted({s for m, s in map(split_set, names) if m == model and s})


def untrained_name(model: str) -> str:
    """Return the usual name of the null control of `model`: X-init of X, X-init+SAE of X+SAE."""
    model, plus, sae = model.partition("+")
    return f"{model}{_UNTRAINED}{plus}{sae}"


def trained_name(name: str) -> str:
    """Return X of X-init, and X+SAE of X-init+SAE; empty for every other name."""
    model, plus, sae = name.partition("+")
    return f"{model.removesuffix(_UNTRAINED)}{plus}{sae}" if model.endswith(_UNTRAINED) else ""


def null_controls(names: Iterable[str]) -> dict[str, str]:
    """Return the null controls among `names`, each with the trained model that it belongs to.

    X-init is the null control of X where X is there and is no null control itself.
    """
    given = set(names)
    found: dict[str, str] = {}
    for name in sorted(given, key=lambda n: (len(n), n)):  # X before X-init before X-init-init
        base = trained_name(name)
        if base in given and base not in found:
            found[name] = base
    return found


def family_of(name: str) -> str:
    """Return the family in which `name` can have a twin; empty for other models."""
    return next((f for f in FAMILIES if name.startswith(f"{f}-")), "")


def twin_name(name: str) -> str:
    """Return the model of the same size in the other family; empty where there is none."""
    crate, gpt2 = FAMILIES
    family = family_of(name)
    other = {crate: gpt2, gpt2: crate}.get(family, "")
    return other and other + name.removeprefix(family)


def display_order(name: str, null_of: str) -> tuple[bool, int, str]:
    """Return the sort key of a model: trained ones first, CRATE before GPT-2 before others.

    `null_of` is the model whose null control `name` is, empty for others.
    """
    family = family_of(name)
    return bool(null_of), FAMILIES.index(family) if family else len(FAMILIES), name
