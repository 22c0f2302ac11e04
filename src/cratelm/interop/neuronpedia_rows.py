"""Build rows of Neuronpedia's tables from records of a run. Column names are those of Neuronpedia.

`cratelm.interop.neuronpedia` states the source of the columns; `neuronpedia.schema.json` lists them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cratelm.interop.openai_records import shortest_float
from cratelm.records import (
    OPENAI_QUANTILES,
    Excerpt,
    Explanation,
    FloatArray,
    Metric,
    NeuronId,
    NeuronScore,
    NeuronSummary,
)
from cratelm.steer.store import LogitEffect

Row = dict[str, Any]
PREFIX = "cratelm_"
"""prefix of the names of cratelm's explainers and metrics, which differ from those that Neuronpedia computes"""
METRIC_TEXTS: dict[Metric, str] = {
    "top_and_random": "Correlation of simulated with true activations, top and random excerpts",
    "random_only": "Correlation of simulated with true activations, random excerpts",
    "anthropic": "Correlation of simulated with true activations, short excerpts of all levels",
    "all_tokens_estimate": "Correlation of simulated with true activations over all tokens, estimated from some of each quantile",
    "detection": "Area under the ROC curve: which excerpts the neuron fires in",
    "detection_hard": "Area under the ROC curve: which excerpts the neuron fires in, among those with its tokens",
    "fuzzing": "Area under the ROC curve: whether the right tokens are marked",
    "fuzzing_hard": "Area under the ROC curve: whether the token is marked where the neuron fires on it",
    "intruder": "Fraction of trials in which the excerpt that does not belong was found",
    "embedding": "Area under the ROC curve of the similarity of excerpt and explanation",
}
_LISTS_LEFT_EMPTY = (
    "topkCosSimIndices",
    "topkCosSimValues",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""columns of a feature for which cratelm has no values"""


@dataclass(frozen=True)
class Names:
    """Names and ids of a model and its neurons in Neuronpedia."""

    model: str
    """`modelId`"""
    source_set: str
    creator: str
    """`creatorId`, and `authorId` of explanations"""
    creator_name: str

    def source(self, layer: int) -> str:
        """Return the id of a layer's source, which is the column `layer` of rows."""
        return f"{layer}-{self.source_set}"

    def neuron_columns(self, neuron: NeuronId) -> Row:
        """Return the columns that identify a neuron; an end has the number of its neuron, in a source of its own."""
        layer = self.source(neuron.layer)
        return {"modelId": self.model, "layer": layer, "index": str(neuron.number)}


def identifier(*parts: object) -> str:
    """Return an id of 25 letters and digits that is the same for the same parts."""
    return "c" + hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:24]


def metadata(names: Names, widths: dict[int, int], text: str) -> dict[str, list[Row]]:
    """Return the rows of release, model and source set, by file. `widths` is the number of neurons by layer."""
    creator = {"creatorId": names.creator, "visibility": "PUBLIC"}
    release = f"cratelm-{names.model}"
    credit = {**creator, "creatorName": names.creator_name, "description": text, "urls": []}
    model = {
        **creator,
        "id": names.model,
        "displayName": names.model,
        "displayNameShort": names.model,
        "layers": max(widths) + 1,
        "neuronsPerLayer": max(widths.values()),
        "owner": names.creator_name,
        "inferenceEnabled": False,
        "instruct": False,
    }
    sourceset = {
        **credit,
        "modelId": names.model,
        "name": names.source_set,
        "type": "",
        "releaseName": release,
        "hasDashboards": True,
    }
    return {
        "release": [{**credit, "name": release, "descriptionShort": None}],
        "model": [model],
        "sourceset": [sourceset],
    }


def source_row(names: Names, layer: int, notes: str) -> Row:
    """Return the row of a source, which is one layer."""
    return {
        "id": names.source(layer),
        "modelId": names.model,
        "setName": names.source_set,
        "creatorId": names.creator,
        "visibility": "PUBLIC",
        "hasDashboards": True,
        "inferenceEnabled": False,
        "dataset": None,
        "notes": notes,
    }


def feature_row(
    names: Names,
    summaries: Sequence[NeuronSummary],
    tokens: Sequence[int],
    effect: LogitEffect | None = None,
) -> Row:
    """Return the row of a neuron, from its summaries of both splits, weighted by `tokens`, and its `effect`."""
    neuron = summaries[0].neuron
    heights, centres = _positive_histogram(summaries)
    rate = np.average([s.firing_rate for s in summaries], weights=tokens)
    return {
        **names.neuron_columns(neuron),
        "creatorId": names.creator,
        "sourceSetName": names.source_set,
        "maxActApprox": max(s.maximum for s in summaries),
        "frac_nonzero": float(rate),
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": centres,
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": None,
        "pos_str": list(effect.promoted) if effect else [],
        "pos_values": list(effect.promoted_values) if effect else [],
        "neg_str": list(effect.suppressed) if effect else [],
        "neg_values": list(effect.suppressed_values) if effect else [],
        **{name: [] for name in _LISTS_LEFT_EMPTY},
    }


