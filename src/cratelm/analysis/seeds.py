"""`cratelm seeds`: are the neurons of another training the same ones, and do explanations hold for them?

Models that differ only in their seed are compared in pairs. The neurons of each layer are matched one to one by the
absolute correlation of their activations on held-out text, and by the absolute cosine of their atoms: those of CRATE's
dictionary (its encoder, if it is decoupled), or the rows of the output matrix of GPT-2's MLP. The mean over pairs is PW-MCC
(Song et al. 2025). Its null is that of the same models with their initial weights, which are drawn again from their
configuration and seed. Explanations of one model are scored on the matches of their neurons in the other.

Memory: all seeds of the model; of two at a time 8 H^2 bytes per layer (`matching`) and what `transfer` needs.

Shape legend: L layers, H neurons of a layer, D width.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.analysis.matching import cross_sums
from cratelm.analysis.seeds_config import SeedsConfig
from cratelm.analysis.seeds_store import (
    MatchControl,
    MatchSummary,
    SeedsSummary,
    SeedTransfer,
    Similarity,
    TransferSummary,
    different_option,
    write_matches,
    write_summary,
    write_transfers,
)
from cratelm.analysis.transfer import measure_transfer
from cratelm.analysis.weights import atoms_of
from cratelm.errors import InputError
from cratelm.explain.store import ExplanationFile, ExplanationSource
from cratelm.models.sites import Site
from cratelm.models.sizes import build_of
from cratelm.records import Interval
from cratelm.runs import Completion, Run, check_memory
from cratelm.runs.names import seed_of, seeded_name
from cratelm.stats.seeds import Matching, cosines, match, transfer
from cratelm.text.table import align


@dataclass(frozen=True)
class SeedsResult:
    """Result of `cratelm seeds`."""

    path: Path
    """folder of `matches.parquet`, `transfers.parquet` and `summary.json`"""
    model: str
    seeds: list[str]
    """names of the models compared"""
    tokens: int
    """held-out text tokens read"""
    table: str
    """the main figures by pair"""

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.seeds)} seeds, {self.tokens:,} held-out tokens"
        return f"{head}\n{self.table}\n{self.path}"


@dataclass(frozen=True, eq=False)
class _Seed:
    name: str
    seed: int
    opened: HarvestContext
    explanations: ExplanationSource | None

    @property
    def model(self) -> Any:
        return self.opened.subject.model


def seeds(config: SeedsConfig) -> SeedsResult:
    """Compare the seeds of a model, write `seeds/MODEL/`, and return the main figures.

    If the stage is finished, its results are read back. Raises `InputError` if the run does not have harvests of at least
    two seeds, or if they differ in more than their seed.
    """
    run = Run(config.run)
    records = _records(run, config.model)
    inputs: dict[str, Completion] = {}
    for name in records:
        inputs[f"activations/{name}"] = run.stage("activations", name).require("harvest")
        if run.stage("explanations", name).completion() is not None:
            inputs[f"explanations/{name}"] = run.stage("explanations", name).require("explain")
    stage = run.stage("seeds", config.model)
    if not stage.is_finished(config, inputs, force=config.force):
        models = [_open(run, config, record, inputs) for record in records.values()]
        _check_sites(models)
        with stage.write(config, inputs) as draft:
            summary = _measure(config, models, draft.path)
            draft.results.update(
                seeds=list(summary.seeds), tokens=summary.tokens, table=_table(summary)
            )
    return stage.result(SeedsResult, path=stage.path, model=config.model)


def _records(run: Run, base: str) -> dict[str, Completion]:
    """Return the records of the trained seeds of a model that are harvested, by name, in the order of their seeds."""
    records: dict[str, Completion] = {}
    harvested = set(run.models("activations")) & set(run.models("model"))
    for name in sorted(harvested, key=seed_of):
        if seed_of(name)[0] == base and not run.is_untrained(name):
            records[name] = run.stage("model", name).require("train")
    if len(records) < 2:
        raise InputError(_too_few(run, base, list(records)))
    first, *others = records.values()
    by_seed = {first.config["seed"]: first.name}
    for record in others:
        if option := different_option(first, record):
            raise InputError(
                f"{record.name} {option}, so that it is not {first.name} with another seed: train it again"
                f" with the options of {first.name}, or give it a name without -seedN"
            )
        same = by_seed.setdefault(record.config["seed"], record.name)
        if same != record.name:
            raise InputError(
                f"{same} and {record.name} have the same seed, {record.config['seed']}: train"
                f" another with --seed, and remove one of these"
            )
    return records


def _too_few(run: Run, base: str, names: Sequence[str]) -> str:
    other = seeded_name(base, 0 if names and seed_of(names[0])[1] == 1 else 1) if names else base
    model = run.stage("model", other)
    if other in run.models("model"):
        commands = []
    elif names:
        words = shlex.split(run.stage("model", names[0]).command(force=False))
        if "--seed" in words:
            at = words.index("--seed")
            del words[at : at + 2]
        commands = [shlex.join([*words, "--seed", str(seed_of(other)[1])])]
    else:
        commands = [model.command(force=False)]
    # with the options of the seed that is there: others could not be compared
    like = names[0] if names else other
    commands += [
        run.stage(stage, like).command(force=False, model=other)
        for stage in ("activations", "explanations")
    ]
    found = f"one harvested seed of {base}, {names[0]}" if names else f"no harvested {base}"
    to_type = ", then ".join(f"`{command}`" for command in commands)
    return f"{run.path} has {found}, but at least two seeds are compared: type {to_type}"


def _open(
    run: Run, config: SeedsConfig, record: Completion, inputs: dict[str, Completion]
) -> _Seed:
    opened = open_harvested(run, record.name, config)
    explained = f"explanations/{record.name}" in inputs
    source = ExplanationFile(run.stage("explanations", record.name).path) if explained else None
    return _Seed(record.name, record.config["seed"], opened, source)


def _check_sites(models: Sequence[_Seed]) -> None:
    first = models[0]
    if first.opened.site.has_both_ends:
        raise InputError(
            f"{first.name} was harvested at both ends of its neurons, but seeds are compared by neurons with one end:"
            " harvest with --polarity positive, under another --name"
        )
    for other in models[1:]:
        for what, a, b in (
            ("neurons of", first.opened.site.name, other.opened.site.name),
            ("sequences of", first.opened.sequence_length, other.opened.sequence_length),
            ("sequences that begin as", first.opened.beginning, other.opened.beginning),
        ):
            if a != b:
                raise InputError(
                    f"{other.name} was harvested with {what} {b}, {first.name} with {what} {a}: harvest"
                    " both with the same options"
                )


@dataclass(eq=False)
class _Found:
    """What was measured of all pairs of seeds."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    """rows of `matches.parquet`, by column"""
    matches: list[MatchSummary] = field(default_factory=list)
    transfers: list[SeedTransfer] = field(default_factory=list)
    tokens: int = 0


def _measure(config: SeedsConfig, models: Sequence[_Seed], folder: Path) -> SeedsSummary:
    opened = models[0].opened
    plan = opened.plan("held_out", config.tokens, config.seed)
    at_once = min(config.batch_tokens, plan.n_tokens())
    check_memory(
        config, {"batch_tokens": 2 * 4 * at_once * sum(opened.site.n_neurons)}, "activations"
    )
    pairs = list(combinations(models, 2))
    found = _Found()
    total = 3 * len(pairs) * plan.n_tokens()
    with tqdm(total=total, desc="seeds", unit="tok", unit_scale=True, disable=config.quiet) as bar:
        for number, (a, b) in enumerate(pairs):
            _measure_pair(config, number, a, b, plan, found, bar.update)
    write_matches(folder, found.blocks)
    write_transfers(folder, found.transfers)
    names = tuple(m.name for m in models)
    transfers = tuple(_summarize(found.transfers))
    summary = SeedsSummary(config.model, names, found.tokens, tuple(found.matches), transfers)
    write_summary(folder, summary)
    return summary


def _measure_pair(
    config: SeedsConfig,
    number: int,
    a: _Seed,
    b: _Seed,
    plan: SearchPlan,
    found: _Found,
    progress: Callable[[int], Any],
) -> None:
    """Add what is measured of a pair of seeds, the `number`-th, to `found`."""
    site, names = a.opened.site, (a.name, b.name)
    own, found.tokens = _matched((a.model, b.model), site, plan, config.batch_tokens, progress)
    untrained = (_untrained(a), _untrained(b))
    null, _ = _matched(untrained, site, plan, config.batch_tokens, progress)
    for place, layer in enumerate(site.layer_numbers):
        for similarity, (pairs, constant) in own[place].items():
            of_null, _ = null[place][similarity]
            means = pairs.mean, of_null.mean, len(pairs.a), constant
            found.matches.append(MatchSummary(*names, layer, similarity, *means))
            by_control: dict[MatchControl, Matching] = {"none": pairs, "untrained": of_null}
            for control, of in by_control.items():
                fixed = dict(zip(("model_a", "model_b"), names, strict=True))
                fixed |= {"site": site.name, "similarity": similarity, "control": control}
                columns = {"index_a": of.a, "index_b": of.b, "value": of.value}
                found.blocks.append({**fixed, "layer": layer, **columns})
    scored = measure_transfer(
        (a.model, b.model),
        site,
        plan,
        (a.explanations, b.explanations),
        [of_layer["activations"][0] for of_layer in own],
        vocabulary=a.opened.store.vocab_size,
        seed=(config.seed, number),
        batch_tokens=config.batch_tokens,
        progress=progress,
    )
    for t in scored:
        indices, scores = (t.index, t.match, t.random), (t.own, t.on_match, t.on_random)
        explained, other = names if t.side == 0 else (b.name, a.name)
        found.transfers.append(
            SeedTransfer(explained, other, site.name, t.layer, *indices, t.explainer, *scores)
        )


_Matched = dict[Similarity, tuple[Matching, int]]
"""the pairs of a layer by each similarity, and how many neurons have none"""


def _matched(
    models: tuple[Any, Any],
    site: Site,
    plan: SearchPlan,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> tuple[list[_Matched], int]:
    """Return the matched neurons of each layer [L] of two models, and the number of text tokens read."""
    layers: list[_Matched] = []
    sums = cross_sums(models, site, plan, batch_tokens, progress)
    for layer, of_layer in zip(site.layer_numbers, sums, strict=True):
        correlation, constant = of_layer.correlation()
        matched: _Matched = {"activations": (match(correlation), constant)}
        a, b = (atoms_of(model, site, layer) for model in models)  # [H, D] each
        if a is not None and b is not None:
            zero = sum(int((~atoms.any(axis=1)).sum()) for atoms in (a, b))
            matched["atoms"] = match(cosines(a.T, b.T)), zero
        layers.append(matched)
    return layers, sums[0].n


def _untrained(seed: _Seed) -> Any:
    """Return the model with the weights from which it was trained."""
    fresh: Any = build_of(seed.model.config, seed.seed)
    return fresh.to(device=seed.model.device, dtype=seed.model.dtype).eval()


def _summarize(transfers: Sequence[SeedTransfer]) -> Iterator[TransferSummary]:
    """Yield the means of each explained model, other model and explainer, over the neurons of all layers."""
    groups: dict[tuple[str, str, str], list[SeedTransfer]] = {}
    for t in transfers:
        groups.setdefault((t.model_a, t.model_b, t.explainer), []).append(t)
    for names, of in groups.items():
        scored = [t for t in of if t.own is not None]
        own = np.array([t.own for t in scored], np.float64)
        on_match = [t.on_match or 0.0 for t in scored]  # what has no correlation counts as chance
        on_random = [t.on_random or 0.0 for t in scored]
        yield TransferSummary(
            *names,
            own=float(own.mean()) if len(own) else None,
            transfer=transfer(own, on_match),
            random=transfer(own, on_random),
            neurons=len(scored),
            undefined=len(of) - len(scored),
            constant=sum(t.on_match is None for t in scored),
        )


def _table(summary: SeedsSummary) -> str:
    """Return the figures of `cratelm seeds` as aligned text."""
    lines = [["matched neurons", "layer", "by", "mean", "untrained"]]
    for m in summary.matches:
        values = f"{m.mean:.3f}", f"{m.untrained:.3f}"
        lines.append([f"{m.model_a}, {m.model_b}", str(m.layer), m.similarity, *values])
    text = align(lines, [False, True, False, True, True])
    if summary.transfers:
        rows = [["explanations", "on the matches in", "by", "own score", "kept", "random neuron"]]
        for t in summary.transfers:
            own = "–" if t.own is None else f"{100 * t.own:.1f}"
            rows.append([t.model_a, t.model_b, t.explainer, own, _share(t.transfer), _share(t.random)])  # fmt: skip
        text += ["", *align(rows, [False] * 3 + [True] * 3)]
    return "\n".join(f"  {line}".rstrip() for line in text)


def _share(value: Interval | None) -> str:
    return "–" if value is None else value.show(".3f")
