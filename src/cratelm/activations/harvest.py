"""`cratelm harvest`: collect excerpts and statistics of every neuron of a model in one pass over tokens.

Shape legend: B sequences, T positions, H neurons of a layer, L layers.
"""

import math
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from cratelm.activations.batches import SearchPlan, random_positions
from cratelm.activations.calibration import Calibration, calibrate, pilot_of
from cratelm.activations.config import HarvestConfig, last_name
from cratelm.activations.layer_harvest import ExcerptSizes, LayerHarvest
from cratelm.activations.out_of_context import out_of_context_rows
from cratelm.activations.parts import part_share, part_stage, write_part
from cratelm.activations.polarity import ABOVE_0, Polarity, Signs, signs_of
from cratelm.activations.store import (
    NEURONS_PER_GROUP,
    SUMMARIES_PER_GROUP,
    excerpt_writer,
    summaries_path,
    summary_schema,
)
from cratelm.activations.tables import excerpt_rows, excerpt_table, summary_table
from cratelm.activations.top_positions import top_positions
from cratelm.activations.topk import slot_bytes
from cratelm.errors import InputError
from cratelm.models import Site, site_of
from cratelm.models.begin import PLAIN_BEGINNING, ChosenBeginning, announce, choose_beginning
from cratelm.models.latents import AutoencoderSource, find_autoencoders, latents_of
from cratelm.models.open import LoadedModel, ModelSource, find_model, sequence_length
from cratelm.models.sites import hooked, partial_note
from cratelm.records import ANTHROPIC_BINS, OPENAI_QUANTILES, Split
from cratelm.runs import (
    Completion,
    Draft,
    Run,
    Stage,
    check_memory,
    write_json,
)
from cratelm.runs.devices import available_on
from cratelm.runs.names import autoencoder_name, latents_name
from cratelm.runs.ranks import Ranks, Share, joined, n_ranks_here
from cratelm.tokens.shards import TokenStore, check_vocabulary

SPLITS: tuple[Split, ...] = ("fit", "held_out")
"""splits that are harvested; the bins are set on the first"""
_WORTH_COMPILING = 10**7
"""activations of a split from which compiled code saves more than the second that loading it takes"""


@dataclass(frozen=True)
class HarvestResult:
    """Result of `cratelm harvest`."""

    path: Path
    """folder of the files (`cratelm.activations.store` reads them)"""
    site: str
    neurons: tuple[int, ...]
    """[L] number of neurons in each layer; of ends, twice as many, at a site with both"""
    tokens: dict[str, int]
    """number of tokens searched, without end marks, by split"""
    dead: dict[str, int]
    """number of neurons that never fired, by split: never above 0, and with both ends never below 0 either"""
    polarity: Polarity = "positive"
    """`both` if each neuron was harvested as two, one for each end"""
    polarity_reason: str = ""
    """why, in words; empty for harvests of older versions"""
    exact_zeros: bool = True
    """True if a neuron fires wherever it is above 0; False if it fires from a fraction of its maximum on
    (`NeuronSummary.firing_threshold`)"""
    only_negative: dict[str, int] = field(default_factory=dict)
    """number of dead neurons that go below 0 but never above, by split, if only positive activations count; `--polarity
    both` harvests them. Not recorded by older versions"""
    begin_token: int | None = None
    """id of the token set before every sequence, which counts nowhere; None for none"""
    skip_first: int = 0
    """number of first tokens of every sequence that are left out, without the begin token"""
    top_at_first: dict[str, float] = field(default_factory=dict)
    """fraction of the top excerpts with their peak at the first position of a sequence, by split"""
    crowded: dict[str, int] = field(default_factory=dict)
    """number of neurons with half or more of their top excerpts at one position, by split (`TopPositions`)"""


def harvest(config: HarvestConfig) -> HarvestResult:
    """Harvest a model and return the result; a finished stage is only read.

    Processes that `torchrun` started each search a share of the tokens, and write what one would have written. Raises
    `InputError` for a model, site or tokenizer that does not fit.
    """
    with joined() as ranks:
        return _harvest(config, ranks)


