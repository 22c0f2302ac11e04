"""`cratelm explain`: from the fit excerpts of each neuron to what it responds to, without a language model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import WEIGHT, gather
from cratelm.explain.lookup import token_table
from cratelm.explain.phrases import lookup_phrase, trie_phrase
from cratelm.explain.store import Selected, write_explanations, write_selected
from cratelm.explain.trie import context_trie
from cratelm.records import Explanation, NeuronId, NeuronRecord
from cratelm.runs import Run


@dataclass(frozen=True)
class ExplainResult:
    """What `explain` did."""

    path: Path
    """folder of `explanations.parquet`"""
    n_neurons: int
    """neurons that were to be explained"""
    n_dead: int
    """of them, never above 0 on the fit split: without an explanation"""
    n_explanations: int

    def __str__(self) -> str:
        return (
            f"{self.n_explanations:,} explanations of {self.n_neurons - self.n_dead:,} neurons,"
            f" {self.n_dead:,} dead: {self.path}"
        )


def explain(config: ExplainConfig) -> ExplainResult:
    """Explains the neurons of one model of a run and writes `explanations/MODEL/`.

    Raises `InputError` where the run has no tokens or no harvest of the model.
    """
    run = Run(config.run)
    harvest = run.stage("activations", config.model)
    inputs = {
        "tokens": run.stage("tokens").require("tokenize").identity,
        "activations": harvest.require("harvest").identity,
    }
    stage = run.stage("explanations", config.model)
    if stage.is_finished(config, inputs, force=config.force):
        return ExplainResult(path=stage.path, **stage.require("explain").results)
    selected = select_neurons(harvest.path, config.neurons, config.seed)
    with stage.write(config, inputs) as draft:
        explanations = list(_explain_all(config, run, harvest.path, selected))
        write_explanations(draft.path, explanations)
        write_selected(draft.path, selected)
        n_dead = sum(s.dead for s in selected)
        counts = {
            "n_neurons": len(selected),
            "n_dead": n_dead,
            "n_explanations": len(explanations),
        }
        draft.results.update(counts)
    return ExplainResult(path=stage.path, **counts)


def select_neurons(harvest: Path, per_layer: int, seed: int) -> list[Selected]:
    """`per_layer` neurons of each layer, 0 for all, by layer and index.

    The draw depends on the seed, the layer and how many neurons the layer has, and on nothing
    else: twins draw the same indices.
    """
    layers: dict[int, list[Selected]] = {}
    for summary in read_summaries(harvest, "fit"):
        layers.setdefault(summary.neuron.layer, []).append(Selected(summary.neuron, summary.dead))
    chosen = []
    for layer, neurons in sorted(layers.items()):
        if 0 < per_layer < len(neurons):
            draw = np.random.default_rng([seed, layer])
            places = np.sort(draw.choice(len(neurons), per_layer, replace=False))
            neurons = [neurons[place] for place in places]
        chosen += neurons
    return chosen


def explain_neuron(
    record: NeuronRecord, config: ExplainConfig, token_strings: Sequence[str]
) -> list[Explanation]:
    """One explanation per explainer of `config`; none for a dead neuron.

    `record` is of the fit split; `token_strings` [V] shows each token. Raises `InputError` where
    the record holds out-of-context excerpts, which exist for scoring only, or no tokens at all.
    """
    if record.summary.dead:
        return []
    if record.of_kind("out_of_context") or not any(len(e) for e in record.excerpts):
        raise InputError(
            f"{record.neuron} has no excerpts to explain from, or those of the held_out split:"
            " harvest it again"
        )
    evidence = gather(record, depth=max(config.depth, 2), weight=WEIGHT)
    documents = tuple(sorted({e.document for e in record.excerpts}))
    mean = record.summary.mean
    explanations = []
    for explainer in config.explainers:
        if explainer == "lookup":
            table = token_table(evidence, mean, config.max_entries)
            text = lookup_phrase(table, evidence, record, token_strings)
            payload = table.payload()
        else:
            trie = context_trie(evidence, mean, config.max_entries, depth=config.depth)
            text, payload = trie_phrase(trie, record, token_strings), trie.payload()
        explanations.append(Explanation(record.neuron, explainer, text, payload, documents))
    return explanations


def _explain_all(
    config: ExplainConfig, run: Run, harvest: Path, selected: Sequence[Selected]
) -> Iterator[Explanation]:
    strings = _token_strings(run)
    wanted: dict[int, list[NeuronId]] = {}
    for neuron in (s.neuron for s in selected):
        wanted.setdefault(neuron.layer, []).append(neuron)
    with tqdm(
        total=len(selected), desc=f"explain {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        for layer, neurons in wanted.items():
            indices = [n.index for n in neurons]
            for record in read_records(harvest, "fit", layers=[layer], indices=indices):
                yield from explain_neuron(record, config, strings)
                bar.update()


def _token_strings(run: Run) -> list[str]:
    from cratelm.tokens.shards import TokenStore

    store = TokenStore(run.stage("tokens").path)
    return store.decode_tokens(range(store.vocab_size))
