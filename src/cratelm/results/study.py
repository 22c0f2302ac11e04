"""Results of a study: the figures of every model of a grid, over its seeds, with replicates that pair all models.

A model of the grid with one seed is a `StudyModel`; those that differ only in the seed are a group, under the name of
seed 0. Figures of losses are over seeds and documents, the others over seeds and neurons (`cratelm.stats.replicates`).

Shape legend: S seeds, C documents, n neurons of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.analysis.seeds_store import SeedsSummary
from cratelm.errors import InputError
from cratelm.records import SIMULATION_METRICS
from cratelm.replace.store import DocumentLoss, read_documents, read_neurons
from cratelm.results.run_results import ModelResults, RunResults, read_results
from cratelm.results.seeds import TOKEN_SHARE, read_model_scores
from cratelm.results.side_results import read_seed_studies
from cratelm.results.stages import MODEL_STAGES, completions
from cratelm.runs import Completion, Run, StageName
from cratelm.stats.replicates import Replicates, SeedResamples

Array = NDArray[np.float64]
Layers = Mapping[int, Array]
_EXTRA: tuple[StageName, ...] = ("replacement", "analysis")
LOSS, REPLACED, LOST, CARRIED, RECOVERED = "loss", "loss_replaced", "nats_lost", "carried", "recovered"  # fmt: skip
CONTEXT, DENSITY = "context_explained", "density"
ALL, PRECISION, HARD = "all_tokens", "precision_top", "auc_hard"
_WHOLE = {ALL: "correlation", PRECISION: "precision_top", HARD: "auc_hard"}
"""measures over all held-out tokens, and their fields in `WholeScore`"""
_OF_LOSSES: dict[str, Callable[..., Array]] = {
    LOSS: lambda true, mean, replaced: true,
    REPLACED: lambda true, mean, replaced: replaced,
    LOST: lambda true, mean, replaced: replaced - true,
    CARRIED: lambda true, mean, replaced: mean - true,
    RECOVERED: lambda true, mean, replaced: (mean - replaced) / (mean - true),
}
"""figures of three losses per token: of the model, with its codes at their means, on explanations"""
STEADINESS = {f"variance:{metric}": metric for metric in SIMULATION_METRICS}
"""measures of how much the layers' mean scores differ: their population variance, by name, with their metric"""


@dataclass(frozen=True)
class StudyModel:
    """A model of the grid."""

    name: str
    base: str
    """name of the same model with seed 0"""
    family: str
    size: str
    seed: int
    switch: str
    """name of the switch; empty for the plain family"""
    control: str
    """kind of null control; empty for a trained model"""
    budget: str
    """family for whose FLOPs it was trained; empty for as many tokens as all"""
    flops: float
    """operations per token of a forward pass"""

    @property
    def group(self) -> str:
        """Return the name under which its seeds stand together: `base`, with the control."""
        return f"{self.base}-{self.control}" if self.control else self.base


@dataclass(frozen=True)
class Training:
    """How one model was trained."""

    parameters: int
    steps: int
    tokens: int
    learning_rate: float
    optimizer: str
    validation_loss: float
    late_fall: float | None
    """what the validation loss fell over the last fifth of the steps, nats; None if it was not measured there"""
    whole_fall: float | None
    """the same over the whole training"""

    @property
    def bend(self) -> float | None:
        """Return the late fall over a fifth of the whole: 1 for a straight line, near 0 for a curve that has bent."""
        if self.late_fall is None or not self.whole_fall:
            return None
        return 5 * self.late_fall / self.whole_fall


@dataclass(frozen=True, eq=False)
class _Losses:
    """Losses of one model on its explanations by document."""

    documents: tuple[int, ...]
    n_tokens: Array
    true: Array
    mean: Array
    replaced: Mapping[str, Array]
    """by explainer"""


@dataclass(frozen=True, eq=False)
class _Read:
    """What was read of one model."""

    training: Training | None
    scores: Mapping[tuple[str, str], Layers]
    """by explainer and measure"""
    density: Layers
    losses: _Losses | None
    unexplained: Mapping[str, Layers]
    """by explainer, the fraction of each neuron's variance that it leaves, over held-out tokens"""
    without_score: str
    """undefined, dead and failed neurons of the principal explainer under the first metric"""


@dataclass(frozen=True, eq=False)
class StudyGroup:
    """Models that differ only in their seed."""

    name: str
    models: Mapping[int, StudyModel]
    """by seed, ascending"""

    @property
    def first(self) -> StudyModel:
        """Return the model with the lowest seed."""
        return next(iter(self.models.values()))


def study_inputs(run: Run, models: Sequence[StudyModel]) -> dict[str, Completion]:
    """Return the completion records of all that `StudyResults` reads, by label."""
    found: dict[str, Completion] = {}
    tokens = run.stage("tokens").completion()
    if tokens is not None:
        found["tokens"] = tokens
    for model in models:
        for stage, done in completions(run, model.name, (*MODEL_STAGES, *_EXTRA)).items():
            found[f"{stage}/{model.name}"] = done
    for base in dict.fromkeys(m.base for m in models):
        done = run.stage("seeds", base).completion()
        if done is not None:
            found[f"seeds/{base}"] = done
    return found


