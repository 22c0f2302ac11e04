"""The overview of a run, from the small files of its stages: completion records, statistics, summaries."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cratelm.activations.store import summaries_path
from cratelm.records import METRICS
from cratelm.replace.store import ReplacementRow
from cratelm.results.replacement import read_replacement
from cratelm.results.scores import (
    find_statistics,
    label_suffix,
    layer_intervals,
    mean_interval,
    read_statistics,
)
from cratelm.results.sparsity import neurons_of
from cratelm.results.stages import (
    MODEL_STAGES,
    Problems,
    display_order,
    missing_sets,
    model_names,
    principal_explainer,
)
from cratelm.results.views import ExplainerCard, MetricCard, ModelCard, RunCard
from cratelm.runs import Completion, Run, StageName
from cratelm.runs.names import family_of, null_kind, split_set
from cratelm.runs.reading import read_parquet
from cratelm.runs.stage import stale_lines
from cratelm.score.whole_summary import LOOKUP
from cratelm.stats.scores import ModelStatistics


def run_card(key: str, run: Run) -> RunCard:
    """Return a card for each model with a finished stage, trained models first, CRATE before others.

    `missing` and `problems` report files that are missing or damaged. `key` is the name of the run in addresses.
    """
    problems = Problems()
    names = model_names(run)
    nulls = run.null_controls(names)
    cards = [_card(run, name, nulls.get(name, ""), problems) for name in names]
    cards.sort(key=lambda card: display_order(card.name, card.null_of))
    if not names:
        problems.lines.append(
            f"{run.path} has no finished model: type `cratelm demo --run {run.path}`, or train, harvest,"
            " explain and score a model"
        )
    return RunCard(key, str(run.path), tuple(cards), tuple(problems.lines))


def _card(run: Run, name: str, null_of: str, problems: Problems) -> ModelCard:
    done: dict[StageName, Completion | None] = {}
    for stage in MODEL_STAGES:
        of_model = run.stage(stage, name)
        done[stage] = problems.attempt(f"{of_model.path} is damaged", of_model.completion, None)
    layers = _layers(run, name, problems) if done["activations"] else _Layers()
    explainers = _explainers(run, name, problems)
    first = explainers[0] if explainers else ExplainerCard("", ())
    stale = run.stale(name)
    trained = done["model"].results if done["model"] else {}
    return ModelCard(
        name=name,
        family=family_of(name),
        site=layers.site,
        neurons=layers.neurons,
        null_of=null_of,
        parameters=trained.get("parameters"),
        loss=trained.get("validation_loss"),
        loss_error=trained.get("validation_standard_error"),
        explainer=first.explainer,
        metrics=first.metrics,
        firing=layers.firing,
        dead=layers.dead,
        missing=_missing(run, name, done, bool(first.metrics), null_of),
        stale=tuple(stale_lines(stale)),
        stale_stages=tuple(stale),
        replaced=_replaced(run, name, problems),
        by_llm=tuple(explainers[1:]),
    )


def _replaced(run: Run, name: str, problems: Problems) -> ReplacementRow | None:
    label = f"{run.stage('replacement', name).path} cannot be read"
    results = problems.attempt(label, partial(read_replacement, run, name), None)
    return results.headline if results else None


@dataclass
class _Layers:
    """Statistics of a harvest by layer; empty without a harvest."""

    site: str = ""
    neurons: dict[int, int] = field(default_factory=dict)
    firing: dict[int, float] = field(default_factory=dict)
    dead: dict[int, int] = field(default_factory=dict)


def _layers(run: Run, name: str, problems: Problems) -> _Layers:
    path = summaries_path(run.stage("activations", name).path, "held_out")
    columns = ["site", "layer", "firing_rate", "maximum"]
    read = partial(read_parquet, path, columns=columns)
    table = problems.attempt(f"{path} cannot be read", read, None)
    layers = _Layers()
    if table is None or not len(table):
        return layers
    layers.site = str(table["site"][0])
    layer, rate, dead = neurons_of(table)
    for number in np.unique(layer).tolist():
        here = layer == number
        layers.neurons[number] = int(here.sum())
        layers.firing[number] = float(rate[here].mean())
        layers.dead[number] = int(dead[here].sum())
    return layers


def _explainers(run: Run, name: str, problems: Problems) -> list[ExplainerCard]:
    """Return the scores of the principal explainer, then those of each other explainer that is a language model.

    The principal explainer is that of the first set of scores that has any. MODEL, the set without a language
    model, sorts before every MODEL@SET.
    """
    cards: list[ExplainerCard] = []
    for label in sorted(n for n in run.models("scores") if split_set(n)[0] == name):
        stage = run.stage("scores", label)
        read = partial(read_statistics, stage.path)
        statistics = problems.attempt(f"{stage.path / 'summary.json'} cannot be read", read, ())
        of_set = split_set(label)[1]
        explainers = sorted({s.explainer for s in statistics})
        if not of_set:
            principal = principal_explainer((of_set, e) for e in explainers)
            explainers = [principal[1]] if principal else []
        suffix = problems.attempt(f"{stage.path} is damaged", partial(label_suffix, stage), "")
        for explainer in explainers:
            metrics = (_metric_card(statistics, explainer, metric) for metric in METRICS)
            defined = tuple(card for card in metrics if card is not None)
            cards.append(ExplainerCard(explainer + suffix, defined))
    return cards


def _metric_card(
    statistics: tuple[ModelStatistics, ...], explainer: str, metric: str
) -> MetricCard | None:
    own = find_statistics(statistics, explainer, metric)
    if own is None:
        return None
    return MetricCard(
        metric=metric,
        mean=mean_interval(own),
        by_layer=layer_intervals(own),
        shuffled=mean_interval(find_statistics(statistics, explainer, metric, "shuffled")),
        defined=own.counts.defined,
        undefined=own.counts.undefined,
        dead=own.counts.dead,
        failed=own.counts.failed,
        look_up=None
        if explainer == LOOKUP
        else mean_interval(find_statistics(statistics, LOOKUP, metric)),
    )


def _missing(
    run: Run, name: str, done: dict[StageName, Completion | None], scored: bool, null_of: str
) -> tuple[str, ...]:
    harvest = done["activations"]
    lines = []
    for stage in MODEL_STAGES:
        # latents, and models from a folder or the Hub, have no `model` stage of their own
        external = stage == "model" and harvest is not None and harvest.config.get("model") != name
        by_llm = any(split_set(n)[0] == name for n in run.models(stage))
        if done[stage] is None and not external and not by_llm:
            lines.append(f"{stage}: `{run.stage(stage, name).command(force=False)}`")
    if not scored and done["scores"] is not None:
        lines.append(f"statistics: `cratelm score --run {run.path} --model {name} --force`")
    if null_of and null_kind(name) == "init":
        sets = missing_sets(run, null_of, name)
        lines += [f"scores by {of_set}: {commands}" for of_set, commands in sets.items()]
    return tuple(lines)