def _harvest(config: HarvestConfig, ranks: Ranks) -> HarvestResult:
    run = Run(config.run)
    name = harvest_name(config)  # may raise, so before files are hashed
    sources = HarvestSources.of(config, run)
    stage = run.stage("activations", name)
    if config.part:
        stage = part_stage(run, name, config.part)
    if ranks.by_first(lambda: stage.is_finished(config, sources.inputs, force=config.force)):
        return harvest_result(stage)
    opened = sources.open(config, run)
    if ranks.is_first:
        announce(opened.chosen, opened.loaded)
    opened = opened.read_as(_signs(config, opened, ranks))
    if ranks.is_first and opened.signs.polarity == "both" and not config.quiet:
        print(f"{name}: {opened.signs.in_words()}", flush=True)
    check_harvest_memory(config, opened.store, opened.site, opened.loaded.model.device)
    with ranks.write(stage, config, sources.inputs) as draft:
        _write_splits(config, opened, name, draft, ranks)
    return harvest_result(stage)


@dataclass(frozen=True, eq=False)
class HarvestSources:
    """What a harvest is made from, before anything is loaded."""

    model: ModelSource
    autoencoders: AutoencoderSource | None
    """the autoencoders whose latents are harvested; None for neurons"""
    inputs: dict[str, Completion | str]
    """by role, for the record of the stage"""

    @classmethod
    def of(cls, config: HarvestConfig, run: Run) -> "HarvestSources":
        """Return the sources. Raises `InputError` if one of them is missing or stale."""
        tokens = run.stage("tokens").require("tokenize")
        model = find_model(run, config.model, config).pinned()
        inputs: dict[str, Completion | str] = {
            "tokens": tokens,
            "model": model.record or model.identity,
        }
        autoencoders = None
        if config.sae:
            autoencoders = find_autoencoders(run, config.model, config.sae)
            inputs["sae"] = autoencoders.record or autoencoders.identity
        return cls(model, autoencoders, inputs)

    def open(self, config: HarvestConfig, run: Run) -> "OpenedSources":
        """Load the model. Raises `InputError` for a model, site or tokenizer that does not fit."""
        loaded = self.model.load(config.device, config.dtype)
        store = TokenStore(run.path / "tokens")
        check_vocabulary(store, loaded.vocab_size)
        if self.autoencoders:
            site = latents_of(loaded.model, self.autoencoders, config.site).only(config.layers)
        else:
            site = site_of(loaded.model, config.site, config.layers)
        if note := partial_note(loaded.model, site):
            print(f"note: {note}", file=sys.stderr, flush=True)
        length = sequence_length(loaded, config.sequence_length)
        chosen = choose_beginning(loaded, run, config.begin_token, config.skip_first)
        chosen.beginning.room(length)  # raises where nothing would count
        return OpenedSources(loaded, store, site, length, chosen)


@dataclass(frozen=True, eq=False)
class OpenedSources:
    """The model, tokens and site of a harvest."""

    loaded: LoadedModel
    store: TokenStore
    site: Site
    length: int
    """tokens per sequence, with the begin token"""
    chosen: ChosenBeginning = PLAIN_BEGINNING
    """how sequences begin"""
    signs: Signs = ABOVE_0
    """how the activations are read"""

    def read_as(self, signs: Signs) -> "OpenedSources":
        """Return the same sources, with the ends of the site if `signs` says so."""
        return replace(self, site=signs.of(self.site), signs=signs)


def _signs(config: HarvestConfig, opened: OpenedSources, ranks: Ranks) -> Signs:
    """Return how the activations are read, which rank 0 decides for all ranks."""
    pilot = pilot_of(plan_of(config, opened, SPLITS[0]), config.pilot_tokens)
    model = opened.loaded.model
    return ranks.by_first(
        lambda: signs_of(config.polarity, model, opened.site, pilot, config.batch_tokens)
    )


