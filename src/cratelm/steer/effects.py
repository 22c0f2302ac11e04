"""`cratelm effects`: what each neuron writes to the vocabulary, and the loss without it.

Writes `steer/MODEL/`:

`logit_effects.parquet`, a row a neuron and kind (`exact`, `first_order`), none for dead neurons:
model, site, layer, index; kind; activation (mean at the tokens it is taken over); n_positions;
promoted_ids, promoted, promoted_values and suppressed_ids, suppressed, suppressed_values (ids, strings
and logits less their mean over the vocabulary, strongest first); agreement (rank correlation of the two
kinds over the vocabulary), overlap (part of the promoted that both name), named (chance that a token
it fires on is promoted more than another), named_shuffled (the same of another neuron's tokens): these
four in rows `exact` alone.

`ablation.parquet`, a row a neuron: model, site, layer, index; dead (on the fit split); change and
change_error (loss without it less loss with it, nats a token, and its standard error over documents);
firing_change and firing_error (over tokens predicted from where it fires); n_tokens, n_firing, n_documents.

`summary.json`: the figures by layer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cratelm.activations.open_harvest import HarvestContext, open_harvested
from cratelm.activations.store import NEURON_FIELDS, read_records, read_summaries
from cratelm.explain.selection import select_neurons
from cratelm.explain.store import SampledNeuron
from cratelm.models.partial_forward import PartialForward
from cratelm.records import Estimate, Interval, NeuronId, parse_neuron_ids
from cratelm.runs import Draft, Run, write_json
from cratelm.score.controls import shuffled
from cratelm.stats.intervals import bootstrap
from cratelm.steer.ablation import Ablation, Ablations, Text, ablate
from cratelm.steer.attribution import Effect, attribute, best
from cratelm.steer.config import EffectsConfig
from cratelm.steer.direct_logit_attribution import direct_logit_attribution
from cratelm.text.table import align

_IDS, _WORDS, _VALUES = pa.list_(pa.int32()), pa.list_(pa.string()), pa.list_(pa.float32())
EFFECT_SCHEMA = pa.schema(
    [
        *NEURON_FIELDS,
        ("kind", pa.string()),
        ("activation", pa.float64()),
        ("n_positions", pa.int32()),
        ("promoted_ids", _IDS),
        ("promoted", _WORDS),
        ("promoted_values", _VALUES),
        ("suppressed_ids", _IDS),
        ("suppressed", _WORDS),
        ("suppressed_values", _VALUES),
        ("agreement", pa.float64()),
        ("overlap", pa.float64()),
        ("named", pa.float64()),
        ("named_shuffled", pa.float64()),
    ]
)
ABLATION_SCHEMA = pa.schema(
    [
        *NEURON_FIELDS,
        ("dead", pa.bool_()),
        ("change", pa.float64()),
        ("change_error", pa.float64()),
        ("firing_change", pa.float64()),
        ("firing_error", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_firing", pa.int64()),
        ("n_documents", pa.int64()),
    ]
)
CLEAR = 2
"""standard errors beyond which a change counts as clear"""


@dataclass(frozen=True)
class LayerEffects:
    """Figures of one layer; intervals are over its neurons."""

    layer: int
    neurons: int
    dead: int
    """never above 0 on the fit split"""
    silent: int
    """of the others, those that fire at no token drawn, so that no effect on the logits is known"""
    size: Interval | None
    """mean absolute change of the loss, nats a token"""
    rise: Interval | None
    """mean change of the loss"""
    firing_rise: Interval | None
    """mean change over tokens predicted from where the neuron fires"""
    raises: Interval | None
    """part of the neurons without which the loss is higher by more than two standard errors"""
    lowers: Interval | None
    """part without which it is lower by more than two"""
    agreement: Interval | None
    """rank correlation over the vocabulary of the first-order reading with the exact effect"""
    overlap: Interval | None
    """part of the tokens promoted most that both name"""
    named: Interval | None
    """chance that a token that the neuron fires on is promoted more than another"""
    named_shuffled: Interval | None
    """the same of tokens that another neuron of the layer fires on"""


@dataclass(frozen=True)
class EffectsResult:
    """What `effects` measured."""

    path: Path
    """folder of `logit_effects.parquet`, `ablation.parquet` and `summary.json`"""
    model: str
    ablation: str
    """what neurons are put to"""
    loss: Estimate
    """of the plain model on the same tokens, nats a token"""
    n_tokens: int
    n_documents: int
    layers: tuple[LayerEffects, ...]

    def __str__(self) -> str:
        put = "its mean" if self.ablation == "mean" else "0"
        head = (
            f"{self.model}: loss {self.loss.show('.4f')} nats a token on {self.n_tokens:,} held-out"
            f" tokens of {self.n_documents} documents; each neuron put to {put}: {self.path}"
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
    for found in layers:
        shown = [_shown(getattr(found, name), form) for name, _, form in _COLUMNS]
        rows.append([str(found.layer), str(found.neurons), str(found.dead), *shown])
    return align(rows, [True] * len(header))


def _shown(found: Interval | None, form: str) -> str:
    return "-" if found is None else found.show(form)


def effects(config: EffectsConfig) -> EffectsResult:
    """Runs the stage; a finished one is read back.

    Raises `InputError` where the run has no harvest of the model, or too little held-out text.
    """
    run = Run(config.run)
    inputs = {
        "tokens": run.stage("tokens").require("tokenize").identity,
        "activations": run.stage("activations", config.model).require("harvest").identity,
    }
    stage = run.stage("steer", config.model)
    if stage.is_finished(config, inputs, force=config.force):
        return _read(stage.path, stage.require("effects").results)
    harvested = open_harvested(run, config.model)
    chosen = parse_neuron_ids("--only", config.only)
    selected = select_neurons(harvested.folder, config.neurons, config.seed, chosen)
    rest = PartialForward(harvested.subject.model, harvested.site)
    length = config.sequence_length or harvested.sequence_length
    text = Text.of(harvested.store.split("held_out"), length, config.tokens, config.seed)
    with stage.write(config, inputs) as draft:
        found = _effects(config, harvested, rest, selected, text)
        ablations = _ablations(config, harvested, rest, selected, text)
        _write(draft, config, harvested, selected, found, ablations, text)
        results = draft.results
    return _read(stage.path, results)


def _by_place(
    harvested: HarvestContext, selected: Sequence[SampledNeuron]
) -> list[NDArray[np.int64]]:
    """[L][k] indices of the neurons of each place."""
    return [
        np.array([s.neuron.index for s in selected if s.neuron.layer == layer], np.int64)
        for layer in harvested.site.layer_numbers
    ]


def _effects(
    config: EffectsConfig,
    harvested: HarvestContext,
    rest: PartialForward,
    selected: Sequence[SampledNeuron],
    text: Text,
) -> dict[NeuronId, Effect]:
    tokens, _ = next(text.batches(config.batch_tokens))
    sample = rest.trace(torch.from_numpy(tokens[:, :-1]).to(rest.model.device))
    matrix = direct_logit_attribution(rest, sample)
    found = {}
    with tqdm(
        total=len(selected), desc=f"logits {config.model}", unit="neuron", disable=config.quiet
    ) as bar:
        for place, indices in enumerate(_by_place(harvested, selected)):
            layer = harvested.site.layer_numbers[place]
            records = read_records(harvested.folder, "fit", [layer], indices.tolist())
            for effect in attribute(
                rest,
                place,
                records,
                matrix,
                vocabulary=harvested.store.vocab_size,
                positions=config.positions,
                seed=config.seed,
            ):
                bar.update()
                if isinstance(effect, Effect):
                    found[effect.neuron] = effect
    return found


def _ablations(
    config: EffectsConfig,
    harvested: HarvestContext,
    rest: PartialForward,
    selected: Sequence[SampledNeuron],
    text: Text,
) -> Ablations:
    neurons = _by_place(harvested, selected)
    means = None
    if config.ablation == "mean":
        known = {s.neuron: s.mean for s in read_summaries(harvested.folder, "fit")}
        means = [
            np.array([known[s.neuron] for s in selected if s.neuron.layer == layer])
            for layer in harvested.site.layer_numbers
        ]
    batches = -(-len(text.sequences) // max(1, config.batch_tokens // text.length))
    with tqdm(
        total=len(selected) * batches,
        desc=f"ablation {config.model}",
        unit="neuron and batch",
        disable=config.quiet,
    ) as bar:
        return ablate(rest, text, neurons, means, config.batch_tokens, bar)


def _write(
    draft: Draft,
    config: EffectsConfig,
    harvested: HarvestContext,
    selected: Sequence[SampledNeuron],
    found: dict[NeuronId, Effect],
    ablations: Ablations,
    text: Text,
) -> None:
    strings = harvested.store.decode_tokens(range(harvested.store.vocab_size))
    donors = shuffled(list(found), config.seed)
    rows: list[dict[str, Any]] = []
    for neuron, effect in found.items():
        other = found[donors[neuron]].named if neuron in donors else np.zeros(0, np.int64)
        rows += _effect_rows(effect, other, config.top, strings)
    pq.write_table(pa.Table.from_pylist(rows, EFFECT_SCHEMA), draft.path / "logit_effects.parquet")
    lost = _lost(harvested, selected, ablations)
    without = [_ablation_row(s, lost[s.neuron]) for s in selected]
    pq.write_table(pa.Table.from_pylist(without, ABLATION_SCHEMA), draft.path / "ablation.parquet")
    exact = [row for row in rows if row["kind"] == "exact"]
    some = next(iter(lost.values()))
    draft.results.update(
        model=config.model,
        ablation=config.ablation,
        loss=asdict(ablations.base),
        n_tokens=text.n_tokens,
        n_documents=some.n_documents,
        layers=[
            asdict(_layer(layer, without, exact, config.seed))
            for layer in sorted({s.neuron.layer for s in selected})
        ],
    )
    write_json(draft.path / "summary.json", draft.results)


def _lost(
    harvested: HarvestContext, selected: Sequence[SampledNeuron], ablations: Ablations
) -> dict[NeuronId, Ablation]:
    found = {}
    for layer, of_layer in zip(harvested.site.layer_numbers, ablations.neurons, strict=True):
        mine = [s.neuron for s in selected if s.neuron.layer == layer]
        found |= dict(zip(mine, of_layer, strict=True))
    return found


def _effect_rows(
    effect: Effect, other: NDArray[np.int64], top: int, strings: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for the exact effect, one for the first-order reading where there is one."""
    rows = [
        {
            **_effect_row(effect, "exact", effect.exact, top, strings),
            "agreement": effect.agreement,
            "overlap": effect.overlap(top),
            "named": effect.place_of(effect.named),
            "named_shuffled": effect.place_of(other),
        }
    ]
    if effect.first_order is not None:
        rows.append(_effect_row(effect, "first_order", effect.first_order, top, strings))
    return rows


