"""Open the model and the site of a harvest again, to measure on the same neurons."""

from dataclasses import dataclass
from pathlib import Path

from cratelm.activations.harvest import autoencoder_identity
from cratelm.errors import InputError
from cratelm.models.open import (
    HUB,
    LoadedModel,
    check_store,
    device_of,
    find_model,
    folder_identity,
    revision_of,
    sequence_length,
)
from cratelm.models.sites import Site, site_of
from cratelm.runs import Completion, Run
from cratelm.runs.names import set_name
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True, eq=False)
class HarvestContext:
    """A model of which a run has a harvest."""

    subject: LoadedModel
    site: Site
    store: TokenStore
    folder: Path
    """of the harvest"""
    sequence_length: int
    """tokens that it read at once"""


def open_site(run: Run, subject: LoadedModel, site: str | None, sae: str | None) -> Site:
    """Return the site called `site`, or the latents of the autoencoders called `sae`.

    `sae` is a name in the run, or a folder.
    Raises `InputError` where there is none.
    """
    if sae is None:
        return site_of(subject.model, site)
    from cratelm.models.latents import latents_of

    stage = run.stage("sae", _sae_name(subject, sae))
    of_run = "/" not in sae and stage.completion() is not None
    return latents_of(subject.model, stage.path if of_run else Path(sae))


def _sae_name(subject: LoadedModel, sae: str) -> str:
    return set_name(Path(subject.name).name, Path(sae).name)


def _opened(run: Run, harvest: Completion, device: str, again: str) -> LoadedModel:
    """Return the model that was harvested, from where it was then and in the same precision.

    It is never looked for on the Hub if it was not from there, and on the Hub at the same commit.
    """
    name: str = harvest.config["model"]
    identity = harvest.inputs.get("model", "")
    dtype = harvest.config.get("dtype", "float32")
    if identity.startswith(HUB):
        source = find_model(run, name, from_run=False, revision=revision_of(identity))
        return source.load(device, dtype)
    folder = Path(name)
    if folder.is_dir() and name not in run.models():
        if identity not in ("", folder_identity(folder)):
            raise InputError(
                f"{folder} holds another model than the one that was harvested: put its files back, or"
                f" {again}"
            )
        return find_model(run, name, from_run=False).load(device, dtype)
    if len(folder.parts) > 1:
        raise InputError(
            f"{name} does not exist: put the folder of the model back, or harvest it again"
        )
    return find_model(run, name).load(device, dtype)


def _device(harvest: Completion) -> str:
    """Return the device of the harvest, `auto` where this machine has none of this name."""
    wanted = harvest.results.get("device", "auto")  # not in runs of version 0.1.0
    try:
        device_of(wanted)
    except InputError:
        return "auto"
    return wanted


def open_harvested(run: Run, name: str, device: str = "auto") -> HarvestContext:
    """Return the model, site and tokens of the harvest called `name`, in the harvest's precision.

    `device` `auto`: that of the harvest, where this machine has it. Raises `InputError` where the
    harvest is not finished, stale or imported, or its model is gone or another one. Models and
    autoencoders from a folder are compared here, by their content.
    """
    stage = run.stage("activations", name)
    harvest = stage.require("harvest")
    run.stage("tokens").require("tokenize")
    if "model" not in harvest.config or not (stage.path / "sites.json").is_file():
        raise InputError(
            f"{stage.path} was imported without a model that could be run: harvest a model"
        )
    again = f"type `{stage.command()}`"
    wanted = _device(harvest) if device == "auto" else device
    subject = _opened(run, harvest, wanted, again)
    store = TokenStore(run.stage("tokens").path)
    check_store(subject, store, run)
    # What the harvest read at once; not in runs of version 0.1.0.
    length = harvest.results.get("sequence_length")
    length = length or sequence_length(subject, harvest.config.get("sequence_length"))
    sae = harvest.config.get("sae")
    site = open_site(run, subject, harvest.config.get("site"), sae)
    named = run.stage("sae", _sae_name(subject, sae)) if sae and "/" not in sae else None
    from_folder = named is None or named.completion() is None
    if sae and from_folder and autoencoder_identity(Path(sae)) != harvest.inputs.get("sae"):
        raise InputError(f"{sae} holds other autoencoders than those that were harvested: {again}")
    return HarvestContext(subject, site, store, stage.path, length)
