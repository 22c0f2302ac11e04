"""`cratelm sae evaluate`: measure how well autoencoders reconstruct, and how much the model loses by it.

Figures are ratios of sums over documents with their standard errors (`cratelm.stats.ratio`):

    explained variance   1 - sum |x - y|^2 / sum |x - mean|^2
    L0                   mean number of latents that are not 0 at a token
    dead                 fraction of the latents that are 0 at all tokens read; error: jackknife
    shrinkage            sum |y|^2 / sum x.y: below 1 if reconstructions are too small in their own
                         direction (Rajamanoharan et al. 2024, "relative reconstruction bias")
    norm ratio           sum |y| / sum |x|: below 1 also if a large component of x is not reconstructed
    loss recovered       (loss ablated - loss spliced) / (loss ablated - loss of the model)

x are the activations at a text token, y is their reconstruction. Ablated: x is replaced by 0, or by the mean
over the tokens read. Spliced: x is replaced by y; for comparison also by the largest activations of x, as many
as the autoencoder has active latents (the site's own code at the same L0), and by all of x. The faithfulness of
steering, with and without a reconstruction, is measured in `cratelm.sae.fidelity`.

Shape legend: C documents, S latents.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from cratelm.activations.batches import SearchPlan
from cratelm.activations.config import last_name
from cratelm.errors import InputError
from cratelm.models.begin import announced
from cratelm.models.latents import AutoencoderSource, find_autoencoders, latents_of
from cratelm.models.open import find_model, sequence_length
from cratelm.models.sites import Site
from cratelm.models.sparse_autoencoder import SparseAutoencoder
from cratelm.records import Estimate
from cratelm.runs import Run, config_dict, settings_of
from cratelm.runs.names import autoencoder_name, set_name, split_set
from cratelm.runs.storage import check_target
from cratelm.sae.evaluate_config import SaeEvaluateConfig
from cratelm.sae.fidelity import steering_fidelity
from cratelm.sae.reconstruction import Firing, Group, ReconstructionSums, Replacement, measure
from cratelm.sae.store import (
    EVALUATION,
    DocumentLosses,
    LayerReconstruction,
    LayerReplacements,
    ReplacedLoss,
    SaeEvaluation,
    StoredEvaluation,
    read_evaluation,
    write_evaluation,
)
from cratelm.stats.ratio import ratio
from cratelm.text.table import align
from cratelm.tokens.shards import TokenSplit, TokenStore, check_vocabulary


class SaeEvaluateResult(SaeEvaluation):
    """Result of `cratelm sae evaluate`; printed as tables."""

    def __str__(self) -> str:
        head = (
            f"{self.sae} on {self.site} of {self.model}, {self.split}: {self.tokens:,} tokens in"
            f" {self.documents:,} documents; loss {self.loss.show('.4f')} nats per token"
        )
        tables = [_layer_table(self.layers), _replacement_table(self)]
        if self.steering:
            tables.append(_steering_table(self))
        return "\n\n".join([head, *tables])


def sae_evaluate(config: SaeEvaluateConfig) -> SaeEvaluateResult:
    """Measure autoencoders, store the figures in the run for reports, and return them.

    Raises `InputError` if the autoencoders do not exist or belong to another model, site or width, or if
    activations or losses are not finite numbers.
    """
    run = Run(config.run)
    if config.output is not None:
        check_target(config.output, "--output", "file")
    tokens = run.stage("tokens").require("tokenize")
    source = find_model(run, config.model, config).pinned()
    identity = source.identity
    asked_for = _autoencoders(config, run)
    loaded = source.load(config.device, config.dtype)
    model = loaded.model
    store = TokenStore(run.stage("tokens").path)
    check_vocabulary(store, model.config.get_text_config().vocab_size)
    site = _open(config, asked_for.source, model, identity)
    length = sequence_length(loaded, config.sequence_length)
    beginning = announced(loaded, run, config.begin_token, config.skip_first, with_skip=True)
    split = store.split(config.split)
    if split.n_tokens < 2:
        raise InputError(
            f"the {config.split} split has {split.n_tokens} tokens, but at least 2 are needed: choose"
            " another --split"
        )

    def plan(tokens: int) -> SearchPlan:
        return SearchPlan.of(
            split, config.split, store.eot_id, length, tokens, config.seed, beginning
        )

    measured = measure(model, site, plan(config.tokens), config.batch_tokens, quiet=config.quiet)
    result = _result(config, asked_for.name, site, measured)
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
    stored = StoredEvaluation(
        figures=result,
        config=config_dict(config),
        identity=asked_for.source.identity,
        model_identity=identity,
        tokens_identity=tokens.identity,
        by_document=_by_document(measured, split),
    )
    for path in filter(None, (asked_for.path, config.output)):
        write_evaluation(Path(path), stored)
    return result


def is_evaluated(config: SaeEvaluateConfig) -> bool:
    """Return True and print a note if the run already has these figures with this configuration.

    Raises `InputError` if `--sae` or `--model` names nothing.
    """
    run = Run(config.run)
    asked_for = _autoencoders(config, run)
    identity = find_model(run, config.model, config).identity
    if not asked_for.path.is_file():
        return False
    try:
        stored = read_evaluation(asked_for.path)
    except InputError:
        return False  # written by another version
    tokens = run.stage("tokens").require("tokenize").identity
    of = (asked_for.source.identity, identity, tokens)
    settings = settings_of(config)
    if settings.defaults | stored.config != settings.values or not stored.is_of(*of):
        return False
    print(f"{asked_for.path} exists, skipped (--force redoes it)", flush=True)
    return True


@dataclass(frozen=True)
class _Autoencoders:
    """The autoencoders that `--sae` names."""

    name: str
    """name for display"""
    source: AutoencoderSource
    path: Path
    """the file in the run for their figures"""


def _autoencoders(config: SaeEvaluateConfig, run: Run) -> _Autoencoders:
    """Return the autoencoders that `--sae` names, by default the model's only ones in the run."""
    model = last_name("--model", config.model)
    of_model = [name for name in run.models("sae") if split_set(name)[0] == model]
    name = config.sae if split_set(config.sae)[1] else set_name(model, config.sae)
    if not config.sae and len(of_model) == 1:
        name = of_model[0]
    if name in run.models("sae"):
        stage = run.stage("sae", name)
        source = AutoencoderSource(name, stage.path, stage.require("sae train"))
        return _Autoencoders(name, source, stage.path / EVALUATION)
    if config.sae and (Path(config.sae).is_dir() or "/" in config.sae):
        source = find_autoencoders(run, config.model, config.sae)
        stored_as = last_name("--sae", autoencoder_name(config.sae) or config.sae)
        path = run.path / "sae" / f"{set_name(model, stored_as)}.json"
        return _Autoencoders(config.sae, source, path)
    has = f"the run has {', '.join(of_model)}" if of_model else f"the run has none of {model}"
    problem = (
        f"--sae {config.sae} is neither a folder nor a name in the run ({has})"
        if config.sae
        else f"--sae is not given and the run does not have exactly one set of autoencoders ({has})"
    )
    raise InputError(
        f"{problem}: name autoencoders of the run, a folder, or RELEASE/ID of SAELens' registry, or type"
        f" `cratelm sae train --run {run.path} --model {config.model}` first"
    )


