"""`cratelm effects`: the effect of each neuron on the logits, and the loss without it.

Writes the folder `steer/MODEL/` of the run; `cratelm.steer.store` documents its files and reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import read_records, read_summaries
from cratelm.explain.selection import select_neurons
from cratelm.explain.store import SampledNeuron
from cratelm.models.open import sequence_length
from cratelm.models.partial_forward import PartialForward
from cratelm.records import Interval, NeuronId
from cratelm.runs import Draft, Run, check_memory
from cratelm.runs.devices import available_on
from cratelm.runs.ranks import Ranks, joined, n_ranks_here
from cratelm.score.controls import shuffled
from cratelm.stats.ends import neuron_means
from cratelm.stats.intervals import bootstrap
from cratelm.steer.ablation import Ablations, HeldOutText, ablate
from cratelm.steer.attribution import VocabularyEffect, attribute, best
from cratelm.steer.config import EffectsConfig
from cratelm.steer.direct_logit_attribution import direct_logit_attribution
from cratelm.steer.store import (
    Ablation,
    EffectKind,
    EffectsSummary,
    LayerEffects,
    LogitEffect,
    NeuronAblation,
    effects_stage,
    read_effects_summary,
    write_ablations,
    write_effects_summary,
    write_logit_effects,
)
from cratelm.text.table import align

CLEAR = 2
"""number of standard errors that a change of the loss must exceed to count in `raises` and `lowers`"""


@dataclass(frozen=True, kw_only=True)
class EffectsResult(EffectsSummary):
    """Result of `cratelm effects`."""

    path: Path
    """folder of `logit_effects.parquet`, `ablation.parquet` and `summary.json`"""

    def __str__(self) -> str:
        value = "its mean" if self.ablation == "mean" else "0"
        head = (
            f"{self.model}: loss {self.loss.show('.4f')} nats per token on {self.n_tokens:,} held-out"
            f" tokens of {self.n_documents} documents; each neuron set to {value}: {self.path}"
        )
        return "\n".join([head, *_table(self.layers)])


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("size", "|change|, nats", ".5f"),
    ("firing_rise", "where firing", "+.5f"),
    ("raises", "raise loss", ".0%"),
    ("lowers", "lower it", ".0%"),
    ("agreement", "first order ~ exact", "+.2f"),
    ("overlap", "top in common", ".0%"),
    ("named", "own tokens up", ".2f"),
    ("named_shuffled", "others' tokens up", ".2f"),
)


def _table(layers: Sequence[LayerEffects]) -> list[str]:
    header = ["layer", "neurons", "dead", *(label for _, label, _ in _COLUMNS)]
    rows = [header]
    for layer in layers:
        means = [_show(getattr(layer, name), form) for name, _, form in _COLUMNS]
        rows.append([str(layer.layer), str(layer.neurons), str(layer.dead), *means])
    return align(rows, [True] * len(header))


def _show(mean: Interval | None, form: str) -> str:
    return "-" if mean is None else mean.show(form)


def effects(config: EffectsConfig) -> EffectsResult:
    """Measure the effects of single neurons on logits and loss, write `steer/MODEL/`, and return the summary.

    If the stage is finished, its summary is read back. Processes that `torchrun` started each measure a share of the
    neurons, and write what one would have written.

    Raises `InputError` if the run has no harvest of the model, or too little held-out text.
    """
    with joined() as ranks:
        return _measured(config, ranks)


def _measured(config: EffectsConfig, ranks: Ranks) -> EffectsResult:
    run = Run(config.run)
    inputs = {
        "tokens": run.stage("tokens").require("tokenize"),
        "activations": run.stage("activations", config.model).require("harvest"),
    }
    stage = effects_stage(run, config.model)
    if ranks.by_first(lambda: stage.is_finished(config, inputs, force=config.force)):
        return _result(stage.path)
    harvested = open_harvested(run, config.model, config)
    selected = select_neurons(harvested.folder, config.neurons, config.seed, config.only)
    partial = PartialForward(harvested.subject.model, harvested.site)
    wanted = config.sequence_length or harvested.sequence_length
    length = sequence_length(harvested.subject, wanted)
    split, begin = harvested.store.split("held_out"), harvested.beginning
    text = HeldOutText.of(split, length, config.tokens, config.seed, begin)
    at_once = max(length, min(config.batch_tokens, text.n_tokens))
    needed = {"batch_tokens": 4 * at_once * max(harvested.site.n_neurons)}
    free = available_on(harvested.subject.model.device)
    free = free and free // n_ranks_here()
    check_memory(config, needed, "the activations of one batch", available=free)
    with ranks.write(stage, config, inputs) as draft:
        effects_by_neuron = _effects(config, harvested, partial, selected, text, ranks)
        ablations = _ablations(config, harvested, partial, selected, text, ranks)
        if draft is not None:
            _write(draft, config, harvested, selected, effects_by_neuron, ablations, text)
    return _result(stage.path)


def _by_layer(
    harvested: HarvestContext, selected: Sequence[SampledNeuron]
) -> list[NDArray[np.int64]]:
    """Return the indices [L][k] of the selected neurons of each layer of the site."""
    return [
        np.array([s.neuron.index for s in selected if s.neuron.layer == layer], np.int64)
        for layer in harvested.site.layer_numbers
    ]


def _effects(
    config: EffectsConfig,
    harvested: HarvestContext,
    partial: PartialForward,
    selected: Sequence[SampledNeuron],
    text: HeldOutText,
    ranks: Ranks,
) -> dict[NeuronId, VocabularyEffect]:
    """Return the effects on the logits of all selected neurons that fire at a drawn token, on rank 0."""
    tokens, *_ = next(text.batches(config.batch_tokens))
    sample = partial.trace(torch.from_numpy(tokens[:, :-1]).to(partial.model.device))
    matrix = direct_logit_attribution(partial, sample)
    effects: list[VocabularyEffect] = []
    with tqdm(
        total=len(selected) // ranks.share.of,
        desc=f"logits {config.model}",
        unit="neuron",
        disable=config.quiet or not ranks.is_first,
    ) as bar:
        for site_layer, indices in enumerate(_by_layer(harvested, selected)):
            layer = harvested.site.layer_numbers[site_layer]
            records = read_records(harvested.folder, "fit", [layer], indices.tolist())
            for effect in attribute(
                partial,
                site_layer,
                records,
                matrix,
                vocabulary=harvested.store.vocab_size,
                positions=config.positions,
                seed=config.seed,
                share=ranks.share,
                prefix=harvested.beginning.prefix(harvested.store.eot_id),
            ):
                bar.update()
                if isinstance(effect, VocabularyEffect):
                    effects.append(effect)
    everyone = [effect for of_rank in ranks.collected(effects) for effect in of_rank]
    # in the order in which one process reads the records, on which the shuffled null control depends
    return {e.neuron: e for e in sorted(everyone, key=lambda e: (e.neuron.layer, e.neuron.index))}


def _ablations(
    config: EffectsConfig,
    harvested: HarvestContext,
    partial: PartialForward,
    selected: Sequence[SampledNeuron],
    text: HeldOutText,
    ranks: Ranks,
) -> Ablations:
    """Return the loss without each selected neuron, on rank 0."""
    neurons = _by_layer(harvested, selected)
    edits = None
    if config.ablation == "mean":
        mean_of = {s.neuron: s.mean for s in read_summaries(harvested.folder, "fit")}
        means = [
            torch.tensor([mean_of[s.neuron] for s in selected if s.neuron.layer == layer])
            for layer in harvested.site.layer_numbers
        ]
        edits = lambda tokens, positions: means  # noqa: E731
    # rounded up, like the batches of `HeldOutText.batches`
    batches = -(-len(text.sequences) // max(1, config.batch_tokens // text.length))
    with tqdm(
        total=len(selected) * batches // ranks.share.of,
        desc=f"ablation {config.model}",
        unit="neuron and batch",
        disable=config.quiet or not ranks.is_first,
    ) as bar:
        ablations = ablate(partial, text, neurons, edits, config.batch_tokens, bar, ranks.share)
    for of_rank in ranks.collected(ablations):
        ablations.add(of_rank)
    return ablations


def _write(
    draft: Draft,
    config: EffectsConfig,
    harvested: HarvestContext,
    selected: Sequence[SampledNeuron],
    effects_by_neuron: dict[NeuronId, VocabularyEffect],
    ablations: Ablations,
    text: HeldOutText,
) -> None:
    strings = harvested.store.token_strings
    donors = shuffled(list(effects_by_neuron), config.seed)
    effects: list[LogitEffect] = []
    for neuron, effect in effects_by_neuron.items():
        other = np.zeros(0, np.int64)
        if neuron in donors:
            other = effects_by_neuron[donors[neuron]].named
        effects += _logit_effects(effect, other, config.top, strings)
    write_logit_effects(draft.path, effects)
    without = _neuron_ablations(harvested, selected, ablations)
    write_ablations(draft.path, without)
    exact = [effect for effect in effects if effect.kind == "exact"]
    summary = EffectsSummary(
        model=config.model,
        ablation=config.ablation,
        loss=ablations.base,
        n_tokens=text.n_tokens,
        n_documents=without[0].ablation.n_documents,
        layers=tuple(
            _layer(layer, without, exact, config.seed)
            for layer in sorted({s.neuron.layer for s in selected})
        ),
    )
    draft.results.update(write_effects_summary(draft.path, summary))


def _neuron_ablations(
    harvested: HarvestContext, selected: Sequence[SampledNeuron], ablations: Ablations
) -> list[NeuronAblation]:
    """Return the ablations with their neurons, in the order of `selected`."""
    by_neuron: dict[NeuronId, Ablation] = {}
    for layer, of_layer in zip(harvested.site.layer_numbers, ablations.neurons, strict=True):
        neurons = [s.neuron for s in selected if s.neuron.layer == layer]
        by_neuron |= {neuron: of_layer[j] for j, neuron in enumerate(neurons)}
    return [NeuronAblation(s.neuron, s.dead, by_neuron[s.neuron]) for s in selected]


def _logit_effects(
    effect: VocabularyEffect, other: NDArray[np.int64], top: int, strings: Sequence[str]
) -> list[LogitEffect]:
    """Return the exact effect, and the first-order effect if there is one.

    `other` are the tokens that another neuron of the layer fires on: the null control of `named`.
    """
    effects = [
        replace(
            _strongest(effect, "exact", effect.exact, top, strings),
            agreement=effect.agreement,
            overlap=effect.overlap(top),
            named=effect.promotes(effect.named),
            named_shuffled=effect.promotes(other),
        )
    ]
    if effect.first_order is not None:
        effects.append(_strongest(effect, "first_order", effect.first_order, top, strings))
    return effects


def _strongest(
    effect: VocabularyEffect,
    kind: EffectKind,
    values: NDArray[np.float64],
    top: int,
    strings: Sequence[str],
) -> LogitEffect:
    """Return the `top` tokens with the largest `values` [V], and those with the smallest."""
    up, down = best(values, top), best(-values, top)
    return LogitEffect(
        neuron=effect.neuron,
        kind=kind,
        activation=effect.activation,
        n_positions=effect.n_positions,
        promoted_ids=tuple(up.tolist()),
        promoted=tuple(strings[int(i)] for i in up),
        promoted_values=tuple(values[up].tolist()),
        suppressed_ids=tuple(down.tolist()),
        suppressed=tuple(strings[int(i)] for i in down),
        suppressed_values=tuple(values[down].tolist()),
    )


def _layer(
    layer: int, without: Sequence[NeuronAblation], exact: Sequence[LogitEffect], seed: int
) -> LayerEffects:
    """Return the figures of one layer; dead neurons are counted but excluded from means."""
    of_layer = [row for row in without if row.neuron.layer == layer]
    rows = [row for row in of_layer if not row.dead]
    alive, neurons = [row.ablation for row in rows], [row.neuron for row in rows]
    effects = [effect for effect in exact if effect.neuron.layer == layer]
    changes = [ablation.change.value for ablation in alive]

    def mean(values: Sequence[float | None]) -> Interval | None:
        return bootstrap(list(neuron_means(neurons, values).values()), seed)

    def of_effects(values: Sequence[float | None]) -> Interval | None:
        return bootstrap(list(neuron_means((e.neuron for e in effects), values).values()), seed)

    def share(sign: int) -> Interval | None:
        """Return the fraction whose loss clearly changes in one direction, of those that have a standard error."""
        errors = [a.change.error for a in alive]
        return mean(
            [
                None if error is None else float(sign * change > CLEAR * error)
                for change, error in zip(changes, errors, strict=True)
            ]
        )

    return LayerEffects(
        layer=layer,
        neurons=len(of_layer),
        dead=len(of_layer) - len(alive),
        silent=len(alive) - len(effects),
        size=mean([abs(change) for change in changes]),
        rise=mean(changes),
        firing_rise=mean([a.where_firing.value if a.where_firing else None for a in alive]),
        raises=share(1),
        lowers=share(-1),
        agreement=of_effects([effect.agreement for effect in effects]),
        overlap=of_effects([effect.overlap for effect in effects]),
        named=of_effects([effect.named for effect in effects]),
        named_shuffled=of_effects([effect.named_shuffled for effect in effects]),
    )


def _result(folder: Path) -> EffectsResult:
    return EffectsResult(path=folder, **vars(read_effects_summary(folder)))
