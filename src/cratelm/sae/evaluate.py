"""`cratelm sae evaluate`: what autoencoders rebuild, and what the model loses by it.

Figures are ratios of sums over documents with their standard errors (`cratelm.stats.ratio`):

    explained variance   1 - sum |x - y|^2 / sum |x - mean|^2
    L0                   latents on at a token
    dead                 part of the latents that are on at no token seen; error: jackknife
    shrinkage            sum |y|^2 / sum x.y: below 1 where reconstructions are too small in their own
                         direction (Rajamanoharan et al. 2024, "relative reconstruction bias")
    norm ratio           sum |y| / sum |x|: below 1, too, where what is left out is not small
    loss recovered       (loss ablated - loss spliced) / (loss ablated - loss of the model)

x are the activations of a text token, y their reconstruction. Ablated: 0, or the mean over the tokens
seen, in the place of x. In the place of y also stand the activations of x that are largest, as many
as the autoencoder has latents on: the site's own code at the same L0; and all of x. How faithful
steering is, with a reconstruction on the way and without: `cratelm.sae.fidelity`.
"""

import dataclasses
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import autoencoder_identity, load_for, model_source
from cratelm.errors import InputError
from cratelm.models.latents import latents_of
from cratelm.models.open import LoadedModel, sequence_length
from cratelm.models.sites import Site
from cratelm.runs import Run, config_dict, identity_of, write_json
from cratelm.runs.names import set_name, split_set
from cratelm.sae.architectures import import_sae_lens
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.fidelity import SteeringFigures, steering_fidelity
from cratelm.sae.reconstruction import Firing, Measured, measure
from cratelm.stats.ratio import Estimate, ratio
from cratelm.tokens.shards import TokenSplit, TokenStore, check_vocabulary

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Spliced:
    """The model with something in the place of its activations."""

    loss: Estimate
    """nats a token"""
    added: Estimate
    """loss less that of the model as it is, on the same tokens"""
    recovered_from_zero: Estimate | None
    """1: nothing is lost, 0: as bad as zeros; None where zeros do not raise the loss"""
    recovered_from_mean: Estimate | None
    """likewise with the mean"""


@dataclass(frozen=True)
class LayerFigures:
    """How well one layer's autoencoder rebuilds its inputs."""

    layer: int
    inputs: int
    """H"""
    latents: int
    """S"""
    explained_variance: Estimate | None
    """None where all tokens have the same activations"""
    l0: Estimate
    dead: Estimate
    shrinkage: Estimate | None
    """None where all reconstructions are 0"""
    norm_ratio: Estimate | None
    """None where all activations are 0"""
    own_l0: Estimate
    """activations of the site that are not 0 at a token"""


@dataclass(frozen=True)
class PlaceFigures:
    """What the model loses where the activations of some layers are replaced at once."""

    layers: tuple[int, ...]
    own_kept: tuple[int, ...]
    """activations kept at a token in `own_top`, by layer"""
    reconstruction: Spliced
    own_top: Spliced
    """the site's own code at the autoencoder's L0"""
    own: Spliced
    """all of the site's own code: nothing is lost"""
    mean: Spliced
    zero: Spliced


@dataclass(frozen=True)
class SaeEvaluateResult:
    """Figures of the autoencoders of one site."""

    model: str
    sae: str
    """as it was named"""
    site: str
    split: str
    documents: int
    tokens: int
    """text tokens seen"""
    loss: Estimate
    """of the model as it is, nats a token"""
    layers: tuple[LayerFigures, ...]
    places: tuple[PlaceFigures, ...]
    """each layer alone, then all together where there are several"""
    steering: tuple[SteeringFigures, ...] = ()
    """latents, by layer; empty where none were steered"""
    own_steering: tuple[SteeringFigures, ...] = ()
    """neurons of the site itself, by layer"""

    def __str__(self) -> str:
        head = (
            f"{self.sae} on {self.site} of {self.model}, {self.split}: {self.tokens:,} tokens in"
            f" {self.documents:,} documents; loss {self.loss.show('.4f')} nats a token"
        )
        tables = [_layer_table(self.layers), _place_table(self)]
        if self.steering:
            tables.append(_steering_table(self))
        return "\n\n".join([head, *tables])


