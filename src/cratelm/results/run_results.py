"""The results of a run by model: everything that a report shows except excerpts and explanations.

This module reads the results of the stages of each model. `side_results` reads the additional measurements,
`neuron_table` and `neuron_view` read single neurons.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.errors import InputError
from cratelm.llm.client import Tally
from cratelm.llm.probe import ProbeResult
from cratelm.records import (  # fmt: skip
    METRICS,
    SIMULATION_METRICS,
    SPLITS,
    Control,
    Metric,
    NeuronKey,
)
from cratelm.results.replacement import (
    CurvePoint,
    ReplacementResults,
    read_replacement,
    read_replacement_curve,
    read_replacement_sets,
)
from cratelm.results.scores import (
    find_statistics,
    label_suffix,
    read_calls,
    read_score_summary,
)
from cratelm.results.side_results import (
    Analysis,
    evaluation_inputs,
    read_analyses,
    read_effects,
    read_interventions,
    read_sae_evaluation,
)
from cratelm.results.sparsity import LayerSparsity, read_sparsity
from cratelm.results.stages import (
    MODEL_STAGES,
    SET_STAGES,
    completions,
    display_order,
    missing_sets,
    principal_explainer,
    set_completions,
    set_names,
    side_completions,
)
from cratelm.runs import Completion, Freshness, Run, StageName, options_of
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.names import (
    FAMILIES,
    NullKind,
    family_of,
    set_name,
    split_set,
    twin_name,
    untrained_name,
)
from cratelm.sae.store import StoredEvaluation
from cratelm.score.controls import Audit
from cratelm.score.duplicates import DuplicateAudit
from cratelm.score.store import read_score_columns, read_token_shares
from cratelm.score.whole_summary import WholeSummary
from cratelm.stats.score_table import ScoreTable
from cratelm.stats.scores import ModelStatistics, Policy
from cratelm.steer.store import EffectsSummary, InterventionSummary
from cratelm.tokens.shards import TokenStore
from cratelm.train.config import TrainConfig
from cratelm.train.log import read_metrics

_COLUMNS = ("value", "reason", "explained_by", "simulator", "variant")
"""columns of the scores that a report shows, besides those that identify a score and its status"""


@dataclass(frozen=True, eq=False)
class ResultSet:
    """Results of `explain` and `score` for one model, either without a language model or with one."""

    model: str
    name: str
    """NAME in the folder MODEL@NAME; empty for the set without a language model"""
    completions: dict[StageName, Completion]
    """completion records of `explanations` and `scores`, if finished"""
    calls: dict[str, Tally]
    """by command: calls that its last execution made to a language model"""
    statistics: tuple[ModelStatistics, ...] = ()
    """as `cratelm score` wrote them"""
    scores: ScoreTable = field(default_factory=lambda: ScoreTable.of([]))
    """scores under all controls, the columns of `_COLUMNS`"""
    audit: Audit | None = None
    """number of documents explained from, scored on, and both; None without scores"""
    near_duplicates: DuplicateAudit | None = None
    """None if near-duplicates were not searched for"""
    preflight: ProbeResult | None = None
    """probe calls of the simulator; None without a language model"""
    all_tokens: WholeSummary | None = None
    """figures over all held-out tokens; None if they were not measured"""
    by_end: Mapping[str, tuple[ModelStatistics, ...]] = field(default_factory=dict)
    """statistics of each end of the neurons, `+` and `-`; empty for neurons with one end"""

    suffix: str = ""
    """appended to the explainers' labels: the name of the set in brackets, if its scores were named"""

    @property
    def label(self) -> str:
        """Return the name of the set's folders: MODEL or MODEL@NAME."""
        return set_name(self.model, self.name)

    @property
    def explainers(self) -> list[str]:
        """Return the names of the scored explainers, sorted."""
        return sorted({s.explainer for s in self.statistics})

    @property
    def neurons(self) -> frozenset[NeuronKey]:
        """Return the neurons that were selected for scoring, including those without a value."""
        return self.scores.neurons()


