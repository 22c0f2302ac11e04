"""Read the results of `analyze`, `effects`, `intervene` and `sae evaluate` as typed records.

Models without such results are omitted. Formats: `docs/white-box.md`, `docs/steering.md`, `docs/saes.md`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.analysis.store import (
    EPSILON,
    SHARE,
    LayerFigure,
    MeasureSummary,
    read_layers,
    read_measure_by_layer,
    read_measure_summaries,
)
from cratelm.records import Estimate, Interval
from cratelm.runs import Completion, Run, hash_file
from cratelm.runs.names import set_name, split_set

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


# ---- cratelm effects ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerEffects:
    """Effects of the neurons of one layer on the output. Intervals are over the neurons of the layer."""

    layer: int
    neurons: int
    dead: int
    size: Interval | None
    """mean absolute change of the loss, nats per token"""
    firing_rise: Interval | None
    """mean change of the loss at the positions where the neuron fires, nats per token"""
    raises: Interval | None
    """fraction of neurons whose ablation raises the loss by more than two standard errors"""
    lowers: Interval | None
    """fraction of neurons whose ablation lowers the loss by more than two standard errors"""
    agreement: Interval | None
    """rank correlation, over the vocabulary, of the first-order estimate with the exact effect"""
    overlap: Interval | None
    """fraction of the most promoted tokens that both the estimate and the exact effect contain"""
    named: Interval | None
    """probability that a token on which the neuron fires is promoted more than another token"""
    named_shuffled: Interval | None
    """the same for tokens on which another neuron of the layer fires"""


@dataclass(frozen=True)
class Effects:
    """Results of `cratelm effects` for one model, from `steer/MODEL/`."""

    name: str
    ablation: str
    """`mean` or `zero`: value that replaced the activation of a neuron"""
    loss: Estimate | None
    """loss of the unmodified model on the same tokens, nats per token"""
    layers: tuple[LayerEffects, ...]


def read_effects(run: Run, models: Sequence[str]) -> list[Effects]:
    """Return the effects of those `models` for which they were measured, in the order of `models`."""
    finished = set(run.models("steer"))
    return [_effects(name, _steer_summary(run, name)) for name in models if name in finished]


def _effects(name: str, record: dict[str, Any]) -> Effects:
    def layer(row: dict[str, Any]) -> LayerEffects:
        intervals = list(LayerEffects.__dataclass_fields__)[3:]
        means = {key: _interval(row[key]) for key in intervals}
        return LayerEffects(row["layer"], row["neurons"], row["dead"], **means)

    layers = tuple(map(layer, record["layers"]))
    return Effects(name, record["ablation"], _estimate(record.get("loss")), layers)


# ---- cratelm intervene ----------------------------------------------------------------------------


@dataclass(frozen=True)
class InterventionControl:
    """One control of an intervention scoring, over all its neurons."""

    control: str
    """`none`, `shuffled` or `random`"""
    mean: Interval | None
    """probability that the judge chooses the steered text; interval over neurons"""
    defined: int
    undefined: int
    dead: int
    failed: int


@dataclass(frozen=True)
class Interventions:
    """Results of `cratelm intervene` for one model and one judge, from `steer/MODEL@NAME/`."""

    name: str
    """name of the model"""
    explainer: str
    judge: str
    n_neurons: int
    kl: Interval | None
    """strength of steering: KL divergence of the next-token distribution, nats"""
    controls: tuple[InterventionControl, ...]


def read_interventions(run: Run, models: Sequence[str]) -> list[Interventions]:
    """Return the intervention scores of `models`, in the order of `models`."""
    names = [name for name in run.models("steer") if split_set(name)[1]]
    return [
        _interventions(model, _steer_summary(run, name))
        for model in models
        for name in names
        if split_set(name)[0] == model
    ]


def _interventions(name: str, record: dict[str, Any]) -> Interventions:
    return Interventions(
        name=name,
        explainer=record["explainer"],
        judge=record["judge"],
        n_neurons=record["n_neurons"],
        kl=_interval(record["kl"]),
        controls=tuple(
            InterventionControl(**{**control, "mean": _interval(control["mean"])})
            for control in record["controls"]
        ),
    )


def _steer_summary(run: Run, name: str) -> dict[str, Any]:
    return _json(run.stage("steer", name).path / "summary.json")


# ---- cratelm sae evaluate -------------------------------------------------------------------------


@dataclass(frozen=True)
class RebuiltLayer:
    """How well the autoencoder of one layer reconstructs its inputs. Standard errors are over documents."""

    layer: int
    inputs: int
    latents: int
    explained_variance: Estimate | None
    l0: Estimate
    own_l0: Estimate
    """number of nonzero activations of the site itself, per token"""
    dead: Estimate
    """fraction of latents that never fire"""
    shrinkage: Estimate | None


@dataclass(frozen=True)
class Spliced:
    """Loss of the model with its activations replaced."""

    loss: Estimate
    """nats per token"""
    added: Estimate
    """increase over the loss of the unmodified model on the same tokens"""
    recovered_from_zero: Estimate | None
    """fraction of the loss recovered: 1 means that nothing is lost, 0 that it is as bad as zeros"""


@dataclass(frozen=True)
class SplicedLayers:
    """Loss of the model when the activations of one or several layers are replaced at the same time."""

    layers: tuple[int, ...]
    reconstruction: Spliced
    own_top: Spliced
    """replaced by the site's own largest activations, as many per token as the autoencoder has latents on"""
    own: Spliced
    """replaced by all of the site's own activations"""


