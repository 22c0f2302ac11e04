"""`cratelm export neuronpedia`: write neurons in the format of Neuronpedia's exports.

The layout is the one that docs.neuronpedia.org ("Exports") describes, and that a self-hosted Neuronpedia imports
from its admin panel:

```
OUT/config/{explanation_type,explanation_model_type,explanation_score_type,explanation_score_model}.jsonl
OUT/MODEL_ID/SOURCE_ID/{release,model,sourceset,source}.jsonl
OUT/MODEL_ID/SOURCE_ID/{features,activations,explanations}/batch-0.jsonl.gz ...
OUT/MODEL_ID/SOURCE_ID/explanation-scores/batch-0.jsonl.gz ...
```
A source is a layer, `LAYER-SET`; a batch contains 1,024 neurons. Columns and types are those of Neuronpedia:
repository hijohnnylin/neuronpedia, `apps/webapp/prisma/schema.prisma` at 008d504 (tables Neuron, Activation,
Explanation, ExplanationScore, ...). This module writes the columns that Neuronpedia's `export-data.py` at 1a80fe9
and SAEDashboard's `neuronpedia_export.py` (jbloomAus/SAEDashboard at 3ea1249) write. `neuronpedia.schema.json`
describes them as a JSON Schema.

A dashboard of SAEDashboard has the same columns under `NeuronpediaDashboardFeature`, with names such as `bin_min`
instead of `binMin` in its activations (`sae_dashboard/neuronpedia/neuronpedia_dashboard.py`, 0.8.0). An export was
read into these classes. It has all their required fields except the number of prompts and the data set searched,
which are properties of the source here.

Neuronpedia publishes no files of scores. `explanation-scores/` has the columns of its table ExplanationScore, and
its importer ignores the folder. It contains only scores that have a value, because the table requires one; the
others are counted. The tokens that a neuron promotes and suppresses are included if `cratelm effects` measured them
on this harvest. Vectors and correlations are empty lists.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.explain.store import read_explanations
from cratelm.interop.config import ExportNeuronpediaConfig
from cratelm.interop.harvested_neurons import both_splits, chosen_neurons, harvest_of
from cratelm.interop.neuronpedia_rows import (
    METRIC_TEXTS,
    PREFIX,
    Names,
    Row,
    activation_row,
    explanation_row,
    feature_row,
    metadata,
    score_row,
    source_row,
    type_name,
    type_row,
)
from cratelm.interop.openai_records import SOURCE
from cratelm.interop.out_folder import EXPORT_MARK, check_out, out_folder
from cratelm.records import (
    BOTH_ENDS,
    END_WORDS,
    Explanation,
    NeuronId,
    NeuronRecord,
    NeuronScore,
    NeuronSummary,
)
from cratelm.runs import Run
from cratelm.runs.names import split_set
from cratelm.score.store import read_scores
from cratelm.steer.store import effects_stage, read_logit_effect
from cratelm.tokens.shards import TokenStore

BATCH = 1024
"""number of neurons per file, as in Neuronpedia's own exports"""
_KINDS = ("top", "random", "openai_bin")


@dataclass(frozen=True)
class ExportNeuronpediaResult:
    """Result of `cratelm export neuronpedia`."""

    path: Path
    model_id: str
    sources: tuple[str, ...]
    """ids of the sources, one per layer; with both ends of neurons, one per layer and end"""
    features: int
    """number of neurons"""
    activations: int
    """number of excerpts"""
    explanations: int
    scores: int
    without_value: int
    """number of scores of these neurons that are omitted: undefined, dead or failed, or without an explanation
    (the intruder test of a failed explanation)"""


@dataclass(frozen=True, eq=False)
class ExportedSet:
    """A set of explanations of a model, and all their scores."""

    name: str
    """name of the language model's set; empty for the set without a language model"""
    explanations: dict[NeuronId, list[Explanation]]
    scores: dict[NeuronId, list[tuple[str, NeuronScore]]] = field(default_factory=dict)
    """scores with the name of their simulator: a language model, or empty for the explainer itself"""

    def scores_of(self, explanation: Explanation) -> Iterator[tuple[str, NeuronScore]]:
        """Yield the scores of one explanation, each with the name of its simulator.

        These are the scores of its explainer. If the explanation was made from the Anthropic excerpts, they are
        restricted to the Anthropic metric; if it was made from the top excerpts, to the other metrics.
        """
        for scorer, score in self.scores.get(explanation.neuron, ()):
            if score.explained_by == explanation.explainer and explanation.serves(score.metric):
                yield scorer or explanation.explainer, score