def sae_evaluate(config: SaeEvaluateConfig) -> SaeEvaluateResult:
    """Measures the autoencoders; the figures are kept in the run, where a report finds them.

    Raises `InputError` for autoencoders that are not there, are of another model, site or width, and
    where activations or losses are not numbers.
    """
    import_sae_lens()
    run = Run(config.run)
    tokens = run.stage("tokens").require("tokenize")
    asked = HarvestConfig(run=config.run, model=config.model, device=config.device)
    source, made = model_source(asked, run)
    identity = identity_of(made)
    asked_for = _autoencoders(config, run)
    model = load_for(source, asked)
    store = TokenStore(run.stage("tokens").path)
    check_vocabulary(store, model.config.get_text_config().vocab_size)
    site = _open(config, asked_for.folder, model, identity)
    length = sequence_length(LoadedModel(config.model, "", model), config.sequence_length)
    split = store.split(config.split)
    if split.n_tokens < 2:
        raise InputError(f"the {config.split} split has {split.n_tokens} tokens, 2 were expected")

    def plan(tokens: int) -> SearchPlan:
        return SearchPlan.of(split, config.split, store.eot_id, length, tokens, config.seed)

    found = measure(model, site, plan(config.tokens), config.batch_tokens, quiet=config.quiet)
    result = _result(config, asked_for.name, site, found)
    if config.steered:
        steering, own = steering_fidelity(
            model,
            site,
            plan(config.steered_tokens),
            config.batch_tokens,
            count=config.steered,
            seed=config.seed,
            quiet=config.quiet,
        )
        result = dataclasses.replace(result, steering=steering, own_steering=own)
    identities = {"identity": asked_for.identity, "model_identity": identity}
    identities["tokens_identity"] = tokens.identity
    for path in filter(None, (asked_for.kept, config.output)):
        written = {"config": config_dict(config), **identities, **asdict(result)}
        write_json(path, {**written, "by_document": _by_document(found, split)})
    return result


def is_evaluated(config: SaeEvaluateConfig) -> bool:
    """True, and said so, where the run keeps figures of these very autoencoders and this configuration."""
    run = Run(config.run)
    asked_for = _autoencoders(config, run)
    _, made = model_source(HarvestConfig(run=config.run, model=config.model), run)
    if not asked_for.kept.is_file():
        return False
    told = json.loads(asked_for.kept.read_text(encoding="utf-8"))
    wanted = (config_dict(config), asked_for.identity, identity_of(made))
    if (told.get("config"), told.get("identity"), told.get("model_identity")) != wanted:
        return False
    tokens = run.stage("tokens").require("tokenize").identity
    if told.get("tokens_identity", tokens) != tokens:  # version 0.1.0 kept none
        return False
    print(f"{asked_for.kept} is there, skipped (--force redoes it)", flush=True)
    return True


@dataclass(frozen=True)
class _Autoencoders:
    """Those that were asked for."""

    name: str
    """as they are told"""
    folder: Path
    identity: str
    kept: Path
    """file of the run that keeps their figures"""


def _autoencoders(config: SaeEvaluateConfig, run: Run) -> _Autoencoders:
    own = Path(config.model).name
    known = [name for name in run.models("sae") if split_set(name)[0] == own]
    named = config.sae if split_set(config.sae)[1] else set_name(own, config.sae)
    if not config.sae and len(known) == 1:
        named = known[0]
    if named in run.models("sae"):
        stage = run.stage("sae", named)
        identity = stage.require("sae train").identity
        return _Autoencoders(named, stage.path, identity, stage.path / EVALUATION)
    folder = Path(config.sae)
    if config.sae and folder.is_dir():
        kept = run.path / "sae" / f"{set_name(own, folder.name)}.json"
        return _Autoencoders(config.sae, folder, autoencoder_identity(folder), kept)
    has = f"the run has {', '.join(known)}" if known else f"the run has none of {own}"
    told = f"--sae {config.sae} is no folder and" if config.sae else "--sae is not given and"
    raise InputError(
        f"{told} names no autoencoders of the run ({has}): name one of them or a folder, or type"
        f" `cratelm sae train --run {run.path} --model {config.model}` first"
    )


