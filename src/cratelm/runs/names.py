"""Names of models and of what is made of them, formatted and parsed here alone.

```
MODEL            a model of the run, and every stage of it without a language model
MODEL+SAE        latents of the autoencoders SAE on top of MODEL
MODEL@SET        explanations, scores or judgements by a language model called SET
MODEL@SAE        in `sae/`: the autoencoders SAE of MODEL
MODEL-init       the usual name of MODEL with its initial weights: a null control
```
A name alone never makes a null control: whether a model is untrained is in its completion record.
"""

from collections.abc import Callable, Iterable

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


def latents_name(model: str, sae: str) -> str:
    """Return `MODEL+SAE`."""
    return f"{model}+{sae}"


def split_latents(name: str) -> tuple[str, str]:
    """Return MODEL and SAE of `MODEL+SAE`; SAE is empty without one."""
    model, _, sae = name.partition("+")
    return model, sae


def untrained_name(model: str) -> str:
    """Return the usual name of the null control of `model`: X-init of X, X-init+SAE of X+SAE."""
    model, sae = split_latents(model)
    return latents_name(model + _UNTRAINED, sae) if sae else model + _UNTRAINED


def trained_name(name: str) -> str:
    """Return X of X-init, and X+SAE of X-init+SAE; empty for every other name."""
    model, sae = split_latents(name)
    base = model.removesuffix(_UNTRAINED)
    if base in ("", model):
        return ""
    return latents_name(base, sae) if sae else base


def null_controls(names: Iterable[str], is_untrained: Callable[[str], bool]) -> dict[str, str]:
    """Return the null controls among `names`, each with the trained model that it belongs to.

    X-init is the null control of X where it is untrained by its record, and X is there and trained.
    A model that somebody trained and called X-init is a model like any other.
    """
    given = set(names)
    untrained = {name for name in given if is_untrained(name)}
    pairs = ((name, trained_name(name)) for name in sorted(untrained))
    return {name: base for name, base in pairs if base in given - untrained}


def family_of(name: str) -> str:
    """Return the family in which `name` can have a twin; empty for other models."""
    return next((f for f in FAMILIES if name.startswith(f"{f}-")), "")


def twin_name(name: str) -> str:
    """Return the model of the same size in the other family; empty where there is none."""
    crate, gpt2 = FAMILIES
    other = {crate: gpt2, gpt2: crate}.get(family_of(name), "")
    return other and other + name.removeprefix(family_of(name))