class StudyResults:
    """The figures of all groups of a study. Each is computed when it is asked for, and kept."""

    def __init__(
        self, run: Run, models: Sequence[StudyModel], *, resamples: int = 2000, seed: int = 0
    ):
        """Raises `InputError` if a model is not scored, or if models were measured on different documents."""
        self.run, self.resamples, self.seed = run, resamples, seed
        results = read_results(run, [m.name for m in models])
        self.explainer = results.explainer
        self.metrics = results.metrics
        self._read = {m.name: _read(results, _model(results, m.name)) for m in models}
        groups: dict[str, dict[int, StudyModel]] = {}
        for m in models:
            groups.setdefault(m.group, {})[m.seed] = m
        self.groups = {
            name: StudyGroup(name, dict(sorted(of.items()))) for name, of in groups.items()
        }
        self.seed_studies: list[SeedsSummary] = read_seed_studies(run, [m.name for m in models])
        self._check_documents()
        self._kept: dict[tuple[str, str, tuple[int, ...]], Replicates | None] = {}

    def _check_documents(self) -> None:
        first = ""
        for name, read in self._read.items():
            if read.losses is None:
                continue
            first = first or name
            same = self._losses(first)
            tokens = np.array_equal(read.losses.n_tokens, same.n_tokens)
            if read.losses.documents != same.documents or not tokens:
                raise InputError(
                    f"{name} was run on its explanations over other documents than {first}: redo one of them with"
                    f" the other's options, `cratelm replace --run {self.run.path} --model {name} --force`"
                )

    def _losses(self, name: str) -> _Losses:
        losses = self._read[name].losses
        assert losses is not None
        return losses

    @cached_property
    def replaced_by(self) -> str:
        """Return the explainer on whose explanations the trained models lose the fewest nats on average; empty without one."""
        trained = [self._losses(m.name) for m in self._trained() if self._read[m.name].losses]
        common = set.intersection(*(set(of.replaced) for of in trained)) if trained else set()
        cost = {
            e: float(
                np.mean([(of.replaced[e] - of.true).sum() / of.n_tokens.sum() for of in trained])
            )
            for e in common
        }
        return min(sorted(cost), key=lambda e: cost[e], default="")

    def _trained(self) -> list[StudyModel]:
        return [m for g in self.groups.values() for m in g.models.values() if not m.control]

    def training(self, model: StudyModel) -> Training | None:
        """Return how a model was trained; None if the run did not train it."""
        return self._read[model.name].training

    def without_score(self, group: StudyGroup) -> str:
        """Return the numbers of undefined, dead and failed neurons of each seed."""
        return ", ".join(self._read[m.name].without_score for m in group.models.values())

    def figure(self, group: str, measure: str, seeds: Sequence[int] = ()) -> Replicates | None:
        """Return a figure of a group over `seeds`, or over all of its seeds; None if it was not measured on each."""
        of_group = self.groups[group]
        chosen = tuple(seeds) or tuple(of_group.models)
        key = (group, measure, chosen)
        if key not in self._kept:
            read = [self._read[of_group.models[s].name] for s in chosen]
            self._kept[key] = self._figure(group, measure, read)
        return self._kept[key]

    def difference(self, a: str, b: str, measure: str) -> Replicates | None:
        """Return a figure of group a minus that of b, over the seeds that both have; None without one."""
        common = [s for s in self.groups[a].models if s in self.groups[b].models]
        if not common:
            return None
        of_a, of_b = (self.figure(name, measure, common) for name in (a, b))
        return None if of_a is None or of_b is None else of_a - of_b

    def _figure(self, group: str, measure: str, read: Sequence[_Read]) -> Replicates | None:
        resamples = SeedResamples(len(read), self.resamples, self.seed)
        if measure in _OF_LOSSES:
            return self._of_losses(measure, read, resamples)
        variance = STEADINESS.get(measure)
        layers = [self._layers(of, variance or measure) for of in read]
        if not all(layers):
            return None
        common = set.intersection(*(set(of) for of in layers if of))
        values = [{k: of[k] for k in sorted(common)} for of in layers if of]
        if not common or (variance and len(common) < 2):
            return None
        name = f"{group}:{measure}"
        if measure == CONTEXT:
            return _context_figure(values, resamples, name)
        if variance:
            return resamples.of_neurons(values, name, lambda means: means.var(-1))
        return resamples.of_neurons(values, name)

    def _of_losses(
        self, measure: str, read: Sequence[_Read], resamples: SeedResamples
    ) -> Replicates | None:
        losses = [of.losses for of in read if of.losses is not None]
        if len(losses) == len(read) and self.replaced_by:
            return resamples.of_documents(
                losses[0].n_tokens,
                _OF_LOSSES[measure],
                [of.true for of in losses],
                [of.mean for of in losses],
                [of.replaced[self.replaced_by] for of in losses],
            )
        trained = [of.training for of in read if of.training is not None]
        if measure == LOSS and len(trained) == len(read):
            return resamples.of_values([of.validation_loss for of in trained])
        return None

    def _layers(self, read: _Read, measure: str) -> Layers | None:
        if measure == DENSITY:
            return read.density or None
        if measure == TOKEN_SHARE:
            return read.scores.get(("", TOKEN_SHARE))
        if measure == CONTEXT:
            left = read.unexplained
            if "lookup" not in left or self.replaced_by not in left:
                return None
            a, b = left["lookup"], left[self.replaced_by]
            return {layer: np.stack([a[layer], b[layer]], axis=-1) for layer in a if layer in b}
        return read.scores.get((self.explainer, measure))


