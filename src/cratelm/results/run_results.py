"""What a report reads of a run: figures of every model, but excerpts of none (see `gallery`)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.records import METRICS, SCORERS, SPLITS, Metric, NeuronScore, NeuronSummary
from cratelm.report.config import ReportConfig
from cratelm.runs import Completion, Run, StageName
from cratelm.runs.names import (
    FAMILIES,
    family_of,
    set_name,
    sets_of,
    split_set,
    twin_name,
    untrained_name,
)
from cratelm.score.store import read_scores
from cratelm.stats.scores import (
    Control,
    Counts,
    LayerStatistics,
    ModelStatistics,
    Policy,
)
from cratelm.tokens.shards import TokenStore
from cratelm.train.log import read_metrics

MODEL_STAGES: dict[StageName, str] = {
    "model": "train",
    "activations": "harvest",
    "explanations": "explain",
    "scores": "score",
}
"""stages of one model, with the verb that makes each"""
SET_STAGES: dict[StageName, str] = {"explanations": "explain", "scores": "score"}
"""those of them that there are several of: one without a language model, one for each that was asked"""
SIDE_STAGES: tuple[StageName, ...] = ("sae", "steer", "analysis")
"""what the side rooms wrote about a model; it may be there, and need not"""
_T = TypeVar("_T", NeuronScore, ModelStatistics)
Place = tuple[int, int]
"""layer and index of a neuron"""


@dataclass(frozen=True, eq=False)
class ResultSet:
    """What `explain` and `score` made of one model, without a language model or with one."""

    name: str
    """as in the folder MODEL@NAME; empty for the set without a language model"""
    completions: dict[StageName, Completion]
    """of `explanations` and `scores`, where they are there"""
    calls: dict[str, dict[str, Any]]
    """by verb: what the last command asked a language model"""
    statistics: tuple[ModelStatistics, ...] = ()
    """as `cratelm score` wrote them"""
    scores: tuple[NeuronScore, ...] = ()
    """of all controls"""
    audit: dict[str, Any] | None = None
    """documents explained from, scored on, and in both; None where there are no scores"""
    near_duplicates: dict[str, Any] = field(default_factory=dict)
    """`cratelm.score.duplicates.DuplicateAudit`; empty where it was not made"""
    preflight: dict[str, Any] = field(default_factory=dict)
    """`cratelm.llm.probe.ProbeResult`; empty without a language model"""
    suffix: str = ""
    """after the explainers' labels: the set's name in brackets, where the scores were given one"""

    def label(self, model: str) -> str:
        """The folder's name."""
        return set_name(model, self.name)

    @property
    def explainers(self) -> list[str]:
        return sorted({s.explainer for s in self.statistics})

    @property
    def places(self) -> frozenset[Place]:
        """Neurons scored, those without a value too."""
        return frozenset((s.neuron.layer, s.neuron.index) for s in self.scores)


@dataclass(frozen=True, eq=False)
class ModelResults:
    """One scored model."""

    name: str
    place: int
    """which colour and marker: a randomly initialised model shares those of the model it is the null of"""
    null_of: str
    """the model whose random initialisation this is; empty for others"""
    completions: dict[StageName, Completion]
    """of the stages that are there, without a language model"""
    sets: tuple[ResultSet, ...]
    """the one without a language model first, where it is there"""
    statistics: tuple[ModelStatistics, ...]
    """of all sets"""
    scores: tuple[NeuronScore, ...]
    """of all sets: of the neurons' own explanations, no controls"""
    summaries: tuple[NeuronSummary, ...]
    """over the held-out split; empty where the harvest is gone"""
    curve: list[dict[str, Any]]
    """lines of the training curve; empty where there is none"""

    @property
    def with_model(self) -> list[ResultSet]:
        """The sets for which a language model was asked."""
        return [found for found in self.sets if found.name]

    @property
    def of_latents(self) -> bool:
        """True where the neurons are latents of autoencoders."""
        harvest = self.completions.get("activations")
        return harvest is not None and bool(harvest.config.get("sae"))

    @property
    def trained_here(self) -> bool:
        """False for a model that was harvested from a folder or the Hub."""
        harvest = self.completions.get("activations")
        return harvest is None or harvest.config.get("model") == self.name

    def figure(
        self,
        explainer: str,
        metric: Metric,
        control: Control = "none",
        policy: Policy = "leave_out",
    ) -> ModelStatistics | None:
        wanted = (explainer, metric, control, policy)
        for s in self.statistics:
            if (s.explainer, s.metric, s.control, s.policy) == wanted:
                return s
        return None