def export_neuronpedia(config: ExportNeuronpediaConfig) -> ExportNeuronpediaResult:
    """Write the harvest of a model with all its explanations and scores in the run.

    Raises `InputError` if the run has no harvest of the model or lacks the requested neurons, if scores belong to
    explanations that have changed, or if `--out` is not empty.
    """
    run = Run(config.run)
    stage, identities = harvest_of(run, config.model)
    chosen = chosen_neurons(stage.path, config.layers, config.only)
    names = _names(config, next(iter(chosen.values()))[0].neuron)
    sets = explanation_sets(run, config.model)
    check_out(config.out, force=config.force, mark=EXPORT_MARK)
    content = {"format": "Neuronpedia export", "model": config.model, **identities}
    counts: dict[str, int] = dict.fromkeys((*_FOLDERS, "without_value"), 0)
    sources: list[str] = []
    with out_folder(config.out, content, mark=EXPORT_MARK) as folder:
        _write_config(folder / "config", names, sets)
        store = TokenStore(run.stage("tokens").path)
        imported = (stage.path / SOURCE).is_file()
        effects = _effects(run, config.model, identities["activations"])
        writer = _Writer(config, names, store, sets, counts, imported, effects)
        harvested = chosen_neurons(stage.path)
        widths = {layer: 1 + of_layer[-1].neuron.number for layer, of_layer in harvested.items()}
        for layer, summaries in chosen.items():
            for of_end, part in _by_end(names, summaries):
                path = folder / names.model / of_end.source(layer)
                rows = metadata(of_end, widths, f"Neurons of {config.model}, by cratelm")
                notes = f"{summaries[0].neuron.site}, layer {layer}{_end_note(part)}"
                rows["source"] = [source_row(of_end, layer, notes)]
                for name, of_table in rows.items():
                    _write_lines(path / f"{name}.jsonl", of_table)
                replace(writer, names=of_end).write(path, stage.path, {layer: part})
                sources.append(of_end.source(layer))
    return ExportNeuronpediaResult(
        path=config.out,
        model_id=names.model,
        sources=tuple(sources),
        features=counts["features"],
        activations=counts["activations"],
        explanations=counts["explanations"],
        scores=counts["explanation-scores"],
        without_value=counts["without_value"],
    )


def _effects(run: Run, model: str, harvest: str) -> Path | None:
    """Return the folder of `cratelm effects`; None if it was not run on this harvest."""
    stage = effects_stage(run, model)
    done = stage.completion()
    if done is None or done.inputs.get("activations") != harvest:
        return None
    return stage.path


def explanation_sets(run: Run, model: str) -> list[ExportedSet]:
    """Return all finished sets of explanations of a model, each with its scores.

    Raises `InputError` if explanations or scores are stale, or if the explanations of scores no longer exist.
    """
    sets, by_identity = [], {}
    for name in _of_model(run, "explanations", model):
        stage = run.stage("explanations", name)
        done = stage.require("explain")
        by_neuron: dict[NeuronId, list[Explanation]] = {}
        for explanation in read_explanations(stage.path):
            by_neuron.setdefault(explanation.neuron, []).append(explanation)
        sets.append(ExportedSet(split_set(name)[1], by_neuron))
        by_identity[done.identity] = sets[-1]
    for name in _of_model(run, "scores", model):
        stage = run.stage("scores", name)
        done = stage.require("score")
        of_set = by_identity.get(done.inputs["explanations"])
        if of_set is None:
            raise InputError(
                f"{stage.path} scores explanations that are no longer in {run.path}: type"
                f" `{stage.command()}` after `cratelm explain`, or move the folder away"
            )
        scorer = _simulator_name(str(done.config.get("simulator") or ""))
        for score in read_scores(stage.path):
            if score.control == "none":
                of_set.scores.setdefault(score.neuron, []).append((scorer, score))
    return sets


def _simulator_name(option: str) -> str:
    """Return the name of the language model in `--simulator`, without its kind and its folder."""
    return option.partition(":")[2].rstrip("/").rpartition("/")[2]


def _of_model(run: Run, stage: Any, model: str) -> list[str]:
    return [n for n in run.models(stage) if split_set(n)[0] == model]


def _names(config: ExportNeuronpediaConfig, neuron: NeuronId) -> Names:
    return Names(
        model=config.model_id or _slug(config.model).lower(),
        source_set=config.source_set or _slug(neuron.site.removesuffix(BOTH_ENDS)),
        creator=config.creator_id,
        creator_name=config.creator_name,
    )


def _by_end(
    names: Names, summaries: list[NeuronSummary]
) -> list[tuple[Names, list[NeuronSummary]]]:
    """Return the neurons with the names of their source; the two ends of neurons are two sources, SET-plus and SET-minus."""
    if summaries[0].neuron.n_ends == 1:
        return [(names, summaries)]
    parts = [(w, [s for s in summaries if s.neuron.end == n]) for n, w in enumerate(END_WORDS)]
    return [
        (replace(names, source_set=f"{names.source_set}-{word}"), part)
        for word, part in parts
        if part
    ]


