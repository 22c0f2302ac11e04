"""What a report reads of a run: figures of every model, but excerpts of none (see `gallery`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.records import METRICS, SPLITS, Metric, NeuronScore, NeuronSummary
from cratelm.report.config import ReportConfig
from cratelm.runs import Completion, Run, StageName
from cratelm.score.statistics import (
    Control,
    Counts,
    LayerStatistics,
    ModelStatistics,
    Policy,
)
from cratelm.score.store import read_scores
from cratelm.tokens.shards import TokenStore
from cratelm.train.log import read_metrics

_INIT = "-init"
_FAMILIES = ("crate", "gpt2")
MODEL_STAGES: dict[StageName, str] = {
    "model": "train",
    "activations": "harvest",
    "explanations": "explain",
    "scores": "score",
}
"""stages of one model, with the verb that makes each"""


@dataclass(frozen=True, eq=False)
class ModelResults:
    """One scored model."""

    name: str
    place: int
    """which colour and marker: a randomly initialised model shares those of the model it is the null of"""
    null_of: str
    """the model whose random initialisation this is; empty for others"""
    completions: dict[StageName, Completion]
    """of the stages that are there"""
    statistics: tuple[ModelStatistics, ...]
    """as `cratelm score` wrote them"""
    scores: tuple[NeuronScore, ...]
    """of the neurons' own explanations, no controls"""
    summaries: tuple[NeuronSummary, ...]
    """over the held-out split; empty where the harvest is gone"""
    curve: list[dict[str, Any]]
    """lines of the training curve; empty where there is none"""
    audit: dict[str, Any]
    """documents explained from, scored on, and in both"""

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
    metrics: tuple[Metric, ...]
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
        crate, gpt2 = (f"{family}-" for family in _FAMILIES)
        pairs = [(m, by_name.get(gpt2 + m.name.removeprefix(crate))) for m in self.principal]
        return [(a, b) for a, b in pairs if a.name.startswith(crate) and b is not None]


def model_names(run: Run, config: ReportConfig) -> list[str]:
    """Models to show, in order. Raises `InputError` where none is scored, or one that was named is not."""
    scored = run.models("scores")
    if not scored:
        raise InputError(
            f"no model of {run.path} is scored: type `cratelm score --run {run.path} --model NAME`"
            " first (before it, explain and harvest)"
        )
    for name in config.models:
        run.stage("scores", name).require("score")
    return sorted(config.models or scored, key=_order)


def inputs_of(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Identity of every finished stage that the report reads."""
    tokens = run.stage("tokens").completion()
    found = {"tokens": tokens.identity} if tokens else {}
    for name in names:
        for stage, done in _completions(run, name).items():
            found[f"{stage}/{name}"] = done.identity
    return found


def gather(run: Run, config: ReportConfig) -> RunResults:
    """Reads the figures of a run. Raises `InputError` for an explainer that no model was scored with."""
    names = model_names(run, config)
    bases = [n for n in names if _base(n) not in names]
    models = tuple(
        _read_model(run, name, bases.index(_base(name) if name not in bases else name), names)
        for name in names
    )
    found = {s.explainer for m in models for s in m.statistics}
    explainer = config.explainer or ("trie" if "trie" in found else min(found))
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
        explainers=tuple(sorted(found, key=lambda e: (e != explainer, e))),
        metrics=tuple(m for m in METRICS if m in metrics),
        shared_ordinals=_shared_ordinals(run) if tokens else 0,
    )


def _read_model(run: Run, name: str, place: int, names: Sequence[str]) -> ModelResults:
    done = _completions(run, name)
    summary = json.loads((run.stage("scores", name).path / "summary.json").read_text())
    harvest = run.stage("activations", name).path
    return ModelResults(
        name=name,
        place=place,
        null_of=_base(name) if _base(name) in names else "",
        completions=done,
        statistics=tuple(_statistics(s) for s in summary["statistics"]),
        scores=tuple(s for s in read_scores(run.stage("scores", name).path) if s.control == "none"),
        summaries=tuple(read_summaries(harvest, "held_out")) if "activations" in done else (),
        curve=read_metrics(run.stage("model", name).path) if "model" in done else [],
        audit=summary["leakage_audit"],
    )


def _completions(run: Run, name: str) -> dict[StageName, Completion]:
    found: dict[StageName, Completion | None] = {
        stage: run.stage(stage, name).completion() for stage in MODEL_STAGES
    }
    return {stage: done for stage, done in found.items() if done is not None}


def missing(results: RunResults) -> list[str]:
    """What a full report would have and this run has not, each with the command that makes it."""
    path = results.run.path
    lines = [] if results.tokens else [f"the token shards (`cratelm tokenize --run {path}`)"]
    for m in results.models:
        gone = {s: verb for s, verb in MODEL_STAGES.items() if s not in m.completions}
        if not m.trained_here:
            gone.pop("model", None)
            lines.append(f"losses and parameters of {m.name}, which was not trained in this run")
        lines += [
            f"{stage}/{m.name} (`cratelm {verb} --run {path} --model {m.name}`)"
            for stage, verb in gone.items()
        ]
    lines += [
        f"the randomly initialised null of {m.name} (`cratelm train --run {path} --model {m.name}"
        f" --steps 0`, then harvest, explain and score {m.name}{_INIT})"
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


def _order(name: str) -> tuple[bool, int, str]:
    family = next((i for i, f in enumerate(_FAMILIES) if name.startswith(f)), len(_FAMILIES))
    return name.endswith(_INIT), family, name


def _base(name: str) -> str:
    return name.removesuffix(_INIT) if name.endswith(_INIT) else ""
