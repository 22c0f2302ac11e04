"""`cratelm sae evaluate`: what autoencoders rebuild, and what the model loses by it.

Figures are ratios of sums over documents with their standard errors (`cratelm.evaluate.estimates`):

    explained variance   1 - sum |x - y|^2 / sum |x - mean|^2
    L0                   latents on at a token
    dead                 part of the latents that are on at no token seen; error: jackknife
    shrinkage            sum |y|^2 / sum x.y: below 1 where reconstructions are too small in their own
                         direction (Rajamanoharan et al. 2024, "relative reconstruction bias")
    norm ratio           sum |y| / sum |x|: below 1, too, where what is left out is not small
    loss recovered       (loss ablated - loss spliced) / (loss ablated - loss of the model)

x are the activations of a text token, y their reconstruction. Ablated: 0, or the mean over the tokens
seen, in the place of x. In the place of y also stand the activations of x that are largest, as many
as the autoencoder has latents on: the site's own code at the same L0; and all of x.
"""

import dataclasses
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import HarvestConfig
from cratelm.activations.harvest import _load, _model_source
from cratelm.errors import InputError
from cratelm.evaluate.estimates import Estimate, ratio
from cratelm.evaluate.subjects import Subject, sequence_length
from cratelm.models.sites import Site, site_of
from cratelm.runs import Run, write_json
from cratelm.sae.architectures import import_sae_lens
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.measure import Firing, Measured, measure
from cratelm.tokens.shards import TokenStore, check_vocabulary

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
    explained_variance: Estimate
    l0: Estimate
    dead: Estimate
    shrinkage: Estimate
    norm_ratio: Estimate
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

    def __str__(self) -> str:
        head = (
            f"{self.sae} on {self.site} of {self.model}, {self.split}: {self.tokens:,} tokens in"
            f" {self.documents:,} documents; loss {self.loss.show('.4f')} nats a token"
        )
        return "\n\n".join([head, _layer_table(self.layers), _place_table(self)])


def sae_evaluate(config: SaeEvaluateConfig) -> SaeEvaluateResult:
    """Measures the autoencoders; those of a run get `evaluation.json` in their folder.

    Raises `InputError` for autoencoders that are not there, are of another model, site or width, and
    where activations or losses are not numbers.
    """
    import_sae_lens()
    run = Run(config.run)
    run.stage("tokens").require("tokenize")
    asked = HarvestConfig(run=config.run, model=config.model, device=config.device)
    source, identity = _model_source(asked, run)
    name, folders, stage = _folders(config, run)
    model = _load(source, asked)
    store = TokenStore(run.stage("tokens").path)
    check_vocabulary(store, model.config.get_text_config().vocab_size)
    site, saes = _open(config, folders, model, identity)
    length = sequence_length(Subject(config.model, "", model), config.sequence_length)
    split = store.split(config.split)
    if split.n_tokens < 2:
        raise InputError(f"the {config.split} split has {split.n_tokens} tokens, 2 were expected")
    plan = SearchPlan.of(split, config.split, store.eot_id, length, config.tokens, config.seed)
    found = measure(model, site, saes, plan, config.batch_tokens, quiet=config.quiet)
    result = _result(config, name, site, saes, found)
    for path in (stage / EVALUATION if stage else None, config.output):
        if path is not None:
            write_json(path, {**asdict(result), "tokens_asked": config.tokens, "seed": config.seed})
    return result


def _folders(config: SaeEvaluateConfig, run: Run) -> tuple[str, list[Path], Path | None]:
    """Name, folders of the layers, and the stage's folder where they are the run's own."""
    own = Path(config.model).name
    known = [name for name in run.models("sae") if name.split("@")[0] == own]
    if not config.sae and len(known) == 1:
        named = known[0]
    else:
        named = config.sae if "@" in config.sae else f"{own}@{config.sae}"
    if named in run.models("sae"):
        path = stage = run.stage("sae", named).path
    else:
        named, path, stage = config.sae, Path(config.sae), None
    if (not config.sae and stage is None) or not path.is_dir():
        has = f"the run has {', '.join(known)}" if known else f"the run has none of {own}"
        raise InputError(
            f"--sae {config.sae or 'is not given and'} names no folder and no autoencoders of the run"
            f" ({has}): name one of them or a folder, or type"
            f" `cratelm sae train --run {run.path} --model {config.model}` first"
        )
    folders = [path] if (path / "cfg.json").is_file() else _layer_folders(path)
    return named, folders, stage


def _layer_folders(path: Path) -> list[Path]:
    found = [p for p in path.glob("layer-*") if (p / "cfg.json").is_file()]
    if not found:
        raise InputError(
            f"{path} holds no autoencoder: cfg.json and sae_weights.safetensors were expected, there"
            " or in folders layer-0, layer-1, ..."
        )
    return sorted(found, key=lambda p: int(p.name.removeprefix("layer-")))


def _open(
    config: SaeEvaluateConfig, folders: list[Path], model: Any, identity: str
) -> tuple[Site, dict[int, Any]]:
    """The site, and SAELens' autoencoder of each layer, all checked against the model."""
    sites, saes = [], {}
    for folder in folders:
        sae = load_sae(folder, str(model.device))
        site = _site(config, folder, sae, model)
        layer = _layer(config, folder, sae)
        _check(config, folder, sae, site, layer, identity)
        sites.append(site)
        saes[layer] = sae
    if len({site.paths for site in sites}) > 1:
        raise InputError(
            f"{folders[0].parent} holds autoencoders of several sites:"
            f" {', '.join(sorted({s.name for s in sites}))}; name one folder with --sae"
        )
    return sites[0], saes


