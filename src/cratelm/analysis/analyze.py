"""`cratelm analyze`: what CRATE's derivation promises, layer by layer, and what its neurons do where."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cratelm.activations.batches import SearchPlan
from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import read_summaries
from cratelm.analysis.coding_rate import (
    EPSILONS,
    coding_rate,
    compression_rate,
    orthonormal,
)
from cratelm.analysis.config import AnalyzeConfig
from cratelm.analysis.explained import Subject, readings
from cratelm.analysis.groups import NONE, Groups, groups
from cratelm.analysis.layer_sums import Gathered, LayerSums, gather
from cratelm.analysis.store import (
    LayerFigure,
    NeuronFacts,
    NeuronReading,
    write_layers,
    write_neurons,
    write_readings,
)
from cratelm.analysis.summary import Summary, show, summarise
from cratelm.analysis.weights import (
    atoms_of,
    bases_of,
    coherence_of,
    dictionary_figures,
    head_figures,
    step_figures,
)
from cratelm.errors import InputError
from cratelm.explain.store import read_explanations
from cratelm.records import Explanation, NeuronId
from cratelm.runs import Run, write_json
from cratelm.stats.intervals import jackknife


@dataclass(frozen=True)
class AnalyzeResult:
    """What was measured: `layers.parquet`, `neurons.parquet`, `readings.parquet`, `summary.json`."""

    path: Path
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
    """Runs the stage; a finished one is read back.

    Raises `InputError` where the harvest or its model is missing, or an explainer is asked for that
    has said nothing.
    """
    run = Run(config.run)
    harvest = run.stage("activations", config.model).require("harvest")
    explained = run.stage("explanations", config.model).completion()
    stage = run.stage("analysis", config.model)
    inputs = {"activations": harvest.identity}
    if explained is not None:
        inputs["explanations"] = explained.identity
    if not stage.is_finished(config, inputs, force=config.force):
        explanations = _explanations(run, config, explained is not None)
        opened = open_harvested(run, config.model)
        with stage.write(config, inputs) as draft:
            draft.results.update(_measure(config, opened, explanations, draft.path))
    found = stage.require("analyze").results
    return AnalyzeResult(
        stage.path, config.model, found["tokens"], found["documents"], found["table"]
    )


def _explanations(run: Run, config: AnalyzeConfig, there: bool) -> list[Explanation]:
    """Those of the explainer asked for. Raises `InputError` where it has said nothing."""
    folder = run.stage("explanations", config.model).path
    found = read_explanations(folder) if there else []
    names = sorted({e.explainer for e in found})
    wanted = config.explainer or ("trie" if "trie" in names else next(iter(names), ""))
    if config.explainer and config.explainer not in names:
        raise InputError(
            f"--explainer is {config.explainer!r}, {folder} has {', '.join(names) or 'none'}:"
            f" choose one of these, or type `cratelm explain --run {run.path} --model"
            f" {config.model}` first"
        )
    return [e for e in found if e.explainer == wanted]


def _measure(
    config: AnalyzeConfig, opened: HarvestContext, explanations: list[Explanation], folder: Path
) -> dict[str, Any]:
    """Writes the files; returns what the completion record tells."""
    length = config.sequence_length or opened.sequence_length
    split = opened.store.split("held_out")
    plan = SearchPlan.of(split, "held_out", opened.store.eot_id, length, config.tokens, config.seed)
    model, site = opened.subject.model, opened.site
    with tqdm(desc="analyze", unit="tok", unit_scale=True, disable=config.quiet) as bar:
        gathered = gather(
            model,
            site,
            plan,
            batch_tokens=config.batch_tokens,
            ista_steps=config.ista_steps,
            progress=bar.update,
        )
        read = list(
            readings(
                Subject(model, site, plan, config.batch_tokens),
                explanations,
                _fit_maximum(opened.folder),
                memory_bytes=config.memory_mib * 2**20,
                seed=config.seed,
                progress=bar.update,
            )
        )
    figures, neurons = _figures(config, opened, gathered)
    summaries = summarise(read, config.resamples, config.seed)
    _write(folder, figures, neurons, read, summaries)
    table = show(figures, summaries)
    return {"tokens": gathered.tokens, "documents": gathered.documents, "table": table}


def _write(
    folder: Path,
    figures: Sequence[LayerFigure],
    neurons: Sequence[NeuronFacts],
    read: Sequence[NeuronReading],
    summaries: Sequence[Summary],
) -> None:
    write_layers(folder, figures)
    write_neurons(folder, neurons)
    if read:
        write_readings(folder, read)
    write_json(folder / "summary.json", {"readings": [vars(s) for s in summaries]})


def _fit_maximum(folder: Path) -> dict[tuple[int, int], float]:
    """Largest activation on the fit split, by layer and index."""
    summaries = read_summaries(folder, "fit")
    return {(s.neuron.layer, s.neuron.index): s.maximum for s in summaries}


def _figures(
    config: AnalyzeConfig, opened: HarvestContext, gathered: Gathered
) -> tuple[list[LayerFigure], list[NeuronFacts]]:
    """Figures of all layers, and of each neuron."""
    figures: list[LayerFigure] = []
    neurons: list[NeuronFacts] = []
    model, site = opened.subject.model, opened.site
    for layer, sums in sorted(gathered.layers.items()):
        found: dict[tuple[str, str], Any] = dict(sums.estimates())
        bases, atoms = bases_of(model, layer), atoms_of(model, site, layer)
        found |= _rates(sums, gathered.group_tokens, bases)
        alike = coherence_of(atoms)
        if atoms is not None and alike is not None:
            found |= (weights := dictionary_figures(atoms, alike))
            found |= step_figures(model, layer, weights["spectral_norm", ""])
        if bases is not None:
            found |= head_figures(bases, config.seed)
        together = _together(sums, found)
        for (quantity, setting), value in found.items():
            error = getattr(value, "error", None)
            value = float(getattr(value, "value", value))
            figures.append(LayerFigure(layer, quantity, setting, value, error))
        neurons += _neurons(config.model, site.name, layer, sums, together, alike)
    return figures, neurons


def _rates(sums: LayerSums, counts: np.ndarray, bases: np.ndarray | None) -> dict:
    """Coding rates before and after the first step, their change, and those in the heads' subspaces."""
    if sums.second is None:
        return {}
    second = sums.second.numpy()  # [G, 2, D, D]
    kinds: dict[str, Any] = {"coding_rate": coding_rate}
    if bases is not None:
        own, unit = bases, orthonormal(bases)
        kinds["compression_rate"] = lambda m, e: compression_rate(m, own, e)
        kinds["subspace_rate"] = lambda m, e: compression_rate(m, unit, e)
    found = {}
    for name, rate in kinds.items():
        for epsilon in EPSILONS:
            key = f"{epsilon:g}"
            for place, when in enumerate(("before", "after")):
                found[f"{name}_{when}", key] = jackknife(
                    lambda m, r=rate, e=epsilon: r(m, e), second[:, place], counts
                )
            found[f"{name}_change", key] = jackknife(
                lambda m, r=rate, e=epsilon: r(m[1], e) - r(m[0], e), second, counts
            )
    return found


