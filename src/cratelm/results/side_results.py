"""What `analyze`, `effects`, `intervene` and `sae evaluate` measured, read from their files as records.

A model that was not measured is absent. Formats: `docs/white-box.md`, `docs/steering.md`, `docs/saes.md`.
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
    """What `cratelm analyze` measured of one model: `analysis/MODEL/`."""

    name: str
    figures: tuple[LayerFigure, ...]
    means: tuple[MeasureSummary, ...]
    """over neurons; empty where the model has no explanations"""
    folder: Path
    """of its files"""
    _by_quantity: dict[tuple[str, str], dict[int, Estimate]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found: dict[tuple[str, str], dict[int, Estimate]] = {}
        for f in self.figures:
            found.setdefault((f.quantity, f.setting), {})[f.layer] = Estimate(f.value, f.error)
        object.__setattr__(self, "_by_quantity", found)

    @property
    def layers(self) -> list[int]:
        """Return the numbers of the layers measured."""
        return sorted({f.layer for f in self.figures})

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Return the quantities measured, each with its setting."""
        return list(self._by_quantity)

    def by_layer(self, quantity: str, setting: str = "") -> dict[int, Estimate]:
        """Return a quantity by layer; empty where it does not exist for the model."""
        return self._by_quantity.get((quantity, setting), {})

    def at(self, quantity: str, setting: str, layer: int) -> Estimate | None:
        """Return a quantity at one layer; None where it does not exist."""
        return self.by_layer(quantity, setting).get(layer)

    def lasso_steps(self) -> list[int]:
        """Return the steps along which the lasso objective was followed, from 0; empty without one."""
        return sorted(int(setting) for quantity, setting in self.settings if quantity == "lasso")

    def steps_taken(self, layer: int) -> int | None:
        """Return the ISTA steps that the model itself takes; None where it takes none."""
        steps = self.at(*_STEPS, layer)
        return None if steps is None else int(steps.value)

    def step_product(self, layer: int) -> float | None:
        """Return eta |D|^2, step size times squared spectral norm; None without a step size."""
        step, norm = self.at(*_STEP_SIZE, layer), self.at("spectral_norm", "", layer)
        return None if step is None or norm is None else step.value * norm.value**2

    def mean(
        self, measure: str, layer: int, control: str = "none", share: float = SHARE
    ) -> MeasureSummary | None:
        """Return the mean of a measure over the neurons of a layer; None where it was not taken."""
        wanted = (measure, layer, control, share)
        for m in self.means:
            if (m.measure, m.layer, m.control, m.share) == wanted:
                return m
        return None

    def neuron_values(self, measure: str) -> dict[int, NDArray[np.float64]]:
        """Return by layer the values of the neurons that have one under their own explanation."""
        return read_measure_by_layer(self.folder, measure)


def read_analyses(run: Run, models: Sequence[str]) -> list[Analysis]:
    """Return the analyses of those of `models` that have one, in the order given."""
    finished = set(run.models("analysis"))
    return [
        _analysis(name, run.stage("analysis", name).path) for name in models if name in finished
    ]


def _analysis(name: str, folder: Path) -> Analysis:
    return Analysis(name, tuple(read_layers(folder)), tuple(read_measure_summaries(folder)), folder)


# ---- cratelm effects ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerEffects:
    """Effects of the neurons of one layer on the output; intervals are over its neurons."""

    layer: int
    neurons: int
    dead: int
    size: Interval | None
    """mean absolute change of the loss, nats per token"""
    firing_rise: Interval | None
    """mean change over tokens predicted from where the neuron fires"""
    raises: Interval | None
    """fraction of the neurons without which the loss is higher by more than two standard errors"""
    lowers: Interval | None
    agreement: Interval | None
    """rank correlation over the vocabulary of the first-order estimate with the exact effect"""
    overlap: Interval | None
    """fraction of the most promoted tokens that both name"""
    named: Interval | None
    """chance that a token that the neuron fires on is promoted more than another"""
    named_shuffled: Interval | None
    """the same for tokens that another neuron of the layer fires on"""


@dataclass(frozen=True)
class Effects:
    """What `cratelm effects` measured of one model: `steer/MODEL/`."""

    name: str
    ablation: str
    """`mean` or `zero`: what neurons were replaced by"""
    loss: Estimate | None
    """of the plain model on the same tokens, nats per token"""
    layers: tuple[LayerEffects, ...]


def read_effects(run: Run, models: Sequence[str]) -> list[Effects]:
    """Return the effects of those of `models` that were measured, in the order given."""
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
    """chance that the judge names the steered text; interval over neurons"""
    defined: int
    undefined: int
    dead: int
    failed: int


@dataclass(frozen=True)
class Interventions:
    """What `cratelm intervene` measured of one model with one judge: `steer/MODEL@NAME/`."""

    name: str
    """of the model"""
    explainer: str
    judge: str
    n_neurons: int
    kl: Interval | None
    """strength of steering: its effect on the next token, nats"""
    controls: tuple[InterventionControl, ...]