@dataclass(frozen=True, eq=False)
class RunResults:
    """All that a report shows but excerpts and explanations."""

    run: Run
    tokens: Completion | None
    """None where the shards are gone"""
    models: tuple[ModelResults, ...]
    """trained ones first, CRATE before GPT-2; then the randomly initialised"""
    explainer: str
    """of the comparison and of the neurons shown"""
    explainers: tuple[str, ...]
    """those without a language model, and the one above"""
    with_model: tuple[str, ...]
    """those with one: their scores are of a sample of the neurons"""
    metrics: tuple[Metric, ...]
    """of the comparison: those by simulation, or the others where a run has no simulation"""
    sides: tuple[Completion, ...]
    """of `SIDE_STAGES`, of the models shown"""
    shared_ordinals: int
    """documents that are in more than one split: 0 where the shards are right, or are gone"""

    @property
    def principal(self) -> tuple[ModelResults, ...]:
        """The models that are not the null of another one shown."""
        return tuple(m for m in self.models if not m.null_of)

    def rank_by(self, config: ReportConfig) -> Metric:
        """The metric that chooses the best neurons: the one asked for, else the first that was scored."""
        return config.rank_by if config.rank_by in self.metrics else self.metrics[0]

    def null(self, model: ModelResults) -> ModelResults | None:
        """The random initialisation of `model`, where it was scored."""
        return next((m for m in self.models if m.null_of == model.name), None)

    def twins(self) -> list[tuple[ModelResults, ModelResults]]:
        """CRATE and GPT-2 of the same size."""
        by_name = {m.name: m for m in self.models}
        crates = [m for m in self.principal if family_of(m.name) == FAMILIES[0]]
        pairs = [(m, by_name.get(twin_name(m.name))) for m in crates]
        return [(a, b) for a, b in pairs if b is not None]


def model_names(run: Run, config: ReportConfig) -> list[str]:
    """Models to show, in order. Raises `InputError` where none is scored, or one that was named is not."""
    scored = {split_set(name)[0] for name in run.models("scores")}
    if not scored:
        raise InputError(
            f"no model of {run.path} is scored: type `cratelm score --run {run.path} --model NAME`"
            " first (before it, explain and harvest)"
        )
    for name in set(config.models) - scored:
        run.stage("scores", name).require("score")
    shown = list(config.models or scored)
    nulls = run.null_controls(shown)
    return sorted(shown, key=lambda name: _order(name, nulls))