def harvest_name(config: HarvestConfig) -> str:
    """Return the name of the harvest in the run; for latents it is `MODEL+SAE` by default."""
    if config.name:
        return config.name
    model = last_name("--model", config.model)
    if not config.sae:
        return model
    return latents_name(model, last_name("--sae", autoencoder_name(config.sae) or config.sae))


def layer_harvest_for(device: torch.device, n_activations: int) -> type[LayerHarvest]:
    """Return the fastest kind of `LayerHarvest` for this many activations, of those that are installed.

    Every process of a harvest must use the same kind, so `n_activations` is that of all of them.
    """
    if device.type == "cpu" and n_activations >= _WORTH_COMPILING and find_spec("numba"):
        from cratelm.activations.fused_harvest import FusedLayerHarvest  # on first use: numba

        return FusedLayerHarvest
    return LayerHarvest


def harvest_split(
    model: PreTrainedModel,
    site: Site,
    plan: SearchPlan,
    calibrations: list[Calibration],
    sizes: ExcerptSizes,
    batch_tokens: int = 8_192,
    quiet: bool = False,
    shares: Sequence[Share] = (),
    exact_zeros: bool = True,
) -> list[LayerHarvest]:
    """Return the harvest of each layer [L] from one pass over the tokens of `plan`, without the head.

    With `shares`, only the blocks of batches (`SearchPlan.blocks`) in the first share are searched, and of these
    only those in the second share, and so on.
    """
    spans = plan.text_spans()
    blocks = plan.blocks(batch_tokens)
    for share in shares:
        blocks = [blocks[i] for i in share.between(len(blocks))]
    numbers = [number for block in blocks for number in block]
    ends = {block[-1] for block in blocks}
    kind = layer_harvest_for(model.device, plan.n_tokens() * sum(site.n_neurons))
    layers = [
        kind(
            calibration,
            random_positions(spans, number, h, sizes.random, plan.seed),
            sizes,
            number,
            is_first=all(share.is_first for share in shares),
            with_octaves=not exact_zeros,
        )
        for calibration, number, h in zip(
            calibrations, site.layer_numbers, site.n_neurons, strict=True
        )
    ]
    progress = tqdm(
        total=plan.n_tokens() // math.prod(share.of for share in shares),
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
    config: HarvestConfig, opened: OpenedSources, name: str, draft: Draft | None, ranks: Ranks
) -> None:
    """Harvest both splits, this process its share; write them into the draft, which rank 0 has."""
    model, site = opened.loaded.model, opened.site
    shares = [*([part_share(config.part)] if config.part else []), ranks.share]
    calibrations: list[Calibration] = []
    for split in SPLITS:
        plan = plan_of(config, opened, split)
        # Both splits use the bins that were set on the first one.
        calibrations = calibrations or _calibrations(config, model, site, plan, ranks)
        quiet = config.quiet or not ranks.is_first
        layers = harvest_split(
            model,
            site,
            plan,
            calibrations,
            sizes_of(config),
            config.batch_tokens,
            quiet,
            shares,
            opened.signs.exact_zeros,
        )
        _merge_ranks(layers, ranks)
        if not config.part:
            write_split(draft and draft.path, plan, layers, opened, name, ranks)
        elif draft is not None:
            write_part(draft.path, split, layers)
            draft.results.update(batch_tokens=config.batch_tokens)
        if draft is not None:
            add_results(draft, config, opened, split, layers)