def load_sae(folder: Path, device: str = "cpu") -> Any:
    """SAELens' object from a folder in its format. Raises `InputError` where it cannot be read."""
    lens = import_sae_lens()
    try:
        return lens.SAE.load_from_disk(folder, device=device).eval()
    except (
        Exception
    ) as error:  # a damaged file fails in ways of json, safetensors, torch and SAELens
        told = " ".join(str(error).split())[:160]
        raise InputError(
            f"{folder} cannot be read as an autoencoder of SAELens ({type(error).__name__}: {told}):"
            " cfg.json and sae_weights.safetensors as SAELens 6 writes them were expected"
        ) from None


def _site(config: SaeEvaluateConfig, folder: Path, sae: Any, model: Any) -> Site:
    name = sae.cfg.metadata.site or config.site
    if name is None:
        raise InputError(f"{folder}/cfg.json names no site: name it with --site")
    if config.site is not None and site_of(model, config.site).paths != site_of(model, name).paths:
        raise InputError(f"{folder} is of site {name}, --site is {config.site}: leave --site out")
    try:
        return site_of(model, name)
    except InputError:
        raise InputError(
            f"{folder} is of site {name}, which {config.model} ({type(model).__name__}) does not have:"
            f" name the model that it was trained on ({sae.cfg.metadata.model_name or 'unknown'})"
        ) from None


def _layer(config: SaeEvaluateConfig, folder: Path, sae: Any) -> int:
    found = sae.cfg.metadata.layer
    if found is None:
        match = re.search(r"\.(\d+)\.", f"{sae.cfg.metadata.hook_name or ''}.")
        found = int(match[1]) if match else config.layer
    if found is None:
        raise InputError(f"{folder}/cfg.json names no layer: name it with --layer")
    if config.layer is not None and config.layer != found:
        raise InputError(f"{folder} is of layer {found}, --layer is {config.layer}: leave it out")
    return found


def _check(
    config: SaeEvaluateConfig, folder: Path, sae: Any, site: Site, layer: int, identity: str
) -> None:
    """Raises `InputError` where an autoencoder cannot be this model's."""
    origin = sae.cfg.metadata.provenance or {}
    if layer >= site.n_layers:
        raise InputError(
            f"{folder} is of layer {layer}, {config.model} has {site.n_layers} at site {site.name}:"
            " name the model that it was trained on"
        )
    if sae.cfg.d_in != site.n_neurons[layer]:
        raise InputError(
            f"{folder} takes {sae.cfg.d_in:,} inputs, site {site.name} of {config.model} has"
            f" {site.n_neurons[layer]:,} in layer {layer}: name the model that it was trained on"
        )
    if origin.get("model_identity", identity) != identity:
        raise InputError(
            f"{folder} was trained on another model than {config.model} is now (it was called"
            f" {sae.cfg.metadata.model_name}): name that one, or type `cratelm sae train` again"
        )


def _result(
    config: SaeEvaluateConfig, name: str, site: Site, saes: dict[int, Any], found: Measured
) -> SaeEvaluateResult:
    sums = found.sums
    return SaeEvaluateResult(
        model=Path(config.model).name,
        sae=name,
        site=site.name,
        split=config.split,
        documents=int((sums["targets"] > 0).sum()),
        tokens=int(sums["text"].sum()),
        loss=_ratio(sums["loss"], sums["targets"]),
        layers=tuple(_layer_figures(layer, sae, found) for layer, sae in sorted(saes.items())),
        places=tuple(_place_figures(group, found) for group in found.groups),
    )


def _layer_figures(layer: int, sae: Any, found: Measured) -> LayerFigures:
    sums = {name[1]: values for name, values in found.sums.by_name.items() if name[0] == layer}
    text = found.sums["text"]
    unexplained = _ratio(sums["error"], sums["spread"])
    return LayerFigures(
        layer=layer,
        inputs=sae.cfg.d_in,
        latents=sae.cfg.d_sae,
        explained_variance=dataclasses.replace(unexplained, value=1 - unexplained.value),
        l0=_ratio(sums["on"], text),
        dead=dead_part(found.firing[layer], int((text > 0).sum())),
        shrinkage=_ratio(sums["rebuilt_square"], sums["product"]),
        norm_ratio=_ratio(sums["rebuilt_norm"], sums["norm"]),
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


def _place_figures(group: tuple[int, ...], found: Measured) -> PlaceFigures:
    def of(kind: str) -> Spliced:
        return _spliced(found, group, kind)

    return PlaceFigures(
        layers=group,
        own_kept=tuple(found.kept[layer] for layer in group),
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
        return _ratio(sums[group, floor] - loss, lost) if lost.sum() > 0 else None

    return Spliced(
        loss=_ratio(loss, targets),
        added=_ratio(loss - clean, targets),
        recovered_from_zero=recovered("zero"),
        recovered_from_mean=recovered("mean"),
    )


def _ratio(x: np.ndarray, y: np.ndarray) -> Estimate:
    """sum(x) / sum(y) over the documents that have a token of either."""
    seen = (x != 0) | (y != 0)
    return ratio(x[seen], y[seen]) if y.sum() else Estimate(math.nan, None)


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
        shown = [getattr(f, name).show(form) for name, _, form in _LAYER_FIGURES]
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
            parts = [
                "–" if r is None else r.show(".2%")
                for r in (s.recovered_from_zero, s.recovered_from_mean)
            ]
            lines.append([f"{where}: {told}", s.added.show("+.4f"), *parts])
    return _grid(lines)


def _grid(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )
