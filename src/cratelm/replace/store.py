"""Read and write the results of `cratelm replace`: the folder `replacement/MODEL/` of a run.

`replacement/MODEL@NAME/` has the same files where a language model simulated explanations, without those of single
neurons' costs and of explanations.

`documents.parquet`          loss by document, replaced layers, explainer and control
`neurons.parquet`            one row per neuron and explainer: how well it predicts the neuron, and what the replacement costs
`curve.parquet`              loss with only the best-explained neurons replaced
`explanations.safetensors`   explanations of all neurons, as they were simulated (`cratelm.replace.simulators`)
`summary.json`               losses and what follows from them, with intervals over documents
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cratelm.records import Estimate, Interval, NeuronId
from cratelm.runs import known_fields, write_json
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import read_json, read_rows

ReplacedBy = Literal["none", "mean", "zero", "ngram", "own", "shuffled"]
"""what the loss is of: `none`, the model itself; `mean`, `zero`: all codes of the layers at their fit means, at 0;
`ngram`: no model but an n-gram model; `own`, `shuffled`: each neuron replaced by its explanation, by another neuron's"""
DOCUMENTS, NEURONS, CURVE, SUMMARY = (
    "documents.parquet",
    "neurons.parquet",
    "curve.parquet",
    "summary.json",
)
REPLACED_DOCUMENTS = TableFile(
    "replacement/MODEL/documents.parquet",
    (
        FileColumn("document", pa.int64(), "`ordinal` of a held-out document"),
        FileColumn(
            "layers",
            pa.string(),
            "replaced layers: `all`, a number, or such as `0-3`; empty if none is",
        ),
        FileColumn("explainer", pa.string(), "explainer; empty for references"),
        FileColumn(
            "replaced_by",
            pa.string(),
            "`own` or `shuffled` explanations; references: `none`, `mean`, `zero`, `ngram`",
        ),
        FileColumn("depth", pa.int32(), "tokens of context of `ngram`, otherwise 0"),
        FileColumn("n_tokens", pa.int64(), "predicted tokens"),
        FileColumn("loss", pa.float64(), "sum of their losses, nats"),
    ),
)
REPLACED_NEURONS = TableFile(
    "replacement/MODEL/neurons.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("explainer", pa.string(), "explainer"),
        FileColumn(
            "explained",
            pa.float64(),
            "1 - squared error / variance over the held-out tokens; null if the neuron is constant",
        ),
        FileColumn(
            "cost",
            pa.float64(),
            "nats per token lost if this neuron alone is replaced; null if it was not measured",
        ),
        FileColumn(
            "cost_error", pa.float64(), "its standard error over documents; null for one document"
        ),
        FileColumn("cost_tokens", pa.int64(), "held-out tokens of that measurement"),
    ),
)
REPLACEMENT_CURVE = TableFile(
    "replacement/MODEL/curve.parquet",
    (
        FileColumn("explainer", pa.string(), "explainer"),
        FileColumn(
            "n_neurons", pa.int64(), "best-explained neurons that are replaced, of all layers"
        ),
        FileColumn("fraction", pa.float64(), "of all neurons"),
        FileColumn("nats_lost", pa.float64(), "nats per token lost"),
        FileColumn("low", pa.float64(), "95% interval over documents; null for one document"),
        FileColumn("high", pa.float64(), "its upper bound"),
    ),
)


@dataclass(frozen=True)
class DocumentLoss:
    """One row of `documents.parquet`."""

    document: int
    layers: str
    explainer: str
    replaced_by: ReplacedBy
    depth: int
    n_tokens: int
    loss: float
    """sum over the tokens, nats"""


@dataclass(frozen=True)
class NeuronReplacement:
    """One row of `neurons.parquet`."""

    neuron: NeuronId
    explainer: str
    explained: float | None
    """1 - squared error / variance over the held-out tokens; None if the neuron is constant there"""
    cost: Estimate | None
    """nats per token that are lost if this neuron alone is replaced; None if it was not measured"""
    cost_tokens: int
    """held-out tokens of that measurement"""


@dataclass(frozen=True)
class CurvePoint:
    """The loss with only the best-explained neurons replaced."""

    explainer: str
    n_neurons: int
    fraction: float
    """of all neurons of the model"""
    nats_lost: Interval
    """per token, over documents"""


