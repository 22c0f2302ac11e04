"""Read the neurons of a harvest that an export writes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.records import NeuronRecord, NeuronSummary, neuron_name, parse_neuron_ids
from cratelm.runs import Run, Stage


def harvest_of(run: Run, model: str) -> tuple[Stage, dict[str, str]]:
    """Return the harvest of a model, and the identities of the stages that an export of it reads.

    Raises `InputError` if there is no harvest, or if it is stale.
    """
    tokens = run.stage("tokens").require("tokenize")
    stage = run.stage("activations", model)
    done = stage.require("harvest")
    return stage, {"activations": done.identity, "tokens": tokens.identity}


def chosen_neurons(
    harvest: Path, layers: Sequence[int] = (), only: Sequence[str] = ()
) -> dict[int, list[NeuronSummary]]:
    """Return the fit summaries of the neurons to write, by layer, in ascending order of the index.

    These are all neurons of `layers`, or those named in `only` (`LAYER:INDEX`), or all neurons of the harvest;
    at most one of the two is given.
    Raises `InputError` for a layer or a neuron that the harvest does not have.
    """
    harvested: dict[int, dict[int, NeuronSummary]] = {}
    for summary in read_summaries(harvest, "fit"):
        harvested.setdefault(summary.neuron.layer, {})[summary.neuron.index] = summary
    wanted = sorted(set(layers)) or sorted(harvested)
    chosen = {layer: _layer(harvest, harvested, layer, "--layers") for layer in wanted}
    if not only:
        return {layer: list(summaries.values()) for layer, summaries in chosen.items()}
    named: dict[int, list[NeuronSummary]] = {}
    first = next(iter(harvested[min(harvested)].values())).neuron
    for key in parse_neuron_ids("--only", only, first.site):
        summaries = _layer(harvest, harvested, key.layer, "--only")
        if key.index not in summaries:
            raise InputError(
                f"--only {key.layer}:{neuron_name(key.index, first.site)}: layer {key.layer} of {harvest} has"
                f" {len(summaries) // first.n_ends:,} neurons, {min(summaries) // first.n_ends} to"
                f" {max(summaries) // first.n_ends}, but not this one"
            )
        named.setdefault(key.layer, []).append(summaries[key.index])
    return named


def both_splits(
    harvest: Path, chosen: dict[int, list[NeuronSummary]]
) -> Iterator[tuple[NeuronRecord, NeuronRecord]]:
    """Yield the records of the chosen neurons from `fit` and from `held_out`, as pairs."""
    for layer, summaries in chosen.items():
        indices = [s.neuron.index for s in summaries]
        splits = [read_records(harvest, s, [layer], indices) for s in ("fit", "held_out")]
        for fit, held_out in zip(*splits, strict=True):
            assert fit.neuron == held_out.neuron
            yield fit, held_out


def _layer(
    harvest: Path, harvested: dict[int, dict[int, NeuronSummary]], layer: int, option: str
) -> dict[int, NeuronSummary]:
    if layer not in harvested:
        has = ", ".join(map(str, sorted(harvested)))
        raise InputError(f"{option}: layer {layer} is not in {harvest}, whose layers are {has}")
    return harvested[layer]
