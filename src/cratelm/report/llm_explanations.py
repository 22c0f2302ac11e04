"""Explanations by language models of the neurons in a gallery, with the scores of these explanations."""

from collections.abc import Sequence
from dataclasses import dataclass

from cratelm.records import Explanation, NeuronKey, NeuronScore
from cratelm.report.cells import METRIC_NAMES
from cratelm.results.neuron_view import read_explanations_of
from cratelm.results.run_results import ModelResults
from cratelm.runs import Run
from cratelm.text.display import printable

_EVIDENCE = {"top": "from its strongest excerpts", "anthropic": "from its whole range"}


@dataclass(frozen=True)
class LlmExplanation:
    """One explanation by a language model."""

    explainer: str
    evidence: str
    """the `EvidenceKind` of the excerpts from which the neuron was explained; empty if it has none"""
    text: str
    scores: str
    """scores in words; empty if there are none"""

    @property
    def source(self) -> str:
        """Return the explainer and its evidence, in words."""
        evidence = _EVIDENCE.get(self.evidence, self.evidence)
        return f"{self.explainer}, {evidence}" if evidence else self.explainer

    @property
    def headline(self) -> bool:
        """Return whether to show the explanation next to the neuron's name. Most metrics score this one."""
        return self.evidence != "anthropic"


def llm_explanations(
    run: Run, model: ModelResults, neurons: Sequence[NeuronKey]
) -> dict[NeuronKey, tuple[LlmExplanation, ...]]:
    """Return the explanations of these neurons in all sets that used a language model, by neuron."""
    scores: dict[NeuronKey, list[tuple[NeuronScore, str]]] = {neuron: [] for neuron in neurons}
    for of_set in model.llm_sets:
        for s in of_set.scores.select(control="none").of_neurons(neurons):
            scores[s.neuron.key].append((s, of_set.suffix))
    by_neuron: dict[NeuronKey, tuple[LlmExplanation, ...]] = {}
    for of_set in model.llm_sets:
        if "explanations" in of_set.completions:
            folder = run.stage("explanations", of_set.label).path
            for e in read_explanations_of(folder, neurons):
                key = e.neuron.key
                words = _scores_in_words(scores[key], e)
                one = LlmExplanation(printable(e.explainer), e.evidence, printable(e.text), words)
                by_neuron[key] = (*by_neuron.get(key, ()), one)
    return by_neuron


def _scores_in_words(scores: Sequence[tuple[NeuronScore, str]], explanation: Explanation) -> str:
    """Return the scores x 100 of one explanation in words, grouped by the model that simulated from it.

    Each score comes with the label suffix of its set.
    """
    by_reader: dict[str, list[str]] = {}
    for s, suffix in scores:
        if s.explained_by == explanation.explainer and explanation.serves(s.metric):
            simulator = "" if s.simulator == explanation.explainer else s.simulator
            reader = f"{simulator}{s.variant}{suffix}".strip("+ ")
            value = str(s.score.status)
            if s.score.value is not None:
                value = f"{100 * s.score.value:.1f}"
            by_reader.setdefault(reader, []).append(f"{METRIC_NAMES[s.metric]} {value}")
    return "; ".join(
        f"{reader}: {' · '.join(parts)}" if reader else " · ".join(parts)
        for reader, parts in by_reader.items()
    )
