"""Read the results of `analyze`, `seeds`, `effects`, `intervene` and `sae evaluate` for the models of a run.

The files are read by `analysis/store.py`, `steer/store.py` and `sae/store.py`. Models without such results
are omitted. Formats: `docs/white-box.md`, `docs/steering.md`, `docs/saes.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.analysis.seeds_store import SeedsSummary, read_seeds_summary, seed_studies
from cratelm.analysis.store import (
    EPSILON,
    SHARE,
    LayerFigure,
    MeasureSummary,
    read_layers,
    read_measure_by_layer,
    read_measure_summaries,
)
from cratelm.records import Estimate
from cratelm.runs import Completion, Run, hash_file
from cratelm.sae.store import EVALUATION, StoredEvaluation, evaluation_path, read_evaluation
from cratelm.steer.store import (
    EffectsSummary,
    InterventionSummary,
    effects_stage,
    intervention_names,
    interventions_stage,
    models_with_effects,
    read_effects_summary,
    read_intervention_summary,
)

DISTORTION = f"{EPSILON:g}"
"""setting of the coding rates that tables and figures show"""
_STEP_SIZE, _STEPS = ("step_size", ""), ("ista_steps", "")


# ---- cratelm analyze ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Analysis:
    """Results of `cratelm analyze` for one model, from `analysis/MODEL/`."""

    name: str
    figures: tuple[LayerFigure, ...]
    means: tuple[MeasureSummary, ...]
    """means over neurons; empty if the model has no explanations"""
    folder: Path
    """folder with the files"""
    _by_quantity: dict[tuple[str, str], dict[int, Estimate]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_quantity: dict[tuple[str, str], dict[int, Estimate]] = {}
        for f in self.figures:
            of_quantity = by_quantity.setdefault((f.quantity, f.setting), {})
            of_quantity[f.layer] = Estimate(f.value, f.error)
        object.__setattr__(self, "_by_quantity", by_quantity)

    @property
    def layers(self) -> list[int]:
        """Return the numbers of the analyzed layers, sorted."""
        return sorted({f.layer for f in self.figures})

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Return the measured quantities, each with its setting."""
        return list(self._by_quantity)

    def by_layer(self, quantity: str, setting: str = "") -> dict[int, Estimate]:
        """Return a quantity by layer; empty if it does not exist for the model."""
        return self._by_quantity.get((quantity, setting), {})

    def at(self, quantity: str, setting: str, layer: int) -> Estimate | None:
        """Return a quantity at one layer; None if it does not exist."""
        return self.by_layer(quantity, setting).get(layer)

    def lasso_steps(self) -> list[int]:
        """Return the step numbers at which the lasso objective was measured, from 0; empty without one."""
        return sorted(int(setting) for quantity, setting in self.settings if quantity == "lasso")

    def steps_taken(self, layer: int) -> int | None:
        """Return the number of ISTA steps that the model itself takes; None for a model without ISTA."""
        steps = self.at(*_STEPS, layer)
        return None if steps is None else int(steps.value)

    def step_product(self, layer: int) -> float | None:
        """Return eta |D|^2: step size times the squared spectral norm of the dictionary; None without a step size."""
        step, norm = self.at(*_STEP_SIZE, layer), self.at("spectral_norm", "", layer)
        return None if step is None or norm is None else step.value * norm.value**2

    def mean(
        self, measure: str, layer: int, control: str = "none", share: float = SHARE
    ) -> MeasureSummary | None:
        """Return the mean of a measure over the neurons of a layer; None if it was not measured."""
        wanted = (measure, layer, control, share)
        for m in self.means:
            if (m.measure, m.layer, m.control, m.share) == wanted:
                return m
        return None

    def neuron_values(self, measure: str) -> dict[int, NDArray[np.float64]]:
        """Return a measure under the neurons' own explanations, by layer, for the neurons that have a value."""
        return read_measure_by_layer(self.folder, measure)


def read_analyses(run: Run, models: Sequence[str]) -> list[Analysis]:
    """Return the analyses of those `models` that have one, in the order of `models`."""
    finished = set(run.models("analysis"))
    return [
        _analysis(name, run.stage("analysis", name).path) for name in models if name in finished
    ]


def _analysis(name: str, folder: Path) -> Analysis:
    return Analysis(name, tuple(read_layers(folder)), tuple(read_measure_summaries(folder)), folder)


# ---- cratelm seeds --------------------------------------------------------------------------------


def read_seed_studies(run: Run, models: Sequence[str]) -> list[SeedsSummary]:
    """Return the comparisons of seeds of which any of the `models` is one, by name."""
    return [read_seeds_summary(run.stage("seeds", name).path) for name in seed_studies(run, models)]


# ---- cratelm effects and cratelm intervene --------------------------------------------------------


def read_effects(run: Run, models: Sequence[str]) -> list[EffectsSummary]:
    """Return the effects of those of `models` that were measured, in the order given."""
    finished = set(models_with_effects(run))
    return [
        read_effects_summary(effects_stage(run, name).path) for name in models if name in finished
    ]


def read_interventions(run: Run, models: Sequence[str]) -> list[InterventionSummary]:
    """Return the intervention scorings of `models`, in the order given."""
    return [
        read_intervention_summary(interventions_stage(run, model, name).path)
        for model in models
        for name in intervention_names(run, model)
    ]


# ---- cratelm sae evaluate -------------------------------------------------------------------------


def read_sae_evaluation(run: Run, harvest: Completion) -> StoredEvaluation | None:
    """Return the evaluation of the autoencoders whose latents were harvested.

    None for a harvest of neurons, without an evaluation, or if the evaluation is of autoencoders, of a
    model or of tokens that were made again since: its figures say nothing of these.
    """
    path = _evaluation_path(run, harvest)
    if path is None or not path.is_file():
        return None
    stored = read_evaluation(path)
    sae, model, tokens = (harvest.inputs.get(role) for role in ("sae", "model", "tokens"))
    return stored if stored.is_of(sae, model, tokens) else None


def evaluation_inputs(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Return the hash of the evaluation file of each of the models `names` that has one."""
    hashes = {}
    for name in names:
        harvest = run.stage("activations", name).completion()
        path = _evaluation_path(run, harvest) if harvest else None
        if path is not None and path.is_file():
            hashes[f"evaluation/{name}"] = hash_file(path)
    return hashes


def evaluation_config(run: Run, name: str) -> dict[str, Any] | None:
    """Return the options that evaluated the autoencoders `sae/NAME` of the run; None where nothing did."""
    path = run.stage("sae", name).path / EVALUATION
    return read_evaluation(path).config if path.is_file() else None


def _evaluation_path(run: Run, harvest: Completion) -> Path | None:
    sae = harvest.config.get("sae")
    return evaluation_path(run, harvest.config["model"], sae) if sae else None
