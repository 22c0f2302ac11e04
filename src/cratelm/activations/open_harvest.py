"""The model and the site that a harvest is of, opened again: for what is measured on the same neurons."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.activations.harvest import HUB, folder_identity, revision_of
from cratelm.errors import InputError
from cratelm.models.open import (
    LoadedModel,
    check_store,
    device_of,
    open_model,
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
    """The site called `site`, or the latents of the autoencoders called `sae`: a name in the run, or a folder.

    Raises `InputError` where there is none.
    """
    if sae is None:
        return site_of(subject.model, site)
    from cratelm.models.latents import latents_of

    stage = run.stage("sae", set_name(Path(subject.name).name, Path(sae).name))
    if "/" in sae or stage.completion() is None:
        return latents_of(subject.model, Path(sae))
    stage.require("sae train")
    return latents_of(subject.model, stage.path)


def _opened(run: Run, harvest: Completion, device: str) -> LoadedModel:
    """The model that was harvested, from where it was then, in the same precision: never asked of the
    Hub if it was not from there, and of the Hub at the same commit."""
    model: str = harvest.config["model"]
    identity = harvest.inputs.get("model", "")
    how = {"device": device, "dtype": harvest.config.get("dtype", "float32")}
    if identity.startswith(HUB):
        revision = revision_of(identity)
        return open_model(run, model, from_run=False, revision=revision, **how)
    folder = Path(model)
    if folder.is_dir() and model not in run.models():
        if identity not in ("", folder_identity(folder)):
            raise InputError(
                f"{model} is not the model that was harvested: put its files back, or type"
                f" `cratelm harvest --run {run.path} --model {model} --force`"
            )
        return open_model(run, model, from_run=False, **how)
    if len(folder.parts) > 1:
        raise InputError(
            f"{model} is not there: put the folder of the model back, or harvest it again"
        )
    return open_model(run, model, **how)


def _device(harvest: Completion) -> str:
    """As the harvest was told, where this machine has that device."""
    wanted = harvest.results.get("device", "auto")  # not in runs of version 0.1.0
    try:
        device_of(wanted)
    except InputError:
        return "auto"
    return wanted


def open_harvested(run: Run, name: str, device: str = "auto") -> HarvestContext:
    """The model, site and tokens of the harvest called `name`, in the harvest's precision.

    `device` `auto`: that of the harvest, where this machine has it. Raises `InputError` where the harvest is not finished, was imported, or its model is gone.
    """
    stage = run.stage("activations", name)
    harvest = stage.require("harvest")
    told: dict[str, Any] = harvest.config
    run.stage("tokens").require("tokenize")
    if "model" not in told or not (stage.path / "sites.json").is_file():
        raise InputError(
            f"{stage.path} was imported, without a model that could be run: harvest a model"
        )
    subject = _opened(run, harvest, _device(harvest) if device == "auto" else device)
    store = TokenStore(run.stage("tokens").path)
    check_store(subject, store, run)
    # what the harvest read at once; not in runs of version 0.1.0
    length = harvest.results.get("sequence_length")
    length = length or sequence_length(subject, told.get("sequence_length"))
    site = open_site(run, subject, told.get("site"), told.get("sae"))
    return HarvestContext(subject, site, store, stage.path, length)