def read_interventions(run: Run, models: Sequence[str]) -> list[Interventions]:
    """Return the intervention scorings of `models`, in the order given."""
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
    """How well the autoencoder of one layer rebuilds its inputs. Errors: over documents."""

    layer: int
    inputs: int
    latents: int
    explained_variance: Estimate | None
    l0: Estimate
    own_l0: Estimate
    """activations of the site that are not 0, per token"""
    dead: Estimate
    """fraction of the latents"""
    shrinkage: Estimate | None


@dataclass(frozen=True)
class Spliced:
    """The model with something in place of its activations."""

    loss: Estimate
    """nats per token"""
    added: Estimate
    """minus the loss of the model as it is, on the same tokens"""
    recovered_from_zero: Estimate | None
    """1: nothing is lost, 0: as bad as zeros"""


@dataclass(frozen=True)
class SplicedLayers:
    """What the model loses where the activations of some layers are replaced at once."""

    layers: tuple[int, ...]
    reconstruction: Spliced
    own_top: Spliced
    """the site's own code at the autoencoder's L0"""
    own: Spliced
    """all of the site's own code"""


@dataclass(frozen=True)
class SteeringFidelity:
    """Latents or neurons of one layer, set to their maximum one at a time. Errors: over those steered."""

    layer: int
    steered: tuple[int, ...]
    fidelity: Estimate | None
    edit: Estimate
    """KL of the edit, nats per token"""
    rebuilt: float
    """KL of the reconstruction alone"""


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """Sums over the tokens of each document, to compare models on the same ones. [C] documents"""

    documents: tuple[int, ...]
    """[C] ordinals"""
    targets: tuple[int, ...]
    """[C] tokens predicted"""
    loss: NDArray[np.float64]
    """[C] of the model as it is"""
    reconstruction: NDArray[np.float64]
    """[C] with all layers rebuilt"""


@dataclass(frozen=True, eq=False)
class SaeEvaluation:
    """What `cratelm sae evaluate` measured of one set of autoencoders."""

    loss: Estimate
    """of the model as it is, nats per token"""
    layers: tuple[RebuiltLayer, ...]
    spliced: tuple[SplicedLayers, ...]
    """each layer alone, then all together where there are several"""
    steering: tuple[SteeringFidelity, ...]
    """latents, by layer"""
    own_steering: tuple[SteeringFidelity, ...]
    """neurons of the site itself, by layer"""
    by_document: DocumentLosses

    @property
    def all_layers(self) -> SplicedLayers:
        """Return the figures with all layers rebuilt at once, or with the only one."""
        return self.spliced[-1]

    def layer(self, number: int) -> RebuiltLayer:
        """Return the figures of one layer's autoencoder."""
        return next(layer for layer in self.layers if layer.layer == number)

    def alone(self, number: int) -> SplicedLayers:
        """Return the figures with this layer alone rebuilt."""
        return next(s for s in self.spliced if s.layers == (number,))


def evaluation_path(run: Run, harvest: Completion) -> Path | None:
    """Return where the evaluation of a harvest's autoencoders lies; None where it is a harvest of neurons.

    `sae/MODEL@NAME/evaluation.json`, or `sae/MODEL@FOLDER.json` for autoencoders from elsewhere.
    """
    sae = harvest.config.get("sae")
    if not sae:
        return None
    own = run.path / "sae" / set_name(Path(harvest.config["model"]).name, Path(sae).name)
    return own / "evaluation.json" if own.is_dir() else own.with_name(f"{own.name}.json")


def evaluation_inputs(run: Run, names: Sequence[str]) -> dict[str, str]:
    """Return the hash of the evaluation of every model of `names` that has one."""
    hashes = {}
    for name in names:
        harvest = run.stage("activations", name).completion()
        path = evaluation_path(run, harvest) if harvest else None
        if path is not None and path.is_file():
            hashes[f"evaluation/{name}"] = hash_file(path)
    return hashes


def evaluation_config(run: Run, name: str) -> dict[str, Any] | None:
    """Return the options that evaluated the autoencoders `sae/NAME` of the run; None where nothing did."""
    path = run.stage("sae", name).path / "evaluation.json"
    return _json(path)["config"] if path.is_file() else None


def read_evaluation(
    path: Path, sae: str | None, model: str | None, tokens: str | None
) -> SaeEvaluation | None:
    """Return the evaluation in a file that `evaluation_path` names.

    None where it is not of the autoencoders of identity `sae` on the model of identity `model` and the
    tokens of identity `tokens`: figures of what was made again since say nothing of these.
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
    """None, too, where the value itself is null."""
    return None if record is None or record["value"] is None else _known_estimate(record)


def _known_estimate(record: dict[str, Any]) -> Estimate:
    """NaN, which JSON cannot hold, is written as null."""
    value = record["value"]
    return Estimate(float("nan") if value is None else value, record["error"])