def _context_figure(seeds: Sequence[Layers], resamples: SeedResamples, name: str) -> Replicates:
    """Return what an explainer explains of the variance that the look-up leaves: 1 - what it leaves over what that leaves.

    Of means over the neurons [n, 2] of a layer, then the mean over layers: a neuron of which the look-up leaves nothing
    has no weight, and no ratio of two small numbers is taken. Both columns are of the same neurons in every resample.
    """
    return resamples.of_neurons(
        seeds, name, lambda means: (1 - means[..., 1, :] / means[..., 0, :]).mean(-1)
    )


def _model(results: RunResults, name: str) -> ModelResults:
    found = results.model(name)
    assert found is not None
    return found


def _read(results: RunResults, m: ModelResults) -> _Read:
    read = read_model_scores(results, m, _WHOLE)
    metric = results.metrics[0]
    statistics = m.find(results.explainer, metric)
    counts = statistics.counts if statistics else None
    without = f"{counts.undefined}/{counts.dead}/{counts.failed}" if counts else "–"
    stage = results.run.stage("replacement", m.name)
    measured = stage.completion() is not None
    return _Read(
        training=_training(m),
        scores={key: of.values for key, of in read.items()},
        density={layer: of.firing_rate for layer, of in m.sparsity.items()},
        losses=_losses(read_documents(stage.path)) if measured else None,
        unexplained=_unexplained(stage.path) if measured else {},
        without_score=without,
    )


def _training(m: ModelResults) -> Training | None:
    done = m.completions.get("model")
    if done is None or "validation_loss" not in done.results:
        return None
    points = [(row["step"], row["validation_loss"]) for row in m.curve if "validation_loss" in row]
    steps = int(done.results.get("steps", 0))
    late = whole = None
    if len(points) > 1 and steps:
        at = [step for step, _ in points]
        losses = [loss for _, loss in points]
        before = float(np.interp(0.8 * steps, at, losses))
        late, whole = before - losses[-1], losses[0] - losses[-1]
    return Training(
        parameters=int(done.results.get("parameters", 0)),
        steps=steps,
        tokens=int(done.results.get("tokens", 0)),
        learning_rate=float(done.config.get("learning_rate", 0)),
        optimizer=str(done.config.get("optimizer", "")),
        validation_loss=float(done.results["validation_loss"]),
        late_fall=late,
        whole_fall=whole,
    )


def _losses(rows: Sequence[DocumentLoss]) -> _Losses | None:
    """Return the losses with all layers replaced; None if these were not measured."""
    true = {row.document: row for row in rows if row.replaced_by == "none"}
    everywhere = [row for row in rows if row.layers == "all"]
    mean = {row.document: row.loss for row in everywhere if row.replaced_by == "mean"}
    own: dict[str, dict[int, float]] = {}
    for row in everywhere:
        if row.replaced_by == "own":
            own.setdefault(row.explainer, {})[row.document] = row.loss
    documents = tuple(sorted(true))
    if not documents or not own or set(mean) != set(documents):
        return None
    return _Losses(
        documents,
        np.array([true[d].n_tokens for d in documents], np.float64),
        np.array([true[d].loss for d in documents]),
        np.array([mean[d] for d in documents]),
        {e: np.array([of[d] for d in documents]) for e, of in own.items()},
    )


def _unexplained(folder: Any) -> dict[str, dict[int, Array]]:
    """Return 1 - R2 of each explainer for the neurons of each layer that have a variance, in the order of the neurons.

    At most 1: an explanation that misleads explains nothing. Without this bound a few neurons that hardly ever fire, and
    whose R2 is far below 0, would decide every sum.
    """
    by: dict[str, dict[int, dict[int, float]]] = {}
    for row in read_neurons(folder):
        if row.explained is not None:
            of_layer = by.setdefault(row.explainer, {}).setdefault(row.neuron.layer, {})
            of_layer[row.neuron.index] = min(1.0, 1 - row.explained)
    return {
        e: {k: np.array([of[i] for i in sorted(of)]) for k, of in sorted(layers.items())}
        for e, layers in by.items()
    }
