"""Read and write the results of `cratelm effects` and `cratelm intervene`: the folders under `steer/` of a run.

Both commands write the stage `steer`, under different names and with different files:

    steer/MODEL/         effects: logit_effects.parquet, ablation.parquet, summary.json
    steer/MODEL@NAME/    intervene: interventions.parquet, continuations.parquet, summary.json, calls.json

`effects_stage` and `interventions_stage` return the two stages; `models_with_effects` and
`intervention_names` list them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.records import Estimate, Interval, NeuronId
from cratelm.runs import Run, Stage, known_fields, write_json
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.names import set_name, sets_of, split_set
from cratelm.runs.reading import read_json, read_rows, verified

EffectKind = Literal["exact", "first_order"]
"""`exact`: through everything after the neuron; `first_order`: only through the last norm and the
unembedding"""
SteeringControl = Literal["none", "shuffled", "random"]
STEERING_CONTROLS: tuple[SteeringControl, ...] = ("none", "shuffled", "random")
"""`none`: the neuron's own explanation on its own continuations; `shuffled`: another neuron's explanation on
the same continuations; `random`: the neuron's own explanation on continuations with another neuron steered as
strongly"""
CONTROL_LABELS: dict[SteeringControl, str] = {
    "none": "own explanation",
    "shuffled": "another neuron's explanation",
    "random": "another neuron steered",
}
SUMMARY = "summary.json"
LOGIT_EFFECTS = TableFile(
    "steer/MODEL/logit_effects.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn(
            "kind",
            pa.string(),
            "`exact`: through everything after the neuron, at tokens where it fires; `first_order`: its column through the last norm and the unembedding",
        ),
        FileColumn(
            "activation",
            pa.float64(),
            "raw activation, mean over the tokens where the effect is measured",
        ),
        FileColumn("n_positions", pa.int32(), "number of these tokens"),
        FileColumn(
            "promoted_ids", pa.list_(pa.int32()), "token ids that are raised most, strongest first"
        ),
        FileColumn("promoted", pa.list_(pa.string()), "the same as text"),
        FileColumn(
            "promoted_values",
            pa.list_(pa.float32()),
            "effect on their logits, minus its mean over the vocabulary",
        ),
        FileColumn(
            "suppressed_ids",
            pa.list_(pa.int32()),
            "token ids that are lowered most, strongest first",
        ),
        FileColumn("suppressed", pa.list_(pa.string()), "the same as text"),
        FileColumn(
            "suppressed_values",
            pa.list_(pa.float32()),
            "effect on their logits, minus its mean over the vocabulary",
        ),
        FileColumn(
            "agreement",
            pa.float64(),
            "for `exact`: rank correlation over the vocabulary with the first-order effect, -1 to 1",
        ),
        FileColumn(
            "overlap",
            pa.float64(),
            "for `exact`: fraction of the promoted tokens that both effects share, 0 to 1",
        ),
        FileColumn(
            "named",
            pa.float64(),
            "for `exact`: probability that a token it fires on is promoted more than another token, 0 to 1",
        ),
        FileColumn("named_shuffled", pa.float64(), "the same for another neuron's tokens"),
    ),
)
ABLATION = TableFile(
    "steer/MODEL/ablation.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("dead", pa.bool_(), "never above 0 on the fit split"),
        FileColumn(
            "change",
            pa.float64(),
            "held-out loss without the neuron minus the loss with it, nats per token",
        ),
        FileColumn("change_error", pa.float64(), "its standard error, over documents"),
        FileColumn(
            "firing_change",
            pa.float64(),
            "the same over tokens predicted at positions where it fires",
        ),
        FileColumn("firing_error", pa.float64(), "its standard error"),
        FileColumn("n_tokens", pa.int64(), "tokens measured on"),
        FileColumn(
            "n_firing", pa.int64(), "of these, tokens predicted at positions where it fires"
        ),
        FileColumn("n_documents", pa.int64(), "documents that the tokens belong to"),
    ),
)
INTERVENTIONS = TableFile(
    "steer/MODEL/interventions.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("explainer", pa.string(), "explainer of the explanation that the judge read"),
        FileColumn(
            "control",
            pa.string(),
            "`none`, `shuffled` (another neuron's explanation) or `random` (another neuron steered as strongly)",
        ),
        FileColumn("explanation", pa.string(), "as the judge read it"),
        FileColumn(
            "value",
            pa.float64(),
            "mean probability that the judge names the steered text, 0 to 1, chance 0.5; null if there is none",
        ),
        FileColumn("status", pa.string(), "`defined`, `undefined`, `dead` or `failed`"),
        FileColumn("reason", pa.string(), "why there is no value; empty if there is one"),
        FileColumn("pairs", pa.int32(), "pairs of continuations judged"),
        FileColumn("same", pa.int32(), "pairs omitted because both texts are equal"),
        FileColumn("steered", pa.int32(), "index of the neuron that was steered"),
        FileColumn("setting", pa.float64(), "raw activation that it was set to"),
        FileColumn(
            "kl",
            pa.float64(),
            "strength: divergence of the steered from the plain predictions, nats per token",
        ),
    ),
)
CONTINUATIONS = TableFile(
    "steer/MODEL/continuations.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("prompt", pa.string(), "the text that is continued"),
        FileColumn("plain", pa.string(), "its continuation without steering"),
        FileColumn("steered", pa.string(), "its continuation with the neuron steered"),
        FileColumn(
            "random", pa.string(), "its continuation with another neuron steered as strongly"
        ),
    ),
)


# ---- effects: steer/MODEL/ ------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitEffect:
    """The tokens whose logits one neuron raises and lowers most where it fires, strongest first."""

    neuron: NeuronId
    kind: EffectKind
    activation: float
    """mean activation at the tokens where the effect is measured"""
    n_positions: int
    """number of these tokens"""
    promoted_ids: tuple[int, ...]
    promoted: tuple[str, ...]
    promoted_values: tuple[float, ...]
    """effect on their logits, minus its mean over the vocabulary"""
    suppressed_ids: tuple[int, ...]
    suppressed: tuple[str, ...]
    suppressed_values: tuple[float, ...]
    agreement: float | None = None
    """for `exact`: rank correlation over the vocabulary with the first-order effect"""
    overlap: float | None = None
    """for `exact`: fraction of the promoted tokens that both effects share"""
    named: float | None = None
    """for `exact`: probability that a token it fires on is promoted more than another token"""
    named_shuffled: float | None = None
    """the same for the tokens that another neuron of the layer fires on"""


@dataclass(frozen=True)
class Ablation:
    """The loss without one neuron minus the loss with it, nats per token."""

    change: Estimate
    """over all tokens; standard error over documents"""
    where_firing: Estimate | None
    """over tokens predicted at positions where it fires; None if it does not fire"""
    n_tokens: int
    n_firing: int
    n_documents: int


@dataclass(frozen=True)
class NeuronAblation:
    """One row of `ablation.parquet`."""

    neuron: NeuronId
    dead: bool
    """never above 0 on the fit split"""
    ablation: Ablation


@dataclass(frozen=True)
class LayerEffects:
    """Figures of one layer; intervals are over its neurons, excluding dead ones."""

    layer: int
    neurons: int
    dead: int
    """never above 0 on the fit split"""
    silent: int
    """neurons that are not dead but fire at no drawn token, and so have no measured effect on the logits"""
    size: Interval | None
    """mean absolute change of the loss, nats per token"""
    rise: Interval | None
    """mean change of the loss"""
    firing_rise: Interval | None
    """mean change over tokens predicted at positions where the neuron fires"""
    raises: Interval | None
    """fraction of the neurons without which the loss is higher by more than two standard errors"""
    lowers: Interval | None
    """fraction without which it is lower by more than two"""
    agreement: Interval | None
    """rank correlation over the vocabulary of the first-order with the exact effect"""
    overlap: Interval | None
    """fraction of the most promoted tokens that both effects share"""
    named: Interval | None
    """probability that a token that the neuron fires on is promoted more than another token"""
    named_shuffled: Interval | None
    """the same for tokens that another neuron of the layer fires on"""


@dataclass(frozen=True, kw_only=True)
class EffectsSummary:
    """`summary.json` of `cratelm effects`."""

    model: str
    ablation: Literal["zero", "mean"]
    """value that neurons are set to: 0, or their mean"""
    loss: Estimate
    """loss of the unedited model on the same tokens, nats per token"""
    n_tokens: int
    n_documents: int
    layers: tuple[LayerEffects, ...]


def effects_stage(run: Run, model: str) -> Stage:
    """Return the stage that `cratelm effects` writes for a model."""
    return run.stage("steer", model)


def models_with_effects(run: Run) -> list[str]:
    """Return the models for which `cratelm effects` has finished, sorted."""
    return [name for name in run.models("steer") if not split_set(name)[1]]


def write_logit_effects(folder: Path, effects: Sequence[LogitEffect]) -> None:
    """Write `logit_effects.parquet` into an existing folder."""
    rows = [{**asdict(e), **vars(e.neuron)} for e in effects]
    _write(LOGIT_EFFECTS, rows, folder)


@checked_arguments()
def read_logit_effects(folder: Path, kind: EffectKind = "exact") -> list[LogitEffect]:
    """Return the effects of all measured neurons, in the order of the file; dead and silent ones have none."""
    return read_rows(_path(LOGIT_EFFECTS, folder), _logit_effect, [("kind", "=", kind)])


@checked_arguments()
def read_logit_effect(
    folder: Path, neuron: NeuronId, kind: EffectKind = "exact"
) -> LogitEffect | None:
    """Return the effect of one neuron.

    None if it was not measured: the folder has no such file, the file is of another site, or the neuron is
    dead or was not drawn.
    """
    path = _path(LOGIT_EFFECTS, folder)
    if not verified(path).is_file():
        return None
    filters = [("layer", "=", neuron.layer), ("index", "=", neuron.index), ("kind", "=", kind)]
    found = read_rows(path, _logit_effect, filters)
    return found[0] if found and found[0].neuron.site == neuron.site else None


def _logit_effect(row: Mapping[str, Any]) -> LogitEffect:
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in row.items()
    }
    return LogitEffect(neuron=_take_neuron(fields), **fields)


def write_ablations(folder: Path, ablations: Sequence[NeuronAblation]) -> None:
    """Write `ablation.parquet` into an existing folder."""
    rows = [
        {
            **vars(row.neuron),
            "dead": row.dead,
            "change": row.ablation.change.value,
            "change_error": row.ablation.change.error,
            "firing_change": None if (at := row.ablation.where_firing) is None else at.value,
            "firing_error": None if at is None else at.error,
            "n_tokens": row.ablation.n_tokens,
            "n_firing": row.ablation.n_firing,
            "n_documents": row.ablation.n_documents,
        }
        for row in ablations
    ]
    _write(ABLATION, rows, folder)


@checked_arguments()
def read_ablations(folder: Path) -> list[NeuronAblation]:
    """Return the rows of `ablation.parquet`, in the order of the file: every neuron that was drawn."""
    return read_rows(_path(ABLATION, folder), _ablation)


def _ablation(row: dict[str, Any]) -> NeuronAblation:
    firing = row["firing_change"]
    ablation = Ablation(
        change=Estimate(row["change"], row["change_error"]),
        where_firing=None if firing is None else Estimate(firing, row["firing_error"]),
        n_tokens=row["n_tokens"],
        n_firing=row["n_firing"],
        n_documents=row["n_documents"],
    )
    return NeuronAblation(_take_neuron(row), row["dead"], ablation)


def write_effects_summary(folder: Path, summary: EffectsSummary) -> dict[str, Any]:
    """Write `summary.json` into an existing folder; return its content."""
    content = asdict(summary)
    write_json(folder / SUMMARY, content)
    return content


@checked_arguments()
def read_effects_summary(folder: Path) -> EffectsSummary:
    """Return `summary.json` of a folder that `cratelm effects` wrote."""
    return read_json(folder / SUMMARY, _effects_summary)


def _effects_summary(content: dict[str, Any]) -> EffectsSummary:
    layers: list[dict[str, Any]] = [
        {name: Interval(**v) if isinstance(v, dict) else v for name, v in layer.items()}
        for layer in content.pop("layers")
    ]
    loss = Estimate(**content.pop("loss"))
    return EffectsSummary(
        loss=loss,
        layers=tuple(LayerEffects(**known_fields(LayerEffects, x)) for x in layers),
        **known_fields(EffectsSummary, content),
    )


# ---- interventions: steer/MODEL@NAME/ -------------------------------------------------------------


@dataclass(frozen=True)
class Intervention:
    """One row of `interventions.parquet`: the judgement of one neuron under one control."""

    neuron: NeuronId
    explainer: str
    control: SteeringControl
    explanation: str
    """as the judge read it"""
    value: float | None
    """mean probability that the judge names the steered text, 0..1, chance 0.5"""
    status: str
    reason: str
    """why there is no value; empty if there is one"""
    pairs: int
    """pairs of continuations judged"""
    same: int
    """pairs omitted because both texts are equal"""
    steered: int | None
    """index of the neuron that was steered"""
    setting: float | None
    """raw activation that it was set to"""
    kl: float | None
    """divergence of the steered predictions from the plain ones, nats per token"""


@dataclass(frozen=True)
class ContinuationTexts:
    """One row of `continuations.parquet`: one prompt and its three continuations."""

    neuron: NeuronId
    prompt: str
    plain: str
    steered: str
    random: str
    """with another neuron steered as strongly; empty if the layer has no other"""


@dataclass(frozen=True)
class ControlSummary:
    """One control over all neurons."""

    control: SteeringControl
    mean: Interval | None
    """probability of naming the steered text; interval over neurons"""
    defined: int
    undefined: int
    dead: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class InterventionSummary:
    """`summary.json` of `cratelm intervene`."""

    model: str
    judge: str
    explainer: str
    n_neurons: int
    controls: tuple[ControlSummary, ...]
    over_shuffled: Interval | None
    """own minus shuffled explanation, paired by neuron"""
    over_random: Interval | None
    """own minus another neuron steered, paired by neuron"""
    kl: Interval | None
    """divergence of the next-token distribution due to steering, nats per token"""
    mass: float | None
    """mean fraction of all probability that falls on the judge's two answers; None if the judge reports
    no probabilities"""
    known: float | None
    """mean probability that the judge gives the right answer on made-up pairs; None if a call failed. Near
    0.5, the judge is at chance"""
    n_failed: int
    """rows whose calls failed"""


def interventions_stage(run: Run, model: str, name: str) -> Stage:
    """Return the stage that `cratelm intervene` writes for a model under a name."""
    return run.stage("steer", set_name(model, name))


def intervention_names(run: Run, model: str) -> list[str]:
    """Return the names under which `cratelm intervene` has finished for a model, sorted."""
    return sets_of(run.models("steer"), model)


def write_interventions(folder: Path, rows: Sequence[Intervention]) -> None:
    """Write `interventions.parquet` into an existing folder."""
    _write(INTERVENTIONS, [{**asdict(row), **vars(row.neuron)} for row in rows], folder)


@checked_arguments()
def read_interventions(folder: Path) -> list[Intervention]:
    """Return the rows of `interventions.parquet`, in the order of the file."""
    return read_rows(
        _path(INTERVENTIONS, folder), lambda row: Intervention(neuron=_take_neuron(row), **row)
    )


def write_continuations(folder: Path, rows: Sequence[ContinuationTexts]) -> None:
    """Write `continuations.parquet` into an existing folder."""
    _write(CONTINUATIONS, [{**asdict(row), **vars(row.neuron)} for row in rows], folder)


@checked_arguments()
def read_continuations(folder: Path) -> list[ContinuationTexts]:
    """Return the rows of `continuations.parquet`, in the order of the file."""
    return read_rows(
        _path(CONTINUATIONS, folder),
        lambda row: ContinuationTexts(neuron=_take_neuron(row), **row),
    )


def write_intervention_summary(folder: Path, summary: InterventionSummary) -> dict[str, Any]:
    """Write `summary.json` into an existing folder; return its content."""
    content = asdict(summary)
    write_json(folder / SUMMARY, content)
    return content


@checked_arguments()
def read_intervention_summary(folder: Path) -> InterventionSummary:
    """Return `summary.json` of a folder that `cratelm intervene` wrote."""
    return read_json(folder / SUMMARY, _intervention_summary)


def _intervention_summary(content: dict[str, Any]) -> InterventionSummary:
    for name in ("over_shuffled", "over_random", "kl"):
        content[name] = _mean(content[name])
    controls = [{**c, "mean": _mean(c["mean"])} for c in content.pop("controls")]
    return InterventionSummary(
        controls=tuple(ControlSummary(**known_fields(ControlSummary, c)) for c in controls),
        **known_fields(InterventionSummary, content),
    )


# ---- files ----------------------------------------------------------------------------------------


def _mean(content: dict[str, Any] | None) -> Interval | None:
    return None if content is None else Interval(**content)


def _path(file: TableFile, folder: Path) -> Path:
    return folder / Path(file.path).name


def _write(file: TableFile, rows: list[dict[str, Any]], folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, file.schema), _path(file, folder))


def _take_neuron(row: dict[str, Any]) -> NeuronId:
    """Return the neuron that a row is about, and remove its columns from the row."""
    return NeuronId(*(row.pop(column.name) for column in NEURON_COLUMNS))
