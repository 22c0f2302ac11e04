"""`cratelm analyze`: measure the properties that CRATE's derivation predicts, by layer, and where neurons fire.

One pass over held-out text accumulates sums over the two steps of each layer (`layer_sums`); coding rates,
sparsity and groups of neurons are computed from these sums, figures of the dictionary and the heads from the
weights (`weights`). Further passes compare neurons with the tokens that their explanations cover (`consistency`).
Writes the folder `analysis/MODEL/` of the run; `cratelm.analysis.store` documents its files and reads them.

Shape legend: D width, K heads, P width of a head, G groups of documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import read_summaries
from cratelm.analysis.coding_rate import (
    coding_rate,
    compression_rate,
    orthonormal,
)
from cratelm.analysis.config import AnalyzeConfig
from cratelm.analysis.consistency import HeldOutPass, count_passes, measure_neurons
from cratelm.analysis.dictionary import Coherence
from cratelm.analysis.groups import NONE, NeuronGroups, group_neurons
from cratelm.analysis.layer_sums import LayerSums, TextSums, sum_over_text
from cratelm.analysis.store import (
    EPSILONS,
    LayerFigure,
    MeasureSummary,
    NeuronCoverage,
    NeuronFacts,
    write_layers,
    write_measure_summaries,
    write_neurons,
    write_readings,
)
from cratelm.analysis.summary import show, summarise
from cratelm.analysis.weights import (
    atoms_of,
    bases_of,
    coherence_of,
    dictionary_figures,
    head_figures,
    step_figures,
)
from cratelm.errors import InputError
from cratelm.explain.concepts.predict import is_concept_payload
from cratelm.explain.concepts.stored import concept_reader
from cratelm.explain.store import read_explanations
from cratelm.models.open import sequence_length
from cratelm.models.sites import Site
from cratelm.records import Estimate, Explanation, NeuronId, NeuronKey, has_both_ends
from cratelm.runs import Draft, Run, check_memory
from cratelm.runs.memory import available_memory
from cratelm.runs.ranks import Ranks, Share, joined, n_ranks_here
from cratelm.stats.intervals import jackknife

Figures = dict[tuple[str, str], Estimate | float]
"""by quantity and setting"""
Rate = Callable[[np.ndarray, float], float]
"""coding rate of a second moment at a distortion"""


@dataclass(frozen=True)
class AnalyzeResult:
    """Result of `cratelm analyze`."""

    path: Path
    """folder of `layers.parquet`, `neurons.parquet`, `readings.parquet` and `summary.json`"""
    model: str
    tokens: int
    """held-out text tokens read"""
    documents: int
    table: str
    """the main figures by layer"""

    def __str__(self) -> str:
        head = f"{self.model}: {self.tokens:,} held-out tokens in {self.documents:,} documents"
        return f"{head}\n{self.table}\n{self.path}"


def analyze(config: AnalyzeConfig) -> AnalyzeResult:
    """Measure a model, write `analysis/MODEL/`, and return the main figures.

    If the stage is finished, its results are read back. Processes that `torchrun` started each measure a share of the
    layers and of the neurons, and write what one would have written. Raises `InputError` if the harvest or its model
    is missing, or if `--explainer` has no explanations.
    """
    with joined() as ranks:
        return _analyze(config, ranks)


def _analyze(config: AnalyzeConfig, ranks: Ranks) -> AnalyzeResult:
    run = Run(config.run)
    harvest = run.stage("activations", config.model).require("harvest")
    explained = run.stage("explanations", config.model)
    is_explained = explained.completion() is not None
    stage = run.stage("analysis", config.model)
    inputs = {"activations": harvest}
    if is_explained:
        inputs["explanations"] = explained.require("explain")
    if not ranks.by_first(lambda: stage.is_finished(config, inputs, force=config.force)):
        explanations = _explanations(run, config, is_explained)
        opened = open_harvested(run, config.model, config)
        with ranks.write(stage, config, inputs) as draft:
            _measure(config, opened, explanations, draft, ranks)
    return stage.result(AnalyzeResult, path=stage.path, model=config.model)


def _explanations(run: Run, config: AnalyzeConfig, finished: bool) -> list[Explanation]:
    """Return the explanations by `--explainer`, by default the trie; none if the stage is not `finished`.

    Raises `InputError` if `--explainer` has no explanations.
    """
    folder = run.stage("explanations", config.model).path
    explanations = read_explanations(folder) if finished else []
    names = sorted({e.explainer for e in explanations})
    explainer = config.explainer or ("trie" if "trie" in names else next(iter(names), ""))
    if config.explainer and config.explainer not in names:
        raise InputError(
            f"--explainer is {config.explainer!r}, but {folder} has {', '.join(names) or 'none'}:"
            f" choose one of these, or type `cratelm explain --run {run.path} --model"
            f" {config.model}` first"
        )
    return [e for e in explanations if e.explainer == explainer]


def _measure(
    config: AnalyzeConfig,
    opened: HarvestContext,
    explanations: list[Explanation],
    draft: Draft | None,
    ranks: Ranks,
) -> None:
    """Measure the share of this process; write the files and the results into the draft, which rank 0 has."""
    length = sequence_length(opened.subject, config.sequence_length or opened.sequence_length)
    plan = opened.plan("held_out", config.tokens, config.seed, length)
    model, site = opened.subject.model, opened.site
    tokens = plan.n_tokens()
    parts: dict[str | tuple[str, ...], float] = {
        "batch_tokens": 4 * min(config.batch_tokens, tokens) * max(site.n_neurons),
        "memory_mib": min(config.memory_mib * 2**20, 4 * tokens * len(explanations)),
    }
    free = available_memory()
    check_memory(config, parts, "activations", available=free and free // n_ranks_here())
    concepts = None
    if any(is_concept_payload(e.payload) for e in explanations):
        folder = Run(config.run).stage("explanations", config.model).path
        concepts = concept_reader(folder, opened.store.token_strings)
    quiet = config.quiet or not ranks.is_first
    held_out = HeldOutPass(model, site, plan, config.batch_tokens, concepts)
    maximum = _fit_maximum(opened.folder)
    sums, coverages = _read_text(config, held_out, explanations, maximum, quiet, ranks.share)
    measured = _Measured(*_figures(config, opened, sums, quiet), coverages)
    everyone = list(ranks.collected(measured))
    if draft is None:
        return
    measured = _in_order(everyone, explanations)
    summaries = summarise(measured.coverages, config.resamples, config.seed)
    _write(draft.path, measured, summaries)
    table = show(measured.figures, summaries)
    draft.results.update(tokens=sums.tokens, documents=sums.documents, table=table)


def _read_text(
    config: AnalyzeConfig,
    held_out: HeldOutPass,
    explanations: list[Explanation],
    fit_maximum: dict[NeuronKey, float],
    quiet: bool,
    share: Share,
) -> tuple[TextSums, list[NeuronCoverage]]:
    """Return the sums over the text and the measures of the explanations, with bars of tokens and neurons."""
    memory_bytes = config.memory_mib * 2**20
    passes = 1 + count_passes(held_out, explanations, memory_bytes, share)
    n_tokens, n_explained = passes * held_out.plan.n_tokens(), -(-len(explanations) // share.of)
    with (
        tqdm(total=n_tokens, desc="analyze", unit="tok", unit_scale=True, disable=quiet) as read,
        tqdm(total=n_explained, desc="explanations", unit="neuron", disable=quiet) as measured,
    ):
        sums = sum_over_text(
            held_out.model,
            held_out.site,
            held_out.plan,
            batch_tokens=config.batch_tokens,
            ista_steps=config.ista_steps,
            progress=read.update,
            share=share,
        )
        coverages = measure_neurons(
            held_out,
            explanations,
            fit_maximum,
            memory_bytes=memory_bytes,
            seed=config.seed,
            progress=measured.update,
            read=read.update,
            work=share,
        )
        return sums, list(coverages)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Figures of the layers and neurons of one or all processes."""

    figures: list[LayerFigure]
    neurons: list[NeuronFacts]
    coverages: list[NeuronCoverage]


