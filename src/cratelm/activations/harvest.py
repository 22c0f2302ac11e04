"""`cratelm harvest`: excerpts and statistics of every neuron of a model, from one pass over tokens.

Shape legend: B sequences, T positions, H neurons of a layer, L layers.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import SearchPlan, random_positions
from cratelm.activations.calibration import Calibration, calibrate
from cratelm.activations.config import HarvestConfig, last_name
from cratelm.activations.layer_harvest import ExcerptSizes, LayerHarvest
from cratelm.activations.out_of_context import out_of_context_rows
from cratelm.activations.store import (
    EXCERPT_SCHEMA,
    NEURONS_A_GROUP,
    SUMMARY_SCHEMA,
    excerpts_path,
    summaries_path,
)
from cratelm.activations.tables import excerpt_rows, excerpt_table, summary_table
from cratelm.errors import InputError
from cratelm.models import Site, site_of
from cratelm.models.latents import latents_of
from cratelm.models.open import LoadedModel, load_on, sequence_length
from cratelm.models.sites import hooked
from cratelm.models.sizes import hub_commit
from cratelm.records import Split
from cratelm.runs import Completion, Draft, Run, hash_file, hash_json, identity_of, write_json
from cratelm.runs.names import latents_name, set_name
from cratelm.tokens.shards import TokenStore, check_vocabulary

HUB = "hub:"
"""begins the identity of a Hub model, hub:NAME@COMMIT"""


@dataclass(frozen=True)
class HarvestResult:
    """What a harvest found."""

    path: Path
    """folder of the files (`cratelm.activations.store` reads them)"""
    site: str
    neurons: tuple[int, ...]
    """[L] neurons of each layer"""
    tokens: dict[str, int]
    """tokens searched in each split, end marks left out"""
    dead: dict[str, int]
    """neurons never above 0, by split"""


def harvest(config: HarvestConfig) -> HarvestResult:
    """Runs the stage; a finished one is read back.

    Raises `InputError` for a model, site or tokenizer that does not fit.
    """
    run = Run(config.run)
    tokens = run.stage("tokens").require("tokenize")
    source, made = model_source(config, run)
    stage = run.stage("activations", harvest_name(config))
    inputs: dict[str, Completion | str] = {"tokens": tokens, "model": made}
    autoencoder = None
    if config.sae:
        autoencoder, inputs["sae"] = _sae_source(config, run)
    if stage.is_finished(config, inputs, force=config.force):
        return _result(stage.path, stage.require("harvest").results)
    model = load_for(source, identity_of(made), config)
    store = TokenStore(run.path / "tokens")
    check_vocabulary(store, model.config.vocab_size)
    site = latents_of(model, autoencoder) if autoencoder else site_of(model, config.site)
    with stage.write(config, inputs) as draft:
        _write_splits(config, store, model, site, stage.name, draft)
        results = draft.results
    return _result(stage.path, results)


def harvest_name(config: HarvestConfig) -> str:
    """Name of the harvest in the run: of latents `MODEL+SAE`."""
    if config.name:
        return config.name
    model = last_name("--model", config.model)
    return latents_name(model, last_name("--sae", config.sae)) if config.sae else model


def harvest_split(
    model: PreTrainedModel,
    site: Site,
    plan: SearchPlan,
    pilots: list[Calibration],
    sizes: ExcerptSizes,
    batch_tokens: int = 8_192,
    quiet: bool = False,
) -> list[LayerHarvest]:
    """One pass over the tokens of `plan`, the head left out: what is kept of each layer [L]."""
    spans = plan.text_spans()
    layers = [
        LayerHarvest(
            pilot, random_positions(spans, number, h, sizes.random, plan.seed), sizes, number
        )
        for pilot, number, h in zip(pilots, site.layer_numbers, site.n_neurons, strict=True)
    ]
    progress = tqdm(
        total=plan.n_tokens(),
        desc=f"harvest {plan.name}",
        unit="tok",
        unit_scale=True,
        disable=quiet,
    )
    with torch.no_grad(), progress:
        for batch in plan.batches(batch_tokens, model.device):
            with hooked(model, site, lambda layer, a, b=batch: layers[layer].add(a, b)):
                model.base_model(input_ids=batch.input_ids, use_cache=False)
            progress.update(batch.input_ids.numel())
    return layers


def _write_splits(
    config: HarvestConfig,
    store: TokenStore,
    model: PreTrainedModel,
    site: Site,
    name: str,
    draft: Draft,
) -> None:
    sizes = ExcerptSizes(
        config.top, config.random, config.per_bin, config.context, config.short_context
    )
    pilots: list[Calibration] = []
    results: dict[str, dict[str, int]] = {"tokens": {}, "dead": {}}
    length = sequence_length(LoadedModel(config.model, "", model), config.sequence_length)
    for split in ("fit", "held_out"):
        plan = _plan(config, store, split, length)
        # both splits share the bins that the first one's pilot set
        pilots = pilots or calibrate(model, site, plan, config.pilot_tokens, config.batch_tokens)
        layers = harvest_split(model, site, plan, pilots, sizes, config.batch_tokens, config.quiet)
        _write(draft.path, plan, layers, model, site, name)
        results["tokens"][split] = layers[0].n_tokens
        results["dead"][split] = sum(int((h.maximum <= 0).sum()) for h in layers)
    draft.results.update(results, site=site.name, neurons=list(site.n_neurons))
    # for what is measured on the same neurons later
    draft.results.update(sequence_length=length, device=config.device)
    told = asdict(replace(site, autoencoders=()))
    del told["autoencoders"]
    write_json(draft.path / "sites.json", {**told, "layers": site.layer_numbers})


def _write(
    folder: Path,
    plan: SearchPlan,
    layers: list[LayerHarvest],
    model: PreTrainedModel,
    site: Site,
    name: str,
) -> None:
    """Writes a split. Held-out excerpts are joined by top tokens out of their context."""
    alone = out_of_context_rows(model, site, plan, layers) if plan.name == "held_out" else None
    with (
        pq.ParquetWriter(summaries_path(folder, plan.name), SUMMARY_SCHEMA) as summaries,
        pq.ParquetWriter(
            excerpts_path(folder, plan.name), EXCERPT_SCHEMA, compression="zstd"
        ) as excerpts,
    ):
        for place, (layer, kept) in enumerate(zip(site.layer_numbers, layers, strict=True)):
            summaries.write_table(summary_table(kept, name, site.name, layer))
            for low in range(0, kept.n_neurons, NEURONS_A_GROUP):
                high = min(low + NEURONS_A_GROUP, kept.n_neurons)
                rows = excerpt_rows(kept, low, high)
                if alone is not None:
                    rows.append(alone[place].between(low, high))
                excerpts.write_table(excerpt_table(rows, plan.split, name, site.name, layer))


def _plan(config: HarvestConfig, store: TokenStore, split: Split, length: int) -> SearchPlan:
    tokens = store.split(split)
    if tokens.n_tokens == 0:
        raise InputError(f"split {split} holds no tokens: tokenize more text or raise its share")
    return SearchPlan.of(tokens, split, store.eot_id, length, config.tokens, config.seed)


def model_source(config: HarvestConfig, run: Run) -> tuple[str | Path, Completion | str]:
    """Where to load the model from, and the record of a model of the run, else the identity of a
    folder or a Hub id."""
    folder = Path(config.model)
    is_name = "/" not in config.model and not config.model.startswith(".")
    # a model of the run goes before a folder of the same name that happens to lie here
    if is_name and (run.stage("model", config.model).completion() or not folder.is_dir()):
        stage = run.stage("model", config.model)
        return stage.path, stage.require("train")
    if folder.is_dir():
        return folder, folder_identity(folder)
    return config.model, f"{HUB}{config.model}@{hub_commit(config.model)}"


def folder_identity(folder: Path) -> str:
    """sha256 over the configuration and weight files of a model's folder."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".bin")]
    return hash_json({p.name: hash_file(p) for p in files})