def _effect_row(
    effect: Effect, kind: str, values: NDArray[np.float64], top: int, strings: Sequence[str]
) -> dict[str, Any]:
    up, down = best(values, top), best(-values, top)
    return {
        **vars(effect.neuron),
        "kind": kind,
        "activation": effect.activation,
        "n_positions": effect.n_positions,
        "promoted_ids": up.tolist(),
        "promoted": [strings[i] for i in up],
        "promoted_values": values[up].tolist(),
        "suppressed_ids": down.tolist(),
        "suppressed": [strings[i] for i in down],
        "suppressed_values": values[down].tolist(),
    }


def _ablation_row(selected: SampledNeuron, lost: Ablation) -> dict[str, Any]:
    firing = lost.where_firing
    return {
        **vars(selected.neuron),
        "dead": selected.dead,
        "change": lost.change.value,
        "change_error": lost.change.error,
        "firing_change": firing.value if firing else None,
        "firing_error": firing.error if firing else None,
        "n_tokens": lost.n_tokens,
        "n_firing": lost.n_firing,
        "n_documents": lost.n_documents,
    }


def _layer(
    layer: int, without: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]], seed: int
) -> LayerEffects:
    """Figures of one layer; dead neurons are counted and left out of every mean."""
    mine = [row for row in without if row["layer"] == layer]
    alive = [row for row in mine if not row["dead"]]
    known = [row for row in exact if row["layer"] == layer]
    change = [row["change"] for row in alive]
    judged = [row for row in alive if row["change_error"] is not None]

    def mean(values: Sequence[float | None]) -> Interval | None:
        return bootstrap([v for v in values if v is not None], seed)

    return LayerEffects(
        layer=layer,
        neurons=len(mine),
        dead=len(mine) - len(alive),
        silent=len(alive) - len(known),
        size=mean([abs(v) for v in change]),
        rise=mean(change),
        firing_rise=mean([row["firing_change"] for row in alive]),
        raises=mean([float(r["change"] > CLEAR * r["change_error"]) for r in judged]),
        lowers=mean([float(-r["change"] > CLEAR * r["change_error"]) for r in judged]),
        agreement=mean([row["agreement"] for row in known]),
        overlap=mean([row["overlap"] for row in known]),
        named=mean([row["named"] for row in known]),
        named_shuffled=mean([row["named_shuffled"] for row in known]),
    )


def _read(path: Path, results: dict[str, Any]) -> EffectsResult:
    def layer(found: dict[str, Any]) -> LayerEffects:
        known: dict[str, Any] = {
            k: Interval(**v) if isinstance(v, dict) else v for k, v in found.items()
        }
        return LayerEffects(**known)

    told = dict(results)
    layers = tuple(layer(found) for found in told.pop("layers"))
    return EffectsResult(path=path, loss=Estimate(**told.pop("loss")), layers=layers, **told)