def _in_order(everyone: Sequence[_Measured], explanations: Sequence[Explanation]) -> _Measured:
    """Return the figures of all processes together, in the order of one."""
    place = {explanation.neuron: i for i, explanation in enumerate(explanations)}
    return _Measured(
        sorted((f for m in everyone for f in m.figures), key=lambda f: f.layer),
        sorted((n for m in everyone for n in m.neurons), key=lambda n: n.neuron.layer),
        sorted(
            (c for m in everyone for c in m.coverages),
            key=lambda c: (c.neuron.layer, place[c.neuron]),
        ),
    )


def _write(folder: Path, measured: _Measured, summaries: Sequence[MeasureSummary]) -> None:
    write_layers(folder, measured.figures)
    write_neurons(folder, measured.neurons)
    if measured.coverages:
        write_readings(folder, measured.coverages)
    write_measure_summaries(folder, summaries)


def _fit_maximum(folder: Path) -> dict[NeuronKey, float]:
    """Return the largest activation of each neuron on the fit split."""
    return {s.neuron.key: s.maximum for s in read_summaries(folder, "fit")}


def _figures(
    config: AnalyzeConfig, opened: HarvestContext, text: TextSums, quiet: bool
) -> tuple[list[LayerFigure], list[NeuronFacts]]:
    """Return the figures of all layers, and the facts about each neuron."""
    figures: list[LayerFigure] = []
    neurons: list[NeuronFacts] = []
    model, site = opened.subject.model, opened.site
    layers = tqdm(sorted(text.layers.items()), desc="layers", unit="layer", disable=quiet)
    for layer, sums in layers:
        of_layer: Figures = dict(sums.estimates())
        bases, atoms = bases_of(model, layer), atoms_of(model, site, layer)
        of_layer |= _rates(sums, text.group_tokens, bases)
        alike = coherence_of(atoms)
        if atoms is not None and alike is not None:
            dictionary = dictionary_figures(atoms, alike)
            of_layer |= dictionary
            of_layer |= step_figures(model, layer, dictionary["spectral_norm", ""])
        if bases is not None:
            of_layer |= head_figures(bases, config.seed)
        groups = _groups(sums)
        of_layer |= _neuron_figures(sums, groups, site)
        for (quantity, setting), value in of_layer.items():
            if isinstance(value, Estimate):
                figures.append(LayerFigure(layer, quantity, setting, value.value, value.error))
            else:
                figures.append(LayerFigure(layer, quantity, setting, float(value)))
        neurons += _neurons(config.model, site.name, layer, sums, groups, alike)
    return figures, neurons