@dataclass(frozen=True, eq=False)
class ModelResults:
    """One scored model."""

    name: str
    place: int
    """number that sets colour and marker; a null control shares that of its trained model"""
    null_of: str
    """the trained model for which this is a null control; empty for any other model"""
    completions: dict[StageName, Completion]
    """completion records of the finished stages that use no language model"""
    sets: tuple[ResultSet, ...]
    """sets of results, first the one without a language model if it exists"""
    statistics: tuple[ModelStatistics, ...]
    """statistics of all sets"""
    scores: ScoreTable
    """scores of all sets for the neurons' own explanations, without controls"""
    all_tokens: WholeSummary | None
    """figures over all held-out tokens of the set without a language model; None if they were not measured"""
    token_shares: Mapping[NeuronKey, float]
    """fraction of the variance that the last token alone explains, of each neuron that has one"""
    sparsity: Mapping[int, LayerSparsity]
    """by layer, how often its neurons fire on the held-out split; empty without a harvest"""
    curve: list[dict[str, Any]]
    """lines of the training curve; empty without a trained model"""
    evaluation: StoredEvaluation | None
    """evaluation of the autoencoders that define the latents; None for neurons, and if the present
    autoencoders were not evaluated"""
    replacement: ReplacementResults | None
    """losses of the model on its explanations; None if they were not measured"""
    replacement_curve: list[CurvePoint]
    """losses with only the best-explained neurons replaced"""
    replacement_sets: Sequence[ReplacementResults]
    """losses of the model on explanations that language models read, by name of the set"""
    stale: Mapping[str, Freshness]
    """stages of the model whose inputs have changed since, by label"""

    @property
    def llm_sets(self) -> list[ResultSet]:
        """Return the sets that used a language model."""
        return [of_set for of_set in self.sets if of_set.name]

    @property
    def latents_of(self) -> str:
        """Return the name of the model whose latents these are; empty for neurons."""
        harvest = self.completions.get("activations")
        if harvest is None or not harvest.config.get("sae"):
            return ""
        return Path(harvest.config["model"]).name

    @property
    def trained_here(self) -> bool:
        """Return whether the run trained the model; False for a model from a folder or the Hub."""
        harvest = self.completions.get("activations")
        return harvest is None or harvest.config.get("model") == self.name

    def find(
        self,
        explainer: str,
        metric: Metric,
        control: Control = "none",
        policy: Policy = "leave_out",
    ) -> ModelStatistics | None:
        """Return the statistics of these scores; None if there are none."""
        return find_statistics(self.statistics, explainer, metric, control, policy)


@dataclass(frozen=True, eq=False)
class RunResults:
    """All results that a report shows, except excerpts and explanations."""

    run: Run
    tokens: Completion | None
    """None if the shards do not exist"""
    models: tuple[ModelResults, ...]
    """trained models first, CRATE before GPT-2; then the null controls"""
    explainer: str
    """explainer of the comparison and of the neurons shown"""
    explainers: tuple[str, ...]
    """explainers without a language model, and `explainer`"""
    llm_explainers: tuple[str, ...]
    """explainers with a language model; their scores cover a sample of the neurons"""
    metrics: tuple[Metric, ...]
    """metrics of the comparison: simulation metrics, or the others if the run has no simulation"""
    side_stages: tuple[Completion, ...]
    """completion records of the additional measurements of these models"""
    analyses: tuple[Analysis, ...]
    effects: tuple[EffectsSummary, ...]
    interventions: tuple[InterventionSummary, ...]
    shared_ordinals: int
    """number of documents in more than one split: 0 if the shards are correct or do not exist"""
    _by_name: dict[str, ModelResults] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {m.name: m for m in self.models})

    @property
    def principal(self) -> tuple[ModelResults, ...]:
        """Return the models that are not the null control of another model in the report."""
        return tuple(m for m in self.models if not m.null_of)

    def model(self, name: str) -> ModelResults | None:
        """Return the model of this name; None if it is not in the report."""
        return self._by_name.get(name)

    def null(self, model: ModelResults, kind: NullKind = "init") -> ModelResults | None:
        """Return a null control of `model`, by default the untrained one; None if it was not scored."""
        null = self.model(untrained_name(model.name, kind))
        return null if null is not None and null.null_of == model.name else None

    def twins(self) -> list[tuple[ModelResults, ModelResults]]:
        """Return the pairs of CRATE and GPT-2 of the same size."""
        crates = [m for m in self.principal if family_of(m.name) == FAMILIES[0]]
        pairs = [(m, self.model(twin_name(m.name))) for m in crates]
        return [(a, b) for a, b in pairs if b is not None]


