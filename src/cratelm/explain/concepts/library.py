"""The library of predicates: those of the package, of files that a user names, and of installed packages.

A predicate is data: conditions that must all hold of a token, in a TOML file.

    [[predicate]]
    name = "attribute"                 # letters, digits and hyphens
    where = "after a dot"              # a place, "tokens after a dot"; or `kind = "digits"`, a plural noun
    previous = "\\\\."                   # the conditions, see `CONDITIONS`
    example = "self.«get»(key)"        # holds at the tokens between « and », and at no other

A `function` is the name of a Python function from `TokenTexts` to bool [n]: one of `functions.py`, or one that an installed
package declares as an entry point of the group `cratelm.predicates`. Only installed packages can declare one, so that a
library, which travels with the explanations of a run, cannot make another machine run code of its own.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError
from cratelm.explain.concepts.functions import FUNCTIONS
from cratelm.explain.concepts.texts import TokenTexts

GROUP = "cratelm.predicates"
"""entry points of installed packages that are functions of predicates"""
BUILTIN_FILES = ("characters", "place", "code", "english", "context")
REGEXES = ("token", "word", "previous", "previous2", "first_word", "line", "before")
"""conditions that are a regular expression. It must match the whole token, word, previous word, the one before that, or
first word of the line; or be found in the line up to the token, or in the line before the token's word"""
LISTS = ("words", "previous_words", "types", "other_types")
"""conditions that are a list: words in lower case, or lexical types, with all types below them"""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
Function = Callable[[TokenTexts], NDArray[np.bool_]]


@dataclass(frozen=True)
class Predicate:
    """A named property of tokens; a condition that is not given is empty."""

    name: str
    kind: str = ""
    """what the tokens are, a plural noun, such as `digits`; exactly one of `kind` and `where` is given"""
    where: str = ""
    """where they are, such as `after a dot`"""
    token: str = ""
    word: str = ""
    previous: str = ""
    previous2: str = ""
    first_word: str = ""
    line: str = ""
    before: str = ""
    words: tuple[str, ...] = ()
    previous_words: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    other_types: tuple[str, ...] = ()
    """lexical types that the token must not have"""
    function: str = ""
    example: str = ""
    """a text that the predicate holds in at exactly the tokens between « and »"""

    @property
    def phrase(self) -> str:
        """Return the tokens in words, a plural noun phrase such as `digits` or `tokens after a dot`."""
        return self.kind or f"tokens {self.where}"

    def conditions(self) -> dict[str, Any]:
        """Return the conditions that are given."""
        names = (*REGEXES, *LISTS, "function")
        return {name: value for name in names if (value := getattr(self, name))}


@dataclass(frozen=True)
class Library:
    """Predicates, each name once."""

    predicates: tuple[Predicate, ...]
    _tables: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    """what evaluations share, see `features`"""

    def __len__(self) -> int:
        return len(self.predicates)

    @cached_property
    def number(self) -> Mapping[str, int]:
        """Return the number of each predicate by its name."""
        return {p.name: i for i, p in enumerate(self.predicates)}

    def __getitem__(self, name: str) -> Predicate:
        """Return the predicate of a name; raise `InputError` if there is none."""
        if name not in self.number:
            raise InputError(f"no predicate {name!r} in the library of {len(self)}")
        return self.predicates[self.number[name]]

    def as_json(self) -> str:
        """Return the library as JSON, which `from_json` reads."""
        rows = []
        for p in self.predicates:
            rows.append({name: value for name, value in asdict(p).items() if value})
        return json.dumps({"predicates": rows}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, name: str) -> "Library":
        """Return the library in a JSON text. Raises `InputError` that begins with `name` if it is none."""
        try:
            rows = json.loads(text)["predicates"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{name} is not a library of predicates: explain again") from None
        return cls(distinct([_predicate(name, i, row) for i, row in enumerate(rows)], name))


@cache
def builtin_library() -> Library:
    """Return the predicates of the package."""
    folder = files("cratelm.explain.concepts") / "data"
    predicates: list[Predicate] = []
    for name in BUILTIN_FILES:
        text = (folder / f"{name}.toml").read_text(encoding="utf-8")
        predicates += parse_predicates(text, f"{name}.toml")
    return Library(distinct(predicates, "the built-in library"))


def parse_predicates(text: str, name: str) -> list[Predicate]:
    """Return the predicates of a TOML text. Raises `InputError` that begins with `name` if it is faulty."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is not TOML: {error}") from None
    rows = content.get("predicate")
    if set(content) != {"predicate"} or not isinstance(rows, list):
        raise InputError(f"{name}: give predicates, each as a table [[predicate]]")
    return [_predicate(name, number, row) for number, row in enumerate(rows)]


def _predicate(file: str, number: int, row: Any) -> Predicate:
    """Return a predicate from a row of a file; raise `InputError` if the row is faulty."""
    label = row.get("name", number + 1) if isinstance(row, dict) else number + 1
    at = f"{file}, predicate {label}"
    if not isinstance(row, dict):
        raise InputError(f"{at}: must be a table")
    known = {f.name for f in fields(Predicate)}
    if unknown := sorted(set(row) - known):
        raise InputError(f"{at}: {unknown[0]} is no key: use {', '.join(sorted(known))}")
    values = {}
    for key, value in row.items():
        is_list = key in LISTS
        right = isinstance(value, list if is_list else str) and value
        if not right or (is_list and not all(isinstance(v, str) for v in value)):
            kind = "a list of strings" if is_list else "a string"
            raise InputError(f"{at}: {key} must be {kind} that is not empty, not {value!r}")
        values[key] = tuple(value) if is_list else value
    if not _NAME.fullmatch(values.get("name", "")):
        raise InputError(f"{at}: name must be lower-case letters, digits and hyphens")
    predicate = Predicate(**values)
    if bool(predicate.kind) == bool(predicate.where):
        raise InputError(f'{at}: give one of kind, such as "digits", and where, such as "in lists"')
    if not predicate.conditions():
        raise InputError(f"{at}: give a condition: {', '.join((*REGEXES, *LISTS, 'function'))}")
    for key in REGEXES:
        try:
            re.compile(getattr(predicate, key))
        except re.error as error:
            raise InputError(f"{at}: {key} is not a regular expression: {error}") from None
    if predicate.function:
        function_of(predicate.function, at)
    return predicate


def distinct(predicates: Iterable[Predicate], name: str) -> tuple[Predicate, ...]:
    """Return predicates; raise `InputError` that begins with `name` if two have the same name."""
    predicates = tuple(predicates)
    seen: set[str] = set()
    for p in predicates:
        if p.name in seen:
            raise InputError(f"{name}: the predicate {p.name} exists already: choose another name")
        seen.add(p.name)
    return predicates


@cache
def function_of(name: str, at: str = "") -> Function:
    """Return the function of a predicate: a built-in one, or one that an installed package declares.

    Raises `InputError` that begins with `at` if there is none, or if its package cannot be imported.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    declared = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in declared:
        known = ", ".join([*sorted(declared), *FUNCTIONS])
        raise InputError(
            f"{at}: no function {name!r}: declare it as an entry point {GROUP} of an installed package, or use one of"
            f" {known}"
        )
    try:
        return declared[name].load()
    except Exception as error:
        raise InputError(f"{at}: the function {name!r} cannot be imported: {error}") from error