def inputs_of(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Identity of every finished stage that the report reads."""
    tokens = run.stage("tokens").completion()
    found = {"tokens": tokens.identity} if tokens else {}
    for name in names:
        for stage, done in _completions(run, name).items():
            found[f"{stage}/{name}"] = done.identity
        for of_set in _set_names(run, name):
            for stage, done in _completions(run, set_name(name, of_set), SET_STAGES).items():
                found[f"{stage}/{set_name(name, of_set)}"] = done.identity
    return found | {f"{done.stage}/{done.name}": done.identity for done in _sides(run, names)}


def gather(run: Run, config: ReportConfig) -> RunResults:
    """Reads the figures of a run. Raises `InputError` for an explainer that no model was scored with."""
    names = model_names(run, config)
    nulls = run.null_controls(names)
    principal = [n for n in names if n not in nulls]
    models = tuple(
        _read_model(run, name, principal.index(nulls.get(name, name)), nulls.get(name, ""))
        for name in names
    )
    found = {s.explainer for m in models for s in m.statistics}
    with_model = {e for m in models for of_set in m.with_model for e in of_set.explainers}
    free = found - with_model
    explainer = config.explainer or ("trie" if "trie" in found else min(free or found))
    if explainer not in found:
        raise InputError(
            f"--explainer is {explainer!r}, the scores have {', '.join(sorted(found))}:"
            " choose one of these"
        )
    metrics = {s.metric for m in models for s in m.statistics}
    tokens = run.stage("tokens").completion()
    return RunResults(
        run=run,
        tokens=tokens,
        models=models,
        explainer=explainer,
        explainers=tuple(sorted(free | {explainer}, key=lambda e: (e != explainer, e))),
        with_model=tuple(sorted(with_model)),
        metrics=tuple(m for m in METRICS if m in metrics)
        or tuple(m for m in SCORERS if m in metrics),
        sides=_sides(run, names),
        shared_ordinals=_shared_ordinals(run) if tokens else 0,
    )


def _read_model(run: Run, name: str, place: int, null_of: str) -> ModelResults:
    done = _completions(run, name)
    sets = tuple(_read_set(run, name, of_set) for of_set in ["", *_set_names(run, name)])
    harvest = run.stage("activations", name).path
    return ModelResults(
        name=name,
        place=place,
        null_of=null_of,
        completions=done,
        sets=tuple(found for found in sets if found.completions),
        statistics=tuple(s for found in sets for s in found.statistics),
        scores=tuple(s for found in sets for s in found.scores if s.control == "none"),
        summaries=tuple(read_summaries(harvest, "held_out")) if "activations" in done else (),
        curve=read_metrics(run.stage("model", name).path) if "model" in done else [],
    )


def _read_set(run: Run, model: str, name: str) -> ResultSet:
    done = _completions(run, set_name(model, name), SET_STAGES)
    files = [(SET_STAGES[stage], run.stage(stage, c.name).path) for stage, c in done.items()]
    calls = {verb: path / "calls.json" for verb, path in files}
    found = ResultSet(
        name, done, {verb: _json(path) for verb, path in calls.items() if path.is_file()}
    )
    if "scores" not in done:
        return found
    folder = run.stage("scores", set_name(model, name)).path
    summary = _json(folder / "summary.json")
    # Who scores the same explanations again under a name of his own gets rows of that name.
    suffix = f" ({name})" if done["scores"].config.get("name") else ""
    near = summary.get("near_duplicates", {})
    if near:
        effects = [{**e, "explainer": e["explainer"] + suffix} for e in near["effects"]]
        near = {**near, "effects": effects}
    return replace(
        found,
        statistics=_renamed(map(_statistics, summary["statistics"]), suffix),
        scores=_renamed(read_scores(folder), suffix),
        audit=summary["leakage_audit"],
        near_duplicates=near,
        preflight=summary.get("preflight", {}),
        suffix=suffix,
    )


def _renamed(found: Iterable[_T], suffix: str) -> tuple[_T, ...]:
    if not suffix:
        return tuple(found)
    return tuple(replace(one, explainer=one.explainer + suffix) for one in found)


def _set_names(run: Run, model: str) -> list[str]:
    """Names of the sets of `model` for which a language model was asked, finished explanations or scores."""
    return sets_of((name for stage in SET_STAGES for name in run.models(stage)), model)


def _completions(
    run: Run, name: str, stages: Iterable[StageName] = tuple(MODEL_STAGES)
) -> dict[StageName, Completion]:
    found: dict[StageName, Completion | None] = {
        stage: run.stage(stage, name).completion() for stage in stages
    }
    return {stage: done for stage, done in found.items() if done is not None}


def _sides(run: Run, names: Sequence[str]) -> tuple[Completion, ...]:
    found = (run.stage(stage, n) for stage in SIDE_STAGES for n in run.models(stage))
    mine = (stage.completion() for stage in found if split_set(stage.name)[0] in names)
    return tuple(done for done in mine if done is not None)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def missing(results: RunResults) -> list[str]:
    """What a full report would have and this run has not, each with the command that makes it."""
    path = results.run.path
    lines = [] if results.tokens else [f"the token shards (`cratelm tokenize --run {path}`)"]
    for m in results.models:
        gone = {s: verb for s, verb in MODEL_STAGES.items() if s not in m.completions}
        if m.of_latents:
            gone.pop("model", None)
        elif not m.trained_here:
            gone.pop("model", None)
            lines.append(f"losses and parameters of {m.name}, which was not trained in this run")
        lines += [
            f"{stage}/{m.name} (`cratelm {verb} --run {path} --model {m.name}`)"
            for stage, verb in gone.items()
        ]
    lines += [
        f"the randomly initialised null of {m.name} (`cratelm train --run {path} --model {m.name}"
        f" --steps 0`, then harvest, explain and score {untrained_name(m.name)})"
        for m in results.principal
        if results.null(m) is None and m.trained_here
    ]
    if not results.twins():
        lines.append("twins: no CRATE and GPT-2 of one size are scored, so nothing is compared")
    return lines + [f"scores by {m}" for m in METRICS if m not in results.metrics]


def _statistics(record: dict[str, Any]) -> ModelStatistics:
    layers = tuple(
        LayerStatistics(**{**layer, "counts": Counts(**layer["counts"])})
        for layer in record["layers"]
    )
    known = {f.name for f in fields(ModelStatistics)}
    plain = {key: value for key, value in record.items() if key in known}
    return ModelStatistics(**{**plain, "counts": Counts(**record["counts"]), "layers": layers})


def _shared_ordinals(run: Run) -> int:
    store = TokenStore(run.stage("tokens").path)
    ordinals = np.concatenate([store.split(split).ordinals for split in SPLITS])
    return len(ordinals) - len(np.unique(ordinals))


def _order(name: str, nulls: Mapping[str, str]) -> tuple[bool, int, str]:
    family = next((i for i, f in enumerate(FAMILIES) if name.startswith(f)), len(FAMILIES))
    return name in nulls, family, name