def add_results(
    draft: Draft,
    config: HarvestConfig,
    opened: OpenedSources,
    split: Split,
    layers: list[LayerHarvest],
) -> None:
    """Add what the completion record says about a split, and about the harvest."""
    results, site = draft.results, opened.site
    results.setdefault("tokens", {})[split] = layers[0].n_tokens
    silent = [h.maximum <= 0 for h in layers]
    if site.has_both_ends:
        silent = [of_layer[0::2] & of_layer[1::2] for of_layer in silent]
    elif site.name != "latents":
        # a sum of squares above 0: the neuron is not 0 everywhere
        below = [s & (h.powers[1] > 0) for s, h in zip(silent, layers, strict=True)]
        results.setdefault("only_negative", {})[split] = sum(int(b.sum()) for b in below)
    results.setdefault("dead", {})[split] = sum(int(of_layer.sum()) for of_layer in silent)
    results.update(site=site.name, neurons=list(site.n_neurons), **opened.signs.as_results())
    # For later measurements on the same neurons (`open_harvest`).
    results.update(sequence_length=opened.length, device=config.device)
    begin = opened.chosen.beginning
    results.update(
        begin_token=begin.token, skip_first=begin.skip, begin_reason=opened.chosen.reason
    )
    if not config.part:
        top = top_positions(layers, begin.room(opened.length))
        results.setdefault("top_positions", {})[split] = asdict(top)
        results.setdefault("top_at_first", {})[split] = top.first_shares[0]
        results.setdefault("crowded", {})[split] = top.crowded


def sizes_of(config: HarvestConfig) -> ExcerptSizes:
    """Return the numbers and lengths of the excerpts."""
    return ExcerptSizes(
        config.top, config.random, config.per_bin, config.context, config.short_context
    )


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


def write_split(
    folder: Path | None,
    plan: SearchPlan,
    layers: list[LayerHarvest],
    opened: OpenedSources,
    name: str,
    ranks: Ranks,
) -> None:
    """Write a split and `sites.json` into the folder that rank 0 has.

    Held-out excerpts include top tokens out of their context, of which every rank measures a share.
    """
    site, out_of_context = opened.site, None
    if plan.name == "held_out":
        out_of_context = out_of_context_rows(opened.loaded.model, site, plan, layers, ranks)
    if folder is None:
        return
    of_site = asdict(replace(site, autoencoders=()))
    del of_site["autoencoders"], of_site["is_flat"]
    write_json(folder / "sites.json", {**of_site, "layers": site.layer_numbers})
    with (
        pq.ParquetWriter(
            summaries_path(folder, plan.name),
            summary_schema(with_firing=not opened.signs.exact_zeros, with_ends=site.has_both_ends),
        ) as summaries,
        excerpt_writer(folder, plan.name) as excerpts,
        ThreadPoolExecutor(1) as thread,  # compresses a row group while the next one is made
    ):
        writing: Future[None] | None = None
        for place, (layer, harvested) in enumerate(zip(site.layer_numbers, layers, strict=True)):
            summary = summary_table(harvested, name, site.name, layer)
            summaries.write_table(summary, row_group_size=SUMMARIES_PER_GROUP)
            for low in range(0, harvested.n_neurons, NEURONS_PER_GROUP):
                high = min(low + NEURONS_PER_GROUP, harvested.n_neurons)
                rows = excerpt_rows(harvested, low, high)
                if out_of_context is not None:
                    rows.append(out_of_context[place].between(low, high))
                table = excerpt_table(rows, plan.split, name, site.name, layer)
                if writing is not None:
                    writing.result()
                writing = thread.submit(excerpts.write_table, table)
        if writing is not None:
            writing.result()


def check_harvest_memory(
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


def plan_of(config: HarvestConfig, opened: OpenedSources, split: Split) -> SearchPlan:
    """Return which sequences of a split are searched. Raises `InputError` if it has no tokens."""
    tokens = opened.store.split(split)
    if tokens.n_tokens == 0:
        raise InputError(f"split {split} has no tokens: tokenize more text or raise its fraction")
    return SearchPlan.of(
        tokens,
        split,
        opened.store.eot_id,
        opened.length,
        config.tokens,
        config.seed,
        opened.chosen.beginning,
    )


def harvest_result(stage: Stage) -> HarvestResult:
    """Return the result of a finished harvest."""
    neurons = tuple(stage.require("harvest").results["neurons"])
    return stage.result(HarvestResult, path=stage.path, neurons=neurons)