@dataclass(frozen=True)
class ReplacementRow:
    """The loss of a model with the codes of some layers replaced by what explanations predict.

    Losses are in nats per token; intervals are over documents, and differences are paired by document.
    """

    explainer: str
    layers: str
    """`all`, the number of one layer, or such as `0-3` for all layers up to one"""
    control: str
    """`none`: the neurons' own explanations; `shuffled`: those of other neurons of their layer"""
    loss_true: Interval
    """of the model itself"""
    loss_mean: Interval
    """with the codes of these layers at their fit means"""
    loss_zero: Interval
    """with the codes of these layers at 0"""
    loss_replaced: Interval
    """on explanations"""
    nats_lost: Interval
    """loss on explanations minus loss of the model"""
    carried: Interval
    """what the codes carry: loss with the codes at their means minus loss of the model"""
    carried_zero: Interval
    """the same with the codes at 0"""
    given_back: Interval
    """what the explanations give back of it: loss with the codes at their means minus loss on explanations"""
    recovered_mean: Interval | None
    """`given_back` / `carried`; None if the codes carry nothing"""
    recovered_unigram: Interval | None
    """(loss of the unigram model - loss on explanations) / (loss of the unigram model - loss of the model); None if the
    model is no better than the unigram model"""
    n_tokens: int = 0
    """held-out tokens that are predicted"""
    n_documents: int = 0


@dataclass(frozen=True)
class NGramLoss:
    """The loss of an n-gram model of the fit text."""

    depth: int
    """tokens of context"""
    loss: Interval
    """nats per token, over documents"""


@dataclass(frozen=True)
class RunnableFraction:
    """How much of a model can run on its explanations."""

    explainer: str
    nats: float
    """that may be lost per token"""
    fraction: float
    """of all neurons that may be replaced, the best-explained first, by linear interpolation of the curve"""


@dataclass(frozen=True)
class ReplacementSummary:
    """`summary.json`: everything that `cratelm replace` says about one model."""

    model: str
    site: str
    layers: tuple[int, ...]
    n_neurons: int
    """of all layers"""
    n_tokens: int
    """held-out tokens that are predicted"""
    n_documents: int
    n_fit_tokens: int
    """fit tokens that the explanations were made from"""
    explainers: tuple[str, ...]
    passes_nothing: tuple[bool, ...]
    """by layer: whether what its block returns depends on the codes alone, so that layers below it do not matter"""
    ngrams: tuple[NGramLoss, ...]
    """by depth; depth 0 is the unigram model"""
    rows: tuple[ReplacementRow, ...]
    runnable: tuple[RunnableFraction, ...]
    sizes: dict[str, float]
    """mean number of entries of an explanation, by explainer"""
    simulators: tuple[str, ...] = ()
    """explainers whose explanations are in `explanations.safetensors`"""
    alone: str = ""
    """explainer whose explanations took the place of one neuron at a time; empty if that was not measured"""
    reconstructed: Interval | None = None
    """loss with true latents and without what the autoencoders cannot reconstruct; None for neurons"""
    explanations: str = ""
    """name of the explanations that a language model simulated; empty without one"""
    simulator: str = ""
    """name of that language model"""
    n_replaced: int = 0
    """neurons with such an explanation: these alone were replaced, in all rows; 0 without a language model, where all
    neurons are explained"""
    n_calibration_tokens: int = 0
    """fit tokens on which the levels were calibrated"""
    n_failed: int = 0
    """calls to the simulator without an answer: where one failed, the neuron has its mean"""

    def row(
        self, explainer: str, layers: str = "all", control: str = "none"
    ) -> ReplacementRow | None:
        """Return the row of an explainer and set of layers; None if there is none."""
        for row in self.rows:
            if (row.explainer, row.layers, row.control) == (explainer, layers, control):
                return row
        return None

    @property
    def headline(self) -> ReplacementRow | None:
        """Return the row of all layers on the explanations that lose the fewest nats; None without one."""
        own = [r for r in self.rows if (r.layers, r.control) == ("all", "none")]
        return min(own, key=lambda r: r.loss_replaced.value, default=None)


