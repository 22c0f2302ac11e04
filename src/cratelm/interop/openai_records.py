"""OpenAI's NeuronRecord JSON: activations of one neuron on texts, as token strings.

The format of Bills et al. 2023, as their library `neuron-explainer` serialises its dataclasses
(repository openai/automated-interpretability, `neuron_explainer/activations/activations.py`; PyPI:
automated-interpretability). Every object names its class in `dataclass_name`:

```
NeuronRecord      neuron_id, random_sample, random_sample_by_quantile, quantile_boundaries,
                  mean, variance, skewness, kurtosis, most_positive_activation_records
NeuronId          layer_index, neuron_index
ActivationRecord  tokens, activations (one a token); newer: dfa_values, dfa_target_index
```
Fields that are not known here are kept and written again, in the order in which they stood, so a
file that is read and written has the same content. A number that does not exist is `null`, or `NaN`
where the file had that.
"""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.errors import InputError

SOURCE = "records.jsonl.gz"
"""in a folder of activations that were imported: the records as they were read, one a line"""
_ACTIVATION_FIELDS = ("tokens", "activations", "dataclass_name")
_RECORD_FIELDS = (
    "neuron_id",
    "random_sample",
    "random_sample_by_quantile",
    "quantile_boundaries",
    "mean",
    "variance",
    "skewness",
    "kurtosis",
    "most_positive_activation_records",
    "dataclass_name",
)


@dataclass(frozen=True, eq=False)
class ActivationRecord:
    """A text with the neuron's activation at each token."""

    tokens: tuple[str, ...]
    """[n]"""
    activations: tuple[float, ...]
    """[n] raw activations, as the file has them: not checked to be finite"""
    others: Mapping[str, Any] = field(default_factory=dict)
    """fields that have no name here, and `dataclass_name`"""
    order: tuple[str, ...] = _ACTIVATION_FIELDS
    """fields in the order in which they are written"""

    def as_json(self) -> dict[str, Any]:
        known = {
            "dataclass_name": "ActivationRecord",
            **self.others,
            "tokens": list(self.tokens),
            "activations": list(self.activations),
        }
        return {name: known[name] for name in self.order}


@dataclass(frozen=True, eq=False)
class OpenAIRecord:
    """A NeuronRecord."""

    neuron_id: Mapping[str, Any]
    """`layer_index` and `neuron_index`, and what else the file has"""
    top: tuple[ActivationRecord, ...]
    """`most_positive_activation_records`, the highest first"""
    random: tuple[ActivationRecord, ...] = ()
    by_quantile: tuple[tuple[ActivationRecord, ...], ...] | None = None
    """a sample of each bin between neighbouring `boundaries`"""
    boundaries: tuple[float | None, ...] | None = None
    mean: float | None = None
    variance: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    """fields that have no name here, and `dataclass_name`"""
    order: tuple[str, ...] = _RECORD_FIELDS
    """fields in the order in which they are written"""

    @classmethod
    def of(cls, layer: int, index: int, **fields: Any) -> "OpenAIRecord":
        """A record with the usual NeuronId."""
        name = {"layer_index": layer, "neuron_index": index, "dataclass_name": "NeuronId"}
        return cls(name, **fields)

    @property
    def layer(self) -> int:
        return self.neuron_id["layer_index"]

    @property
    def index(self) -> int:
        return self.neuron_id["neuron_index"]

    def as_json(self) -> dict[str, Any]:
        bins = self.by_quantile
        known = {
            "dataclass_name": "NeuronRecord",
            **self.others,
            "neuron_id": dict(self.neuron_id),
            "random_sample": [r.as_json() for r in self.random],
            "random_sample_by_quantile": bins and [[r.as_json() for r in b] for b in bins],
            "quantile_boundaries": self.boundaries and list(self.boundaries),
            "mean": self.mean,
            "variance": self.variance,
            "skewness": self.skewness,
            "kurtosis": self.kurtosis,
            "most_positive_activation_records": [r.as_json() for r in self.top],
        }
        return {name: known[name] for name in self.order}


def read_record(path: str | Path) -> OpenAIRecord:
    """The record in a file. Raises `InputError`, naming the place, where it holds something else."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return parse_record(data, str(path))


def parse_record(data: bytes, name: str) -> OpenAIRecord:
    """As `read_record`; `name` says in errors where `data` come from."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(
            f"{name} is no JSON in UTF-8 ({told}): a NeuronRecord of OpenAI's neuron-explainer was"
            " expected, leave other files out of --files"
        ) from None
    return _Reader(name).record(value)


def encode_record(record: OpenAIRecord) -> bytes:
    """A record as JSON in UTF-8 on one line, without white space, as OpenAI's library writes it."""
    text = json.dumps(record.as_json(), separators=(",", ":"), ensure_ascii=False)
    # half of a surrogate pair cannot be UTF-8: Python's escape of it is JSON's
    return text.encode("utf-8", "backslashreplace")


