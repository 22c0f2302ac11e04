"""OpenAI's NeuronRecord JSON: activations of one neuron on texts, as token strings.

This is the format of Bills et al. 2023, as their library `neuron-explainer` serialises its dataclasses
(repository openai/automated-interpretability, `neuron_explainer/activations/activations.py`; PyPI:
automated-interpretability). Every object names its class in `dataclass_name`:

```
NeuronRecord      neuron_id, random_sample, random_sample_by_quantile, quantile_boundaries,
                  mean, variance, skewness, kurtosis, most_positive_activation_records
NeuronId          layer_index, neuron_index
ActivationRecord  tokens, activations (one per token); newer: dfa_values, dfa_target_index
```
Unknown fields are kept and written again in their original order, so that a file that is read and written has the
same content. A number that does not exist is `null`, or `NaN` if the file had `NaN`.
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
from cratelm.runs.reading import reading

SOURCE = "records.jsonl.gz"
"""file in a folder of imported activations that contains the records as they were read, one per line"""
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
    """[n] raw activations as in the file, which may not be finite"""
    others: Mapping[str, Any] = field(default_factory=dict)
    """unknown fields, and `dataclass_name`"""
    order: tuple[str, ...] = _ACTIVATION_FIELDS
    """names of the fields in the order in which they are written"""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object with its fields in order."""
        values = {
            "dataclass_name": "ActivationRecord",
            **self.others,
            "tokens": list(self.tokens),
            "activations": list(self.activations),
        }
        return {name: values[name] for name in self.order}


@dataclass(frozen=True, eq=False)
class OpenAIRecord:
    """A NeuronRecord: one neuron with its activation records and statistics."""

    neuron_id: Mapping[str, Any]
    """`layer_index`, `neuron_index`, and other fields of the file"""
    top: tuple[ActivationRecord, ...]
    """`most_positive_activation_records`, the highest activation first"""
    random: tuple[ActivationRecord, ...] = ()
    by_quantile: tuple[tuple[ActivationRecord, ...], ...] | None = None
    """random samples of the bins between neighbouring `boundaries`"""
    boundaries: tuple[float | None, ...] | None = None
    mean: float | None = None
    variance: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    """unknown fields, and `dataclass_name`"""
    order: tuple[str, ...] = _RECORD_FIELDS
    """names of the fields in the order in which they are written"""

    @classmethod
    def of(cls, layer: int, index: int, **fields: Any) -> "OpenAIRecord":
        """Return a record of the neuron `index` of `layer`, with a standard NeuronId."""
        name = {"layer_index": layer, "neuron_index": index, "dataclass_name": "NeuronId"}
        return cls(name, **fields)

    @property
    def layer(self) -> int:
        """Return the layer, from 0."""
        return self.neuron_id["layer_index"]

    @property
    def index(self) -> int:
        """Return the index in the layer, from 0."""
        return self.neuron_id["neuron_index"]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object with its fields in order."""
        bins = self.by_quantile
        values = {
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
        return {name: values[name] for name in self.order}


def read_record(path: str | Path) -> OpenAIRecord:
    """Return the record in a file. Raises `InputError`, which names the field, if the content is not a NeuronRecord."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return parse_record(data, str(path))


def parse_record(data: bytes, name: str) -> OpenAIRecord:
    """Return the record in `data`; `name` stands for the file in errors. Raises as `read_record`."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(
            f"{name} is not JSON in UTF-8 ({reason}): it must be a NeuronRecord of OpenAI's neuron-explainer; leave"
            " other files out of --files"
        ) from None
    return _Parser(name).record(value)


def encode_record(record: OpenAIRecord) -> bytes:
    """Return JSON in UTF-8 on one line, without whitespace, as OpenAI's library writes it."""
    text = json.dumps(record.as_json(), separators=(",", ":"), ensure_ascii=False)
    # a lone surrogate cannot be encoded in UTF-8; Python's escape of it is also JSON's
    return text.encode("utf-8", "backslashreplace")


def shortest_float(value: np.float32) -> float:
    """Return the number with the fewest digits that rounds to this float32: 0.1, not 0.10000000149."""
    return float(str(value))


@contextlib.contextmanager
def source_writer(folder: str | Path) -> Iterator[Callable[[OpenAIRecord], None]]:
    """Yield a function that appends a record to `SOURCE` in the folder of the imported activations."""
    with (Path(folder) / SOURCE).open("wb") as file, gzip.GzipFile("", "wb", 6, file, 0) as packed:

        def append(record: OpenAIRecord) -> None:
            packed.write(encode_record(record) + b"\n")

        yield append