def revision_of(identity: str) -> str | None:
    """The commit in the identity of a Hub model; None for other models, and in runs of version 0.1.0."""
    return (
        (identity.rpartition("@")[2] or None)
        if identity.startswith(HUB) and "@" in identity
        else None
    )


def _sae_source(config: HarvestConfig, run: Run) -> tuple[Path, Completion | str]:
    """Where the autoencoders lie, and the record of those of the run, else the identity of a folder."""
    assert config.sae is not None
    stage = run.stage(
        "sae", set_name(last_name("--model", config.model), last_name("--sae", config.sae))
    )
    if "/" not in config.sae and stage.completion() is not None:
        return stage.path, stage.require("sae train")
    folder = Path(config.sae)
    if not folder.is_dir():
        raise InputError(
            f"--sae {config.sae} is neither a folder nor finished in the run ({stage.path}):"
            f" type `cratelm sae train --run {run.path} --model {config.model}` first"
        )
    return folder, autoencoder_identity(folder)


def autoencoder_identity(folder: Path) -> str:
    """sha256 over the configurations and weights of the autoencoders in a folder from elsewhere."""
    files = [*folder.rglob("cfg.json"), *folder.rglob("*.safetensors")]
    return hash_json({str(p.relative_to(folder)): hash_file(p) for p in sorted(files)})


def load_for(source: str | Path, identity: str, config: HarvestConfig) -> PreTrainedModel:
    """The model that `model_source` gave, of the Hub at the commit of its identity."""
    return load_on(source, config.device, config.dtype, revision_of(identity))


def _result(path: Path, results: dict) -> HarvestResult:
    return HarvestResult(
        path, results["site"], tuple(results["neurons"]), results["tokens"], results["dead"]
    )
