"""Scoring explanations that their own simulators read, without a language model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from numpy.typing import NDArray

from cratelm.explain.store import SampledNeuron
from cratelm.records import (
    CONTROLS,
    Control,
    Excerpt,
    Explanation,
    Metric,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    Score,
    Status,
)
from cratelm.score.config import ScoreConfig
from cratelm.score.controls import shuffled
from cratelm.score.selection import scored_on
from cratelm.score.simulation import IsDuplicate, graded
from cratelm.score.simulators import simulate, simulate_constant


def score_neuron(
    record: NeuronRecord,
    explanation: Explanation | None,
    donor: Explanation | None,
    explainer: str,
    metrics: Sequence[Metric],
    is_duplicate: IsDuplicate,
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
            value = _score_one(control, used, excerpts, is_duplicate)
            scores.append(
                NeuronScore(
                    record.neuron,
                    explainer,
                    metric,
                    control,
                    value,
                    documents,
                    explained_by=explainer,
                )
            )
    return scores


def _score_one(
    control: Control,
    explanation: Explanation | None,
    excerpts: Sequence[Excerpt],
    is_duplicate: IsDuplicate,
) -> Score:
    if explanation is None:
        reason = "the layer has no other explained neuron to take an explanation from"
        return Score(None, Status.UNDEFINED, reason)
    tokens: list[NDArray] = [e.token_ids for e in excerpts]
    if control == "constant":
        simulated = simulate_constant(explanation.payload, tokens)
    else:
        simulated = simulate(explanation.explainer, explanation.payload, tokens)
    return graded(excerpts, simulated, is_duplicate)


def _without_value(
    neuron: NeuronId, explainer: str, metrics: Iterable[Metric], none: Score
) -> list[NeuronScore]:
    return [
        NeuronScore(neuron, explainer, m, c, none, explained_by=explainer)
        for m in metrics
        for c in CONTROLS
    ]


def score_all(
    config: ScoreConfig,
    records: Iterable[NeuronRecord],
    selected: Sequence[SampledNeuron],
    explanations: Sequence[Explanation],
    explainers: Sequence[str],
    is_duplicate: IsDuplicate,
) -> Iterator[NeuronScore]:
    """Scores of the `records` (held-out), by explainer; `selected` says which were dead on the fit split."""
    by_name: Mapping[str, dict[NeuronId, Explanation]] = {e: {} for e in explainers}
    for explanation in explanations:
        by_name[explanation.explainer][explanation.neuron] = explanation
    donors = {e: shuffled(list(found), config.seed) for e, found in by_name.items()}
    dead_on_fit = {s.neuron for s in selected if s.dead}
    never = Score(None, Status.DEAD, "never above 0 on the fit split")
    for record in records:
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
            yield from score_neuron(record, own, donor, explainer, config.metrics, is_duplicate)