def _open(config: SaeEvaluateConfig, source: AutoencoderSource, model: Any, identity: str) -> Site:
    """Return the site of the latents, checked against the model, with the name of the site that they read."""
    try:
        site = latents_of(model, source, config.site)
    except InputError as error:
        raise InputError(f"{source.name} cannot be measured on {config.model}: {error}") from None
    configs = [cast(SparseAutoencoder, sae).config for sae in site.autoencoders]
    for of_layer in configs:
        if (of_layer.model_identity or identity) != identity:
            raise InputError(
                f"{source.name} was trained on a model called {of_layer.model_name}, which differs from"
                f" {config.model} as it is now: give that --model, or type `cratelm sae train` again"
            )
    named = config.site or configs[0].site or configs[0].hook_name
    return dataclasses.replace(site, name=named)


def _result(
    config: SaeEvaluateConfig, name: str, site: Site, measured: ReconstructionSums
) -> SaeEvaluateResult:
    sums = measured.sums
    saes = cast(tuple[SparseAutoencoder, ...], site.autoencoders)
    return SaeEvaluateResult(
        model=Path(config.model).name,
        sae=name,
        site=site.name,
        split=config.split,
        documents=int((sums["targets"] > 0).sum()),
        tokens=int(sums["text"].sum()),
        loss=_ratio(sums["loss"], sums["targets"]),
        layers=tuple(
            _layer_reconstruction(site_layer, site.layer_numbers[site_layer], sae, measured)
            for site_layer, sae in enumerate(saes)
        ),
        replacements=tuple(_layer_replacements(group, site, measured) for group in measured.groups),
    )


def _by_document(measured: ReconstructionSums, split: TokenSplit) -> DocumentLosses:
    """Return the sums of each document that has a predicted token."""
    sums = measured.sums
    predicted = sums["targets"] > 0
    all_layers = sums[measured.groups[-1], "reconstruction"]
    return DocumentLosses(
        document=tuple(split.ordinals[sums.documents[predicted]].tolist()),
        targets=tuple(sums["targets"][predicted].astype(int).tolist()),
        loss=tuple(sums["loss"][predicted].tolist()),
        reconstruction=tuple(all_layers[predicted].tolist()),
    )


