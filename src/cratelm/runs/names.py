"""Names of models and of results about them, formatted and parsed only here.

```
MODEL            a model of the run, and each of its stages without a language model
MODEL+SAE        latents of the autoencoders SAE on top of MODEL
MODEL@SET        explanations, scores, judgements or losses by a language model called SET
MODEL@SAE        in `sae/`: the autoencoders SAE of MODEL
MODEL-init       the usual name of MODEL with its initial weights: a null control
MODEL-permuted, MODEL-embeddings
                 the usual names of null controls made from the trained MODEL (`cratelm train --null`)
BASE-seedN       the usual name of MODEL with another seed than 0; BASE itself has seed 0
SIZE-frozen-PART-PART
                 the usual name of BASE with parts that keep their initial weights
```
In this order: SIZE-frozen-PART-seedN-init. A name alone does not make a null control, or a seed: the completion record
says whether a model is untrained, and which seed it has.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from cratelm.errors import InputError

FAMILIES = ("crate", "gpt2")
_VARIANT = re.compile(r"^-[a-z0-9]+(?=-\d+l(?:\W|$))")
"""the variant of a family in a name without the family, before the size"""
"""models of one size in both families are twins: `crate-2l` and `gpt2-2l`"""
NullKind = Literal["init", "permuted", "embeddings"]
NULLS: tuple[NullKind, ...] = ("init", "permuted", "embeddings")
"""null controls of a model, by the end of their usual names: its initial weights, its weights permuted inside
each tensor of the blocks, its embeddings with fresh weights for the rest"""
DerivedNull = Literal["permuted", "embeddings"]
"""null controls that are made from the trained model"""
_SEED = re.compile(r"(.+)-seed([1-9][0-9]*)")
_FROZEN = "-frozen-"
LONGEST_NAME = 200
"""bytes; file systems allow 255, of which the names of temporary files and of sets need some"""
_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that are not printed or break a line, and of halves of characters"""


def control_characters(text: str) -> list[str]:
    """Return the characters of `text` that are not printed or break a line.

    Bytes that are not UTF-8, which Python represents by lone surrogates, do not count: file names may
    have them.
    """
    bytes_in_names = range(0xDC80, 0xDD00)
    return [c for c in text if unicodedata.category(c) in _CONTROL and ord(c) not in bytes_in_names]


def problem_of(name: str) -> str:
    """Return what keeps `name` from being the name of a model, set or folder of a run, as a clause.

    An empty string for a good name.
    """
    if not name.strip():
        return "is empty"
    if control_characters(name) or not name.isprintable():
        return "has characters that are not printed"
    if "/" in name or "\\" in name:
        return "has a slash"
    if name.startswith((".", "-")):
        return f"begins with {name[0]!r}"
    size = len(os.fsencode(name))
    if size > LONGEST_NAME:
        return f"has {size:,} bytes, and at most {LONGEST_NAME} are possible"
    return ""


def check_name(option: str, name: str, *, reserved: str = "") -> None:
    """Raise `InputError`, which names the `option`, if `name` cannot be the name of a model or set.

    `reserved`: characters that the name cannot have, because they separate the parts of longer names.
    """
    problem = problem_of(name)
    separators = [character for character in reserved if character in name]
    if not problem and separators:
        problem = f"has {separators[0]!r}, which separates the parts of a longer name"
    if problem:
        shown = repr(name) if len(name) <= 60 else f"{name[:59]!r}…"
        raise InputError(f"{option} is {shown}, which {problem}: use {USABLE}")


USABLE = "letters, digits, '-', '_' or '.', beginning with a letter or digit"


def set_name(model: str, name: str) -> str:
    """Return `MODEL@NAME`; `MODEL` if `name` is empty, for results without a language model."""
    return f"{model}@{name}" if name else model


def split_set(name: str) -> tuple[str, str]:
    """Return MODEL and SET of `MODEL@SET`; SET is empty if there is none."""
    model, _, of_set = name.partition("@")
    return model, of_set


def sets_of(names: Iterable[str], model: str) -> list[str]:
    """Return SET of each `MODEL@SET` in `names` whose MODEL is `model`, sorted, without duplicates."""
    return sorted({s for m, s in map(split_set, names) if m == model and s})


def autoencoder_name(sae: str) -> str:
    """Return the name of autoencoders that `--sae` gives: the last name of a path, all of a release, RELEASE-ID.

    A path is one that exists; anything else with a slash is a release of SAELens' registry.
    """
    path = Path(sae)
    return path.name if path.is_dir() or "/" not in sae else sae.strip("/").replace("/", "-")


def latents_name(model: str, sae: str) -> str:
    """Return `MODEL+SAE`."""
    return f"{model}+{sae}"


def split_latents(name: str) -> tuple[str, str]:
    """Return MODEL and SAE of `MODEL+SAE`; SAE is empty if there is none."""
    model, _, sae = name.partition("+")
    return model, sae