@dataclass(frozen=True)
class SteeringFidelity:
    """Fidelity of steering latents or neurons of one layer, each set to its maximum, one at a time.

    Standard errors are over the steered latents or neurons.
    """

    layer: int
    steered: tuple[int, ...]
    fidelity: Estimate | None
    edit: Estimate
    """KL divergence caused by the edit, nats per token"""
    rebuilt: float
    """KL divergence caused by the reconstruction alone"""


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """Losses summed over the tokens of each document, to compare models on the same documents. C: documents."""

    documents: tuple[int, ...]
    """[C] ordinals"""
    targets: tuple[int, ...]
    """[C] number of predicted tokens"""
    loss: NDArray[np.float64]
    """[C] loss of the unmodified model"""
    reconstruction: NDArray[np.float64]
    """[C] loss with all layers reconstructed"""


@dataclass(frozen=True, eq=False)
class SaeEvaluation:
    """Results of `cratelm sae evaluate` for one set of autoencoders."""

    loss: Estimate
    """loss of the unmodified model, nats per token"""
    layers: tuple[RebuiltLayer, ...]
    spliced: tuple[SplicedLayers, ...]
    """each layer alone, then all layers together if there are several"""
    steering: tuple[SteeringFidelity, ...]
    """steering of latents, by layer"""
    own_steering: tuple[SteeringFidelity, ...]
    """steering of the neurons of the site itself, by layer"""
    by_document: DocumentLosses

    @property
    def all_layers(self) -> SplicedLayers:
        """Return the results with all layers reconstructed at once; with one layer, those of that layer."""
        return self.spliced[-1]

    def layer(self, number: int) -> RebuiltLayer:
        """Return the reconstruction results of one layer's autoencoder."""
        return next(layer for layer in self.layers if layer.layer == number)

    def alone(self, number: int) -> SplicedLayers:
        """Return the results with only this layer reconstructed."""
        return next(s for s in self.spliced if s.layers == (number,))


def evaluation_path(run: Run, harvest: Completion) -> Path | None:
    """Return the path of the evaluation of a harvest's autoencoders; None for a harvest of neurons.

    This is `sae/MODEL@NAME/evaluation.json`, or `sae/MODEL@FOLDER.json` for autoencoders from outside the run.
    The file may not exist.
    """
    sae = harvest.config.get("sae")
    if not sae:
        return None
    own = run.path / "sae" / set_name(Path(harvest.config["model"]).name, Path(sae).name)
    return own / "evaluation.json" if own.is_dir() else own.with_name(f"{own.name}.json")


