"""`cratelm score`: how well explanations predict their neurons on held-out excerpts, beside null controls."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.store import read_records
from cratelm.errors import InputError
from cratelm.explain.store import Selected, read_explanations, read_selected
from cratelm.records import (
    Excerpt,
    Explanation,
    Metric,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    Score,
    Status,
)
from cratelm.runs import Run, write_json
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import CONTROLS, Audit, Control, audit, shuffled
from cratelm.score.metrics import correlation_score
from cratelm.score.selection import scored_on
from cratelm.score.simulators import simulate, simulate_constant
from cratelm.score.statistics import ModelStatistics, all_statistics
from cratelm.score.store import write_scores


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
    means: dict[str, str]
    """by explainer and metric: own score and shuffled control, in words"""

    def __str__(self) -> str:
        head = (
            f"{self.n_scores:,} scores of {self.n_neurons:,} neurons, {self.n_dead:,} dead,"
            f" {self.shared_documents} documents shared: {self.path}"
        )
        return "\n".join([head, *(f"  {name:<24} {text}" for name, text in self.means.items())])


def score(config: ScoreConfig) -> ScoreResult:
    """Scores the explanations of one model of a run and writes `scores/MODEL/`.

    Raises `InputError` where the run has no harvest or no explanations of the model, or where a
    document was both explained from and scored on.
    """
    run = Run(config.run)
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
    with stage.write(config, inputs) as draft:
        scores = list(_score_all(config, harvest.path, selected, explanations, explainers))
        checked = _disjoint(audit(explanations, scores), config)
        write_scores(draft.path, scores)
        results = _write_summary(draft.path, config, selected, scores, checked)
        draft.results.update(results)
    return ScoreResult(path=stage.path, **results)


def score_neuron(
    record: NeuronRecord,
    explanation: Explanation | None,
    donor: Explanation | None,
    explainer: str,
    metrics: Sequence[Metric],
) -> list[NeuronScore]:
    """Scores of one live neuron by one explainer: every metric under every control.

    `record` is of the held-out split. `explanation` None (the explainer did not answer) gives
    FAILED. `donor` is the explanation that the shuffled control uses instead, None where the layer
    has no other. The simulators are given the payload and the tokens, never the activations.
    """
    if record.summary.dead:
        none = Score(None, Status.DEAD, "never above 0 on the held-out split")
        return _without_value(record.neuron, explainer, metrics, none)
    if explanation is None:
        none = Score(None, Status.FAILED, f"no explanation by {explainer}")
        return _without_value(record.neuron, explainer, metrics, none)
    uses: dict[Control, Explanation | None] = {
        "none": explanation,
        "shuffled": donor,
        "constant": explanation,
    }
    scores = []
    for metric in metrics:
        excerpts = scored_on(record, metric)
        documents = tuple(sorted({e.document for e in excerpts}))
        for control, used in uses.items():
            value = _score_one(control, used, excerpts)
            scores.append(NeuronScore(record.neuron, explainer, metric, control, value, documents))
    return scores


def _score_one(
    control: Control, explanation: Explanation | None, excerpts: Sequence[Excerpt]
) -> Score:
    if explanation is None:
        reason = "the layer has no other explained neuron to take an explanation from"
        return Score(None, Status.UNDEFINED, reason)
    tokens: list[NDArray] = [e.token_ids for e in excerpts]
    if control == "constant":
        simulated = simulate_constant(explanation.payload, tokens)
    else:
        simulated = simulate(explanation.explainer, explanation.payload, tokens)
    return correlation_score([e.activations for e in excerpts], simulated)


def _without_value(
    neuron: NeuronId, explainer: str, metrics: Iterable[Metric], none: Score
) -> list[NeuronScore]:
    return [NeuronScore(neuron, explainer, m, c, none) for m in metrics for c in CONTROLS]


def _score_all(
    config: ScoreConfig,
    harvest: Path,
    selected: Sequence[Selected],
    explanations: Sequence[Explanation],
    explainers: Sequence[str],
) -> Iterator[NeuronScore]:
    """Scores of all selected neurons, by layer, index and explainer."""
    by_name: Mapping[str, dict[NeuronId, Explanation]] = {e: {} for e in explainers}
    for explanation in explanations:
        by_name[explanation.explainer][explanation.neuron] = explanation
    donors = {e: shuffled(list(found), config.seed) for e, found in by_name.items()}
    dead_on_fit = {s.neuron for s in selected if s.dead}
    never = Score(None, Status.DEAD, "never above 0 on the fit split")
    for record in _held_out(config, harvest, selected):
        for explainer, found in by_name.items():
            if record.neuron in dead_on_fit:
                yield from _without_value(record.neuron, explainer, config.metrics, never)
                continue
            own = found.get(record.neuron)
            donor = (
                found[donors[explainer][record.neuron]]
                if record.neuron in donors[explainer]
                else None
            )
            yield from score_neuron(record, own, donor, explainer, config.metrics)


def _held_out(
    config: ScoreConfig, harvest: Path, selected: Sequence[Selected]
) -> Iterator[NeuronRecord]:
    """Held-out records of the selected neurons; `InputError` where one is missing."""
    layers: dict[int, list[int]] = {}
    for s in selected:
        layers.setdefault(s.neuron.layer, []).append(s.neuron.index)
    with tqdm(
        total=len(selected), desc=f"score {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        for layer, indices in layers.items():
            n_found = 0
            for record in read_records(harvest, "held_out", layers=[layer], indices=indices):
                n_found += 1
                yield record
                bar.update()
            if n_found != len(indices):
                raise InputError(
                    f"{harvest} holds {n_found} of the {len(indices)} explained neurons of layer"
                    f" {layer} in the held_out split: type `cratelm harvest --force` for this model"
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
    selected: Sequence[Selected],
    scores: Sequence[NeuronScore],
    checked: Audit,
) -> dict:
    """Writes `summary.json`; returns the figures of `ScoreResult`."""
    statistics = all_statistics(scores, resamples=config.resamples, seed=config.seed)
    write_json(
        folder / "summary.json",
        {
            "model": config.model,
            "leakage_audit": asdict(checked),
            "statistics": [asdict(s) for s in statistics],
        },
    )
    left_out = {
        (s.explainer, s.metric, s.control): s for s in statistics if s.policy == "leave_out"
    }
    means = {
        f"{explainer} {metric}": f"{_shown(own)}; shuffled {_shown(left_out[explainer, metric, 'shuffled'])};"
        f" {own.counts.undefined} undefined, {own.counts.failed} failed"
        for (explainer, metric, control), own in left_out.items()
        if control == "none"
    }
    return {
        "n_scores": len(scores),
        "n_neurons": len(selected),
        "n_dead": len({s.neuron for s in scores if s.score.status == Status.DEAD}),
        "shared_documents": len(checked.shared),
        "means": means,
    }


def _shown(statistics: ModelStatistics) -> str:
    if statistics.mean is None:
        return "none"
    if statistics.low is None:
        return f"{statistics.mean:.1f}"
    return f"{statistics.mean:.1f} ({statistics.low:.1f} to {statistics.high:.1f})"