def untrained_name(model: str, kind: NullKind = "init") -> str:
    """Return the usual name of a null control of `model`: X-init for X, X-init+SAE for X+SAE."""
    model, sae = split_latents(model)
    return latents_name(f"{model}-{kind}", sae) if sae else f"{model}-{kind}"


def model_name(
    size: str,
    *,
    steps: int | None,
    freeze: Iterable[str] = (),
    null: DerivedNull | None = None,
    seed: int = 0,
) -> str:
    """Return the usual name of what `cratelm train` makes with these options: crate-2l, crate-2l-seed1-init ...

    The seed of a `null` is not in its name: `size` is the name of a trained model then.
    """
    if null:
        return untrained_name(size, null)
    parts = "-".join(sorted(freeze))
    name = f"{size}{_FROZEN}{parts}" if parts else size
    name = f"{name}-seed{seed}" if seed else name
    return name if steps else untrained_name(name)


def training_words(name: str) -> list[str]:
    """Return the options of `cratelm train` that make a model with this usual name: the inverse of `model_name`.

    Steps, and all that names do not show, have their defaults.
    """
    kind, trained = null_kind(name), trained_name(name)
    if kind in ("permuted", "embeddings"):
        return ["--model", trained, "--null", kind]
    base, seed = seed_of(trained or name)
    size, _, parts = base.partition(_FROZEN)
    return [
        *("--model", size),
        *(["--freeze", *parts.split("-")] if parts else []),
        *(["--seed", str(seed)] if seed else []),
        *(["--steps", "0"] if kind else []),
    ]


def seeded_name(base: str, seed: int) -> str:
    """Return the usual name of the model called `base` with another seed: X for 0, X-seed1; X-seed1-init for X-init."""
    if not seed:
        return base
    model, sae = split_latents(base)
    kind = null_kind(model)
    if kind == "embeddings" and _FROZEN in model:
        kind = None  # the last of the frozen parts
    name = f"{trained_name(model) if kind else model}-seed{seed}"
    name = untrained_name(name, kind) if kind else name
    return latents_name(name, sae) if sae else name


def seed_of(name: str) -> tuple[str, int]:
    """Return the name with seed 0, and the seed: X-init+SAE and 1 for X-seed1-init+SAE, X and 0 for X."""
    model, sae = split_latents(name)
    kind = null_kind(model)
    found = _SEED.fullmatch(trained_name(model) if kind else model)
    if found is None:
        return name, 0
    base = untrained_name(found[1], kind) if kind else found[1]
    return latents_name(base, sae) if sae else base, int(found[2])


def null_kind(name: str) -> NullKind | None:
    """Return the kind of null control that `name` is the usual name of; None for every other name."""
    model, _ = split_latents(name)
    base, _, end = model.rpartition("-")
    if f"{base}-".endswith(_FROZEN):
        return None  # embeddings are also a part that can be frozen
    return next((kind for kind in NULLS if base and end == kind), None)


def trained_name(name: str) -> str:
    """Return X for X-init, and X+SAE for X-init+SAE, of each kind; an empty string for every other name."""
    model, sae = split_latents(name)
    kind = null_kind(name)
    if kind is None:
        return ""
    base = model.removesuffix(f"-{kind}")
    return latents_name(base, sae) if sae else base


def null_controls(names: Iterable[str], is_untrained: Callable[[str], bool]) -> dict[str, str]:
    """Return the null controls among `names`, each with the trained model that it belongs to.

    X-init is the null control of X if its record says that it is untrained, and `names` has a trained X; so
    are X-permuted and X-embeddings. A trained model that happens to be called X-init is an ordinary model.
    """
    all_names = set(names)
    untrained = {name for name in all_names if is_untrained(name)}
    pairs = ((name, trained_name(name)) for name in sorted(untrained))
    return {name: base for name, base in pairs if base in all_names - untrained}


def family_of(name: str) -> str:
    """Return the family of `name`, `crate` or `gpt2`; an empty string for models without a family."""
    return next((f for f in FAMILIES if name.startswith(f"{f}-")), "")


def is_variant(name: str) -> bool:
    """Return whether `name` is that of a variant of CRATE or GPT-2, such as crate-tssa-2l."""
    family = family_of(name)
    return bool(family and _VARIANT.match(name.removeprefix(family)))


def twin_name(name: str) -> str:
    """Return the name of the same size in the other family; an empty string without a family.

    The twin of a variant, such as crate-tssa-2l or gpt2-solu-2l, is the plain model of the other family.
    """
    crate, gpt2 = FAMILIES
    family = family_of(name)
    other = {crate: gpt2, gpt2: crate}.get(family, "")
    return other and other + _VARIANT.sub("", name.removeprefix(family))
