"""`cratelm explain`: describe what each neuron responds to, from its excerpts of the fit split."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from cratelm.errors import InputError
from cratelm.explain.concepts.files import load_library
from cratelm.explain.concepts.fit import FitFeatures, fit_features
from cratelm.explain.concepts.library import Library
from cratelm.explain.concepts.stored import write_library
from cratelm.explain.config import ExplainConfig
from cratelm.explain.llm_explainer import LLMExplainer
from cratelm.explain.neuron import CountingExplainer, check_contexts
from cratelm.explain.selection import read_selected_records, select_neurons
from cratelm.explain.store import (
    ExplanationFailure,
    SampledNeuron,
    noun_of,
    write_explanations,
    write_selected,
    write_unexplained,
)
from cratelm.llm.client import DryRun, WorkerResult, dry_run
from cratelm.llm.prompts import openai as openai_prompts
from cratelm.llm.prompts.neurons import VERSION
from cratelm.llm.session import is_finished, open_client, write_calls
from cratelm.records import Explanation, NeuronRecord
from cratelm.runs import Completion, Draft, Inputs, Run
from cratelm.runs.names import set_name
from cratelm.stats.sample_size import precision_statement
from cratelm.tokens.beginning import Beginning


@dataclass(frozen=True)
class ExplainResult:
    """Result of `cratelm explain`."""

    path: Path
    """folder of `explanations.parquet`"""
    n_neurons: int
    """neurons selected to be explained"""
    n_dead: int
    """of these, neurons that are never above 0 on the fit split and so have no explanation"""
    n_explanations: int
    n_failed: int = 0
    """explanations that were requested from a language model and failed"""
    calls: str = ""
    """number and cost of the calls to a language model, in words"""
    noun: str = "neurons"
    """what `n_neurons` and `n_dead` count: `neurons`, or `ends of neurons` at a site with both ends"""

    def __str__(self) -> str:
        failed = (
            f", {self.n_failed:,} explanations failed (--retry-failed repeats the calls)"
            if self.n_failed
            else ""
        )
        calls = f"\n  {self.calls}" if self.calls else ""
        return (
            f"{self.n_explanations:,} explanations of {self.n_neurons - self.n_dead:,} {self.noun},"
            f" {self.n_dead:,} dead{failed}: {self.path}{calls}"
        )


class Explainer(Protocol):
    """Anything that explains neurons, with or without a language model."""

    def explain(
        self, records: Iterable[NeuronRecord]
    ) -> Iterator[Explanation | ExplanationFailure]:
        """Yield explanations and failures for records of the fit split, in the order of `records`.

        One neuron can have several, by explainer or kind of evidence; a dead neuron has none.
        """
        ...


def explain(config: ExplainConfig) -> ExplainResult | DryRun | WorkerResult:
    """Explain the neurons of one model of a run, and return the counts.

    Writes `explanations/MODEL/`, or `explanations/MODEL@NAME/` with the explanations of the language
    model NAME. With `--dry-run` no explanation is requested, nothing is written and a `DryRun` is
    returned; with `--shard` answers are written only to the worker's ledger.

    Raises `InputError` if the run has no tokens or no harvest of the model, or the language model cannot
    be reached or fails every call; `BudgetReached` at a limit. All answers so far are in the ledger.
    """
    run = Run(config.run)
    harvest = run.stage("activations", config.model)
    inputs: dict[str, Completion | str] = {
        "tokens": run.stage("tokens").require("tokenize"),
        "activations": harvest.require("harvest"),
    }
    selected = select_neurons(harvest.path, config.neurons, config.seed, config.only)
    if config.explainer:
        return _explain_with_llm(config, run, inputs, selected)
    library = load_library(config.concepts)
    if config.concepts:
        inputs["concepts"] = hashlib.sha256(library.as_json().encode()).hexdigest()
    stage = run.stage("explanations", config.model)
    if stage.is_finished(config, inputs, force=config.force):
        return stage.result(ExplainResult, path=stage.path)
    records = read_selected_records(harvest.path, "fit", selected)
    first = list(islice(records, 1))
    for record in first:  # before the progress bar; all neurons have about as many tokens
        check_contexts(record, config)
    explainer = CountingExplainer(config, _fit_features(run, config, library))
    n_expected = len(config.explainers) * sum(not s.dead for s in selected)
    with stage.write(config, inputs) as draft:
        stream = explainer.explain(chain(first, records))
        outcomes = _progress(stream, n_expected, config.model, config.quiet)
        counts = _write(draft, selected, outcomes)
        write_library(draft.path, library)
    return ExplainResult(path=stage.path, **counts)


def _explain_with_llm(
    config: ExplainConfig, run: Run, inputs: Inputs, selected: list[SampledNeuron]
) -> ExplainResult | DryRun | WorkerResult:
    if config.prompts == "openai":
        openai_prompts.require()
    harvest = run.stage("activations", config.model).path
    inputs = {
        **inputs,
        "prompts": VERSION if config.prompts == "cratelm" else openai_prompts.VERSION,
    }
    index, count = config.worker()
    of_worker = selected[index::count]
    with open_client(config, config.explainer) as client, ExitStack() as held:
        name = config.name or client.backend.name
        stage = run.stage("explanations", set_name(config.model, name))
        if is_finished(config, stage, inputs):
            return stage.result(ExplainResult, path=stage.path)
        # no other process may make the same calls meanwhile
        if not (config.dry_run or config.shard):
            held.enter_context(stage.lock())
        if config.neurons:
            layers = len({s.neuron.layer for s in selected})
            n_neurons = len({(s.neuron.layer, s.neuron.index // s.neuron.n_ends) for s in selected})
            print(precision_statement(n_neurons // layers, layers), flush=True)
        explainer = LLMExplainer(client, name, config, _token_strings(run))
        records = read_selected_records(harvest, "fit", of_worker)
        if config.dry_run:
            return dry_run(client, ([r.request] for r in explainer.requests(records)))
        n_expected = len(config.evidence) * sum(not s.dead for s in of_worker)
        label = f"{config.model} by {name}"
        outcomes = list(_progress(explainer.explain(records), n_expected, label, config.quiet))
        client.require_answers()
        if config.shard:
            # answers are in the ledger: the command that merges the workers writes the stage
            return WorkerResult(client.ledger.path, len(of_worker), str(client.tally))
        _require_explanation(outcomes, name)
        with stage.write(config, inputs) as draft:
            write_calls(draft, client)
            counts = _write(draft, selected, outcomes)
    return ExplainResult(path=stage.path, calls=str(client.tally), **counts)


def _require_explanation(outcomes: Sequence[Explanation | ExplanationFailure], name: str) -> None:
    """Raise `InputError` if no answer is an explanation; failed calls alone are the client's to report."""
    failures = [o for o in outcomes if isinstance(o, ExplanationFailure)]
    if failures and len(failures) == len(outcomes):
        raise InputError(
            f"none of the {len(failures):,} answers of {name} is an explanation, the first: {failures[0].reason};"
            " no stage was written: choose another --explainer, or other --prompts"
        )


