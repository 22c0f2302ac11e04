"""`cratelm score`: how well explanations predict their neurons on held-out excerpts, with null controls."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import HarvestConfig
from cratelm.activations.open_harvest import is_measurable, open_harvested
from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.explain.concepts.features import ConceptReader
from cratelm.explain.concepts.stored import concept_reader
from cratelm.explain.named_set import explanations_of, simulated_name
from cratelm.explain.selection import read_selected_records, read_selected_rows
from cratelm.explain.store import (
    ExplanationFailure,
    ExplanationFile,
    ExplanationSource,
    SampledNeuron,
    noun_of,
    read_selected,
    read_unexplained,
)
from cratelm.llm.client import Client, DryRun, WorkerResult, dry_run
from cratelm.llm.config import NO_LLM
from cratelm.llm.probe import ProbeResult, probe_levels
from cratelm.llm.prompts import neurons as prompts
from cratelm.llm.prompts import openai as openai_prompts
from cratelm.llm.prompts import scorers as scorer_prompts
from cratelm.llm.session import is_finished, open_client, write_calls
from cratelm.records import Interval, NeuronKey, NeuronRecord, NeuronScore, Split, Status
from cratelm.runs import Draft, Run, Stage, write_json
from cratelm.runs.names import set_name
from cratelm.score.audit import CHANGES, planted_audit
from cratelm.score.audit import table as planted_table
from cratelm.score.audit_run import ChangedExplanations, RunAudit, compare, figures_of
from cratelm.score.audit_run import table as run_table
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import Audit, DocumentAudit, ExplanationSet
from cratelm.score.duplicates import DuplicateAudit, NearDuplicates
from cratelm.score.llm_summary import LostExcerpts, hard_differences, lost_excerpts
from cratelm.score.pipeline import Reader, Scoring, plan_batches, requests_of, score_records
from cratelm.score.scorers import Prompting
from cratelm.score.simulators import COMPAT, TOKEN_EXPLAINERS, LLMSimulator
from cratelm.score.store import read_score_columns, read_whole_scores, write_scores, write_whole
from cratelm.score.whole import WholeSplit
from cratelm.score.whole_summary import summarize_whole
from cratelm.stats.score_table import ScoreTable
from cratelm.stats.scores import ModelStatistics, all_statistics, statistics_by_end
from cratelm.tokens.shards import TokenStore


@dataclass(frozen=True)
class ScoreResult:
    """Result of `cratelm score`."""

    path: Path
    """folder of `scores.parquet` and `summary.json`"""
    n_scores: int
    """number of rows: neurons x explainers x metrics x controls"""
    n_neurons: int
    n_dead: int
    """neurons that never fired on the fit or on the held-out split"""
    shared_documents: int
    """documents both explained from and scored on: always 0, since otherwise `score` raises"""
    n_duplicates: int
    """scored passages that are near-duplicates of passages explained from"""
    means: dict[str, str]
    """mean of the explanations' own scores and of the shuffled control, in words, by explainer and metric"""
    n_failed: int = 0
    """scores, including those of null controls, that do not exist because an explainer or simulator failed"""
    n_lost: int = 0
    """excerpts left out of the other scores because their calls failed; one counts for each score"""
    calls: str = ""
    """number and cost of the calls to a language model, in words"""
    hard: dict[str, str] = field(default_factory=dict)
    """differences that hard negatives make, in words, by explainer and metric; empty if none were scored"""
    whole: dict[str, str] = field(default_factory=dict)
    """figures over all held-out tokens, in words, by what they are; empty if they were not measured"""
    audit: str = ""
    """tables of the audit of the metrics; empty without --audit"""
    noun: str = "neurons"
    """what `n_neurons` and `n_dead` count: `neurons`, or `ends of neurons` at a site with both ends"""

    def __str__(self) -> str:
        parts = [f"{self.n_failed:,} scores failed"] if self.n_failed else []
        parts += [f"{self.n_lost:,} excerpts left out of scores"] if self.n_lost else []
        failed = f", {', '.join(parts)} (--retry-failed repeats the calls)" if parts else ""
        calls = f"\n  {self.calls}" if self.calls else ""
        head = (
            f"{self.n_scores:,} scores of {self.n_neurons:,} {self.noun}, {self.n_dead:,} dead,"
            f" {self.shared_documents} shared documents, {self.n_duplicates:,} near-duplicate"
            f" passages{failed}: {self.path}{calls}"
        )
        lines = [*self.means.items(), *self.hard.items(), *self.whole.items()]
        text = "\n".join([head, *(f"  {name:<30} {words}" for name, words in lines)])
        return f"{text}\n{self.audit}" if self.audit else text