def _together(sums: LayerSums, found: dict) -> Groups | None:
    """Groups of neurons; their figures go into `found`."""
    assert sums.moments is not None
    assert sums.fired is not None
    found["dead", ""] = float(1 - sums.fired.double().mean())
    if len(sums.fired) < 2:
        return None
    together = groups(sums.moments.correlation())
    sizes = np.bincount(together.group[together.group != NONE])
    found["groups", ""] = len(sizes)
    found["grouped", ""] = float((together.group != NONE).mean())
    found["largest_group", ""] = int(sizes.max(initial=0))
    return together


def _neurons(
    model: str, site: str, layer: int, sums: LayerSums, together: Groups | None, alike: Any
) -> list[NeuronFacts]:
    assert sums.fired is not None
    return [
        NeuronFacts(
            NeuronId(model, site, layer, i),
            dead=not fired,
            group=NONE if together is None else int(together.group[i]),
            nearest=NONE if together is None else int(together.nearest[i]),
            correlation=0.0 if together is None else float(together.correlation[i]),
            nearest_atom=None if alike is None else int(alike.nearest[i]),
            coherence=None if alike is None else float(alike.cosine[i]),
            duplicate=None if alike is None else bool(alike.duplicated[i]),
        )
        for i, fired in enumerate(sums.fired.tolist())
    ]
