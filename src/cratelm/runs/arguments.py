"""Types of arguments, checked from their annotations: options of verbs, and arguments of public functions.

The command line parses options by the same annotations, so that a wrong type comes from Python; NaN,
infinity, absurd numbers and empty paths come from both. A value of another type that means the same is
converted: a path given as text, a NumPy number, a list instead of a tuple.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from cratelm.errors import InputError
from cratelm.runs.names import control_characters

_P = ParamSpec("_P")
_R = TypeVar("_R")
LARGEST = 10**15
"""largest number that counts anything: tokens, steps, bytes. Larger ones overflow in the libraries"""
LARGEST_SEED = 2**63 - 1
"""largest seed that both NumPy and torch accept"""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""bytes of a name and of a path that Linux accepts; other systems have the same limits or lower ones"""
_MAY_BE_EMPTY = ("text", "subset_field")
"""options whose empty value is not that of an option that was not given: a text without tokens, no field"""


def check_fields(config: Any) -> None:
    """Check all fields of a dataclass instance against its annotations, and convert them (see above).

    Raises `InputError`, which names the first field that does not fit.
    """
    hints = annotations_of(type(config))
    for field in dataclasses.fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        name = option_name(field.name, hint)
        checked = checked_value(name, value, hint)
        _check_not_empty(name, field, hint, checked)
        if checked is not value:
            object.__setattr__(config, field.name, checked)  # also on a frozen dataclass


def option_name(field: str, hint: Any = None) -> str:
    """Return how a field is written on the command line: `--name`, or `NAME` for a positional argument."""
    positional = get_origin(hint) is Annotated
    return field.upper() if positional else f"--{field.replace('_', '-')}"


def checked_arguments(**instead: Any) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that checks the arguments of a function against its annotations.

    `instead` has other types than the annotated ones, by argument; `Any` stands for no check. The function
    raises `InputError`, which names the first argument that does not fit.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)  # raises Python's own TypeError
            hints = {**annotations_of(function), **instead}
            for name, value in bound.arguments.items():
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_KEYWORD or name == "self":
                    continue
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    found = tuple(checked_value(name, v, hints[name]) for v in value)
                else:
                    found = checked_value(name, value, hints.get(name, Any))
                bound.arguments[name] = found
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, converted where that loses nothing.

    Raises `InputError`, which calls the value `name`, if it has another type, is not a finite number, is
    larger than any count can be, or is a path that no file system accepts.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar | str):
        return value
    if origin is Annotated:
        return checked_value(name, value, parts[0])
    if origin in (Union, types.UnionType):
        return _checked_union(name, value, hint, parts)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in parts):
            choices = ", ".join(map(str, parts))
            raise InputError(f"{name} is {_shown(value)}: choose from {choices}")
        return value
    if origin is tuple and parts[1:] == (...,):
        return _checked_tuple(name, value, hint, parts[0])
    if origin in (Sequence, Iterable, list):
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise _wrong(name, value, hint)
        return value
    check = _CHECKS.get(hint)
    if check is not None:
        return check(name, value)
    kind = origin or hint
    if kind is Callable or not isinstance(kind, type):
        return value
    if getattr(kind, "_is_protocol", False) or isinstance(value, kind):
        return value
    raise _wrong(name, value, hint)


def _checked_union(name: str, value: Any, hint: Any, parts: tuple[Any, ...]) -> Any:
    if value is None and types.NoneType in parts:
        return None
    others = [part for part in parts if part is not types.NoneType]
    if len(others) == 1:
        try:
            return checked_value(name, value, others[0])
        except InputError:
            if value is None or not _is_right_kind(value, others[0]):
                raise _wrong(name, value, hint) from None
            raise
    for part in others:
        if _is_right_kind(value, part):
            return checked_value(name, value, part)
    raise _wrong(name, value, hint)