def write_documents(folder: Path, losses: Iterable[DocumentLoss]) -> None:
    """Write `documents.parquet` into `folder`."""
    _write(folder / DOCUMENTS, REPLACED_DOCUMENTS, map(vars, losses))


def write_neurons(folder: Path, neurons: Iterable[NeuronReplacement]) -> None:
    """Write `neurons.parquet` into `folder`."""
    rows = (
        {
            **vars(n.neuron),
            "explainer": n.explainer,
            "explained": n.explained,
            "cost": n.cost.value if n.cost else None,
            "cost_error": n.cost.error if n.cost else None,
            "cost_tokens": n.cost_tokens,
        }
        for n in neurons
    )
    _write(folder / NEURONS, REPLACED_NEURONS, rows)


def write_curve(folder: Path, points: Iterable[CurvePoint]) -> None:
    """Write `curve.parquet` into `folder`."""
    rows = (
        {
            "explainer": p.explainer,
            "n_neurons": p.n_neurons,
            "fraction": p.fraction,
            "nats_lost": p.nats_lost.value,
            "low": p.nats_lost.low,
            "high": p.nats_lost.high,
        }
        for p in points
    )
    _write(folder / CURVE, REPLACEMENT_CURVE, rows)


def _write(path: Path, file: TableFile, rows: Iterable[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=file.schema), path)


def write_summary(folder: Path, summary: ReplacementSummary) -> dict[str, Any]:
    """Write `summary.json` into `folder`, and return its content."""
    content = asdict(summary)
    write_json(folder / SUMMARY, content)
    return content


@checked_arguments()
def read_documents(folder: str | Path) -> list[DocumentLoss]:
    """Return the rows of `documents.parquet` in `folder`."""
    return read_rows(
        Path(folder) / DOCUMENTS, lambda row: DocumentLoss(**known_fields(DocumentLoss, row))
    )


@checked_arguments()
def read_neurons(folder: str | Path) -> list[NeuronReplacement]:
    """Return the rows of `neurons.parquet` in `folder`."""

    def neuron(row: dict[str, Any]) -> NeuronReplacement:
        cost = row["cost"]
        return NeuronReplacement(
            NeuronId(row["model"], row["site"], row["layer"], row["index"]),
            row["explainer"],
            row["explained"],
            None if cost is None else Estimate(cost, row["cost_error"]),
            row["cost_tokens"],
        )

    return read_rows(Path(folder) / NEURONS, neuron)


@checked_arguments()
def read_curve(folder: str | Path) -> list[CurvePoint]:
    """Return the points of `curve.parquet` in `folder`."""

    def point(row: dict[str, Any]) -> CurvePoint:
        lost = Interval(row["nats_lost"], row["low"], row["high"])
        return CurvePoint(row["explainer"], row["n_neurons"], row["fraction"], lost)

    return read_rows(Path(folder) / CURVE, point)


@checked_arguments()
def read_replacement_summary(folder: str | Path) -> ReplacementSummary:
    """Return the summary in `folder`. Raises `InputError` if it is missing or damaged."""
    return read_json(Path(folder) / SUMMARY, _summary)


def _summary(content: dict[str, Any]) -> ReplacementSummary:
    fields = known_fields(ReplacementSummary, content)
    return ReplacementSummary(
        **fields
        | {
            "layers": tuple(content["layers"]),
            "explainers": tuple(content["explainers"]),
            "passes_nothing": tuple(content["passes_nothing"]),
            "ngrams": tuple(
                NGramLoss(of["depth"], Interval(**of["loss"])) for of in content["ngrams"]
            ),
            "rows": tuple(_row(of) for of in content["rows"]),
            "runnable": tuple(RunnableFraction(**of) for of in content["runnable"]),
            "simulators": tuple(content.get("simulators", ())),
            "reconstructed": _interval(content.get("reconstructed")),
        }
    )


def _row(content: dict[str, Any]) -> ReplacementRow:
    fields = known_fields(ReplacementRow, content)
    intervals: dict[str, Any] = {
        n: Interval(**of) for n, of in fields.items() if isinstance(of, dict)
    }
    return ReplacementRow(**fields | intervals)


def _interval(content: dict[str, Any] | None) -> Interval | None:
    return None if content is None else Interval(**content)
