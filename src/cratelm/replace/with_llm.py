"""`cratelm replace --simulator`: run a model on what a language model predicts from explanations.

The explanations are those of a set that a language model wrote, from the strongest excerpts. Their neurons are replaced
and all others stay what the model computes, on a bounded number of held-out tokens, since each neuron and piece of text is
a call. On the same tokens and neurons, the other explainers and the references are measured as without a language model.

Writes the folder `replacement/MODEL@NAME/` of the run; `cratelm.replace.store` documents its files and reads them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace as with_fields
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.batches import SearchPlan
from cratelm.errors import InputError
from cratelm.explain.named_set import explanations_of, simulated_label, simulated_name
from cratelm.explain.store import ExplanationFile, read_selected, read_unexplained
from cratelm.llm.client import Client, DryRun, WorkerResult, dry_run
from cratelm.llm.probe import probe_levels
from cratelm.llm.prompts import neurons as prompts
from cratelm.llm.requests import Answer, Outcome, Request
from cratelm.llm.session import is_finished, open_client, write_calls
from cratelm.records import Explanation
from cratelm.replace.config import ReplaceConfig
from cratelm.replace.fit import Fit
from cratelm.replace.layers import ALL, LayerSet
from cratelm.replace.levels import Levels, Simulated, tokens_of_pieces
from cratelm.replace.measure import measure
from cratelm.replace.neurons import neuron_rows
from cratelm.replace.predictors import Constant, Predictor
from cratelm.replace.prepared import Prepared, planned
from cratelm.replace.result import ReplaceResult, result_of
from cratelm.replace.store import write_curve, write_documents, write_neurons, write_summary
from cratelm.replace.summary import Figures, summarized
from cratelm.replace.text import BatchText
from cratelm.runs import Draft, Run, Stage
from cratelm.runs.names import set_name
from cratelm.runs.ranks import Ranks, n_ranks
from cratelm.score.controls import ExplanationSet
from cratelm.score.simulators import LLMSimulator

Float32 = NDArray[np.float32]
CPU = torch.device("cpu")


def replace_with_llm(config: ReplaceConfig) -> ReplaceResult | DryRun | WorkerResult:
    """Run a model on explanations that a language model simulates, and return the summary.

    Writes `replacement/MODEL@NAME/`, where NAME is `config.name`. With `--dry-run` no level is requested, nothing is
    written and a `DryRun` is returned; with `--shard` answers are written only to the worker's ledger.

    Raises `InputError` if the run has no harvest or no such explanations of the model, or if the language model cannot be
    reached or fails every call; `BudgetReached` at a limit. All answers so far are in the ledger.
    """
    if n_ranks() > 1:
        raise InputError(
            "--simulator runs in one process: omit torchrun, and share the calls among workers with --shard"
        )
    run = Run(config.run)
    with open_client(config, config.simulator) as client, ExitStack() as held:
        simulator = client.backend.name
        source = config.explanations or simulator
        explained = explanations_of(run, config.model, source, config.simulator)
        inputs = {
            "tokens": run.stage("tokens").require("tokenize"),
            "activations": run.stage("activations", config.model).require("harvest"),
            "explanations": explained.require("explain"),
            "prompts": prompts.VERSION,
        }
        name = config.name or simulated_name(source, simulator)
        stage = run.stage("replacement", set_name(config.model, name))
        if is_finished(config, stage, inputs):
            return result_of(stage.path)
        # no other process may make the same calls meanwhile
        if not (config.dry_run or config.shard):
            held.enter_context(stage.lock())
        prepared = Prepared.of(config, run)
        probe = probe_levels(client)
        print(f"{simulator}: {probe}", flush=True)
        reader = LLMSimulator.of(probe, prepared.opened.store.token_strings)
        simulation = Simulation(prepared, explanations_in(explained, config.seed), reader)
        if config.dry_run:
            return dry_run(client, simulation.requests())
        print(simulation.calls_in_words(), flush=True)
        simulation.ask(client)
        client.require_answers()
        if config.shard:
            n = len(simulation.of_worker)
            return WorkerResult(client.ledger.path, n, str(client.tally))
        with stage.write(config, inputs) as draft:
            write_calls(draft, client)
            _write(draft, simulation, source, simulator)
    return with_fields(result_of(stage.path), calls=str(client.tally))


def explanations_in(stage: Stage, seed: int) -> list[Explanation]:
    """Return the explanations of a set that the metric `top_and_random` uses, by layer and index.

    Raises `InputError` if it has none, or explanations by several explainers.
    """
    file = ExplanationFile(stage.path)
    explainers = sorted({explainer for explainer, _ in file.kinds()})
    if len(explainers) > 1:
        raise InputError(
            f"{stage.path} has explanations by {', '.join(explainers)}: name a set of one language model with"
            " --explanations"
        )
    of_set = ExplanationSet(file, read_unexplained(stage.path), seed)
    found = [
        of_set.find(selected.neuron, explainer, "top_and_random", "none")
        for explainer in explainers
        for selected in read_selected(stage.path)
        if not selected.dead
    ]
    explanations = [of for of in found if isinstance(of, Explanation)]
    if not explanations:
        raise InputError(
            f"{stage.path} has no explanation made from the strongest excerpts: type `{stage.command()}` with"
            " --evidence top"
        )
    return explanations


class Simulation:
    """Levels that a language model predicts for explained neurons, on samples of the fit and held-out tokens."""

    def __init__(
        self, prepared: Prepared, explanations: Sequence[Explanation], reader: LLMSimulator
    ):
        """Raises `InputError` if a sample has no text."""
        self.prepared, self.explanations, self._reader = prepared, explanations, reader
        config = prepared.config
        self.explainer = explanations[0].explainer
        wanted = config.simulated_tokens
        self.fit = planned(config, prepared.opened, "fit", wanted)
        self.held_out = planned(config, prepared.opened, "held_out", wanted)
        self.pieces = list(tokens_of_pieces([*_texts(self.fit), *_texts(self.held_out)]).values())
        """token ids [m] of the different pieces of both samples"""
        if not self.pieces:
            raise InputError(
                f"--simulated-tokens {wanted}: the sampled tokens are end marks: give a higher number"
            )
        index, count = config.worker()
        self.of_worker = explanations[index::count]
        """explanations that this process has simulated"""
        layers = prepared.opened.site.layer_numbers
        self._levels = {
            layers.index(layer): Levels(
                np.array(sorted(e.neuron.index for e in explanations if e.neuron.layer == layer))
            )
            for layer in sorted({e.neuron.layer for e in explanations})
        }
        """by place"""
        self.n_failed = 0

    def calls_in_words(self) -> str:
        """Return how many calls are made at most, and for what; equal requests are made once."""
        n, m = len(self.of_worker), len(self.pieces)
        return (
            f"at most {n * m:,} calls: {n:,} explanations x {m:,} pieces of text, of {self.fit.n_tokens():,} fit and"
            f" {self.held_out.n_tokens():,} held-out tokens"
        )

    def requests(self) -> Iterator[list[Request]]:
        """Yield the requests for each explanation."""
        for explanation in self.of_worker:
            yield self._reader.requests(explanation, self.pieces)

    def ask(self, client: Client) -> None:
        """Request the levels of all pieces. Raises `BudgetReached` as `Client.ask` does."""
        n_together = max(1, client.backend.window // len(self.pieces))
        with tqdm(
            total=len(self.of_worker),
            desc=f"simulate {self.prepared.config.model}",
            unit="neuron",
            disable=self.prepared.config.quiet,
        ) as bar:
            pending = zip(self.of_worker, self.requests(), strict=True)
            while group := list(islice(pending, n_together)):
                outcomes = client.ask([r for _, requests in group for r in requests])
                for number, (explanation, _) in enumerate(group):
                    first = number * len(self.pieces)
                    self._add(explanation, outcomes[first : first + len(self.pieces)])
                bar.update(len(group))

    def _add(self, explanation: Explanation, outcomes: Sequence[Outcome]) -> None:
        """Add the levels of one neuron at all pieces, and count the calls that failed."""
        neuron = explanation.neuron
        levels = self._levels[self.prepared.opened.site.layer_numbers.index(neuron.layer)]
        column = int(np.searchsorted(levels.neurons, neuron.index))
        for piece, outcome in zip(self.pieces, outcomes, strict=True):
            if isinstance(outcome, Answer):
                (of_piece,) = self._reader.simulate(explanation, [piece], [outcome])
                levels.put(piece, column, of_piece)
            else:
                self.n_failed += 1

    @cached_property
    def replaced(self) -> LayerSet:
        """The neurons that are replaced: those with an explanation."""
        widths = self.prepared.opened.site.n_neurons
        masks = {}
        for place, levels in self._levels.items():
            masks[place] = np.zeros(widths[place], bool)
            masks[place][levels.neurons] = True
        return LayerSet(ALL, tuple(masks), masks)

    def predictors(self) -> list[Predictor]:
        """Return the calibrated simulation by place, from one pass over the sampled fit tokens."""
        prepared, opened = self.prepared, self.prepared.opened
        texts: list[BatchText] = []
        codes: dict[int, list[Float32]] = {place: [] for place in self._levels}
        device = opened.subject.model.device
        for batch in self.fit.batches(prepared.config.batch_tokens, device):
            trace = prepared.model.trace(batch.input_ids)
            texts.append(BatchText.of(batch))
            for place, of in codes.items():
                of.append(trace.activations[place].flatten(0, 1).float().cpu().numpy())
        return [
            Simulated.calibrated(
                self._levels[place], list(zip(texts, codes[place], strict=True)), means
            )
            if place in codes
            else Constant(means)
            for place, means in enumerate(prepared.means)
        ]


def _texts(plan: SearchPlan) -> list[BatchText]:
    return [BatchText.of(batch) for batch in plan.batches(plan.sequence_length, CPU)]


def _write(draft: Draft, simulation: Simulation, source: str, simulator: str) -> None:
    """Measure, and write the files of the stage."""
    prepared, replaced = simulation.prepared, simulation.replaced
    config, opened, text = prepared.config, prepared.opened, prepared.text
    label = simulated_label(simulation.explainer, simulator)
    fitted = Fit(config, opened, text, prepared.largest, Ranks()).explain()
    explained: dict[str, Sequence[Predictor]] = {label: simulation.predictors(), **fitted}
    losses, errors = measure(
        prepared.held_out(simulation.held_out),
        explained,
        prepared.means,
        [replaced],
        (text.contexts, text.ngrams),
        prepared.largest,
        config.seed,
        Ranks(),
    )
    figures = Figures(losses, config.resamples, config.seed)
    write_documents(draft.path, figures.documents())
    write_curve(draft.path, [])
    rows = []
    for explainer in explained:
        rows += neuron_rows(config.model, opened.site, errors, explainer, chosen=replaced.neurons)
    write_neurons(draft.path, rows)
    summary = summarized(prepared, figures, [replaced], explained)
    summary = with_fields(
        summary,
        sizes={name: size for name, size in summary.sizes.items() if name != label},
        explanations=source,
        simulator=simulator,
        n_replaced=len(simulation.explanations),
        n_calibration_tokens=simulation.fit.n_tokens(),
        n_failed=simulation.n_failed,
    )
    draft.results.update(write_summary(draft.path, summary))