def scored_models(run: Run, models: Sequence[str] = ()) -> list[str]:
    """Return `models`, or all scored models if it is empty, in the order of a report.

    Raises `InputError` if the run has no scored model, or if one of `models` is not scored.
    """
    scored = {split_set(name)[0] for name in run.models("scores")}
    if not scored:
        raise InputError(
            f"no model of {run.path} is scored: type `cratelm score --run {run.path} --model NAME`"
            " first (before it, explain and harvest)"
        )
    for name in sorted(set(models) - scored):
        run.stage("scores", name).require("score")
    names = set(models) or scored
    nulls = run.null_controls(names)
    return sorted(names, key=lambda name: display_order(name, nulls.get(name, "")))


def input_identities(run: Run, models: Sequence[str]) -> dict[str, str]:
    """Return the identity of everything that `read_results` reads for these models, by label."""
    tokens = run.stage("tokens").completion()
    records = {"tokens": tokens} if tokens else {}
    for model in models:
        for stage, done in completions(run, model).items():
            records[f"{stage}/{model}"] = done
        for name in set_names(run, model):
            for stage, done in set_completions(run, model, name).items():
                records[f"{stage}/{set_name(model, name)}"] = done
    records |= {f"{done.stage}/{done.name}": done for done in side_completions(run, models)}
    identities = {label: done.identity for label, done in records.items()}
    return identities | evaluation_inputs(run, models)


@checked_arguments()
def read_results(run: Run, models: Sequence[str] = (), explainer: str | None = None) -> RunResults:
    """Return the results of `models`, or of all scored models.

    `explainer` selects the explainer of the comparison; None selects the trie, or the first by name if there
    is no trie. Raises `InputError` if a model is not scored, or if no model is scored with `explainer`.
    """
    names = scored_models(run, models)
    nulls = run.null_controls(names)
    principal = [name for name in names if name not in nulls]
    read = tuple(
        _read_model(run, name, principal.index(nulls.get(name, name)), nulls.get(name, ""))
        for name in names
    )
    scored = {s.explainer for m in read for s in m.statistics}
    by_llm = {e for m in read for of_set in m.llm_sets for e in of_set.explainers}
    pairs = (("llm" if e in by_llm else "", e) for e in scored)
    chosen = explainer or (principal_explainer(pairs) or ("", ""))[1]
    if chosen not in scored:
        raise InputError(
            f"--explainer is {chosen!r}, but the scores are of {', '.join(sorted(scored))}:"
            " choose one of these"
        )
    without_llm = (scored - by_llm) | {chosen}
    metrics = {s.metric for m in read for s in m.statistics}
    tokens = run.stage("tokens").completion()
    return RunResults(
        run=run,
        tokens=tokens,
        models=read,
        explainer=chosen,
        explainers=tuple(sorted(without_llm, key=lambda e: (e != chosen, e))),
        llm_explainers=tuple(sorted(by_llm)),
        metrics=tuple(m for m in SIMULATION_METRICS if m in metrics)
        or tuple(m for m in METRICS if m in metrics),
        side_stages=side_completions(run, names),
        analyses=tuple(read_analyses(run, names)),
        effects=tuple(read_effects(run, names)),
        interventions=tuple(read_interventions(run, names)),
        shared_ordinals=_shared_ordinals(run) if tokens else 0,
    )


def _read_model(run: Run, name: str, place: int, null_of: str) -> ModelResults:
    done = completions(run, name)
    sets = [_read_set(run, name, of_set) for of_set in ["", *set_names(run, name)]]
    harvest = done.get("activations")
    folder = run.stage("activations", name).path
    shares = read_token_shares(run.stage("scores", name).path) if "scores" in done else []
    return ModelResults(
        name=name,
        place=place,
        null_of=null_of,
        completions=done,
        sets=tuple(of_set for of_set in sets if of_set.completions),
        statistics=tuple(s for of_set in sets for s in of_set.statistics),
        scores=ScoreTable.concatenated([s.scores.select(control="none") for s in sets]),
        all_tokens=next((s.all_tokens for s in sets if s.all_tokens), None),
        token_shares={s.neuron.key: s.token_share for s in shares if s.token_share is not None},
        sparsity=read_sparsity(folder) if harvest else {},
        curve=read_metrics(run.stage("model", name).path) if "model" in done else [],
        evaluation=read_sae_evaluation(run, harvest) if harvest else None,
        replacement=read_replacement(run, name),
        replacement_curve=read_replacement_curve(run, name),
        replacement_sets=read_replacement_sets(run, name),
        stale=run.stale(name),
    )


