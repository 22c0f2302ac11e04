"""Read and write explanations.

`explanations.parquet`   one row per neuron and explainer
`neurons.parquet`        one row per neuron selected to be explained, including dead ones
`concepts.json`          the predicates that the formulas of concepts use, see `concepts.stored`
`unexplained.parquet`    one row per explanation that was requested from a language model and failed

The folder is `explanations/MODEL/` without a language model and `explanations/MODEL@NAME/` with one.
A language model explains a neuron once for each kind of evidence, which `payload` names. The payloads of a
large model take gigabytes: `ExplanationFile` reads one layer at a time.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.records import Explanation, NeuronId, NeuronKey
from cratelm.runs.arguments import checked_arguments
from cratelm.runs.columns import NEURON_COLUMNS, FileColumn, TableFile
from cratelm.runs.reading import decoding, read_rows, reading, verified

ROWS_A_GROUP = 64
"""rows that are read to get the payload of one neuron: about 250 kB"""
EXPLANATIONS = TableFile(
    "explanations/MODEL/explanations.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn(
            "explainer",
            pa.string(),
            "`lookup`, `trie`, `concepts`, `lookup+concepts`, or the name of a language model",
        ),
        FileColumn(
            "text",
            pa.string(),
            "for people, and for language models that simulate from it: the claim up to the first semicolon, then the"
            " evidence",
        ),
        FileColumn("payload", pa.string(), "for the simulator of the same name, JSON"),
        FileColumn(
            "documents",
            pa.list_(pa.int64()),
            "`ordinal`s of the documents that it was made from, all of split `fit`",
        ),
        FileColumn(
            "claim_variance",
            pa.float64(),
            "fraction of the variance over the fit excerpts that the claim explains, 0 to 1; null for language models."
            " Files of version 0.1.0 lack the column",
        ),
    ),
)
UNEXPLAINED = TableFile(
    "explanations/MODEL/unexplained.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("evidence", pa.string(), "kind of excerpts in the prompt: `top` or `anthropic`"),
        FileColumn("reason", pa.string(), "why it failed, in words"),
    ),
)
SELECTED = TableFile(
    "explanations/MODEL/neurons.parquet",
    (
        *NEURON_COLUMNS,
        FileColumn("dead", pa.bool_(), "never above 0 on the fit split"),
    ),
)


@dataclass(frozen=True)
class SampledNeuron:
    """A neuron selected to be explained."""

    neuron: NeuronId
    dead: bool
    """never above 0 on the fit split, and so without an explanation; an end whose other end fires is rarely selected"""


def noun_of(selected: Sequence[SampledNeuron]) -> dict[str, str]:
    """Return the entry `noun` of a result: what its counts are numbers of. Empty for neurons with one end."""
    has_ends = any(s.neuron.n_ends > 1 for s in selected)
    return {"noun": "ends of neurons"} if has_ends else {}


@dataclass(frozen=True)
class ExplanationFailure:
    """An explanation that was requested from a language model and failed."""

    neuron: NeuronId
    evidence: str
    reason: str


def write_explanations(folder: str | Path, explanations: Iterable[Explanation]) -> int:
    """Write `explanations.parquet` into `folder`, in the order given, and return how many there are.

    They are written while they are made; memory: one row group.
    """
    rest = iter(explanations)
    groups = iter(lambda: list(islice(rest, ROWS_A_GROUP)), [])
    n = 0
    with pq.ParquetWriter(Path(folder) / "explanations.parquet", EXPLANATIONS.schema) as writer:
        for group in groups:
            writer.write_table(_explanation_table(group))
            n += len(group)
        if not n:
            writer.write_table(_explanation_table([]))
    return n


def _explanation_table(explanations: Sequence[Explanation]) -> pa.Table:
    rows = [
        {
            **vars(e.neuron),
            "explainer": e.explainer,
            "text": e.text,
            "payload": json.dumps(e.payload),
            "documents": e.documents,
            "claim_variance": e.claim_variance,
        }
        for e in explanations
    ]
    return pa.Table.from_pylist(rows, schema=EXPLANATIONS.schema)


@checked_arguments()
def read_explanations(folder: str | Path) -> list[Explanation]:
    """Return the explanations in `folder`, in the order written; raise `InputError` if there are none."""
    return read_rows(_existing(Path(folder) / "explanations.parquet"), explanation_of)


def explanation_of(row: dict[str, Any]) -> Explanation:
    """Return the explanation in a row of `explanations.parquet`."""
    return Explanation(
        _neuron(row),
        row["explainer"],
        row["text"],
        json.loads(row["payload"]),
        tuple(row["documents"]),
        row.get("claim_variance"),
    )


Kind = tuple[str, str]
"""explainer and kind of evidence, which is empty if one explanation serves all metrics"""


@dataclass(frozen=True, eq=False)
class StoredExplanation:
    """An explanation that is read, and its payload decoded, only when it is used."""

    neuron: NeuronId
    read: Callable[[], Explanation]


class ExplanationSource(Protocol):
    """The explanations of a set, by layer."""

    def kinds(self) -> Collection[Kind]:
        """Return all kinds in the set."""
        ...

    def of_layer(self, layer: int) -> Iterator[tuple[Kind, StoredExplanation]]:
        """Yield the explanations of a layer with their kinds, in the order written."""
        ...


class ListedExplanations:
    """Explanations in memory, as an `ExplanationSource`."""

    def __init__(self, explanations: Sequence[Explanation]):
        self._explanations = explanations

    def kinds(self) -> Collection[Kind]:
        """Return all kinds in the set."""
        return {(e.explainer, e.evidence) for e in self._explanations}

    def of_layer(self, layer: int) -> Iterator[tuple[Kind, StoredExplanation]]:
        """Yield the explanations of a layer with their kinds."""
        for e in self._explanations:
            if e.neuron.layer == layer:
                yield (e.explainer, e.evidence), StoredExplanation(e.neuron, lambda e=e: e)


class ExplanationFile:
    """The explanations in a folder, as an `ExplanationSource`. Memory: one layer, payloads as JSON.

    The documents that explanations were made from are read only by `documents` and `documents_of`.
    Raises `InputError` if there are no explanations, or if the file is damaged.
    """

    def __init__(self, folder: str | Path):
        self._path = _existing(Path(folder) / "explanations.parquet")
        self._kinds: set[Kind] = set()
        self._layers: list[tuple[int, int]] = []
        """lowest and highest layer of each row group"""
        for group in self._groups(["layer", "explainer", "payload"]):
            layers = group["layer"].to_numpy()
            self._layers.append((int(layers.min()), int(layers.max())) if len(group) else (0, -1))
            evidence = _evidence(group["payload"])
            self._kinds.update(zip(group["explainer"].to_pylist(), evidence, strict=True))

    def kinds(self) -> Collection[Kind]:
        """Return all kinds in the set."""
        return self._kinds

    def of_layer(self, layer: int) -> Iterator[tuple[Kind, StoredExplanation]]:
        """Yield the explanations of a layer with their kinds, in the order written, without documents."""
        unused = ("documents", "claim_variance")
        columns = [c.name for c in EXPLANATIONS.columns if c.name not in unused]
        for group in self._groups(columns, layer):
            decoded = lru_cache(maxsize=8)(partial(self._explanation, group))
            names = (group[name].to_pylist() for name in ("model", "site", "index", "explainer"))
            evidence = _evidence(group["payload"])
            for row, (model, site, index, explainer, of_kind) in enumerate(
                zip(*names, evidence, strict=True)
            ):
                neuron = NeuronId(model, site, layer, index)
                stored = StoredExplanation(neuron, partial(decoded, row, neuron, explainer))
                yield (explainer, of_kind), stored

    def documents(self) -> Iterator[list[int]]:
        """Yield the documents that explanations were made from, without repeats within a part of the file."""
        for group in self._groups(["documents"]):
            yield np.unique(_flat(group["documents"])).tolist()

    def documents_of(self, layer: int) -> dict[NeuronKey, NDArray[np.int64]]:
        """Return the documents that each neuron of a layer was explained from, by all explainers."""
        by_neuron: dict[NeuronKey, list[NDArray[np.int64]]] = {}
        for group in self._groups(["layer", "index", "documents"], layer):
            lists = group["documents"].combine_chunks()
            ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))
            parts = np.split(_flat(group["documents"]), ends[:-1])
            for index, part in zip(group["index"].to_pylist(), parts, strict=True):
                by_neuron.setdefault(NeuronKey(layer, index), []).append(part)
        return {key: np.unique(np.concatenate(parts)) for key, parts in by_neuron.items()}

    def _groups(self, columns: list[str], layer: int | None = None) -> Iterator[pa.Table]:
        """Yield columns of each row group, or of those with the layer and then only its rows."""
        with (
            reading(self._path, "the columns that docs/files.md lists") as sound,
            pq.ParquetFile(sound) as file,
        ):
            for name in columns:
                if name not in file.schema_arrow.names:
                    raise KeyError(name)
            for number in range(file.num_row_groups):
                if layer is None:
                    yield file.read_row_group(number, columns, use_threads=False)
                elif self._layers[number][0] <= layer <= self._layers[number][1]:
                    group = file.read_row_group(number, columns, use_threads=False)
                    yield group.filter(pa.array(group["layer"].to_numpy() == layer))

    def _explanation(
        self, group: pa.Table, row: int, neuron: NeuronId, explainer: str
    ) -> Explanation:
        with decoding(self._path, "the columns that docs/files.md lists"):
            payload = json.loads(group["payload"][row].as_py())
            return Explanation(neuron, explainer, group["text"][row].as_py(), payload, ())


def _evidence(payloads: pa.ChunkedArray) -> list[str]:
    """Return the kind of evidence in each payload; a payload without the word is not decoded."""
    return [
        str(json.loads(payload).get("evidence", "")) if '"evidence"' in payload else ""
        for payload in payloads.to_pylist()
    ]


def _flat(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    return lists.combine_chunks().flatten().to_numpy()


def write_selected(folder: str | Path, selected: Sequence[SampledNeuron]) -> None:
    """Write `neurons.parquet`, the neurons selected to be explained, into `folder`."""
    rows = [{**vars(s.neuron), "dead": s.dead} for s in selected]
    table = pa.Table.from_pylist(rows, schema=SELECTED.schema)
    pq.write_table(table, Path(folder) / "neurons.parquet")


@checked_arguments()
def read_selected(folder: str | Path) -> list[SampledNeuron]:
    """Return the neurons selected to be explained, including dead ones, by layer and index.

    Raises `InputError` if the file does not exist.
    """
    path = _existing(Path(folder) / "neurons.parquet")
    return read_rows(path, lambda row: SampledNeuron(_neuron(row), row["dead"]))


def write_unexplained(folder: str | Path, failures: Sequence[ExplanationFailure]) -> None:
    """Write `unexplained.parquet`, the failed explanations, into `folder`."""
    rows = [{**vars(f.neuron), "evidence": f.evidence, "reason": f.reason} for f in failures]
    table = pa.Table.from_pylist(rows, schema=UNEXPLAINED.schema)
    pq.write_table(table, Path(folder) / "unexplained.parquet")


@checked_arguments()
def read_unexplained(folder: str | Path) -> list[ExplanationFailure]:
    """Return the explanations that a language model failed to give; none if the file does not exist."""
    path = Path(folder) / "unexplained.parquet"
    if not verified(path).is_file():
        return []
    return read_rows(
        path, lambda row: ExplanationFailure(_neuron(row), row["evidence"], row["reason"])
    )


def _existing(path: Path) -> Path:
    if not verified(path).is_file():
        raise InputError(f"{path} does not exist: type `cratelm explain` for this model first")
    return path


def _neuron(row: dict) -> NeuronId:
    return NeuronId(row["model"], row["site"], row["layer"], row["index"])