def _end_note(summaries: Sequence[NeuronSummary]) -> str:
    neuron = summaries[0].neuron
    if neuron.n_ends == 1:
        return ""
    return f", {'below' if neuron.end else 'above'} 0"


def _slug(name: str) -> str:
    """Return `name` as an id, with each run of characters that an id cannot contain replaced by one dash."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:128] or "model"


_FOLDERS = ("features", "activations", "explanations", "explanation-scores")


@dataclass(frozen=True, eq=False)
class _Writer:
    """Writes the batches of one layer after another, and adds to `counts`."""

    config: ExportNeuronpediaConfig
    names: Names
    store: TokenStore
    sets: list[ExportedSet]
    counts: dict[str, int]
    imported: bool
    """whether the records were imported: then the quantiles of their bins are unknown"""
    effects: Path | None
    """folder of the neurons' effects on the vocabulary; None if they were not measured"""

    def write(self, folder: Path, harvest: Path, chosen: dict[int, list[NeuronSummary]]) -> None:
        """Write the batches of the single layer in `chosen`."""
        ((layer, summaries),) = chosen.items()
        bar = tqdm(
            total=len(summaries),
            desc=f"export layer {layer}",
            unit="neuron",
            disable=self.config.quiet,
        )
        with bar:
            for batch, first in enumerate(range(0, len(summaries), BATCH)):
                of_batch = {layer: summaries[first : first + BATCH]}
                with ExitStack() as stack:
                    opened = {
                        name: stack.enter_context(_lines(folder / name / f"batch-{batch}.jsonl.gz"))
                        for name in _FOLDERS
                    }
                    for fit, held_out in both_splits(harvest, of_batch):
                        for name, row in self.rows(fit, held_out):
                            opened[name].write(_line(row))
                            self.counts[name] += 1
                        bar.update()

    def rows(self, fit: NeuronRecord, held_out: NeuronRecord) -> Iterator[tuple[str, Row]]:
        """Yield all rows of a neuron, each with the name of the folder it belongs to."""
        both = {"fit": fit, "held_out": held_out}
        summaries = [record.summary for record in both.values()]
        effect = read_logit_effect(self.effects, fit.neuron) if self.effects else None
        tokens_read = [s.n_tokens for s in summaries]
        yield "features", feature_row(self.names, summaries, tokens_read, effect)
        for split, record in both.items():
            for excerpt in record.excerpts:
                if excerpt.kind in _KINDS and excerpt.rank < self.config.excerpts and len(excerpt):
                    tokens = self.store.aligned_text(excerpt.token_ids)
                    row = activation_row(self.names, record.summary, excerpt, split, tokens)
                    if self.imported and excerpt.kind == "openai_bin":
                        row["binContains"] = None
                    yield "activations", row
        for of_set in self.sets:
            n_written = 0
            for explanation in of_set.explanations.get(fit.neuron, ()):
                row = explanation_row(self.names, explanation, of_set.name)
                yield "explanations", row
                for scorer, score in of_set.scores_of(explanation):
                    if score.score.value is not None:
                        yield "explanation-scores", score_row(self.names, row, scorer, score)
                        n_written += 1
            self.counts["without_value"] += len(of_set.scores.get(fit.neuron, ())) - n_written


def _write_config(folder: Path, names: Names, sets: list[ExportedSet]) -> None:
    """Write the tables of explainers, scorers and language models, which other rows refer to by name."""
    explained = [(e, s.name) for s in sets for rows in s.explanations.values() for e in rows]
    scored = [pair for s in sets for rows in s.scores.values() for pair in rows]
    tables: dict[str, tuple[set[str], Callable[[str], str], bool]] = {
        "explanation_type": ({type_name(*e) for e in explained}, _explainer_text, True),
        "explanation_model_type": ({name for _, name in explained if name}, _model_text, False),
        "explanation_score_type": ({PREFIX + s.metric for _, s in scored}, _metric_text, True),
        "explanation_score_model": (
            {scorer or s.explainer for scorer, s in scored},
            _model_text,
            False,
        ),
    }
    for table, (values, text_of, owned) in tables.items():
        rows = [type_row(names, name, text_of(name), owned=owned) for name in sorted(values)]
        _write_lines(folder / f"{table}.jsonl", rows)


def _explainer_text(name: str) -> str:
    return f"cratelm's explainer {name.removeprefix(PREFIX)}"


def _model_text(name: str) -> str:
    return f"{name}, as named on the command line"


def _metric_text(name: str) -> str:
    return next(text for metric, text in METRIC_TEXTS.items() if PREFIX + metric == name)


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(_line, rows)))


def _lines(path: Path) -> gzip.GzipFile:
    """Open a compressed file without a timestamp, so that the same export gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return gzip.GzipFile(path, "wb", 6, mtime=0)


def _line(row: Row) -> bytes:
    """Return JSON on one line. Raises ValueError for a number that JSON cannot represent."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
