"""`cratelm score`: how well explanations predict their neurons on held-out excerpts, beside null controls."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cratelm.activations.store import read_records
from cratelm.errors import InputError
from cratelm.explain.store import (
    SampledNeuron,
    explanation_set_name,
    read_explanations,
    read_selected,
    read_unexplained,
)
from cratelm.llm.client import Client, DryRun, WorkerResult, dry_run
from cratelm.llm.probe import ProbeResult, probe_levels
from cratelm.llm.prompts import neurons as prompts
from cratelm.llm.prompts import openai as openai_prompts
from cratelm.llm.prompts import scorers as scorer_prompts
from cratelm.llm.session import ledger_path, open_client
from cratelm.records import Explanation, NeuronId, NeuronRecord, NeuronScore, Split, Status
from cratelm.runs import Draft, Run, Stage, write_json
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import Audit, audit
from cratelm.score.duplicates import DuplicateAudit, NearDuplicates
from cratelm.score.llm_pipeline import (
    Explanations,
    PendingScore,
    Reader,
    answered,
    asked_about,
    requests_of,
    windows,
)
from cratelm.score.pipeline import score_all
from cratelm.score.simulation import COMPAT, Simulator
from cratelm.score.store import write_scores
from cratelm.stats.scores import ModelStatistics, all_statistics
from cratelm.tokens.shards import TokenStore

FREE = "free"
"""names the explanations made without a language model, with `--explanations`"""


@dataclass(frozen=True)
class ScoreResult:
    """What `score` did."""

    path: Path
    """folder of `scores.parquet` and `summary.json`"""
    n_scores: int
    """rows: neurons x explainers x metrics x controls"""
    n_neurons: int
    n_dead: int
    """neurons that never fired on the fit or on the held-out split"""
    shared_documents: int
    """documents both explained from and scored on: 0, or there would be no result"""
    n_duplicates: int
    """scored passages that are near-duplicates of what was explained from"""
    means: dict[str, str]
    """by explainer and metric: own score and shuffled control, in words"""
    n_failed: int = 0
    """scores, those of null controls too, that the explainer or the simulator failed to give"""
    calls: str = ""
    """what a language model was asked, in words"""

    def __str__(self) -> str:
        failed = (
            f", {self.n_failed:,} scores failed (--retry-failed asks again)"
            if self.n_failed
            else ""
        )
        calls = f"\n  {self.calls}" if self.calls else ""
        head = (
            f"{self.n_scores:,} scores of {self.n_neurons:,} neurons, {self.n_dead:,} dead,"
            f" {self.shared_documents} documents shared, {self.n_duplicates:,} passages"
            f" near-duplicates{failed}: {self.path}{calls}"
        )
        return "\n".join([head, *(f"  {name:<24} {text}" for name, text in self.means.items())])


def score(config: ScoreConfig) -> ScoreResult | DryRun | WorkerResult:
    """Scores the explanations of one model of a run.

    Writes `scores/MODEL/`, or `scores/MODEL@NAME/` where a language model reads the explanations
    called NAME. With `--dry-run` nothing is asked or written and the `DryRun` is returned; with
    `--shard` answers go to the worker's ledger alone.

    Raises `InputError` where the run has no harvest or no explanations of the model, where a
    document was both explained from and scored on, or where the language model cannot be reached;
    `BudgetReached` at a limit, with all answers so far in the ledger.
    """
    run = Run(config.run)
    if config.simulator:
        return _score_with_model(config, run)
    harvest = run.stage("activations", config.model)
    explained = run.stage("explanations", config.model)
    inputs = {
        "activations": harvest.require("harvest").identity,
        "explanations": explained.require("explain").identity,
    }
    stage = run.stage("scores", config.model)
    if stage.is_finished(config, inputs, force=config.force):
        return ScoreResult(path=stage.path, **stage.require("score").results)
    selected = read_selected(explained.path)
    explanations = read_explanations(explained.path)
    explainers = explained.require("explain").config["explainers"]
    duplicates = _near_duplicates(run, config, explanations, selected)
    with stage.write(config, inputs) as draft:
        records = _held_out(config, harvest.path, selected)
        scores = list(
            score_all(config, records, selected, explanations, explainers, duplicates.is_duplicate)
        )
        results = _finish(draft, config, selected, explanations, scores, duplicates, {})
    return ScoreResult(path=stage.path, **results)


def _score_with_model(config: ScoreConfig, run: Run) -> ScoreResult | DryRun | WorkerResult:
    if config.prompts == "openai":
        openai_prompts.require()
    with open_client(config, config.simulator) as client:
        reader = client.backend.name
        source = _explanation_set(run, config, reader)
        name = config.name or (reader if source == reader else f"{source or FREE}-by-{reader}")
        explained = run.stage("explanations", explanation_set_name(config.model, source))
        harvest = run.stage("activations", config.model)
        inputs = {
            "tokens": run.stage("tokens").require("tokenize").identity,
            "activations": harvest.require("harvest").identity,
            "explanations": explained.require("explain").identity,
            "prompts": f"{prompts.VERSION} {scorer_prompts.VERSION}",
        }
        stage = run.stage("scores", explanation_set_name(config.model, name))
        redo = config.force or (config.retry_failed and _has_failed(stage))
        ahead = not (config.dry_run or config.shard)
        if ahead and stage.is_finished(config, inputs, force=redo):
            return ScoreResult(path=stage.path, **stage.require("score").results)
        selected = read_selected(explained.path)
        explanations = read_explanations(explained.path)
        found = probe_levels(client)
        print(f"{reader}: {found}", flush=True)
        duplicates = _near_duplicates(run, config, explanations, selected)
        asked = _asked(config, run, client, found, explained.path, duplicates)
        if config.dry_run:
            return dry_run(client, (requests_of(some) for some in asked))
        scores = [s for some in asked for s in answered(some, client)]
        if config.shard:
            return WorkerResult(ledger_path(config), len(selected), str(client.tally))
        with stage.write(config, inputs) as draft:
            write_json(draft.path / "calls.json", client.tally.as_dict())
            draft.unhashed.add("calls.json")
            more = {"preflight": found.as_dict()}
            results = _finish(draft, config, selected, explanations, scores, duplicates, more)
    return ScoreResult(path=stage.path, calls=str(client.tally), **results)


def _explanation_set(run: Run, config: ScoreConfig, reader: str) -> str:
    """Name of the set of explanations that `config` asks for; empty for those without a language model."""
    if config.explanations == FREE:
        return ""
    wanted = config.explanations or reader
    if run.stage("explanations", explanation_set_name(config.model, wanted)).completion() is None:
        prefix = f"{config.model}@"
        there = [n.removeprefix(prefix) for n in run.models("explanations") if n.startswith(prefix)]
        raise InputError(
            f"{run.path} has no explanations of {config.model} by {wanted}: those by"
            f" {', '.join([*there, FREE])} can be named with --explanations; or type `cratelm explain"
            f" --run {run.path} --model {config.model} --explainer {config.simulator}` first"
        )
    return wanted


def _has_failed(stage: Stage) -> bool:
    done = stage.completion()
    return done is not None and bool(done.results.get("n_failed"))


def _asked(
    config: ScoreConfig,
    run: Run,
    client: Client,
    found: ProbeResult,
    explained: Path,
    duplicates: NearDuplicates,
) -> Iterator[list[PendingScore]]:
    """The scores in the making of what is in the folder `explained`, some neurons at a time; those of
    this worker's shard."""
    selected, explanations = read_selected(explained), read_explanations(explained)
    store = TokenStore(run.stage("tokens").path)
    variants = {"": Simulator.of(found, config.prompts)}
    if config.paper_compat:
        variants[COMPAT] = Simulator.of(found, config.prompts, paper_compat=True)
    reader = Reader(
        name=client.backend.name,
        simulators=variants,
        metrics=config.metrics,
        strings=store.decode_tokens(range(store.vocab_size)),
        is_duplicate=duplicates.is_duplicate,
        seed=config.seed,
    )
    known = Explanations(explanations, read_unexplained(explained), config.seed)
    explainers = sorted({e.explainer for e in explanations}) or [config.explanations or reader.name]
    dead = {s.neuron for s in selected if s.dead}
    index, count = config.worker()
    records = _held_out(config, run.stage("activations", config.model).path, selected[index::count])
    asked = (list(asked_about(r, r.neuron in dead, explainers, known, reader)) for r in records)
    yield from windows(asked, client)


def _near_duplicates(
    run: Run,
    config: ScoreConfig,
    explanations: Sequence[Explanation],
    selected: Sequence[SampledNeuron],
) -> NearDuplicates:
    """Knows all that the explainers were shown: excerpts of the fit split from the documents they name."""
    duplicates = NearDuplicates(TokenStore(run.stage("tokens").path))
    seen: dict[NeuronId, set[int]] = {}
    for explanation in explanations:
        seen.setdefault(explanation.neuron, set()).update(explanation.documents)
    harvest = run.stage("activations", config.model).path
    for record in _records(harvest, "fit", selected):
        documents = seen.get(record.neuron, set())
        duplicates.explained(e for e in record.excerpts if e.document in documents)
    return duplicates


def _finish(
    draft: Draft,
    config: ScoreConfig,
    selected: Sequence[SampledNeuron],
    explanations: Sequence[Explanation],
    scores: Sequence[NeuronScore],
    duplicates: NearDuplicates,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Writes the files of the stage; returns the figures of `ScoreResult`."""
    checked = _disjoint(audit(explanations, scores), config)
    write_scores(draft.path, scores)
    near = duplicates.audit(scores)
    results = _write_summary(draft.path, config, selected, scores, checked, near, more)
    draft.results.update(results)
    return results


def _held_out(
    config: ScoreConfig, harvest: Path, selected: Sequence[SampledNeuron]
) -> Iterator[NeuronRecord]:
    """Held-out records of the selected neurons, with a progress bar."""
    with tqdm(
        total=len(selected), desc=f"score {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        for record in _records(harvest, "held_out", selected):
            yield record
            bar.update()


def _records(
    harvest: Path, split: Split, selected: Sequence[SampledNeuron]
) -> Iterator[NeuronRecord]:
    """Records of the selected neurons, by layer and index; `InputError` where one is missing."""
    layers: dict[int, list[int]] = {}
    for s in selected:
        layers.setdefault(s.neuron.layer, []).append(s.neuron.index)
    for layer, indices in layers.items():
        n_found = 0
        for record in read_records(harvest, split, layers=[layer], indices=indices):
            n_found += 1
            yield record
        if n_found != len(indices):
            raise InputError(
                f"{harvest} holds {n_found} of the {len(indices)} explained neurons of layer"
                f" {layer} in the {split} split: type `cratelm harvest --force` for this model"
            )


def _disjoint(checked: Audit, config: ScoreConfig) -> Audit:
    if checked.shared:
        raise InputError(
            f"{len(checked.shared)} documents (first: {checked.shared[0]}) were both explained from"
            f" and scored on, none was expected: type `cratelm harvest --force --run {config.run}"
            f" --model {config.model}`, then explain and score again"
        )
    return checked


def _write_summary(
    folder: Path,
    config: ScoreConfig,
    selected: Sequence[SampledNeuron],
    scores: Sequence[NeuronScore],
    checked: Audit,
    near: DuplicateAudit,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Writes `summary.json`; returns the figures of `ScoreResult`."""
    statistics = all_statistics(scores, resamples=config.resamples, seed=config.seed)
    write_json(
        folder / "summary.json",
        {
            "model": config.model,
            "leakage_audit": asdict(checked),
            "near_duplicates": asdict(near),
            **more,
            "statistics": [asdict(s) for s in statistics],
        },
    )
    left_out = {
        (s.explainer, s.metric, s.control): s for s in statistics if s.policy == "leave_out"
    }
    means = {
        f"{explainer} {metric}": f"{_shown(own)}; shuffled"
        f" {_shown(left_out[explainer, metric, 'shuffled'])};"
        f" {own.counts.undefined} undefined, {own.counts.failed} failed"
        for (explainer, metric, control), own in left_out.items()
        if control == "none"
    }
    return {
        "n_scores": len(scores),
        "n_neurons": len(selected),
        "n_dead": len({s.neuron for s in scores if s.score.status == Status.DEAD}),
        "n_failed": sum(s.score.status == Status.FAILED for s in scores),
        "shared_documents": len(checked.shared),
        "n_duplicates": near.n_near_duplicates,
        "means": means,
    }


def _shown(statistics: ModelStatistics) -> str:
    if statistics.mean is None:
        return "none"
    if statistics.low is None:
        return f"{statistics.mean:.1f}"
    return f"{statistics.mean:.1f} ({statistics.low:.1f} to {statistics.high:.1f})"