def _rates(sums: LayerSums, counts: np.ndarray, bases: np.ndarray | None) -> Figures:
    """Return coding rates before and after the first step and their change, overall and in the heads' subspaces.

    `counts` [G] are the tokens of each group of documents, `bases` [K, P, D] the heads' projections.
    """
    if sums.second_moments is None:
        return {}
    moments = sums.second_moments.numpy()  # [G, 2, D, D]: before and after
    rates: dict[str, Rate] = {"coding_rate": coding_rate}
    if bases is not None:
        projections, unit = bases, orthonormal(bases)
        rates["compression_rate"] = lambda m, e: compression_rate(m, projections, e)
        rates["subspace_rate"] = lambda m, e: compression_rate(m, unit, e)
    figures: Figures = {}
    for name, rate in rates.items():
        for epsilon in EPSILONS:
            key = f"{epsilon:g}"
            for side, when in enumerate(("before", "after")):
                figures[f"{name}_{when}", key] = jackknife(
                    lambda m, r=rate, e=epsilon: r(m, e), moments[:, side], counts
                )
            # computed from both sides jointly, since the error of the change is not that of independent figures
            figures[f"{name}_change", key] = jackknife(
                lambda m, r=rate, e=epsilon: r(m[1], e) - r(m[0], e), moments, counts
            )
    return figures


def _groups(sums: LayerSums) -> NeuronGroups | None:
    """Return groups of neurons that fire alike; None for a layer with a single neuron."""
    assert sums.correlation is not None
    assert sums.fired is not None
    return None if len(sums.fired) < 2 else group_neurons(sums.correlation.correlation())


def _fired(sums: LayerSums, site_name: str) -> torch.Tensor:
    """Return whether each neuron fired [H]; an end counts as its neuron does, which fires if either end does."""
    assert sums.fired is not None
    if not has_both_ends(site_name):
        return sums.fired
    return sums.fired.view(-1, 2).any(1).repeat_interleave(2)


def _neuron_figures(sums: LayerSums, groups: NeuronGroups | None, site: Site) -> Figures:
    """Return the fraction of dead neurons and the figures of the groups of a layer."""
    figures: Figures = {("dead", ""): float(1 - _fired(sums, site.name).double().mean())}
    if groups is not None:
        sizes = np.bincount(groups.group[groups.group != NONE])
        figures["groups", ""] = len(sizes)
        figures["grouped", ""] = float((groups.group != NONE).mean())
        figures["largest_group", ""] = int(sizes.max(initial=0))
    return figures


def _neurons(
    model: str,
    site: str,
    layer: int,
    sums: LayerSums,
    groups: NeuronGroups | None,
    alike: Coherence | None,
) -> list[NeuronFacts]:
    """Return the facts about each neuron of a layer."""
    assert sums.fired is not None
    return [
        NeuronFacts(
            NeuronId(model, site, layer, i),
            dead=not fired,
            group=NONE if groups is None else int(groups.group[i]),
            nearest=NONE if groups is None else int(groups.nearest[i]),
            correlation=0.0 if groups is None else float(groups.correlation[i]),
            nearest_atom=None if alike is None else int(alike.nearest[i]),
            coherence=None if alike is None else float(alike.cosine[i]),
            duplicate=None if alike is None else bool(alike.duplicated[i]),
        )
        for i, fired in enumerate(_fired(sums, site).tolist())
    ]