def _read_set(run: Run, model: str, name: str) -> ResultSet:
    done = set_completions(run, model, name)
    folders = {stage: run.stage(stage, set_name(model, name)).path for stage in done}
    calls = {SET_STAGES[stage]: read_calls(folders[stage]) for stage in done}
    tallies = {verb: tally for verb, tally in calls.items() if tally is not None}
    if "scores" not in done:
        return ResultSet(model, name, done, tallies)
    suffix = label_suffix(run.stage("scores", set_name(model, name)))
    summary = read_score_summary(folders["scores"]).renamed(suffix)
    scores = read_score_columns(folders["scores"], _COLUMNS)
    return ResultSet(
        model,
        name,
        done,
        tallies,
        statistics=summary.statistics,
        scores=scores.labelled(suffix) if suffix else scores,
        audit=summary.audit,
        near_duplicates=summary.near_duplicates,
        preflight=summary.preflight,
        all_tokens=summary.all_tokens,
        by_end=summary.by_end,
        suffix=suffix,
    )


def _shared_ordinals(run: Run) -> int:
    store = TokenStore(run.stage("tokens").path)
    ordinals = np.concatenate([store.split(split).ordinals for split in SPLITS])
    return len(ordinals) - len(np.unique(ordinals))


def missing_results(results: RunResults) -> list[str]:
    """Return a line for each result that a full report has and this run lacks, with the command that produces it."""
    path = results.run.path
    lines = [] if results.tokens else [f"the token shards (`cratelm tokenize --run {path}`)"]
    for m in results.models:
        missing: list[StageName] = [stage for stage in MODEL_STAGES if stage not in m.completions]
        if "model" in missing and (m.latents_of or not m.trained_here):
            missing.remove("model")
        if not m.latents_of and not m.trained_here:
            lines.append(f"losses and parameters of {m.name}, which was not trained in this run")
        lines += [
            f"{stage}/{m.name} (`{results.run.stage(stage, m.name).command(force=False)}`)"
            for stage in missing
        ]
    lines += [
        f"the randomly initialised null control of {m.name} (`{_untrained_command(results.run, m)}`, then"
        f" harvest, explain and score {untrained_name(m.name)})"
        for m in results.principal
        if results.null(m) is None and m.trained_here
    ]
    lines += [
        f"scores by {name} of {null.name}, the untrained control of {m.name} ({commands})"
        for m in results.principal
        if (null := results.null(m)) is not None
        for name, commands in missing_sets(results.run, m.name, null.name).items()
    ]
    if not results.twins() and len(results.principal) < 2:
        lines.append(
            "twins: no CRATE and GPT-2 of the same size are scored, so nothing is compared"
        )
    lines += [f"scores by {m}" for m in SIMULATION_METRICS if m not in results.metrics]
    for m in results.principal:
        if m.latents_of and m.evaluation is None:
            config = m.completions["activations"].config
            lines.append(
                f"the evaluation of the autoencoders of {m.name} (`cratelm sae evaluate --run {path}"
                f" --model {config['model']} --sae {config['sae']}`)"
            )
    return lines


def _untrained_command(run: Run, m: ModelResults) -> str:
    """Return the command that saves the weights from which a model was trained, as its null control."""
    name, done = untrained_name(m.name), m.completions.get("model")
    if done is None:
        return run.stage("model", name).command(force=False)
    size, length = str(done.config["model"]), done.config["sequence_length"]
    config = TrainConfig(
        model=size,
        steps=0,
        freeze=tuple(done.config.get("freeze", ())),
        seed=done.config["seed"],
        model_overrides=tuple(done.config["model_overrides"]),
        sequence_length=None
        if length == TrainConfig(model=size).resolved().sequence_length
        else length,
    )
    if config.folder != name:
        config = replace(config, name=name)
    return shlex.join(["cratelm", "train", "--run", str(run.path), *options_of(config)])
