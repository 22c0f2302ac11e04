"""`cratelm replace`: how much of a model can run on the explanations of its neurons.

Writes the folder `replacement/MODEL/` of the run; `cratelm.replace.store` documents its files and reads them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import read_summaries
from cratelm.errors import InputError
from cratelm.records import NeuronId, NeuronSummary, Split
from cratelm.replace.config import ReplaceConfig, parts_of
from cratelm.replace.fit import Fit, FitText
from cratelm.replace.forward import ExplainedModel
from cratelm.replace.layers import ALL, layer_sets
from cratelm.replace.measure import Errors, HeldOut, Losses, Variant, measure
from cratelm.replace.neurons import best_explained, curve, ranking, replaced_alone, runnable
from cratelm.replace.predictors import Predictor
from cratelm.replace.simulators import write_simulators
from cratelm.replace.store import (
    NeuronReplacement,
    ReplacementSummary,
    read_replacement_summary,
    write_curve,
    write_documents,
    write_neurons,
    write_summary,
)
from cratelm.replace.summary import Figures
from cratelm.runs import Draft, Run, check_memory
from cratelm.runs.devices import available_on
from cratelm.runs.ranks import Ranks, joined, n_ranks_here
from cratelm.steer.ablation import Ablations
from cratelm.text.table import align


@dataclass(frozen=True, kw_only=True)
class ReplaceResult(ReplacementSummary):
    """Result of `cratelm replace`."""

    path: Path
    """folder of `documents.parquet`, `neurons.parquet`, `curve.parquet` and `summary.json`"""

    def __str__(self) -> str:
        return "\n".join([_headline(self), "", *_table(self), "", *_notes(self), f"{self.path}"])


def replace(config: ReplaceConfig) -> ReplaceResult:
    """Run a model on its explanations, write `replacement/MODEL/`, and return the summary.

    If the stage is finished, its summary is read back. Processes that `torchrun` started each take a share of the
    tokens and neurons, and write what one would have written.

    Raises `InputError` if the run has no harvest of the model, or what must be held does not fit into memory.
    """
    with joined() as ranks:
        return _replaced(config, ranks)


def _replaced(config: ReplaceConfig, ranks: Ranks) -> ReplaceResult:
    run = Run(config.run)
    inputs = {
        "tokens": run.stage("tokens").require("tokenize"),
        "activations": run.stage("activations", config.model).require("harvest"),
    }
    stage = run.stage("replacement", config.model)
    if ranks.by_first(lambda: stage.is_finished(config, inputs, force=config.force)):
        return _result(stage.path)
    opened = open_harvested(run, config.model, config.device)
    model = ExplainedModel(opened.subject.model, opened.site)
    summaries = [
        [s for s in read_summaries(opened.folder, "fit") if s.neuron.layer == layer]
        for layer in opened.site.layer_numbers
    ]
    vocabulary = opened.store.vocab_size
    text = FitText.of(_plan(config, opened, "fit"), config.batch_tokens, config.depth, vocabulary)
    _check_memory(config, opened, text)
    with ranks.write(stage, config, inputs) as draft:
        _measure(config, opened, model, summaries, text, draft, ranks)
    return _result(stage.path)


def _measure(
    config: ReplaceConfig,
    opened: HarvestContext,
    model: ExplainedModel,
    summaries: Sequence[Sequence[NeuronSummary]],
    text: FitText,
    draft: Draft | None,
    ranks: Ranks,
) -> None:
    """Explain, run and measure; write the files into the draft, which rank 0 has."""
    largest = [max((abs(s.maximum) for s in of), default=1.0) for of in summaries]
    explained = Fit(config, opened, text, largest, ranks).explain()
    held_out = HeldOut(
        model,
        _plan(config, opened, "held_out"),
        config.batch_tokens,
        opened.store.vocab_size,
        config.quiet,
    )
    sets = layer_sets(opened.site.layer_numbers, config.layers)
    means = [np.array([s.mean for s in of], np.float32) for of in summaries]
    ngrams = text.contexts, text.ngrams
    losses, errors = measure(held_out, explained, means, sets, ngrams, largest, config.seed, ranks)
    chosen = ranks.by_first(lambda: _fewest_lost(losses, explained))
    partly = None
    if config.curve_tokens:
        points = ranks.by_first(lambda: ranking(errors, chosen))
        best = chosen, explained[chosen]
        partly = best_explained(held_out, best, points, config.curve_tokens, ranks)
    alone = replaced_alone(config, opened, explained[chosen], ranks)
    if draft is not None:
        outcome = _Outcome(losses, errors, partly, chosen, alone)
        _write(draft, config, opened, model, text, explained, outcome)


@dataclass(frozen=True, eq=False)
class _Outcome:
    """Everything that was measured on held-out text."""

    losses: Losses
    errors: list[Errors]
    """by place"""
    partly: Losses | None
    """with only the best-explained neurons replaced"""
    chosen: str
    """explainer of `partly` and `alone`"""
    alone: Ablations | None
    """one neuron at a time"""


def _fewest_lost(losses: Losses, explainers: Iterable[str]) -> str:
    """Return the explainer on which the model loses the fewest nats if all layers are replaced; else the first one."""
    total = {name: losses.sums.get(Variant("own", name, ALL)) for name in explainers}
    return min(total, key=lambda name: np.inf if (of := total[name]) is None else of.sum())


def _plan(config: ReplaceConfig, opened: HarvestContext, split: Split) -> SearchPlan:
    """Return which sequences of a split are read. Raises `InputError` if it has no tokens."""
    tokens = opened.store.split(split)
    if tokens.n_tokens == 0:
        raise InputError(f"split {split} has no tokens: tokenize more text or raise its fraction")
    wanted = config.fit_tokens if split == "fit" else config.tokens
    return SearchPlan.of(
        tokens, split, opened.store.eot_id, opened.sequence_length, wanted, config.seed
    )


def _check_memory(config: ReplaceConfig, opened: HarvestContext, text: FitText) -> None:
    """Raise `InputError` if sums over the contexts, or tables without a limit, do not fit into memory."""
    widths, n_contexts = opened.site.n_neurons, len(text.contexts)
    parts = [part for name in config.explainers for part in parts_of(name)]
    unlimited = sum(p.kind == "trie" and not (p.most or p.of_excerpts) for p in parts)
    needed: dict[str | tuple[str, ...], float] = {
        ("fit_tokens", "depth"): 8 * max(widths) * n_contexts,
        ("explainers", "fit_tokens"): 4 * sum(widths) * n_contexts * unlimited,
    }
    free = available_on(opened.subject.model.device)
    check_memory(
        config,
        needed,
        f"the means of {sum(widths):,} neurons at {n_contexts:,} contexts",
        available=free and free // n_ranks_here(),
    )


def _write(
    draft: Draft,
    config: ReplaceConfig,
    opened: HarvestContext,
    model: ExplainedModel,
    text: FitText,
    explained: Mapping[str, Sequence[Predictor]],
    outcome: _Outcome,
) -> None:
    site, partly = opened.site, outcome.partly
    figures = Figures(outcome.losses, config.resamples, config.seed)
    sets = layer_sets(site.layer_numbers, config.layers)
    n_neurons = sum(site.n_neurons)
    points = curve(partly, n_neurons, config.resamples, config.seed) if partly else []
    simulators = write_simulators(draft.path, explained)
    write_documents(draft.path, figures.documents())
    write_curve(draft.path, points)
    write_neurons(
        draft.path,
        [row for explainer in explained for row in _neurons(config, opened, outcome, explainer)],
    )
    summary = ReplacementSummary(
        model=config.model,
        site=site.name,
        layers=site.layer_numbers,
        n_neurons=n_neurons,
        n_tokens=figures.n_tokens,
        n_documents=figures.n_documents,
        n_fit_tokens=text.n_tokens,
        explainers=config.explainers,
        passes_nothing=tuple(model.passes_nothing),
        ngrams=figures.ngrams(),
        rows=figures.rows(config.explainers, sets),
        runnable=tuple(runnable(points)),
        sizes={
            name: float(np.mean([of.entries for of in predictors]))
            for name, predictors in explained.items()
        },
        simulators=tuple(simulators),
        alone=outcome.chosen if outcome.alone is not None else "",
        reconstructed=figures.reconstructed(),
    )
    draft.results.update(write_summary(draft.path, summary))


def _neurons(
    config: ReplaceConfig,
    opened: HarvestContext,
    outcome: _Outcome,
    explainer: str,
) -> list[NeuronReplacement]:
    """Return the figures of all neurons for one explainer."""
    site = opened.site
    alone = outcome.alone if explainer == outcome.chosen else None
    rows = []
    for place, layer in enumerate(site.layer_numbers):
        for index, explained in enumerate(outcome.errors[place].explained(explainer).tolist()):
            ablation = None if alone is None else alone.neurons[place][index]
            rows.append(
                NeuronReplacement(
                    NeuronId(config.model, site.name, layer, index),
                    explainer,
                    explained if np.isfinite(explained) else None,
                    None if ablation is None else ablation.change,
                    0 if ablation is None else ablation.n_tokens,
                )
            )
    return rows


def _result(folder: Path) -> ReplaceResult:
    return ReplaceResult(path=folder, **vars(read_replacement_summary(folder)))


def _headline(summary: ReplacementSummary) -> str:
    row = summary.headline
    if row is None:
        return f"{summary.model}: layers were replaced one at a time only"
    recovered = "" if row.recovered_mean is None else f" ({row.recovered_mean.show('.1%')})"
    return (
        f"{summary.model}: on its explanations ({row.explainer}) a loss of {row.loss_replaced.show('.3f')}"
        f" nats per token, {row.loss_true.show('.3f')} without; the codes carry"
        f" {row.carried.show('.2f')} nats, the explanations give back {row.given_back.show('.2f')}"
        f"{recovered}"
    )


_COLUMNS = (
    ("replaced", "loss_replaced", ".3f"),
    ("nats lost", "nats_lost", ".3f"),
    ("codes carry", "carried", ".3f"),
    ("at 0", "carried_zero", ".3f"),
    ("given back", "given_back", ".3f"),
    ("recovered, of means", "recovered_mean", ".1%"),
    ("of unigram", "recovered_unigram", ".1%"),
)


def _table(summary: ReplacementSummary) -> list[str]:
    header = ["layers", "explainer", *(label for label, _, _ in _COLUMNS)]
    lines = [header]
    for row in summary.rows:
        name = row.explainer + (", shuffled" if row.control == "shuffled" else "")
        cells = [getattr(row, field) for _, field, _ in _COLUMNS]
        shown = [
            "-" if cell is None else cell.show(form)
            for cell, (_, _, form) in zip(cells, _COLUMNS, strict=True)
        ]
        lines.append([row.layers, name, *shown])
    return align(lines)


def _notes(summary: ReplacementSummary) -> list[str]:
    ngrams = ", ".join(f"{n.depth} {n.loss.show('.3f')}" for n in summary.ngrams)
    lines = [
        f"n-gram models of the same {summary.n_fit_tokens:,} fit tokens, by tokens of context: {ngrams}",
        "entries per explanation: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in summary.sizes.items()),
    ]
    if summary.reconstructed is not None:
        lines.append(
            "with true latents, without the error of the autoencoders:"
            f" {summary.reconstructed.show('.3f')}"
        )
    for explainer in summary.explainers:
        of = [r for r in summary.runnable if r.explainer == explainer]
        if of:
            shares = ", ".join(f"{r.fraction:.0%} at {r.nats:g} nats" for r in of)
            lines.append(f"neurons that can run on {explainer}, best-explained first: {shares}")
    lines.append(
        f"{summary.n_tokens:,} held-out tokens of {summary.n_documents} documents; 95% intervals over documents"
    )
    return lines
