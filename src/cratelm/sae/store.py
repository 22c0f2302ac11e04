"""What `cratelm sae train` and `cratelm sae evaluate` leave in a run: the folders under `sae/`, read here.

sae/MODEL@NAME/                    written by sae train
  layer-0/ layer-1/ ...            cfg.json and sae_weights.safetensors in SAELens' format, which
                                   `sae_lens.SAE.load_from_disk` reads; decoder rows have norm 1
  sae.json                         what was trained on what, and the last figures of each layer
  metrics.jsonl                    the curves, a line a layer and point
  timing.jsonl                     tokens per second (no part of the stage's identity)
  evaluation.json                  written by sae evaluate
sae/MODEL@FOLDER.json              the same figures of autoencoders from a folder elsewhere
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.records import Estimate
from cratelm.runs import Run, write_json
from cratelm.runs.names import set_name

DESCRIPTION, EVALUATION = "sae.json", "evaluation.json"


# ---- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaeLayerTraining:
    """The last point of one layer's curve: figures of one batch of train tokens."""

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
    """dead latents that were reinitialised over the whole training; 0 where dead latents are revived by a
    loss"""


@dataclass(frozen=True, kw_only=True)
class SaeTraining:
    """`sae.json`: the autoencoders of one site and how they were trained."""

    model: str
    site: str
    architecture: str
    tokens: int
    """tokens seen, repeats counted"""
    revived_by: str
    """what revives dead latents: `resampling` or `auxiliary loss`"""
    layers: tuple[SaeLayerTraining, ...]


def write_training(folder: Path, training: SaeTraining, inputs: dict[str, str]) -> dict[str, Any]:
    """Write `sae.json` into an existing folder; return the description without the `inputs` of the stage."""
    content = asdict(training)
    write_json(folder / DESCRIPTION, {**content, "inputs": inputs})
    return content


def read_training(folder: Path) -> SaeTraining:
    """Return the description in a folder that `cratelm sae train` wrote."""
    content = _read_json(folder / DESCRIPTION)
    content.pop("inputs")
    layers = tuple(SaeLayerTraining(**layer) for layer in content.pop("layers"))
    return SaeTraining(layers=layers, **content)


# ---- evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplacedLoss:
    """Loss of the model with something in place of its activations."""

    loss: Estimate
    """nats per token"""
    added: Estimate
    """loss minus that of the unedited model, on the same tokens"""
    recovered_from_zero: Estimate | None
    """1: nothing is lost, 0: as bad as zeros; None if zeros do not raise the loss"""
    recovered_from_mean: Estimate | None
    """likewise, against the mean in place of activations"""


@dataclass(frozen=True)
class LayerReconstruction:
    """How well one layer's autoencoder reconstructs its inputs."""

    layer: int
    inputs: int
    """H"""
    latents: int
    """S"""
    explained_variance: Estimate | None
    """None if all tokens have the same activations"""
    l0: Estimate
    """latents that are not 0 at a token"""
    dead: Estimate
    """fraction of the latents that are 0 at all tokens"""
    shrinkage: Estimate | None
    """None if all reconstructions are 0"""
    norm_ratio: Estimate | None
    """None if all activations are 0"""
    own_l0: Estimate
    """activations of the site that are not 0 at a token"""


@dataclass(frozen=True)
class LayerReplacements:
    """What the model loses where the activations of some layers are replaced, all of them at once."""

    layers: tuple[int, ...]
    own_kept: tuple[int, ...]
    """activations per token that `own_top` keeps, by layer"""
    reconstruction: ReplacedLoss
    own_top: ReplacedLoss
    """the site's own activations, the strongest of each token: as many as the autoencoder has latents on"""
    own: ReplacedLoss
    """all of the site's own activations: nothing is lost"""
    mean: ReplacedLoss
    zero: ReplacedLoss


@dataclass(frozen=True)
class SteeringFidelity:
    """Latents of one layer, or neurons of the site below, set to their maximum one at a time."""

    layer: int
    steered: tuple[int, ...]
    """their indices, drawn from those that fire on the tokens"""
    tokens: int
    """text tokens at which they were steered"""
    fidelity: Estimate | None
    """mean over those steered, -1 to 1, its standard error over them; None if no edit changes anything"""
    edit: Estimate
    """KL(plain | edit), nats per token, likewise"""
    rebuilt: float
    """KL(plain | rebuilt), nats per token: what steering costs before anything is steered"""


@dataclass(frozen=True, kw_only=True)
class SaeEvaluation:
    """Figures of the autoencoders of one site."""

    model: str
    sae: str
    """the autoencoders as they were named"""
    site: str
    split: str
    documents: int
    tokens: int
    """text tokens seen"""
    loss: Estimate
    """of the unedited model, nats per token"""
    layers: tuple[LayerReconstruction, ...]
    replacements: tuple[LayerReplacements, ...]
    """each layer alone, then all together where there are several; `places` in the file"""
    steering: tuple[SteeringFidelity, ...] = ()
    """latents, by layer; empty if none were steered"""
    own_steering: tuple[SteeringFidelity, ...] = ()
    """neurons of the site itself, by layer"""

    @property
    def all_layers(self) -> LayerReplacements:
        """All layers replaced at once: the only one where there is one."""
        return self.replacements[-1]

    def layer_alone(self, layer: int) -> LayerReplacements:
        """One layer replaced alone."""
        return next(r for r in self.replacements if r.layers == (layer,))


@dataclass(frozen=True)
class DocumentLosses:
    """Sums over the predicted tokens of each document, for models to be compared on the same documents."""

    document: tuple[int, ...]
    """ordinals"""
    targets: tuple[int, ...]
    """tokens predicted"""
    loss: tuple[float, ...]
    """of the unedited model, nats"""
    reconstruction: tuple[float, ...]
    """with all layers reconstructed at once, nats"""


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation as the run keeps it: with what it was made from."""

    figures: SaeEvaluation
    config: dict[str, Any]
    """options of the command"""
    identity: str
    """of the autoencoders"""
    model_identity: str
    by_document: DocumentLosses
    tokens_identity: str = ""
    """of the run's tokens that were read; empty in files of version 0.1.0"""

    def is_of(self, sae_identity: str | None, model_identity: str | None) -> bool:
        """True if these autoencoders and this model were measured, not ones trained again since."""
        return (self.identity, self.model_identity) == (sae_identity, model_identity)


def evaluation_path(run: Run, model: str, sae: str) -> Path:
    """Return where the run keeps the figures of autoencoders of `model`: a name in the run, or a folder.

    `model` is a name in the run, or a folder or Hub id. The file need not be there.
    """
    name = set_name(Path(model).name, Path(sae).name)
    trained_here = run.path / "sae" / name
    return (
        trained_here / EVALUATION
        if trained_here.is_dir()
        else trained_here.with_name(f"{name}.json")
    )


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


def read_evaluation(path: Path) -> StoredEvaluation:
    """Return the evaluation in a JSON file that `write_evaluation` wrote.

    Raises `InputError` for a file of another form.
    """
    try:
        return _evaluation(_read_json(path))
    except (ValueError, KeyError, TypeError) as error:
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


def _estimates(content: dict[str, Any]) -> dict[str, Any]:
    """The same with `Estimate` in place of each object."""
    return {k: Estimate(**v) if isinstance(v, dict) else v for k, v in content.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
