"""`cratelm harvest`: collect excerpts and statistics of every neuron of a model in one pass over tokens.

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
    EXCERPTS,
    NEURONS_PER_GROUP,
    SUMMARIES,
    excerpts_path,
    summaries_path,
)
from cratelm.activations.tables import excerpt_rows, excerpt_table, summary_table
from cratelm.activations.topk import slot_bytes
from cratelm.errors import InputError
from cratelm.models import Site, site_of
from cratelm.models.latents import latents_of
from cratelm.models.open import LoadedModel, find_model, sequence_length
from cratelm.models.sites import hooked
from cratelm.records import ANTHROPIC_BINS, OPENAI_QUANTILES, Split
from cratelm.runs import (
    Completion,
    Draft,
    Run,
    Stage,
    check_memory,
    hash_file,
    hash_json,
    write_json,
)
from cratelm.runs.devices import available_on
from cratelm.runs.names import latents_name, set_name
from cratelm.runs.ranks import Ranks, Share, joined, n_ranks_here
from cratelm.tokens.shards import TokenStore, check_vocabulary

_WHOLE = Share()


@dataclass(frozen=True)
class HarvestResult:
    """Result of `cratelm harvest`."""

    path: Path
    """folder of the files (`cratelm.activations.store` reads them)"""
    site: str
    neurons: tuple[int, ...]
    """[L] number of neurons in each layer"""
    tokens: dict[str, int]
    """number of tokens searched, without end marks, by split"""
    dead: dict[str, int]
    """number of neurons that were never above 0, by split"""


def harvest(config: HarvestConfig) -> HarvestResult:
    """Harvest a model and return the result; a finished stage is only read.

    Processes that `torchrun` started each search a share of the tokens, and write what one would have written. Raises
    `InputError` for a model, site or tokenizer that does not fit.
    """
    with joined() as ranks:
        return _harvest(config, ranks)


def _harvest(config: HarvestConfig, ranks: Ranks) -> HarvestResult:
    run = Run(config.run)
    tokens = run.stage("tokens").require("tokenize")
    source = find_model(run, config.model).pinned()
    stage = run.stage("activations", harvest_name(config))
    inputs: dict[str, Completion | str] = {
        "tokens": tokens,
        "model": source.record or source.identity,
    }
    autoencoder = None
    if config.sae:
        autoencoder, inputs["sae"] = _sae_source(config, run)
    if ranks.by_first(lambda: stage.is_finished(config, inputs, force=config.force)):
        return _result(stage)
    loaded = source.load(config.device, config.dtype)
    model = loaded.model
    store = TokenStore(run.path / "tokens")
    check_vocabulary(store, model.config.vocab_size)
    site = latents_of(model, autoencoder) if autoencoder else site_of(model, config.site)
    _check_memory(config, store, site, model.device)
    with ranks.write(stage, config, inputs) as draft:
        _write_splits(config, store, loaded, site, stage.name, draft, ranks)
    return _result(stage)


def harvest_name(config: HarvestConfig) -> str:
    """Return the name of the harvest in the run; for latents it is `MODEL+SAE` by default."""
    if config.name:
        return config.name
    model = last_name("--model", config.model)
    return latents_name(model, last_name("--sae", config.sae)) if config.sae else model


def harvest_split(
    model: PreTrainedModel,
    site: Site,
    plan: SearchPlan,
    calibrations: list[Calibration],
    sizes: ExcerptSizes,
    batch_tokens: int = 8_192,
    quiet: bool = False,
    share: Share = _WHOLE,
) -> list[LayerHarvest]:
    """Return the harvest of each layer [L] from one pass over the tokens of `plan`, without the head.

    With a `share`, only these blocks of batches are searched (`SearchPlan.blocks`).
    """
    spans = plan.text_spans()
    blocks = plan.blocks(batch_tokens)
    searched = [blocks[i] for i in share.between(len(blocks))]
    numbers = [number for block in searched for number in block]
    ends = {block[-1] for block in searched}
    layers = [
        LayerHarvest(
            calibration,
            random_positions(spans, number, h, sizes.random, plan.seed),
            sizes,
            number,
            is_first=share.is_first,
        )
        for calibration, number, h in zip(
            calibrations, site.layer_numbers, site.n_neurons, strict=True
        )
    ]
    progress = tqdm(
        total=plan.n_tokens() // share.of,
        desc=f"harvest {plan.name}",
        unit="tok",
        unit_scale=True,
        disable=quiet,
    )
    with torch.no_grad(), progress:
        batches = plan.batches(batch_tokens, model.device, numbers)
        for number, batch in zip(numbers, batches, strict=True):
            with hooked(model, site, lambda layer, a, b=batch: layers[layer].add(a, b)):
                model.base_model(input_ids=batch.input_ids, use_cache=False)
            if number in ends:
                for layer in layers:
                    layer.end_block()
            progress.update(batch.input_ids.numel())
    return layers


def _merge_ranks(layers: list[LayerHarvest], ranks: Ranks) -> None:
    """Merge, on rank 0, the shares of all ranks into its own, layer by layer.

    Memory: one layer of one other rank, about as much as its neurons take in a harvest.
    """
    for layer in layers:
        if ranks.is_first:
            for number in range(1, ranks.share.of):
                layer.merge(ranks.receive(number))
        else:
            ranks.send(layer.state())


def _write_splits(
    config: HarvestConfig,
    store: TokenStore,
    loaded: LoadedModel,
    site: Site,
    name: str,
    draft: Draft | None,
    ranks: Ranks,
) -> None:
    """Harvest both splits, this process its share; write them into the draft, which rank 0 has."""
    sizes = ExcerptSizes(
        config.top, config.random, config.per_bin, config.context, config.short_context
    )
    model = loaded.model
    length = sequence_length(loaded, config.sequence_length)
    calibrations: list[Calibration] = []
    results: dict[str, dict[str, int]] = {"tokens": {}, "dead": {}}
    for split in ("fit", "held_out"):
        plan = _plan(config, store, split, length)
        # Both splits use the bins that were set on the first one.
        calibrations = calibrations or _calibrations(config, model, site, plan, ranks)
        quiet = config.quiet or not ranks.is_first
        layers = harvest_split(
            model, site, plan, calibrations, sizes, config.batch_tokens, quiet, ranks.share
        )
        _merge_ranks(layers, ranks)
        if draft is None:
            continue
        _write(draft.path, plan, layers, model, site, name)
        results["tokens"][split] = layers[0].n_tokens
        results["dead"][split] = sum(int((h.maximum <= 0).sum()) for h in layers)
    if draft is None:
        return
    draft.results.update(results, site=site.name, neurons=list(site.n_neurons))
    # For later measurements on the same neurons (`open_harvest`).
    draft.results.update(sequence_length=length, device=config.device)
    fields = asdict(replace(site, autoencoders=()))
    del fields["autoencoders"]
    write_json(draft.path / "sites.json", {**fields, "layers": site.layer_numbers})


def _calibrations(
    config: HarvestConfig, model: PreTrainedModel, site: Site, plan: SearchPlan, ranks: Ranks
) -> list[Calibration]:
    """Return the figures of the pilot sample, which rank 0 measures for all ranks."""
    cpu = torch.device("cpu")
    measured = ranks.by_first(
        lambda: [
            c.to(cpu)
            for c in calibrate(model, site, plan, config.pilot_tokens, config.batch_tokens)
        ]
    )
    return [calibration.to(model.device) for calibration in measured]


def _write(
    folder: Path,
    plan: SearchPlan,
    layers: list[LayerHarvest],
    model: PreTrainedModel,
    site: Site,
    name: str,
) -> None:
    """Write a split; held-out excerpts include top tokens out of their context."""
    out_of_context = (
        out_of_context_rows(model, site, plan, layers) if plan.name == "held_out" else None
    )
    with (
        pq.ParquetWriter(summaries_path(folder, plan.name), SUMMARIES.schema) as summaries,
        pq.ParquetWriter(
            excerpts_path(folder, plan.name), EXCERPTS.schema, compression="zstd"
        ) as excerpts,
    ):
        for place, (layer, harvested) in enumerate(zip(site.layer_numbers, layers, strict=True)):
            summaries.write_table(summary_table(harvested, name, site.name, layer))
            for low in range(0, harvested.n_neurons, NEURONS_PER_GROUP):
                high = min(low + NEURONS_PER_GROUP, harvested.n_neurons)
                rows = excerpt_rows(harvested, low, high)
                if out_of_context is not None:
                    rows.append(out_of_context[place].between(low, high))
                excerpts.write_table(excerpt_table(rows, plan.split, name, site.name, layer))


def _check_memory(
    config: HarvestConfig, store: TokenStore, site: Site, device: torch.device
) -> None:
    """Raise `InputError` if the excerpts of all neurons do not fit into memory, or a batch does not."""
    tokens = max(store.split(split).n_tokens for split in ("fit", "held_out"))
    neurons, widest = sum(site.n_neurons), max(site.n_neurons)
    long = slot_bytes(2 * config.context)
    short = slot_bytes(2 * config.short_context)
    bins = (len(OPENAI_QUANTILES) - 1) * long + ANTHROPIC_BINS * short
    parts: dict[str | tuple[str, ...], float] = {
        ("top", "context"): neurons * config.top * long,
        ("per_bin", "context"): neurons * config.per_bin * bins,
        "random": neurons * config.random * 8,
        ("context", "random"): neurons * min(config.random, tokens) * 8 * config.context,
        "batch_tokens": widest * min(config.batch_tokens, tokens) * 4,
        "pilot_tokens": widest * min(config.pilot_tokens, tokens) * 4,
    }
    purpose = f"the excerpts of {neurons:,} neurons"
    free = available_on(device)
    check_memory(config, parts, purpose, available=free and free // n_ranks_here())


def _plan(config: HarvestConfig, store: TokenStore, split: Split, length: int) -> SearchPlan:
    tokens = store.split(split)
    if tokens.n_tokens == 0:
        raise InputError(f"split {split} has no tokens: tokenize more text or raise its fraction")
    return SearchPlan.of(tokens, split, store.eot_id, length, config.tokens, config.seed)


def _sae_source(config: HarvestConfig, run: Run) -> tuple[Path, Completion | str]:
    """Return the folder of the autoencoders, and their record in the run or the identity of the folder."""
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
    """Return a sha256 over the configurations and weights of the autoencoders in a folder."""
    files = [*folder.rglob("cfg.json"), *folder.rglob("*.safetensors")]
    return hash_json({str(p.relative_to(folder)): hash_file(p) for p in sorted(files)})


def _result(stage: Stage) -> HarvestResult:
    neurons = tuple(stage.require("harvest").results["neurons"])
    return stage.result(HarvestResult, path=stage.path, neurons=neurons)