def _open(config: SaeEvaluateConfig, folder: Path, model: Any, identity: str) -> Site:
    """The site of the latents, checked against the model, under the name of what they are of."""
    try:
        site = latents_of(model, folder)
    except InputError as error:
        raise InputError(f"{folder} cannot be measured on {config.model}: {error}") from None
    metadata = [cast(Any, sae).cfg.metadata for sae in site.autoencoders]
    for told in metadata:
        if (told.provenance or {}).get("model_identity", identity) != identity:
            raise InputError(
                f"{folder} was trained on another model than {config.model} is now (it was called"
                f" {told.model_name}): name that one, or type `cratelm sae train` again"
            )
    return dataclasses.replace(site, name=str(metadata[0].site or metadata[0].hook_name))


def _result(config: SaeEvaluateConfig, name: str, site: Site, found: Measured) -> SaeEvaluateResult:
    sums = found.sums
    saes = cast(tuple[Any, ...], site.autoencoders)
    return SaeEvaluateResult(
        model=Path(config.model).name,
        sae=name,
        site=site.name,
        split=config.split,
        documents=int((sums["targets"] > 0).sum()),
        tokens=int(sums["text"].sum()),
        loss=_ratio(sums["loss"], sums["targets"]),
        layers=tuple(
            _layer_figures(place, site.layer_numbers[place], sae, found)
            for place, sae in enumerate(saes)
        ),
        places=tuple(_place_figures(group, site, found) for group in found.groups),
    )


def _by_document(found: Measured, split: TokenSplit) -> dict[str, list]:
    """Sums of each document, for losses of several models to be compared on the same ones."""
    sums = found.sums
    seen = sums["targets"] > 0
    whole = sums[found.groups[-1], "reconstruction"]
    return {
        "document": split.ordinals[sums.documents[seen]].tolist(),
        "targets": sums["targets"][seen].astype(int).tolist(),
        "loss": sums["loss"][seen].tolist(),
        "reconstruction": whole[seen].tolist(),
    }


def _layer_figures(place: int, layer: int, sae: Any, found: Measured) -> LayerFigures:
    sums = {name[1]: values for name, values in found.sums.by_name.items() if name[0] == place}
    text = found.sums["text"]
    unexplained = _over(sums["error"], sums["spread"])
    if unexplained is not None:
        unexplained = dataclasses.replace(unexplained, value=1 - unexplained.value)
    return LayerFigures(
        layer=layer,
        inputs=sae.cfg.d_in,
        latents=sae.cfg.d_sae,
        explained_variance=unexplained,
        l0=_ratio(sums["on"], text),
        dead=dead_part(found.firing[place], int((text > 0).sum())),
        shrinkage=_over(sums["rebuilt_square"], sums["product"]),
        norm_ratio=_over(sums["rebuilt_norm"], sums["norm"]),
        own_l0=_ratio(sums["own_on"], text),
    )


def dead_part(firing: Firing, documents: int) -> Estimate:
    """Part of the latents that never fired; its error by the jackknife over documents.

    Without document i those die that fired nowhere else, so that the part becomes dead + only_i
    (Efron & Stein 1981: se^2 = (C - 1) / C sum (part_i - mean part)^2).
    """
    latents = len(firing.documents)
    dead = float((firing.documents == 0).mean())
    if documents < 2:
        return Estimate(dead, None)
    once = firing.last[firing.documents == 1]  # the one document of each latent with only one
    only = np.unique(once, return_counts=True)[1] / latents
    mean = only.sum() / documents
    spread = ((only - mean) ** 2).sum() + (documents - len(only)) * mean**2
    return Estimate(dead, math.sqrt((documents - 1) / documents * spread))


