"""Read and write the results of `cratelm sae train` and `cratelm sae evaluate`: the folder `sae/` of a run.

sae/MODEL@NAME/                    written by sae train
  layer-0/ layer-1/ ...            cfg.json and sae_weights.safetensors in SAELens' format, which
                                   `sae_lens.SAE.load_from_disk` reads; decoder rows have norm 1
  sae.json                         a description of the training, and the last figures of each layer
  metrics.jsonl                    the curves, one line per layer and point
  timing.jsonl                     tokens per second (not part of the stage's identity)
  evaluation.json                  written by sae evaluate
sae/MODEL@FOLDER.json              the same figures for autoencoders from a folder elsewhere
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.records import Estimate
from cratelm.runs import Run, write_json
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.names import autoencoder_name, set_name
from cratelm.runs.reading import read_json

DESCRIPTION, EVALUATION = "sae.json", "evaluation.json"


# ---- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaeLayerTraining:
    """The last point of one layer's curve: figures for one batch of train tokens."""

    layer: int
    inputs: int
    """H"""
    latents: int
    """S"""
    explained_variance: float
    l0: float
    """mean number of latents that are not 0 at a token"""
    dead: int
    """latents that fired at none of the last --dead-after tokens"""
    resampled: int
    """dead latents that were reinitialised during the whole training; 0 for architectures that revive dead
    latents by a loss"""


@dataclass(frozen=True, kw_only=True)
class SaeTraining:
    """`sae.json`: the autoencoders of one site and their training."""

    model: str
    site: str
    architecture: str
    tokens: int
    """tokens trained on, including repeats"""
    revived_by: str
    """method that revives dead latents: `resampling`, `auxiliary loss`, or `nothing`"""
    layers: tuple[SaeLayerTraining, ...]


def write_training(folder: Path, training: SaeTraining, inputs: dict[str, str]) -> dict[str, Any]:
    """Write `sae.json` into an existing folder; return its content without the `inputs` of the stage."""
    content = asdict(training)
    write_json(folder / DESCRIPTION, {**content, "inputs": inputs})
    return content


@checked_arguments()
def read_training(folder: Path) -> SaeTraining:
    """Return the description in a folder that `cratelm sae train` wrote."""
    return read_json(folder / DESCRIPTION, _training)


def _training(content: dict[str, Any]) -> SaeTraining:
    content.pop("inputs")
    layers = tuple(SaeLayerTraining(**layer) for layer in content.pop("layers"))
    return SaeTraining(layers=layers, **content)


# ---- evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplacedLoss:
    """Loss of the model with its activations replaced."""

    loss: Estimate
    """nats per token"""
    added: Estimate
    """loss minus the loss of the unedited model on the same tokens"""
    recovered_from_zero: Estimate | None
    """1: no loss is added, 0: as bad as zeros; None if zeros do not raise the loss"""
    recovered_from_mean: Estimate | None
    """the same relative to the mean instead of zeros"""


@dataclass(frozen=True)
class LayerReconstruction:
    """Quality of the reconstructions of one layer's autoencoder (definitions: `cratelm.sae.evaluate`)."""

    layer: int
    inputs: int
    """H"""
    latents: int
    """S"""
    explained_variance: Estimate | None
    """None if all tokens have the same activations"""
    l0: Estimate
    """mean number of latents that are not 0 at a token"""
    dead: Estimate
    """fraction of the latents that are 0 at all tokens"""
    shrinkage: Estimate | None
    """None if all reconstructions are 0"""
    norm_ratio: Estimate | None
    """None if all activations are 0"""
    own_l0: Estimate
    """mean number of activations of the site that are not 0 at a token"""


@dataclass(frozen=True)
class LayerReplacements:
    """Losses of the model with the activations of some layers replaced together."""

    layers: tuple[int, ...]
    own_kept: tuple[int, ...]
    """activations per token that `own_top` keeps, by layer"""
    reconstruction: ReplacedLoss
    own_top: ReplacedLoss
    """the site's own activations, the strongest at each token: as many as the autoencoder has active latents"""
    own: ReplacedLoss
    """all of the site's own activations, which adds no loss"""
    mean: ReplacedLoss
    zero: ReplacedLoss


@dataclass(frozen=True)
class SteeringFidelity:
    """Figures for latents of one layer, or neurons of the underlying site, set to their maximum one at a time.

    Definitions: `cratelm.sae.fidelity`.
    """

    layer: int
    steered: tuple[int, ...]
    """indices of the steered latents or neurons, drawn from those that fire on the tokens"""
    tokens: int
    """text tokens at which they were steered"""
    fidelity: Estimate | None
    """mean over the steered ones, -1 to 1, with its standard error; None if no edit has an effect"""
    edit: Estimate
    """KL(plain | edit) in nats per token: mean over the steered ones, with its standard error"""
    rebuilt: float
    """KL(plain | rebuilt), nats per token: the effect of the reconstruction alone"""


