"""`cratelm merge harvest`: make a harvest from its parts; every file is that of a harvest by one process."""

from dataclasses import replace

import torch

from cratelm.activations.batches import random_positions
from cratelm.activations.config import HarvestConfig, MergeHarvestConfig
from cratelm.activations.harvest import (
    SPLITS,
    HarvestResult,
    HarvestSources,
    OpenedSources,
    add_results,
    check_harvest_memory,
    harvest_result,
    plan_of,
    sizes_of,
    write_split,
)
from cratelm.activations.layer_harvest import LayerHarvest
from cratelm.activations.parts import part_share, parts_of, read_part
from cratelm.activations.polarity import Signs
from cratelm.errors import InputError
from cratelm.records import Split
from cratelm.runs import Completion, Run, Stage, identity_of
from cratelm.runs.config import known_fields
from cratelm.runs.names import split_set
from cratelm.runs.ranks import Ranks


def merge_harvest(config: MergeHarvestConfig) -> HarvestResult:
    """Make the harvest `activations/MODEL` from its parts and return its result; then remove the parts.

    If the harvest is finished and no parts are there, it is only read. Raises `InputError` if a part is missing,
    damaged or stale, or differs from the others in its options or in what it was made from.
    """
    run = Run(config.run)
    stage = run.stage("activations", config.model)
    parts = parts_of(run, config.model)
    if not parts and stage.completion() is not None and not config.force:
        print(f"{stage.label} is finished, and no parts of it are left", flush=True)
        return harvest_result(stage)
    records = {part: of.require("harvest") for part, of in parts.items()}
    whole = _config_of_whole(config, run, records)
    sources = HarvestSources.of(whole, run)
    first = next(iter(records.values()))
    for role, value in sources.inputs.items():
        if first.inputs.get(role) != identity_of(value):
            raise InputError(
                f"{role} of the parts of {config.model} has changed since: harvest the parts again, with --force"
            )
    # Parts may be missing if the harvest is finished: a merge that was killed has removed some.
    if not stage.is_finished(whole, sources.inputs, force=config.force):
        _check_complete(parts)
        opened = sources.open(whole, run).read_as(Signs.read(first.results))
        check_harvest_memory(whole, opened.store, opened.site, torch.device("cpu"))
        with stage.write(whole, sources.inputs) as draft:
            for split in SPLITS:
                layers = _merged(whole, opened, split, parts)
                plan = plan_of(whole, opened, split)
                write_split(draft.path, plan, layers, opened, stage.name, Ranks())
                add_results(draft, whole, opened, split, layers)
    for part in parts.values():
        part.remove()
    return harvest_result(stage)


def _config_of_whole(
    config: MergeHarvestConfig, run: Run, records: dict[str, Completion]
) -> HarvestConfig:
    """Return the options of the harvest whose parts have these records.

    Raises `InputError` if there are none, or if they differ in an option or an input.
    """
    if not records:
        raise InputError(
            f"there are no parts of {config.model}: type `cratelm harvest --run {run.path} --model"
            f" {config.model} --part 1/2` first, then 2/2"
        )
    first, *others = records
    for other in others:
        if part_share(other).of != part_share(first).of:
            raise InputError(
                f"parts {first} and {other} of {config.model} are of different divisions: harvest all parts of"
                f" one of them, and move the others away from {run.path / 'parts'}"
            )
        if different := _difference(records[first], records[other]):
            raise InputError(
                f"parts {first} and {other} of {config.model} differ in {different}: harvest one of them again"
                " with the options of the other, and --force"
            )
    done = records[first]
    options = known_fields(HarvestConfig, done.config)
    whole = HarvestConfig(**{**options, "run": config.run, "part": None, "device": config.device})
    return replace(whole, batch_tokens=done.results["batch_tokens"])


def _check_complete(parts: dict[str, Stage]) -> None:
    """Raise `InputError`, which says what to type, if a part is missing."""
    first, stage = next(iter(parts.items()))
    of = part_share(first).of
    missing = [f"{i}/{of}" for i in range(1, of + 1) if f"{i}/{of}" not in parts]
    if missing:
        shown = ", ".join(missing[:8]) + ", ..." * (len(missing) > 8)
        command = stage.command(force=False).replace(f"--part {first}", f"--part {missing[0]}")
        batch_tokens = stage.require("harvest").results["batch_tokens"]
        if batch_tokens != HarvestConfig.batch_tokens:
            command += f" --batch-tokens {batch_tokens}"
        raise InputError(
            f"of the {of} parts of {split_set(stage.name)[0]}, {shown} {'are' if missing[1:] else 'is'} missing:"
            f" type `{command}` first"
        )


def _difference(one: Completion, other: Completion) -> str:
    """Return in words the first option or input in which two parts differ; empty if they agree."""
    sides = [
        {**p.config, "part": None, "batch_tokens": p.results.get("batch_tokens")}
        for p in (one, other)
    ]
    for name in sorted({*sides[0], *sides[1]}):
        values = [side.get(name) for side in sides]
        if values[0] != values[1]:
            return f"--{name.replace('_', '-')} ({values[0]} and {values[1]})"
    for role in sorted({*one.inputs, *other.inputs}):
        if one.inputs.get(role) != other.inputs.get(role):
            return f"the {role} that they were made from"
    return ""


def _merged(
    config: HarvestConfig, opened: OpenedSources, split: Split, parts: dict[str, Stage]
) -> list[LayerHarvest]:
    """Return the harvest of each layer [L] from the files of the parts. Memory: the result, and a layer of a part.

    Raises `InputError` if the parts have different bins: their pilot samples were measured with different results.
    """
    spans = plan_of(config, opened, split).text_spans()
    layers: list[LayerHarvest] = []
    for place, (number, h) in enumerate(
        zip(opened.site.layer_numbers, opened.site.n_neurons, strict=True)
    ):
        merged = None
        for part, stage in parts.items():
            state, calibration = read_part(stage.path, split, place)
            if merged is None:
                random = random_positions(spans, number, h, config.random, config.seed)
                merged = LayerHarvest(
                    calibration,
                    random,
                    sizes_of(config),
                    number,
                    with_octaves=len(state["octaves"]) > 0,
                )
            elif not merged.calibration.equals(calibration):
                raise InputError(
                    f"part {part} measured the model with other results than {next(iter(parts))} on the same"
                    " tokens, so that their bins differ: harvest all parts on machines of one kind, with the same"
                    " number of threads"
                )
            merged.merge(state)
        assert merged is not None
        layers.append(merged)
    return layers