def read_source(folder: str | Path) -> Iterator[OpenAIRecord]:
    """Yield the original records of a folder of imported activations, sorted by layer and index.

    Raises `InputError` if the file is damaged.
    """
    path = Path(folder) / SOURCE
    with reading(path, "gzip"), gzip.open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield parse_record(line, f"{path}, line {number}")


class _Parser:
    """Converts JSON values to records and checks them; errors name the file."""

    def __init__(self, name: str):
        self.name = name

    def record(self, value: Any) -> OpenAIRecord:
        """Return the record in a file. Raises `InputError` if it is not a NeuronRecord."""
        fields = self.object(value, "the file", "NeuronRecord")
        neuron = self.object(self.need(fields, "neuron_id", "the file"), "neuron_id", "NeuronId")
        for key in ("layer_index", "neuron_index"):
            number = self.need(neuron, key, "neuron_id")
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
                raise self.wrong(f"neuron_id.{key}", number, "a whole number from 0")
        bins, edges = fields.get("random_sample_by_quantile"), fields.get("quantile_boundaries")
        if bins is not None:
            bins = tuple(
                self.activations(of_bin, f"random_sample_by_quantile[{number}]")
                for number, of_bin in enumerate(self.list(bins, "random_sample_by_quantile"))
            )
        if edges is not None:
            edges = self.list(edges, "quantile_boundaries")
            edges = tuple(self.number(e, "quantile_boundaries") for e in edges)
        top = self.need(fields, "most_positive_activation_records", "the file")
        moments = {
            key: self.number(fields.get(key), key)
            for key in ("mean", "variance", "skewness", "kurtosis")
        }
        return OpenAIRecord(
            neuron_id=neuron,
            top=self.activations(top, "most_positive_activation_records"),
            random=self.activations(fields.get("random_sample", []), "random_sample"),
            by_quantile=bins,
            boundaries=edges,
            **moments,
            others=_without(fields, _RECORD_FIELDS),
            order=tuple(fields),
        )

    def activations(self, value: Any, where: str) -> tuple[ActivationRecord, ...]:
        """Return a list of activation records."""
        rows = enumerate(self.list(value, where))
        return tuple(self.activation(row, f"{where}[{number}]") for number, row in rows)

    def activation(self, value: Any, where: str) -> ActivationRecord:
        """Return one activation record, which must have a number for each token."""
        fields = self.object(value, where, "ActivationRecord")
        tokens = self.list(self.need(fields, "tokens", where), f"{where}.tokens")
        values = self.list(self.need(fields, "activations", where), f"{where}.activations")
        for token in tokens:
            if not isinstance(token, str):
                raise self.wrong(f"{where}.tokens", token, "a string for each token")
        for number in values:
            if self.number(number, f"{where}.activations") is None:
                raise self.wrong(f"{where}.activations", None, "a number for each token")
        if len(tokens) != len(values):
            counts = f"{len(tokens)} tokens, {len(values)} activations"
            raise self.wrong(where, counts, "as many activations as tokens")
        others = _without(fields, _ACTIVATION_FIELDS)
        return ActivationRecord(tuple(tokens), tuple(values), others, tuple(fields))

    def object(self, value: Any, where: str, kind: str) -> dict[str, Any]:
        """Return `value` if it is an object of the class `kind`."""
        if not isinstance(value, dict):
            raise self.wrong(where, value, f"an object of class {kind}")
        if value.get("dataclass_name", kind) != kind:
            raise self.wrong(f"{where}: dataclass_name", value["dataclass_name"], kind)
        return value

    def list(self, value: Any, where: str) -> list[Any]:
        """Return `value` if it is a list."""
        if not isinstance(value, list):
            raise self.wrong(where, value, "a list")
        return value

    def number(self, value: Any, where: str) -> float | None:
        """Return `value` if it is a number or null."""
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.wrong(where, value, "a number")
        return value

    def need(self, fields: Mapping[str, Any], key: str, where: str) -> Any:
        """Return the field `key`. Raises `InputError` if it is missing."""
        if key not in fields:
            present = ", ".join(map(repr, list(fields)[:8])) or "no fields"
            raise InputError(
                f"{self.name}: {where} has no {key!r}, only {present}: it must be a NeuronRecord of OpenAI's"
                " neuron-explainer; leave other files out of --files"
            )
        return fields[key]

    def wrong(self, where: str, value: Any, expected: str) -> InputError:
        """Return the error for a value that is not as expected."""
        return InputError(
            f"{self.name}: {where} is {_shown(value)}, but must be {expected}; leave damaged files out of --files"
        )


def _without(fields: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields that are not `known`, and `dataclass_name`."""
    return {k: v for k, v in fields.items() if k not in known or k == "dataclass_name"}


def _shown(value: Any) -> str:
    """Return a value for an error message: JSON on one line, shortened."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return " ".join(text.split())[:60] or "empty"