@dataclass(frozen=True, kw_only=True)
class SaeEvaluation:
    """Figures of the autoencoders of one site."""

    model: str
    sae: str
    """name of the autoencoders, as given"""
    site: str
    split: str
    documents: int
    tokens: int
    """text tokens read"""
    loss: Estimate
    """loss of the unedited model, nats per token"""
    layers: tuple[LayerReconstruction, ...]
    replacements: tuple[LayerReplacements, ...]
    """each layer alone, then all together if there are several; `places` in the file"""
    steering: tuple[SteeringFidelity, ...] = ()
    """latents, by layer; empty if none were steered"""
    own_steering: tuple[SteeringFidelity, ...] = ()
    """neurons of the site itself, by layer"""

    @property
    def all_layers(self) -> LayerReplacements:
        """All layers replaced together; the only entry if there is one layer."""
        return self.replacements[-1]

    def of_layer(self, layer: int) -> LayerReconstruction:
        """Return the figures of one layer's autoencoder."""
        return next(r for r in self.layers if r.layer == layer)

    def layer_alone(self, layer: int) -> LayerReplacements:
        """Return the figures of one layer replaced alone."""
        return next(r for r in self.replacements if r.layers == (layer,))


@dataclass(frozen=True)
class DocumentLosses:
    """Sums over the predicted tokens of each document, for comparing models on the same documents."""

    document: tuple[int, ...]
    """ordinals of the documents"""
    targets: tuple[int, ...]
    """number of predicted tokens"""
    loss: tuple[float, ...]
    """loss of the unedited model, nats"""
    reconstruction: tuple[float, ...]
    """loss with all layers replaced by their reconstructions, nats"""


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation as stored in the run, with its inputs."""

    figures: SaeEvaluation
    config: dict[str, Any]
    """options of the command"""
    identity: str
    """identity of the autoencoders"""
    model_identity: str
    by_document: DocumentLosses
    tokens_identity: str = ""
    """identity of the run's tokens that were read; empty in files of version 0.1.0"""

    def is_of(self, sae: str | None, model: str | None, tokens: str | None) -> bool:
        """Return whether exactly the autoencoders, model and tokens of these identities were measured."""
        same_tokens = self.tokens_identity in ("", tokens)  # version 0.1.0 did not write it
        return (self.identity, self.model_identity) == (sae, model) and same_tokens


def evaluation_path(run: Run, model: str, sae: str) -> Path:
    """Return the path in the run for the figures of autoencoders of `model`; the file need not exist.

    `model` is a name in the run, a folder or a Hub id; `sae` is what `--sae` gives.
    """
    # a folder that has been moved since has no name but its last one
    names = [set_name(Path(model).name, name) for name in (autoencoder_name(sae), Path(sae).name)]
    for name in names:
        if (run.path / "sae" / name).is_dir():
            return run.path / "sae" / name / EVALUATION
    files = [run.path / "sae" / f"{name}.json" for name in names]
    return next((file for file in files if file.is_file()), files[0])


def write_evaluation(path: Path, evaluation: StoredEvaluation) -> None:
    """Write an evaluation to a JSON file."""
    figures = asdict(evaluation.figures)
    figures["places"] = figures.pop("replacements")
    content = {
        **figures,
        "config": evaluation.config,
        "identity": evaluation.identity,
        "model_identity": evaluation.model_identity,
        "tokens_identity": evaluation.tokens_identity,
        "by_document": asdict(evaluation.by_document),
    }
    write_json(path, content)


@checked_arguments()
def read_evaluation(path: Path) -> StoredEvaluation:
    """Return the evaluation in a JSON file that `write_evaluation` wrote.

    Raises `InputError` for a file of another form.
    """
    # not `read_json`: the file may lie in a folder of `sae train`, which does not make it again
    try:
        return _evaluation(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as an evaluation ({type(error).__name__}: {error}): type `cratelm sae"
            " evaluate` again"
        ) from None


def _evaluation(content: dict[str, Any]) -> StoredEvaluation:
    by_document = {name: tuple(values) for name, values in content.pop("by_document").items()}
    tokens_identity = content.pop("tokens_identity", "")
    config, identity, model_identity = (
        content.pop(name) for name in ("config", "identity", "model_identity")
    )
    figures = SaeEvaluation(
        loss=Estimate(**content.pop("loss")),
        layers=tuple(LayerReconstruction(**_estimates(x)) for x in content.pop("layers")),
        replacements=tuple(_layer_replacements(x) for x in content.pop("places")),
        steering=tuple(_steering(x) for x in content.pop("steering")),
        own_steering=tuple(_steering(x) for x in content.pop("own_steering")),
        **content,
    )
    return StoredEvaluation(
        figures,
        config,
        identity,
        model_identity,
        DocumentLosses(**by_document),
        tokens_identity,
    )


def _layer_replacements(content: dict[str, Any]) -> LayerReplacements:
    losses = {n: ReplacedLoss(**_estimates(v)) for n, v in content.items() if isinstance(v, dict)}
    layers, kept = tuple(content["layers"]), tuple(content["own_kept"])
    return LayerReplacements(layers, kept, **losses)


def _steering(content: dict[str, Any]) -> SteeringFidelity:
    return SteeringFidelity(**{**_estimates(content), "steered": tuple(content["steered"])})


_OPTIONAL = {
    "explained_variance",
    "shrinkage",
    "norm_ratio",
    "recovered_from_zero",
    "recovered_from_mean",
    "fidelity",
}
"""figures of the classes above that may be None"""


def _estimates(content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with each JSON object converted to an `Estimate`.

    JSON has no NaN, which is written as null: a figure whose value is null is None if its field allows that.
    """

    def estimate(name: str, figure: dict[str, Any]) -> Estimate | None:
        value, error = figure["value"], figure["error"]
        if value is None and name in _OPTIONAL:
            return None
        # 0.1.0 wrote the error of a negative ratio with the wrong sign
        return Estimate(math.nan if value is None else value, None if error is None else abs(error))

    return {k: estimate(k, v) if isinstance(v, dict) else v for k, v in content.items()}
