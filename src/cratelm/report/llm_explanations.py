"""What language models say of the neurons shown, with the scores of what they say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cratelm.records import NeuronScore
from cratelm.report.cells import METRIC_NAMES
from cratelm.results.run_results import ModelResults, Place
from cratelm.runs import Run
from cratelm.text.display import printable

_FROM = {"top": "from its strongest excerpts", "anthropic": "from its whole range"}


@dataclass(frozen=True)
class Told:
    """One explanation by a language model."""

    explainer: str
    evidence: str
    """`top` or `anthropic`: what it was explained from"""
    text: str
    figures: str
    """its scores, in words; empty where it has none"""

    @property
    def who(self) -> str:
        return f"{self.explainer}, {_FROM.get(self.evidence, self.evidence)}"

    @property
    def headline(self) -> bool:
        """Shown beside the neuron's name: the one that most scores are of."""
        return self.evidence != "anthropic"


def told(run: Run, model: ModelResults, places: Sequence[Place]) -> dict[Place, tuple[Told, ...]]:
    """By neuron: what each set of explanations by a language model has of these neurons."""
    wanted = set(places)
    scores: dict[Place, list[NeuronScore]] = {place: [] for place in places}
    for s in (s for found in model.with_model for s in found.scores if s.control == "none"):
        if (s.neuron.layer, s.neuron.index) in wanted:
            scores[s.neuron.layer, s.neuron.index].append(s)
    result: dict[Place, tuple[Told, ...]] = {}
    for found in model.with_model:
        if "explanations" in found.completions:
            folder = run.stage("explanations", found.label(model.name)).path
            for place, explainer, evidence, text in _rows(folder, wanted):
                figures = _figures(scores[place], explainer, evidence)
                one = Told(printable(explainer), evidence, printable(text), figures)
                result[place] = (*result.get(place, ()), one)
    return result


def _rows(folder: Path, wanted: set[Place]) -> list[tuple[Place, str, str, str]]:
    columns = ["layer", "index", "explainer", "text", "payload"]
    rows = pq.read_table(
        folder / "explanations.parquet",
        columns=columns,
        filters=[("index", "in", sorted({index for _, index in wanted}))],
    ).to_pylist()
    return [
        ((r["layer"], r["index"]), r["explainer"], evidence, r["text"])
        for r in rows
        if (r["layer"], r["index"]) in wanted
        for evidence in [json.loads(r["payload"]).get("evidence", "top")]
    ]


def _figures(scores: Sequence[NeuronScore], explainer: str, evidence: str) -> str:
    """Scores x 100 of this explanation, by every model that read it."""
    shown: dict[str, list[str]] = {}
    for s in scores:
        from_range = s.metric == "anthropic"
        reader = s.explainer.removeprefix(explainer)
        of_this = s.explainer.startswith(explainer) and (not reader or reader[0] in "/+ ")
        if of_this and from_range == (evidence == "anthropic"):
            value = str(s.score.status)
            if s.score.value is not None:
                value = f"{100 * s.score.value:.1f}"
            shown.setdefault(reader, []).append(f"{METRIC_NAMES[s.metric]} {value}")
    return "; ".join(
        f"{reader.strip('/+ ')}: {' · '.join(parts)}" if reader else " · ".join(parts)
        for reader, parts in shown.items()
    )