def activation_row(
    names: Names, summary: NeuronSummary, excerpt: Excerpt, split: str, tokens: list[str]
) -> Row:
    """Return the row of an excerpt with n tokens; `tokens` [n] is their text."""
    neuron, values = summary.neuron, [shortest_float(a) for a in excerpt.activations]
    highest = int(np.argmax(values))
    columns = names.neuron_columns(neuron)
    return {
        "id": identifier(
            "activation", *columns.values(), split, excerpt.kind, excerpt.bin, excerpt.rank
        ),
        **columns,
        "creatorId": names.creator,
        "dataSource": f"{split}, {excerpt.kind}",
        "tokens": tokens,
        "values": values,
        "maxValue": values[highest],
        "maxValueTokenIndex": highest,
        "minValue": min(values),
        "qualifyingTokenIndex": excerpt.peak,
        **_bin(summary, excerpt),
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
    }


def explanation_row(names: Names, explanation: Explanation, of_set: str) -> Row:
    """Return the row of an explanation; `of_set` is the name of its set, empty without a language model."""
    columns = names.neuron_columns(explanation.neuron)
    kind = type_name(explanation, of_set)
    return {
        "id": identifier("explanation", *columns.values(), of_set, kind),
        **columns,
        "authorId": names.creator,
        "description": explanation.text,
        "typeName": kind,
        "explanationModelName": of_set or None,
        "embedding": None,
        "umap_x": None,
        "umap_y": None,
        "umap_cluster": None,
        "umap_log_feature_sparsity": None,
    }


def type_name(explanation: Explanation, of_set: str) -> str:
    """Return the type of an explanation: its explainer, or for a language model the kind of its evidence."""
    of_llm = f"model_{explanation.evidence}".rstrip("_")
    return PREFIX + (of_llm if of_set else explanation.explainer)


def score_row(names: Names, explanation: Row, scorer: str, score: NeuronScore) -> Row:
    """Return the row of a score that has a value; `scorer` names its simulator."""
    result = score.score
    details = {
        "explainer": score.explainer,
        "n_tokens": result.n_tokens,
        "n_records": result.n_records,
        "n_duplicates": result.n_duplicates,
        "without_duplicates": result.without_duplicates,
        "r2": result.r2,
        "absolute_deviation": result.absolute_deviation,
        "accuracy": result.accuracy,
    }
    return {
        "id": identifier("score", explanation["id"], scorer, score.explainer, score.metric),
        "explanationId": explanation["id"],
        "initiatedByUserId": names.creator,
        "value": result.value,
        "explanationScoreTypeName": PREFIX + score.metric,
        "explanationScoreModelName": scorer,
        "jsonDetails": json.dumps(details),
    }


def type_row(names: Names, name: str, text: str, *, owned: bool) -> Row:
    """Return a row of the tables of explainers, scorers and language models; rows of models have no owner."""
    row = {
        "name": name,
        "displayName": name,
        "description": text,
        "featured": False,
        "url": None,
        "creatorName": names.creator_name,
    }
    return {**row, "isAttention": False, "creatorId": names.creator} if owned else row


def _positive_histogram(summaries: Sequence[NeuronSummary]) -> tuple[list[float], list[float]]:
    """Return heights and centres of the histogram's bins over the tokens on which the neuron fires.

    Counts are summed over both splits. Tokens on which it does not fire are subtracted from the lowest bin in which it
    can, because this bin would otherwise dwarf all others. Empty if the bins of the splits differ.
    """
    ranges = {(s.histogram_low, s.histogram_high) for s in summaries}
    if len(ranges) > 1:
        return [], []
    ((low, high),) = ranges
    counts = np.sum([s.histogram for s in summaries], axis=0)  # [64]
    edges = np.linspace(low, high, len(counts) + 1)
    above = edges[1:] > min(s.firing_threshold or 0.0 for s in summaries)
    fired = sum(round(s.firing_rate * s.n_tokens) for s in summaries)
    heights = np.where(above, counts, 0)[above]
    # not below 0: the thresholds of the splits can differ
    heights[:1] = np.maximum(0, heights[:1] - (heights.sum() - fired))
    centres = (edges[:-1] + edges[1:])[above] / 2
    return [float(h) for h in heights], [float(c) for c in centres]


def _bin(summary: NeuronSummary, excerpt: Excerpt) -> Row:
    """Return the bin as in dashboards: -1 for top excerpts, else its edges and its fraction of the pilot's tokens."""
    if excerpt.kind == "top":
        return {"binMin": -1.0, "binMax": float(summary.maximum), "binContains": -1.0}
    edges: FloatArray = summary.openai_edges
    if excerpt.kind != "openai_bin" or not np.isfinite(edges).all():
        return {"binMin": None, "binMax": None, "binContains": None}
    low, high = edges[excerpt.bin], edges[excerpt.bin + 1]
    begin = OPENAI_QUANTILES[int(np.flatnonzero(edges == low)[0])]
    share = round(OPENAI_QUANTILES[excerpt.bin + 1] - begin, 6)
    return {"binMin": shortest_float(low), "binMax": shortest_float(high), "binContains": share}