def shortest_float(value: np.float32) -> float:
    """Return the number with the fewest digits that is this float32: 0.1, not 0.10000000149."""
    return float(str(value))


@contextlib.contextmanager
def source_writer(folder: str | Path) -> Iterator[Callable[[OpenAIRecord], None]]:
    """Keeps imported records beside the tables that are made of them; yields what takes one."""
    with (Path(folder) / SOURCE).open("wb") as file, gzip.GzipFile("", "wb", 6, file, 0) as packed:

        def keep(record: OpenAIRecord) -> None:
            packed.write(encode_record(record) + b"\n")

        yield keep


def read_source(folder: str | Path) -> Iterator[OpenAIRecord]:
    """The records that a folder of imported activations was made of, by layer and index."""
    path = Path(folder) / SOURCE
    with gzip.open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield parse_record(line, f"{path}, line {number}")


class _Reader:
    """Takes JSON values apart and knows the file for its errors."""

    def __init__(self, name: str):
        self.name = name

    def record(self, value: Any) -> OpenAIRecord:
        found = self.object(value, "the file", "NeuronRecord")
        neuron = self.object(self.need(found, "neuron_id", "the file"), "neuron_id", "NeuronId")
        for key in ("layer_index", "neuron_index"):
            number = self.need(neuron, key, "neuron_id")
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
                raise self.wrong(f"neuron_id.{key}", number, "a whole number from 0")
        bins, edges = found.get("random_sample_by_quantile"), found.get("quantile_boundaries")
        if bins is not None:
            bins = tuple(
                self.activations(one, f"random_sample_by_quantile[{place}]")
                for place, one in enumerate(self.list(bins, "random_sample_by_quantile"))
            )
        if edges is not None:
            edges = self.list(edges, "quantile_boundaries")
            edges = tuple(self.number(e, "quantile_boundaries") for e in edges)
        top = self.need(found, "most_positive_activation_records", "the file")
        moments = {
            key: self.number(found.get(key), key)
            for key in ("mean", "variance", "skewness", "kurtosis")
        }
        return OpenAIRecord(
            neuron_id=neuron,
            top=self.activations(top, "most_positive_activation_records"),
            random=self.activations(found.get("random_sample", []), "random_sample"),
            by_quantile=bins,
            boundaries=edges,
            **moments,
            others=_without(found, _RECORD_FIELDS),
            order=tuple(found),
        )

    def activations(self, value: Any, where: str) -> tuple[ActivationRecord, ...]:
        rows = enumerate(self.list(value, where))
        return tuple(self.activation(one, f"{where}[{place}]") for place, one in rows)

    def activation(self, value: Any, where: str) -> ActivationRecord:
        found = self.object(value, where, "ActivationRecord")
        tokens = self.list(self.need(found, "tokens", where), f"{where}.tokens")
        values = self.list(self.need(found, "activations", where), f"{where}.activations")
        for token in tokens:
            if not isinstance(token, str):
                raise self.wrong(f"{where}.tokens", token, "a string for each token")
        for number in values:
            if self.number(number, f"{where}.activations") is None:
                raise self.wrong(f"{where}.activations", None, "a number for each token")
        if len(tokens) != len(values):
            raise self.wrong(where, f"{len(tokens)} tokens, {len(values)} activations", "as many")
        others = _without(found, _ACTIVATION_FIELDS)
        return ActivationRecord(tuple(tokens), tuple(values), others, tuple(found))

    def object(self, value: Any, where: str, kind: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(where, value, f"an object, a {kind}")
        if value.get("dataclass_name", kind) != kind:
            raise self.wrong(f"{where}: dataclass_name", value["dataclass_name"], kind)
        return value

    def list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong(where, value, "a list")
        return value

    def number(self, value: Any, where: str) -> float | None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.wrong(where, value, "a number")
        return value

    def need(self, found: Mapping[str, Any], key: str, where: str) -> Any:
        if key not in found:
            there = ", ".join(map(repr, list(found)[:8])) or "nothing"
            raise InputError(
                f"{self.name}: {where} has no {key!r} but {there}: a NeuronRecord of OpenAI's"
                " neuron-explainer was expected, leave other files out of --files"
            )
        return found[key]

    def wrong(self, where: str, found: Any, expected: str) -> InputError:
        return InputError(
            f"{self.name}: {where} is {_shown(found)}, expected: {expected}; leave damaged files out"
            " of --files"
        )


def _without(found: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are not known, and the name of the class."""
    return {k: v for k, v in found.items() if k not in known or k == "dataclass_name"}


def _shown(value: Any) -> str:
    """A value in an error: JSON on one line, cut short."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return " ".join(text.split())[:60] or "empty"
