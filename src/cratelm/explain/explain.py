"""`cratelm explain`: from the fit excerpts of each neuron to what it responds to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cratelm.activations.store import read_records, read_summaries
from cratelm.errors import InputError
from cratelm.explain.config import ExplainConfig
from cratelm.explain.evidence import WEIGHT, collect_evidence
from cratelm.explain.llm_explainer import ExplanationRequest, ask, explanation_requests
from cratelm.explain.lookup import token_table
from cratelm.explain.phrases import lookup_phrase, trie_phrase
from cratelm.explain.store import (
    ExplanationFailure,
    SampledNeuron,
    explanation_set_name,
    write_explanations,
    write_selected,
    write_unexplained,
)
from cratelm.explain.trie import context_trie
from cratelm.llm.client import Client, DryRun, WorkerResult, dry_run
from cratelm.llm.prompts import openai as openai_prompts
from cratelm.llm.prompts.neurons import VERSION
from cratelm.llm.session import ledger_path, open_client
from cratelm.records import Explanation, NeuronRecord
from cratelm.runs import Draft, Run, Stage, write_json
from cratelm.stats.sample_size import precision_statement


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
    n_failed: int = 0
    """explanations that a language model was asked for and did not give"""
    calls: str = ""
    """what a language model was asked, in words"""

    def __str__(self) -> str:
        failed = (
            f", {self.n_failed:,} explanations failed (--retry-failed asks again)"
            if self.n_failed
            else ""
        )
        calls = f"\n  {self.calls}" if self.calls else ""
        return (
            f"{self.n_explanations:,} explanations of {self.n_neurons - self.n_dead:,} neurons,"
            f" {self.n_dead:,} dead{failed}: {self.path}{calls}"
        )


def explain(config: ExplainConfig) -> ExplainResult | DryRun | WorkerResult:
    """Explains the neurons of one model of a run.

    Writes `explanations/MODEL/`, or `explanations/MODEL@NAME/` where a language model called NAME
    explains. With `--dry-run` nothing is asked or written and the `DryRun` is returned; with
    `--shard` answers go to the worker's ledger alone.

    Raises `InputError` where the run has no tokens or no harvest of the model, or the language model
    cannot be reached; `BudgetReached` at a limit, with all answers so far in the ledger.
    """
    run = Run(config.run)
    harvest = run.stage("activations", config.model)
    inputs = {
        "tokens": run.stage("tokens").require("tokenize").identity,
        "activations": harvest.require("harvest").identity,
    }
    selected = select_neurons(harvest.path, config.neurons, config.seed, config.places())
    if config.explainer:
        return _explain_with_model(config, run, inputs, selected)
    stage = run.stage("explanations", config.model)
    if stage.is_finished(config, inputs, force=config.force):
        return ExplainResult(path=stage.path, **stage.require("explain").results)
    with stage.write(config, inputs) as draft:
        explanations = list(_explain_all(config, run, harvest.path, selected))
        counts = _write(draft, selected, explanations, [])
    return ExplainResult(path=stage.path, **counts)


def _explain_with_model(
    config: ExplainConfig, run: Run, inputs: dict[str, str], selected: list[SampledNeuron]
) -> ExplainResult | DryRun | WorkerResult:
    if config.prompts == "openai":
        openai_prompts.require()
    with open_client(config, config.explainer) as client:
        name = config.name or client.backend.name
        inputs["prompts"] = VERSION if config.prompts == "cratelm" else config.prompts
        stage = run.stage("explanations", explanation_set_name(config.model, name))
        redo = config.force or (config.retry_failed and _has_failed(stage))
        ahead = not (config.dry_run or config.shard)
        if ahead and stage.is_finished(config, inputs, force=redo):
            return ExplainResult(path=stage.path, **stage.require("explain").results)
        if config.neurons:
            layers = len({s.neuron.layer for s in selected})
            print(precision_statement(len(selected) // layers, layers), flush=True)
        index, count = config.worker()
        asked = _questions(config, run, selected[index::count])
        if config.dry_run:
            return dry_run(client, ([q.request] for q in asked))
        answers = list(_answers(config, client, name, asked, len(selected[index::count])))
        if config.shard:
            return WorkerResult(ledger_path(config), len(selected[index::count]), str(client.tally))
        explanations = [a for a in answers if isinstance(a, Explanation)]
        failures = [a for a in answers if isinstance(a, ExplanationFailure)]
        with stage.write(config, inputs) as draft:
            write_json(draft.path / "calls.json", client.tally.as_dict())
            draft.unhashed.add("calls.json")
            counts = _write(draft, selected, explanations, failures)
    return ExplainResult(path=stage.path, calls=str(client.tally), **counts)


def _questions(
    config: ExplainConfig, run: Run, selected: Sequence[SampledNeuron]
) -> Iterator[ExplanationRequest]:
    """In the order of `selected`."""
    strings = _token_strings(run)
    for record in _records(run.stage("activations", config.model).path, selected):
        yield from explanation_requests(record, config, strings)


def _answers(
    config: ExplainConfig,
    client: Client,
    name: str,
    asked: Iterator[ExplanationRequest],
    n_neurons: int,
) -> Iterator[Explanation | ExplanationFailure]:
    with tqdm(
        total=n_neurons * len(config.evidence),
        desc=f"explain {config.model} by {name}",
        unit="explanation",
        disable=config.quiet,
    ) as bar:
        while some := list(islice(asked, client.backend.window)):
            for answer in ask(some, client, name, config.prompts):
                yield answer
                bar.update()


def _has_failed(stage: Stage) -> bool:
    done = stage.completion()
    return done is not None and bool(done.results.get("n_failed"))


def _write(
    draft: Draft,
    selected: Sequence[SampledNeuron],
    explanations: Sequence[Explanation],
    failures: Sequence[ExplanationFailure],
) -> dict[str, Any]:
    """Writes the files of the stage; returns the figures of `ExplainResult`."""
    write_explanations(draft.path, explanations)
    write_selected(draft.path, selected)
    write_unexplained(draft.path, failures)
    counts = {
        "n_neurons": len(selected),
        "n_dead": sum(s.dead for s in selected),
        "n_explanations": len(explanations),
        "n_failed": len(failures),
    }
    draft.results.update(counts)
    return counts


def select_neurons(
    harvest: Path, per_layer: int, seed: int, only: Sequence[tuple[int, int]] = ()
) -> list[SampledNeuron]:
    """`per_layer` neurons of each layer, 0 for all, by layer and index; or `only` these (layer, index).

    Raises `InputError` where the harvest has not one of `only`.

    The draw depends on the seed, the layer and how many neurons the layer has, and on nothing
    else: twins draw the same indices, and a smaller sample is part of a larger one.
    """
    layers: dict[int, list[SampledNeuron]] = {}
    for summary in read_summaries(harvest, "fit"):
        layers.setdefault(summary.neuron.layer, []).append(
            SampledNeuron(summary.neuron, summary.dead)
        )
    if only:
        return _named(harvest, layers, only)
    chosen = []
    for layer, neurons in sorted(layers.items()):
        if 0 < per_layer < len(neurons):
            draw = np.random.default_rng([seed, layer])
            places = np.sort(draw.permutation(len(neurons))[:per_layer])
            neurons = [neurons[place] for place in places]
        chosen += neurons
    return chosen


def _named(
    harvest: Path, layers: dict[int, list[SampledNeuron]], only: Sequence[tuple[int, int]]
) -> list[SampledNeuron]:
    there = {(s.neuron.layer, s.neuron.index): s for found in layers.values() for s in found}
    missing = [place for place in only if place not in there]
    if missing:
        layer, index = missing[0]
        raise InputError(
            f"--only {layer}:{index}: {harvest} has layers {', '.join(map(str, sorted(layers)))} of"
            f" {len(next(iter(layers.values())))} neurons and not this one"
        )
    return [there[place] for place in only]


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
    evidence = collect_evidence(record, depth=max(config.depth, 2), weight=WEIGHT)
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
    config: ExplainConfig, run: Run, harvest: Path, selected: Sequence[SampledNeuron]
) -> Iterator[Explanation]:
    strings = _token_strings(run)
    with tqdm(
        total=len(selected), desc=f"explain {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        for record in _records(harvest, selected):
            yield from explain_neuron(record, config, strings)
            bar.update()


def _records(harvest: Path, selected: Sequence[SampledNeuron]) -> Iterator[NeuronRecord]:
    """Fit records of the selected neurons, by layer and index."""
    wanted: dict[int, list[int]] = {}
    for neuron in (s.neuron for s in selected):
        wanted.setdefault(neuron.layer, []).append(neuron.index)
    for layer, indices in wanted.items():
        yield from read_records(harvest, "fit", layers=[layer], indices=indices)


def _token_strings(run: Run) -> list[str]:
    from cratelm.tokens.shards import TokenStore

    store = TokenStore(run.stage("tokens").path)
    return store.decode_tokens(range(store.vocab_size))