def _place_figures(group: tuple[int, ...], site: Site, found: Measured) -> PlaceFigures:
    def of(kind: str) -> Spliced:
        return _spliced(found, group, kind)

    return PlaceFigures(
        layers=tuple(site.layer_numbers[place] for place in group),
        own_kept=tuple(found.kept[place] for place in group),
        reconstruction=of("reconstruction"),
        own_top=of("own_top"),
        own=of("own"),
        mean=of("mean"),
        zero=of("zero"),
    )


def _spliced(found: Measured, group: tuple[int, ...], kind: str) -> Spliced:
    sums = found.sums
    loss, clean, targets = sums[group, kind], sums["loss"], sums["targets"]

    def recovered(floor: str) -> Estimate | None:
        lost = sums[group, floor] - clean
        return _over(sums[group, floor] - loss, lost) if lost.sum() > 0 else None

    return Spliced(
        loss=_ratio(loss, targets),
        added=_ratio(loss - clean, targets),
        recovered_from_zero=recovered("zero"),
        recovered_from_mean=recovered("mean"),
    )


def _ratio(x: np.ndarray, y: np.ndarray) -> Estimate:
    """sum(x) / sum(y) over the documents that have a token of either."""
    seen = (x != 0) | (y != 0)
    return ratio(x[seen], y[seen])


def _over(x: np.ndarray, y: np.ndarray) -> Estimate | None:
    """The same, None where the second sum is 0."""
    return _ratio(x, y) if y.sum() else None


def _show(figure: Estimate | None, form: str) -> str:
    return "–" if figure is None else figure.show(form)


_LAYER_FIGURES = (
    ("explained_variance", "explained variance", ".1%"),
    ("l0", "L0", ".1f"),
    ("dead", "dead", ".1%"),
    ("shrinkage", "shrinkage", ".3f"),
    ("norm_ratio", "norm ratio", ".3f"),
    ("own_l0", "own L0", ".1f"),
)
"""field, heading, format"""


def _layer_table(layers: tuple[LayerFigures, ...]) -> str:
    lines = [["", "inputs", "latents", *(heading for _, heading, _ in _LAYER_FIGURES)]]
    for f in layers:
        shown = [_show(getattr(f, name), form) for name, _, form in _LAYER_FIGURES]
        lines.append([f"layer {f.layer}", f"{f.inputs:,}", f"{f.latents:,}", *shown])
    return _grid(lines)


def _place_table(result: SaeEvaluateResult) -> str:
    lines = [["in the place of activations", "loss added", "from zero", "from mean"]]
    for place in result.places:
        where = f"layer {place.layers[0]}" if len(place.layers) == 1 else "all layers"
        kept = ", ".join(map(str, place.own_kept))
        rows = {
            "reconstruction": place.reconstruction,
            f"own code, strongest {kept}": place.own_top,
            "own code, all": place.own,
            "mean": place.mean,
            "zero": place.zero,
        }
        for told, s in rows.items():
            parts = [_show(r, ".2%") for r in (s.recovered_from_zero, s.recovered_from_mean)]
            lines.append([f"{where}: {told}", s.added.show("+.4f"), *parts])
    return _grid(lines)


def _steering_table(result: SaeEvaluateResult) -> str:
    lines = [["steered, one at a time", "fidelity", "KL of the edit", "KL of the reconstruction"]]
    sides = (("latents", result.steering), ("neurons of the site", result.own_steering))
    for told, figures in sides:
        for f in figures:
            shown = [_show(f.fidelity, ".3f"), f.edit.show(".4f"), f"{f.rebuilt:.4f}"]
            lines.append([f"layer {f.layer}: {len(f.steered)} {told}", *shown])
    return _grid(lines)


def _grid(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )
