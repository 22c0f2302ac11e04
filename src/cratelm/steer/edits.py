"""Edits of neurons: which neurons, which operation, and at which tokens. Imports nothing heavy."""

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cratelm.errors import InputError
from cratelm.runs.arguments import checked_value

Operation = Literal["set", "add", "scale", "zero"]
_NUMBER = float | None


@dataclass(frozen=True)
class Positions:
    """The tokens of a text at which neurons are edited.

    The position of a token is the number of real tokens before it in its row. Padding has no position and is
    not counted; cached tokens are counted. Negative positions count from the end of the prompt: the input of
    `generate`, or, outside of `generate`, all tokens up to the end of the pass.
    """

    listed: tuple[int, ...] | None = None
    """only these positions; None for the span below"""
    start: int = 0
    stop: int | None = None
    """first position after the span; None: to the end, generated tokens included"""
    generated: bool = False
    """only the tokens that `generate` adds"""

    @property
    def everywhere(self) -> bool:
        """True if every token is edited, so that positions need not be tracked."""
        return self == Positions()

    @classmethod
    def of(cls, value: "str | int | Sequence[int] | Positions") -> "Positions":
        """Return the positions that `value` names.

        These are `all`, `last`, `generated`, a span such as `5:` or `-3:`, or one or more numbers. Raises
        `InputError` for anything else.
        """
        if isinstance(value, Positions):
            return value
        if isinstance(value, str):
            return _from_words(value)
        try:
            single = isinstance(value, int | numbers.Integral)
            listed: tuple[Any, ...] = (value,) if single else tuple(value)  # type: ignore[arg-type]
            if (
                not isinstance(value, bytes)
                and listed
                and all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in listed)
            ):
                return cls(listed=tuple(map(int, listed)))
        except TypeError:
            pass
        raise _no_positions(value)


def _from_words(text: str) -> Positions:
    named = {
        "all": Positions(),
        "last": Positions(listed=(-1,)),
        "generated": Positions(generated=True),
    }
    if text in named:
        return named[text]
    span = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    if span:
        return Positions(start=int(span[1] or 0), stop=int(span[2]) if span[2] else None)
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        return Positions(listed=tuple(map(int, text.split(","))))
    raise _no_positions(text)


def _no_positions(value: object) -> InputError:
    return InputError(
        f"positions {value!r} cannot be read: give all, last, generated, a span such as 5: or -3:, or"
        " numbers such as 2,5"
    )


@dataclass(frozen=True)
class Edit:
    """An operation on neurons of one layer: exactly one of `set`, `add`, `scale`, `zero`.

    Raises `InputError` if none or several of these are given, if the number is not finite, if no neuron is
    named, and for a value of a wrong type.
    """

    layer: int
    neurons: int | Sequence[int]
    """one index or several; converted to a tuple"""
    set: float | None = None
    """value that the raw activation is set to"""
    add: float | None = None
    """value that is added to the raw activation"""
    scale: float | None = None
    """factor that the activation is multiplied by"""
    zero: bool = False
    """set the activation to 0"""
    positions: str | int | Sequence[int] | Positions = "all"
    """`all`, `last` (of the prompt), `generated`, a span such as `5:`, or numbers; see `Positions`"""

    def __post_init__(self) -> None:
        for name, hint in (("layer", int), ("set", _NUMBER), ("add", _NUMBER), ("scale", _NUMBER)):
            object.__setattr__(self, name, checked_value(name, getattr(self, name), hint))
        checked_value("zero", self.zero, bool)
        single = isinstance(self.neurons, numbers.Integral)
        neurons = (self.neurons,) if single else self.neurons
        neurons = checked_value("neurons", neurons, tuple[int, ...])
        object.__setattr__(self, "neurons", neurons)
        object.__setattr__(self, "positions", Positions.of(self.positions))
        one_operation(self.set, self.add, self.scale, self.zero)
        if not neurons:
            raise InputError("an edit names no neuron: give at least one index")

    @property
    def indices(self) -> tuple[int, ...]:
        """The neurons, as a tuple."""
        assert isinstance(self.neurons, tuple)
        return self.neurons

    @property
    def where(self) -> Positions:
        """The positions, parsed."""
        assert isinstance(self.positions, Positions)
        return self.positions

    def from_position(self, first: int) -> "Edit":
        """Return the edit without the first tokens, such as a begin token, if it is of all tokens."""
        return replace(self, positions=f"{first}:") if first and self.where.everywhere else self

    @property
    def operation(self) -> tuple[Operation, float]:
        """The operation and its number."""
        return one_operation(self.set, self.add, self.scale, self.zero)


def one_operation(
    set_: float | None, add: float | None, scale: float | None, zero: bool, *, dashes: str = ""
) -> tuple[Operation, float]:
    """Return the operation that is given, and its number.

    Raises `InputError` unless exactly one is given, with a finite number. `dashes` is a prefix of the names in
    messages: `--` for options of a command.
    """
    values: dict[Operation, float | None] = {"set": set_, "add": add, "scale": scale}
    operations: list[tuple[Operation, float]] = [(k, v) for k, v in values.items() if v is not None]
    if zero:
        operations.append(("zero", 0.0))
    if len(operations) != 1:
        names = ", ".join(dashes + name for name in ("set", "add", "scale", "zero"))
        if not operations:
            raise InputError(f"no operation on the neurons is given: give one of {names}")
        raise InputError(
            f"{' and '.join(dashes + name for name, _ in operations)} cannot be combined: give one of {names}"
        )
    name, value = operations[0]
    if not math.isfinite(value):
        raise InputError(f"{dashes}{name} is {value}: it must be a finite number")
    return name, value
