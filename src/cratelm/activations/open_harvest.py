"""Open the model and the site of a harvest again, to measure on the same neurons."""

from dataclasses import dataclass, replace
from pathlib import Path

from cratelm.activations.batches import SearchPlan
from cratelm.errors import InputError
from cratelm.models.latents import find_autoencoders, latents_of
from cratelm.models.open import (
    HUB,
    LoadedModel,
    ModelSource,
    check_store,
    device_of,
    find_model,
    folder_identity,
    revision_of,
    sequence_length,
)
from cratelm.models.sites import Site, site_of
from cratelm.models.sizes import hub_commit
from cratelm.records import Split, has_both_ends
from cratelm.runs import Completion, Run, Stage
from cratelm.runs.model_options import HarvestedModelOptions, SourceOptions
from cratelm.runs.reading import read_json
from cratelm.tokens.beginning import PLAIN, Beginning
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True, eq=False)
class HarvestContext:
    """The model, site and tokens of a harvest."""

    subject: LoadedModel
    site: Site
    store: TokenStore
    folder: Path
    """folder of the harvest"""
    sequence_length: int
    """tokens per sequence in the harvest, with the begin token"""
    beginning: Beginning = PLAIN
    """how sequences began in the harvest"""

    def plan(
        self, split: Split, tokens: int, seed: int, sequence_length: int | None = None
    ) -> SearchPlan:
        """Return a plan of at most `tokens` tokens of a split, in sequences that begin as in the harvest.

        `sequence_length` is by default that of the harvest.
        """
        length = sequence_length or self.sequence_length
        of_split, eot = self.store.split(split), self.store.eot_id
        return SearchPlan.of(of_split, split, eot, length, tokens, seed, self.beginning)


def open_site(
    run: Run,
    subject: LoadedModel,
    site: str | None,
    sae: str | None,
    layers: tuple[int, ...] = (),
) -> Site:
    """Return the site called `site`, or the latents of the autoencoders called `sae`, in `layers` (empty: all).

    `sae` is what `--sae` gives; with it, `site` is the site that the autoencoders read, if they do not say it. Raises
    `InputError` if there is no such site or autoencoder.
    """
    if sae is None:
        return site_of(subject.model, site, layers)
    return latents_of(subject.model, find_autoencoders(run, subject.name, sae), site).only(layers)


def _opened(run: Run, harvest: Completion, options: SourceOptions, again: str) -> LoadedModel:
    """Return the harvested model, from its location at the time and in the same precision.

    A model from the Hub is loaded at the same commit; any other is never looked up on the Hub. `again` is
    what to type to harvest it again, for messages.
    """
    name: str = harvest.config["model"]
    identity = harvest.inputs.get("model", "")
    device, dtype = _device(harvest, options.device_wanted), options.dtype_wanted
    dtype = harvest.config.get("dtype", "float32") if dtype == "auto" else dtype
    if identity.startswith(HUB):
        return _from_hub(run, name, identity, options, again).load(device, dtype)
    folder = Path(name)
    if folder.is_dir() and name not in run.models():
        if identity not in ("", folder_identity(folder)):
            raise InputError(
                f"{folder} no longer has the model that was harvested: restore its files, or {again}"
            )
        return find_model(run, name, options, from_run=False).load(device, dtype)
    if len(folder.parts) > 1:
        raise InputError(
            f"{name} does not exist: restore the folder of the model, or harvest it again"
        )
    return find_model(run, name, options).load(device, dtype)


def _from_hub(
    run: Run, name: str, identity: str, options: SourceOptions, again: str
) -> ModelSource:
    """Return the commit that was harvested. Raises `InputError` if `--revision` is another, or its code changed."""
    commit = revision_of(identity)
    if options.revision is not None:
        asked = hub_commit(name.partition("@")[0], options.revision)
        if commit is not None and asked != commit:
            raise InputError(
                f"--revision {options.revision} is commit {asked} of {name}, but {commit} was harvested: omit"
                " --revision, or harvest that revision under another --name"
            )
    of_harvest = replace(options, revision=commit or options.revision)
    source = find_model(run, name.partition("@")[0], of_harvest, from_run=False)
    if commit is not None and source.identity != identity:
        raise InputError(f"the code of {name} has changed since it was harvested: {again}")
    return source


def _with_recorded_layers(site: Site, folder: Path) -> Site:
    """Return the site with the numbers of its layers in a harvest.

    Version 0.1.0 numbered them from 0, also where the first layers of the model lack the site.
    """
    recorded = read_json(folder / "sites.json")
    if tuple(recorded.get("paths", ())) != site.paths or not recorded.get("layers"):
        return site
    numbers = tuple(recorded["layers"])
    return site if numbers == site.layer_numbers else replace(site, layers=numbers)


def _device(harvest: Completion, wanted: str) -> str:
    """Return `wanted`; for `auto` the device of the harvest, or `auto` if this machine does not have that."""
    device = harvest.results.get("device", "auto")  # absent in runs of version 0.1.0
    if wanted != "auto":
        return wanted
    try:
        device_of(device)
    except InputError:
        return "auto"
    return device


def is_measurable(stage: Stage) -> bool:
    """Return whether the model of a finished harvest can be run again; that of imported records cannot."""
    harvest = stage.require("harvest")
    return "model" in harvest.config and (stage.path / "sites.json").is_file()


def open_harvested(
    run: Run,
    name: str,
    options: SourceOptions = HarvestedModelOptions(),  # noqa: B008 - it is frozen
) -> HarvestContext:
    """Return the model, site and tokens of the harvest called `name`.

    By default the precision is that of the harvest, and so is the device if this machine has it. Raises `InputError`
    if the harvest is not finished, is stale or was imported, or if its model is missing or has changed. Models
    and autoencoders from a folder are compared here, by their content.
    """
    stage = run.stage("activations", name)
    harvest = stage.require("harvest")
    run.stage("tokens").require("tokenize")
    if not is_measurable(stage):
        raise InputError(f"{stage.path} was imported, so there is no model to run: harvest a model")
    again = f"type `{stage.command()}`"
    subject = _opened(run, harvest, options, again)
    store = TokenStore(run.stage("tokens").path)
    check_store(subject, store, run)
    # The harvest's sequence length; absent in runs of version 0.1.0.
    length = harvest.results.get("sequence_length")
    length = length or sequence_length(subject, harvest.config.get("sequence_length"))
    sae = harvest.config.get("sae")
    if sae:
        source = find_autoencoders(run, subject.name, sae)
        if source.record is None and source.identity != harvest.inputs.get("sae"):
            raise InputError(f"{sae} no longer has the autoencoders that were harvested: {again}")
    named = harvest.results.get("site", "")
    site_name = named if has_both_ends(named) else harvest.config.get("site")
    layers = tuple(harvest.config.get("layers", ()))
    site = open_site(run, subject, site_name, sae, layers)
    site = _with_recorded_layers(site, stage.path)
    beginning = Beginning.recorded(harvest.results)
    return HarvestContext(subject, site, store, stage.path, length, beginning)