def evaluation_inputs(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Return the hash of the evaluation file of each of the models `names` that has one."""
    hashes = {}
    for name in names:
        harvest = run.stage("activations", name).completion()
        path = evaluation_path(run, harvest) if harvest else None
        if path is not None and path.is_file():
            hashes[f"evaluation/{name}"] = hash_file(path)
    return hashes


def evaluation_config(run: Run, name: str) -> dict[str, Any] | None:
    """Return the options with which the autoencoders `sae/NAME` of the run were evaluated; None if they were not."""
    path = run.stage("sae", name).path / "evaluation.json"
    return _json(path)["config"] if path.is_file() else None


def read_evaluation(
    path: Path, sae: str | None, model: str | None, tokens: str | None
) -> SaeEvaluation | None:
    """Return the evaluation stored in the file at `path`, which `evaluation_path` returned.

    Returns None if the evaluation belongs to other autoencoders than `sae`, another model than `model` or
    other tokens than `tokens` (all three are identities): it says nothing about the present ones.
    """
    record = _json(path)
    if (record.get("identity"), record.get("model_identity")) != (sae, model):
        return None
    if (record.get("tokens_identity") or tokens) != tokens:  # version 0.1.0 wrote none
        return None
    sums = record["by_document"]
    return SaeEvaluation(
        loss=_known_estimate(record["loss"]),
        layers=tuple(map(_rebuilt_layer, record["layers"])),
        spliced=tuple(map(_spliced_layers, record["places"])),
        steering=tuple(map(_fidelity, record.get("steering", ()))),
        own_steering=tuple(map(_fidelity, record.get("own_steering", ()))),
        by_document=DocumentLosses(
            documents=tuple(sums["document"]),
            targets=tuple(sums["targets"]),
            loss=np.array(sums["loss"]),
            reconstruction=np.array(sums["reconstruction"]),
        ),
    )


def _rebuilt_layer(record: dict[str, Any]) -> RebuiltLayer:
    return RebuiltLayer(
        layer=record["layer"],
        inputs=record["inputs"],
        latents=record["latents"],
        explained_variance=_estimate(record["explained_variance"]),
        l0=_known_estimate(record["l0"]),
        own_l0=_known_estimate(record["own_l0"]),
        dead=_known_estimate(record["dead"]),
        shrinkage=_estimate(record["shrinkage"]),
    )


def _spliced_layers(record: dict[str, Any]) -> SplicedLayers:
    def spliced(kind: str) -> Spliced:
        part = record[kind]
        return Spliced(
            loss=_known_estimate(part["loss"]),
            added=_known_estimate(part["added"]),
            recovered_from_zero=_estimate(part["recovered_from_zero"]),
        )

    return SplicedLayers(
        layers=tuple(record["layers"]),
        reconstruction=spliced("reconstruction"),
        own_top=spliced("own_top"),
        own=spliced("own"),
    )


def _fidelity(record: dict[str, Any]) -> SteeringFidelity:
    return SteeringFidelity(
        layer=record["layer"],
        steered=tuple(record["steered"]),
        fidelity=_estimate(record["fidelity"]),
        edit=_known_estimate(record["edit"]),
        rebuilt=record["rebuilt"],
    )


# ---- values of JSON files -------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _interval(record: dict[str, Any] | None) -> Interval | None:
    return None if record is None else Interval(record["value"], record["low"], record["high"])


def _estimate(record: dict[str, Any] | None) -> Estimate | None:
    """Return an estimate; None if there is no record or its value is null."""
    return None if record is None or record["value"] is None else _known_estimate(record)


def _known_estimate(record: dict[str, Any]) -> Estimate:
    """Return an estimate; a null value becomes NaN, which JSON cannot hold."""
    value = record["value"]
    return Estimate(float("nan") if value is None else value, record["error"])