def _is_right_kind(value: Any, hint: Any) -> bool:
    """Return whether `value` is of the type `hint`, whatever its size and content."""
    if get_origin(hint) is Literal:
        return isinstance(value, tuple({type(choice) for choice in get_args(hint)}))
    if hint in (int, float):
        abstract = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, abstract) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | os.PathLike)
    if get_origin(hint) in (tuple, Sequence, Iterable, list):
        return not isinstance(value, str | bytes) and isinstance(value, Iterable)
    kind = get_origin(hint) or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _checked_tuple(name: str, value: Any, hint: Any, part: Any) -> tuple[Any, ...]:
    if part is Path and isinstance(value, str | os.PathLike):
        value = (value,)  # one path for a list of paths, as on the command line
    elif hasattr(value, "tolist"):  # a NumPy array or a tensor
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise _wrong(name, value, hint)
    return tuple(checked_value(name, item, part) for item in value)


def _checked_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool) and type(value).__name__ != "bool":  # NumPy's is another class
        raise _wrong(name, value, bool)
    return bool(value)


def _checked_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(name, value, int)
    number = int(value)
    most = LARGEST_SEED if "seed" in name else LARGEST
    if abs(number) > most:
        side = "at most" if number > 0 else "at least"
        limit = most if number > 0 else -most
        raise InputError(f"{name} is {_shown(number)}: it must be {side} {limit:,}")
    return number if type(value) is not int else value


def _checked_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, value, float)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        finite = False
    if not finite:
        raise InputError(f"{name} is {_shown(value)}: it must be a finite number")
    # An integer stays one: identities hash the JSON, in which 1 and 1.0 differ.
    return value if isinstance(value, int) or type(value) is float else float(value)


def _checked_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, str)
    return value


def checked_path(name: str, value: Any) -> Path:
    """Return a path that a file system can have.

    Raises `InputError` for an empty path, control characters, a name or path that is too long, and a
    leading dash, with which every later command would take it for an option.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise _wrong(name, value, Path)
    text = os.fspath(value)
    if not text.strip():
        raise InputError(f"{name} is empty: name a path, or leave the option out")
    if text.startswith("-"):
        raise InputError(f"{name} is {_shown(text)}, which looks like an option: type ./{text}")
    if control_characters(text):
        raise InputError(
            f"{name} is {_shown(text)}, which has control characters: give another path"
        )
    try:
        sizes = [len(os.fsencode(part)) for part in Path(text).parts] or [0]
    except UnicodeEncodeError:
        raise InputError(
            f"{name} is {_shown(text)}, which is not valid Unicode: give another path"
        ) from None
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) > _LONGEST_PATH:
        what = f"a name of {max(sizes):,}" if max(sizes) > _LONGEST_NAME else f"{sum(sizes):,}"
        raise InputError(
            f"{name} is {_shown(text)}, which has {what} bytes, and at most {_LONGEST_NAME} are possible"
            f" in a name and {_LONGEST_PATH:,} in a path: name a shorter one"
        )
    return value if isinstance(value, Path) else Path(text)


_CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    bool: _checked_bool,
    int: _checked_int,
    float: _checked_float,
    str: _checked_text,
    Path: checked_path,
}
_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    types.NoneType: ("None", "None"),
}
"""each type in words, singular and plural"""


def _wrong(name: str, value: Any, hint: Any) -> InputError:
    return InputError(
        f"{name} is {_shown(value)} ({type(value).__name__}): it must be {_in_words(hint)}"
    )


def _in_words(hint: Any, *, plural: bool = False) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_words(parts[0], plural=plural)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(part, plural=plural) for part in parts))
    if origin in (tuple, Sequence, Iterable, list):
        return f"a list of {_in_words(parts[0], plural=True)}"
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if hint in _WORDS:
        return _WORDS[hint][plural]
    return getattr(origin or hint, "__name__", str(hint))


def _shown(value: Any) -> str:
    """Return a value as Python writes it, on one line and not longer than a line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class of the user
        text = f"an object of {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_not_empty(name: str, field: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Raise `InputError` for empty text, unless the default is empty: then it means that none was given."""
    texts = value if isinstance(value, tuple) else (value,)
    empty = any(isinstance(text, str) and not text.strip() for text in texts)
    if empty and field.default != value and field.name not in _MAY_BE_EMPTY:
        needed = field.default is dataclasses.MISSING
        advice = "give a value" if needed else "give a value, or leave the option out"
        raise InputError(f"{name} is empty: {advice}")


@functools.cache
def annotations_of(owner: Any) -> Mapping[str, Any]:
    """Return the annotations of a dataclass or function; none if they cannot be resolved outside checkers."""
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except NameError:
        return {}