def _layer_reconstruction(
    site_layer: int, layer: int, sae: Any, measured: ReconstructionSums
) -> LayerReconstruction:
    by_name = measured.sums.by_name
    # the sums of this layer are named (site_layer, figure); other names do not begin with a number
    sums = {name[1]: values for name, values in by_name.items() if name[0] == site_layer}
    text = measured.sums["text"]
    unexplained = _over(sums["error"], sums["spread"])
    if unexplained is not None:
        unexplained = dataclasses.replace(unexplained, value=1 - unexplained.value)
    return LayerReconstruction(
        layer=layer,
        inputs=sae.config.d_in,
        latents=sae.config.d_sae,
        explained_variance=unexplained,
        l0=_ratio(sums["on"], text),
        dead=dead_fraction(measured.firing[site_layer], int((text > 0).sum())),
        shrinkage=_over(sums["rebuilt_square"], sums["product"]),
        norm_ratio=_over(sums["rebuilt_norm"], sums["norm"]),
        own_l0=_ratio(sums["own_on"], text),
    )


def dead_fraction(firing: Firing, documents: int) -> Estimate:
    """Return the fraction of the latents that never fired, with its jackknife error over `documents` documents.

    Without document i, the latents that fired only there are dead too, so that the fraction is dead + only_i
    (Efron & Stein 1981: se^2 = (C - 1) / C sum_i (fraction_i - mean fraction)^2).
    """
    latents = len(firing.documents)
    dead = float((firing.documents == 0).mean())
    if documents < 2:
        return Estimate(dead, None)
    once = firing.last[
        firing.documents == 1
    ]  # for each latent that fired in one document, that document
    only = np.unique(once, return_counts=True)[1] / latents
    # `dead` is the same in every fraction_i and cancels. Documents without such a latent have only_i = 0 and
    # are not in `only`; each of them adds mean^2.
    mean = only.sum() / documents
    spread = ((only - mean) ** 2).sum() + (documents - len(only)) * mean**2
    return Estimate(dead, math.sqrt((documents - 1) / documents * spread))


def _layer_replacements(
    group: Group, site: Site, measured: ReconstructionSums
) -> LayerReplacements:
    def of(kind: Replacement) -> ReplacedLoss:
        return _replaced_loss(measured, group, kind)

    return LayerReplacements(
        layers=tuple(site.layer_numbers[site_layer] for site_layer in group),
        own_kept=tuple(measured.kept[site_layer] for site_layer in group),
        reconstruction=of("reconstruction"),
        own_top=of("own_top"),
        own=of("own"),
        mean=of("mean"),
        zero=of("zero"),
    )


def _replaced_loss(measured: ReconstructionSums, group: Group, kind: Replacement) -> ReplacedLoss:
    sums = measured.sums
    loss, clean, targets = sums[group, kind], sums["loss"], sums["targets"]

    def recovered(ablation: Replacement) -> Estimate | None:
        lost = sums[group, ablation] - clean
        return _over(sums[group, ablation] - loss, lost) if lost.sum() > 0 else None

    return ReplacedLoss(
        loss=_ratio(loss, targets),
        added=_ratio(loss - clean, targets),
        recovered_from_zero=recovered("zero"),
        recovered_from_mean=recovered("mean"),
    )


def _ratio(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Return sum(x) / sum(y) over the documents in which x or y is not 0."""
    nonzero = (x != 0) | (y != 0)
    return ratio(x[nonzero], y[nonzero])


def _over(x: np.ndarray, y: np.ndarray) -> Estimate | None:
    """Return `_ratio`, or None if the second sum is 0."""
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


def _layer_table(layers: tuple[LayerReconstruction, ...]) -> str:
    lines = [["", "inputs", "latents", *(heading for _, heading, _ in _LAYER_FIGURES)]]
    for f in layers:
        cells = [_show(getattr(f, name), form) for name, _, form in _LAYER_FIGURES]
        lines.append([f"layer {f.layer}", f"{f.inputs:,}", f"{f.latents:,}", *cells])
    return "\n".join(align(lines))


def _replacement_table(result: SaeEvaluateResult) -> str:
    lines = [["in place of activations", "loss added", "from zero", "from mean"]]
    for replaced in result.replacements:
        layers = f"layer {replaced.layers[0]}" if len(replaced.layers) == 1 else "all layers"
        kept = ", ".join(map(str, replaced.own_kept))
        rows = {
            "reconstruction": replaced.reconstruction,
            f"own code, strongest {kept}": replaced.own_top,
            "own code, all": replaced.own,
            "mean": replaced.mean,
            "zero": replaced.zero,
        }
        for label, loss in rows.items():
            recovered = [
                _show(r, ".2%") for r in (loss.recovered_from_zero, loss.recovered_from_mean)
            ]
            lines.append([f"{layers}: {label}", loss.added.show("+.4f"), *recovered])
    return "\n".join(align(lines))


def _steering_table(result: SaeEvaluateResult) -> str:
    lines = [["steered, one at a time", "fidelity", "KL of the edit", "KL of the reconstruction"]]
    sides = (("latents", result.steering), ("neurons of the site", result.own_steering))
    for label, figures in sides:
        for f in figures:
            cells = [_show(f.fidelity, ".3f"), f.edit.show(".4f"), f"{f.rebuilt:.4f}"]
            lines.append([f"layer {f.layer}: {len(f.steered)} {label}", *cells])
    return "\n".join(align(lines))