def score(config: ScoreConfig) -> ScoreResult | DryRun | WorkerResult:
    """Score the explanations of one model of a run, and return the counts and means.

    Writes `scores/MODEL/`, or `scores/MODEL@NAME/` if a language model reads the explanations, where NAME
    is `config.name`. With `--dry-run` no score is requested, nothing is written and a `DryRun` is returned;
    with `--shard` answers are written only to the worker's ledger.

    Raises `InputError` if the run has no harvest or no explanations of the model, if a document was
    both explained from and scored on, or if the language model cannot be reached or fails every call;
    `BudgetReached` at a limit. All answers so far are in the ledger.
    """
    run = Run(config.run)
    if config.simulator:
        return _score_with_llm(config, run)
    harvest = run.stage("activations", config.model)
    explained = run.stage("explanations", config.model)
    inputs = {
        "activations": harvest.require("harvest"),
        "explanations": explained.require("explain"),
    }
    stage = run.stage("scores", config.model)
    if stage.is_finished(config, inputs, force=config.force):
        return stage.result(ScoreResult, path=stage.path)
    explanations = _read_explained(
        explained.path, explained.require("explain").config["explainers"]
    )
    _require_counts(config, harvest.path, explanations.selected)
    store = TokenStore(run.stage("tokens").path)
    duplicates = _near_duplicates(store, harvest.path, explanations)
    concepts = concept_reader(explained.path, store.token_strings)
    scoring = replace(_scoring(config, explanations, duplicates, None), concepts=concepts)
    with stage.write(config, inputs) as draft:
        records = _held_out(config, harvest.path, explanations.selected)
        scores = score_records(records, scoring)
        documents = _write(draft, config, explanations, scores)
        whole, extra, words = None, {}, {}
        if config.all_tokens and is_measurable(harvest):
            whole = _Whole(config, run, harvest, explanations.explainers, concepts)
            write_whole(draft.path, whole.of(explanations.explanations).measure())
            columns = read_score_columns(draft.path, ("value",))
            summary = summarize_whole(draft.path, columns, config.resamples, config.seed)
            extra["all_tokens"], words["whole"] = asdict(summary), summary.in_words()
        if config.audit:
            words["audit"] = _audited(config, harvest.path, explanations, scoring, whole, draft)
        results = _summarize(draft, config, explanations, documents, duplicates, extra) | words
        draft.results.update(words)
    return ScoreResult(path=stage.path, **results)


def _score_with_llm(config: ScoreConfig, run: Run) -> ScoreResult | DryRun | WorkerResult:
    if config.prompts == "openai":
        openai_prompts.require()
    with open_client(config, config.simulator) as client, ExitStack() as held:
        reader = client.backend.name
        source = _explanation_set(run, config, reader)
        name = config.name or simulated_name(source, reader)
        explained = run.stage("explanations", set_name(config.model, source))
        harvest = run.stage("activations", config.model)
        inputs = {
            "tokens": run.stage("tokens").require("tokenize"),
            "activations": harvest.require("harvest"),
            "explanations": explained.require("explain"),
            "prompts": f"{prompts.VERSION} {scorer_prompts.VERSION}",
        }
        stage = run.stage("scores", set_name(config.model, name))
        if is_finished(config, stage, inputs):
            return stage.result(ScoreResult, path=stage.path)
        # no other process may make the same calls meanwhile
        if not (config.dry_run or config.shard):
            held.enter_context(stage.lock())
        explanations = _read_explained(explained.path, (), config.explanations or reader)
        _require_counts(config, harvest.path, explanations.selected)
        store = TokenStore(run.stage("tokens").path)
        probe = probe_levels(client)
        print(f"{reader}: {probe}", flush=True)
        duplicates = _near_duplicates(store, harvest.path, explanations)
        scoring = _scoring(config, explanations, duplicates, _reader(config, client, probe, store))
        index, count = config.worker()
        of_worker = explanations.selected[index::count]
        records = _held_out(config, harvest.path, of_worker)
        if config.dry_run:
            batches = plan_batches(records, scoring, client)
            return dry_run(client, (requests_of(batch) for batch in batches))
        scores = score_records(records, scoring, client)
        if config.shard:
            # answers are in the ledger: the command that merges the workers writes the stage
            deque(scores, maxlen=0)
            client.require_answers()
            return WorkerResult(client.ledger.path, len(of_worker), str(client.tally))
        with stage.write(config, inputs) as draft:
            documents = _write(draft, config, explanations, scores)
            client.require_answers()
            write_calls(draft, client)
            preflight = {"preflight": probe.as_dict()}
            results = _summarize(draft, config, explanations, documents, duplicates, preflight)
    return ScoreResult(path=stage.path, calls=str(client.tally), **results)


def _explanation_set(run: Run, config: ScoreConfig, reader: str) -> str:
    """Return the name of the explanations to score; empty for those made without a language model."""
    if config.explanations == NO_LLM:
        return ""
    name = config.explanations or reader
    explanations_of(run, config.model, name, config.simulator, NO_LLM)
    return name


@dataclass(frozen=True, eq=False)
class Explained:
    """Content of the folder of an explanation set."""

    selected: list[SampledNeuron]
    """neurons selected to be explained"""
    explanations: ExplanationFile
    failures: list[ExplanationFailure]
    explainers: Sequence[str]
    """in the order of the rows"""


def _read_explained(folder: Path, explainers: Sequence[str], default: str = "") -> Explained:
    """Return the explanation set in `folder`.

    If `explainers` is empty, those in the file are used, or `default` if the file has no explanation.
    """
    explanations = ExplanationFile(folder)
    in_file = sorted({explainer for explainer, _ in explanations.kinds()}) or [default]
    return Explained(
        read_selected(folder), explanations, read_unexplained(folder), explainers or in_file
    )


def _require_counts(config: ScoreConfig, harvest: Path, selected: Sequence[SampledNeuron]) -> None:
    """Raise `InputError` if the estimate needs counts of tokens per bin that the harvest lacks."""
    if "all_tokens_estimate" not in config.metrics or not selected:
        return
    summaries = read_summaries(harvest, "held_out", [selected[0].neuron.layer])
    if any(s.openai_counts is None for s in summaries):
        raise InputError(
            f"--metrics all_tokens_estimate needs the number of tokens in each quantile bin, which the harvest of"
            f" {config.model} lacks (it is imported, or of an earlier version): type `cratelm harvest --force --run"
            f" {config.run} --model {config.model}`, then explain and score again, or omit the metric"
        )


def _reader(config: ScoreConfig, client: Client, probe: ProbeResult, store: TokenStore) -> Reader:
    strings = store.token_strings
    simulators = {"": LLMSimulator.of(probe, strings, config.prompts)}
    if config.paper_compat:
        simulators[COMPAT] = LLMSimulator.of(probe, strings, config.prompts, paper_compat=True)
    prompting = Prompting(strings, probe.supports_logprobs, config.seed)
    return Reader(client.backend.name, simulators, prompting)


def _scoring(
    config: ScoreConfig, explained: Explained, duplicates: NearDuplicates, reader: Reader | None
) -> Scoring:
    failures = explained.failures if reader else None
    return Scoring(
        metrics=config.metrics,
        explainers=explained.explainers,
        explanations=ExplanationSet(explained.explanations, failures, config.seed),
        dead_on_fit={s.neuron for s in explained.selected if s.dead},
        find_duplicates=duplicates.are_duplicates,
        reader=reader,
        per_bin=config.per_bin,
        resamples=config.resamples,
    )


def _near_duplicates(store: TokenStore, harvest: Path, explained: Explained) -> NearDuplicates:
    """Return an index of all excerpts that explainers used: fit excerpts from the documents they list."""
    duplicates = NearDuplicates(store)
    columns = ["layer", "index", "kind", "document", "position"]
    of_layer, documents_of = -1, {}
    for layer, rows in read_selected_rows(harvest, "fit", explained.selected, columns):
        if layer != of_layer:
            of_layer, documents_of = layer, explained.explanations.documents_of(layer)
        duplicates.register_positions(_explained_positions(layer, rows, documents_of))
    return duplicates


def _explained_positions(
    layer: int, rows: pa.Table, documents_of: Mapping[NeuronKey, NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Return the positions of those excerpts that are in documents their neurons were explained from."""
    kinds = rows["kind"].combine_chunks().dictionary_encode()
    in_context = np.array([k != "out_of_context" for k in kinds.dictionary.to_pylist()], bool)
    used = in_context[kinds.indices.to_numpy()]
    index, document, position = (rows[c].to_numpy() for c in ("index", "document", "position"))
    edges = np.flatnonzero(np.diff(index, prepend=-1, append=-1)).tolist()
    for low, high in pairwise(edges):
        documents = documents_of.get(NeuronKey(layer, int(index[low])), ())
        used[low:high] &= np.isin(document[low:high], documents)
    return position[used]


def _held_out(
    config: ScoreConfig, harvest: Path, selected: Sequence[SampledNeuron]
) -> Iterator[NeuronRecord]:
    """Yield the held-out records of the selected neurons, with a progress bar."""
    with tqdm(
        total=len(selected), desc=f"score {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        for record in read_selected_records(harvest, "held_out", selected):
            yield record
            bar.update()


class _Whole:
    """Measures over all held-out tokens, for explanations or changed ones."""

    def __init__(
        self,
        config: ScoreConfig,
        run: Run,
        harvest: Stage,
        explainers: Sequence[str],
        concepts: ConceptReader,
    ):
        self._config, self._explainers, self._concepts = config, explainers, concepts
        self._opened = open_harvested(run, config.model, config)
        self._harvest = harvest.require("harvest").config

    def _plan(self, split: Split) -> SearchPlan:
        """Return the tokens that the harvest searched."""
        tokens = self._harvest.get("tokens", HarvestConfig.tokens)
        seed = self._harvest.get("seed", HarvestConfig.seed)
        return self._opened.plan(split, tokens, seed)

    def of(self, explanations: ExplanationSource) -> WholeSplit:
        """Return the measurement of explanations."""
        c = self._config
        return WholeSplit(
            self._opened,
            self._plan,
            explanations,
            self._explainers,
            c.model,
            c.seed,
            c.quiet,
            self._concepts,
        )


def _audited(
    config: ScoreConfig,
    harvest: Path,
    explained: Explained,
    scoring: Scoring,
    whole: _Whole | None,
    draft: Draft,
) -> str:
    """Audit the metrics, write `audit.json`, and return its tables."""
    planted = planted_audit(trials=40, seed=config.seed)
    before = figures_of(read_score_columns(draft.path, ("value",)), read_whole_scores(draft.path))
    found: list[RunAudit] = []
    for change in CHANGES:
        source = ChangedExplanations(explained.explanations, change, config.seed)
        changed = replace(
            scoring,
            explanations=ExplanationSet(source, None, config.seed),
            explainers=[e for e in scoring.explainers if e in TOKEN_EXPLAINERS],
        )
        scores = score_records(_held_out(config, harvest, explained.selected), changed)
        over_all = (s for _, of in (whole.of(source).measure() if whole else ()) for s in of)
        after = figures_of(scores, over_all)
        found += compare(before, after, change, resamples=config.resamples, seed=config.seed)
    write_json(
        draft.path / "audit.json",
        {"planted": [asdict(a) for a in planted], "run": [asdict(a) for a in found]},
    )
    lines = ["planted labels, share of trials noticed, by rate", *planted_table(planted)]
    return "\n".join([*lines, "", "explanations of the run", *run_table(found)])


def _write(
    draft: Draft, config: ScoreConfig, explained: Explained, scores: Iterable[NeuronScore]
) -> Audit:
    """Write the scores while they are computed; return the audit of the documents."""
    audit = DocumentAudit()
    for documents in explained.explanations.documents():
        audit.explained(documents)
    with_bounds = "all_tokens_estimate" in config.metrics
    write_scores(draft.path, audit.watched(scores), with_bounds=with_bounds)
    return _disjoint(audit.result(), config)


def _summarize(
    draft: Draft,
    config: ScoreConfig,
    explained: Explained,
    documents: Audit,
    duplicates: NearDuplicates,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `summary.json` for the scores in the draft; return the fields of `ScoreResult`.

    `extra` is added to `summary.json`.
    """
    columns = ("value", "n_failed", "n_duplicates", "without_duplicates")
    scores = read_score_columns(draft.path, columns)
    near = duplicates.audit(scores)
    results = _write_summary(draft.path, config, explained.selected, scores, documents, near, extra)
    draft.results.update(results)
    return results


def _disjoint(documents: Audit, config: ScoreConfig) -> Audit:
    if documents.shared:
        raise InputError(
            f"{len(documents.shared)} documents (first: {documents.shared[0]}) were both explained from"
            f" and scored on, but the splits must be disjoint: type `cratelm harvest --force --run"
            f" {config.run} --model {config.model}`, then explain and score again"
        )
    return documents


def _write_summary(
    folder: Path,
    config: ScoreConfig,
    selected: Sequence[SampledNeuron],
    scores: ScoreTable,
    documents: Audit,
    near: DuplicateAudit,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `summary.json`; return the fields of `ScoreResult`."""
    statistics = all_statistics(scores, resamples=config.resamples, seed=config.seed)
    by_end = statistics_by_end(scores, resamples=config.resamples, seed=config.seed)
    if by_end:
        extra = {**extra, "by_end": {end: [asdict(s) for s in of] for end, of in by_end.items()}}
    lost = lost_excerpts(scores)
    hard = hard_differences(scores, config.resamples, config.seed)
    if config.simulator:
        extra = {
            **extra,
            "lost_excerpts": [asdict(row) for row in lost.values()],
            "hard_negatives": [asdict(row) for row in hard],
        }
    write_json(
        folder / "summary.json",
        {
            "model": config.model,
            "leakage_audit": asdict(documents),
            "near_duplicates": asdict(near),
            **extra,
            "statistics": [asdict(s) for s in statistics],
        },
    )
    return {
        "n_scores": len(scores),
        "n_neurons": len(selected),
        **noun_of(selected),
        "n_dead": len(scores.select(status=str(Status.DEAD)).neurons()),
        "n_failed": len(scores.select(status=str(Status.FAILED))),
        "n_lost": sum(row.n_excerpts for row in lost.values()),
        "shared_documents": len(documents.shared),
        "n_duplicates": near.n_near_duplicates,
        "means": _means(statistics, lost, by_end),
        "hard": {f"{h.explainer} {h.metric}, hard - random": h.in_words() for h in hard},
    }


def _means(
    statistics: Iterable[ModelStatistics],
    lost: Mapping[tuple[str, ...], LostExcerpts],
    by_end: Mapping[str, Iterable[ModelStatistics]],
) -> dict[str, str]:
    """Return the means of the own and the shuffled explanations in words, by explainer and metric.

    If neurons have two ends, the means of each end follow.
    """
    defined_only = {
        (s.explainer, s.metric, s.control): s for s in statistics if s.policy == "leave_out"
    }
    of_ends = {
        (end, s.explainer, s.metric): s
        for end, of in by_end.items()
        for s in of
        if s.policy == "leave_out" and s.control == "none"
    }
    return {
        f"{explainer} {metric}": f"{_mean(own)}; shuffled"
        f" {_mean(defined_only[explainer, metric, 'shuffled'])};"
        f" {own.counts.undefined} undefined, {own.counts.failed} failed"
        + (f", {row.n_excerpts:,} excerpts left out" if (row := lost.get(key)) else "")
        + "".join(
            f"; ends {end}: {_mean(s)}"
            for end in by_end
            if (s := of_ends.get((end, explainer, metric)))
        )
        for key, own in defined_only.items()
        for explainer, metric, control in [key]
        if control == "none"
    }


def _mean(statistics: ModelStatistics) -> str:
    if statistics.mean is None:
        return "none"
    return Interval(statistics.mean, statistics.low, statistics.high).in_words(".1f")
