"""The overview of a run, from the small files of its stages: completions, statistics, summaries."""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cratelm.activations.store import summaries_path
from cratelm.errors import InputError
from cratelm.records import SCORERS
from cratelm.results.neuron_table import READ_ERRORS, one_line
from cratelm.results.views import MetricCard, ModelCard, RunCard, Value
from cratelm.runs import Completion, Run, StageName
from cratelm.runs.names import family_of, split_set

_VERBS: dict[StageName, str] = {
    "model": "train",
    "activations": "harvest",
    "explanations": "explain",
    "scores": "score",
}


def run_card(key: str, run: Run) -> RunCard:
    """Every model of a run of which anything is there, trained ones first, CRATE before others."""
    problems: list[str] = []
    names = {split_set(n)[0] for stage in _VERBS for n in run.models(stage)}
    nulls = run.null_controls(names)
    cards = [_card(run, name, nulls.get(name, ""), problems) for name in sorted(names)]
    cards.sort(key=lambda c: (bool(c.null_of), c.family != "crate", c.family != "gpt2", c.name))
    if not names:
        problems.append(
            f"{run.path} holds no finished model: type `cratelm demo --run {run.path}`, or train,"
            " harvest, explain and score one"
        )
    return RunCard(key, str(run.path), tuple(cards), tuple(problems))


def _card(run: Run, name: str, null_of: str, problems: list[str]) -> ModelCard:
    done: dict[StageName, Completion | None] = {
        stage: _completion(run, stage, name, problems) for stage in _VERBS
    }
    harvest, trained = done["activations"], done["model"]
    neurons, firing, dead, site = _summaries(run, name, harvest, problems)
    explainer, metrics = _metrics(run, name, problems)
    results = trained.results if trained else {}
    return ModelCard(
        name=name,
        family=family_of(name),
        site=site,
        neurons=neurons,
        null_of=null_of,
        parameters=results.get("parameters"),
        loss=results.get("validation_loss"),
        loss_error=results.get("validation_standard_error"),
        explainer=explainer,
        metrics=metrics,
        firing=firing,
        dead=dead,
        missing=_missing(run, name, done, bool(metrics)),
    )


def _completion(run: Run, stage: StageName, name: str, problems: list[str]) -> Completion | None:
    try:
        return run.stage(stage, name).completion()
    except (*READ_ERRORS, InputError) as error:
        problems.append(f"{run.stage(stage, name).path} is damaged ({one_line(error)})")
        return None


def _summaries(
    run: Run, name: str, harvest: Completion | None, problems: list[str]
) -> tuple[dict[int, int], dict[int, float], dict[int, int], str]:
    """By layer: neurons, mean firing rate, dead ones; and the site."""
    if harvest is None:
        return {}, {}, {}, ""
    path = summaries_path(run.stage("activations", name).path, "held_out")
    try:
        table = pq.read_table(path, columns=["site", "layer", "firing_rate", "maximum"])
        layer, rate = table["layer"].to_numpy(), table["firing_rate"].to_numpy()
        silent = table["maximum"].to_numpy() <= 0
        site = str(table["site"][0]) if len(table) else ""
    except READ_ERRORS as error:
        problems.append(f"{path} cannot be read ({one_line(error)})")
        return {}, {}, {}, ""
    numbers, count = np.unique(layer, return_counts=True)
    layers = numbers.tolist()
    return (
        dict(zip(layers, count.tolist(), strict=True)),
        {n: float(rate[layer == n].mean()) for n in layers},
        {n: int(silent[layer == n].sum()) for n in layers},
        site,
    )


def _metrics(run: Run, name: str, problems: list[str]) -> tuple[str, tuple[MetricCard, ...]]:
    """Of the set without a language model, else of the first one with."""
    sets = [n for n in run.models("scores") if split_set(n)[0] == name]
    for found in sorted(sets):
        path = run.stage("scores", found).path / "summary.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))["statistics"]
            explainers = sorted({s["explainer"] for s in told}, key=lambda e: (e != "trie", e))
            if explainers:
                mine = [s for s in told if s["explainer"] == explainers[0]]
                return explainers[0], _metric_cards(mine)
        except (*READ_ERRORS, AttributeError) as error:
            problems.append(f"{path} cannot be read ({one_line(error)})")
    return "", ()


def _metric_cards(told: list[dict[str, Any]]) -> tuple[MetricCard, ...]:
    known = {(s["metric"], s["control"]): s for s in told if s["policy"] == "leave_out"}
    cards = []
    for metric in SCORERS:
        own = known.get((metric, "none"))
        if own is None:
            continue
        layers = {layer["layer"]: _value(layer) for layer in own["layers"]}
        cards.append(
            MetricCard(
                metric=metric,
                mean=_value(own),
                by_layer={n: v for n, v in layers.items() if v is not None},
                shuffled=_value(known.get((metric, "shuffled"))),
                **{k: own["counts"][k] for k in ("defined", "undefined", "dead", "failed")},
            )
        )
    return tuple(cards)


def _value(told: dict[str, Any] | None) -> Value | None:
    if told is None or told["mean"] is None:
        return None
    return Value(told["mean"], told["low"], told["high"])


def _missing(
    run: Run, name: str, done: dict[StageName, Completion | None], scored: bool
) -> tuple[str, ...]:
    harvest = done["activations"]
    lines = []
    for stage, verb in _VERBS.items():
        elsewhere = stage == "model" and harvest is not None and harvest.config.get("model") != name
        by_model = any(split_set(n)[0] == name for n in run.models(stage))
        if done[stage] is None and not elsewhere and not by_model:
            lines.append(f"{stage}: `cratelm {verb} --run {run.path} --model {name}`")
    if not scored and done["scores"] is not None:
        lines.append(f"statistics: `cratelm score --run {run.path} --model {name} --force`")
    return tuple(lines)
