"""The model and the site that a harvest is of, opened again: for what is measured on the same neurons."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.activations.harvest import autoencoder_identity, folder_identity
from cratelm.errors import InputError
from cratelm.models.open import LoadedModel, check_store, open_model
from cratelm.models.sites import Site, site_of
from cratelm.runs import Run, Stage
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

    folder = _folder_of(run, subject, sae)
    if folder is None:
        stage = _sae_stage(run, subject, sae)
        stage.require("sae train")
        folder = stage.path
    return latents_of(subject.model, folder)


def _sae_stage(run: Run, subject: LoadedModel, sae: str) -> Stage:
    return run.stage("sae", set_name(Path(subject.name).name, Path(sae).name))


def _folder_of(run: Run, subject: LoadedModel, sae: str) -> Path | None:
    """The folder that `sae` names; None where it names autoencoders of the run."""
    own = "/" not in sae and _sae_stage(run, subject, sae).completion() is not None
    return None if own else Path(sae)


def _opened(run: Run, model: str, identity: str, again: str) -> LoadedModel:
    """The model that was harvested, from where it was then: never asked of the Hub if it was not from there."""
    if identity.startswith("hub:"):
        return open_model(run, model, from_run=False)
    folder = Path(model)
    if folder.is_dir() and model not in run.models():
        if folder_identity(folder) != identity:
            raise InputError(
                f"{folder} holds another model than the one that was harvested: {again}"
            )
        return open_model(run, model, from_run=False)
    if len(folder.parts) > 1:
        raise InputError(
            f"{model} is not there: put the folder of the model back, or harvest it again"
        )
    return open_model(run, model)


def open_harvested(run: Run, name: str) -> HarvestContext:
    """The model, site and tokens of the harvest called `name`.

    Raises `InputError` where the harvest is not finished, stale or imported, or its model is gone or
    another one. Models and autoencoders from a folder are compared here, by their content.
    """
    stage = run.stage("activations", name)
    harvest = stage.require("harvest")
    told: dict[str, Any] = harvest.config
    run.stage("tokens").require("tokenize")
    if "model" not in told or not (stage.path / "sites.json").is_file():
        raise InputError(
            f"{stage.path} was imported, without a model that could be run: harvest a model"
        )
    again = f"type `{stage.command()}`"
    subject = _opened(run, told["model"], harvest.inputs.get("model", ""), again)
    store = TokenStore(run.stage("tokens").path)
    check_store(subject, store, run)
    length = told.get("sequence_length") or subject.longest or 1024
    sae = told.get("sae")
    site = open_site(run, subject, told.get("site"), sae)
    from_folder = _folder_of(run, subject, sae) if sae else None
    if from_folder and autoencoder_identity(from_folder) != harvest.inputs.get("sae"):
        raise InputError(f"{sae} holds other autoencoders than those that were harvested: {again}")
    return HarvestContext(subject, site, store, stage.path, int(length))