def _progress(
    outcomes: Iterator[Explanation | ExplanationFailure], n_expected: int, label: str, quiet: bool
) -> Iterable[Explanation | ExplanationFailure]:
    return tqdm(
        outcomes, total=n_expected, desc=f"explain {label}", unit="explanation", disable=quiet
    )


def _write(
    draft: Draft,
    selected: Sequence[SampledNeuron],
    outcomes: Iterable[Explanation | ExplanationFailure],
) -> dict[str, Any]:
    """Write the files of the stage while outcomes are made; return the figures of `ExplainResult`."""
    failures: list[ExplanationFailure] = []

    def explanations() -> Iterator[Explanation]:
        for outcome in outcomes:
            if isinstance(outcome, ExplanationFailure):
                failures.append(outcome)
            else:
                yield outcome

    n_explanations = write_explanations(draft.path, explanations())
    write_selected(draft.path, selected)
    write_unexplained(draft.path, failures)
    counts = {
        "n_neurons": len(selected),
        "n_dead": sum(s.dead for s in selected),
        "n_explanations": n_explanations,
        "n_failed": len(failures),
        **noun_of(selected),
    }
    draft.results.update(counts)
    return counts


def _fit_features(run: Run, config: ExplainConfig, library: Library) -> FitFeatures:
    """Return the features of the fit split, in segments of the harvest's sequences."""
    from cratelm.tokens.shards import TokenStore

    store = TokenStore(run.stage("tokens").path)
    harvest = run.stage("activations", config.model).completion()
    results = harvest.results if harvest else {}
    length, beginning = results.get("sequence_length", 0), Beginning.recorded(results)
    return fit_features(library, store, length, beginning)


def _token_strings(run: Run) -> list[str]:
    from cratelm.tokens.shards import TokenStore

    return TokenStore(run.stage("tokens").path).token_strings
