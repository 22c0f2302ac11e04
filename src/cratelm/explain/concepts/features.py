"""At which tokens the predicates of a library hold.

Most conditions see a string that recurs, such as the word of a token. Each such string is judged once by all conditions
on it, and the result is kept for as long as the library: in time a batch is little more than looking up strings.

Memory: the strings seen, about 200 bytes each; the oldest go once there are `_KEPT` of a kind.

Shape legend: n tokens, P predicates.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cratelm.errors import InputError, one_line
from cratelm.explain.concepts.library import Library, Predicate, function_of
from cratelm.explain.concepts.texts import TokenTexts

_KEPT = 200_000
Bools = NDArray[np.bool_]
Test = Callable[[str], bool]


class _Judged:
    """Strings of one kind, each judged by all conditions on that kind."""

    def __init__(self):
        self.tests: list[Test] = []
        self._numbers: dict[str, int] = {}
        self._rows = np.zeros((0, 0), bool)

    def columns(self, strings: Sequence[str]) -> Bools:
        """Return which conditions hold of each string, [n, conditions]."""
        if len(self._numbers) > _KEPT:
            self._numbers.clear()
        numbers, tests = self._numbers, self.tests
        codes, new = np.empty(len(strings), np.int64), []
        for i, string in enumerate(strings):
            code = numbers.get(string)
            if code is None:
                code = numbers[string] = len(numbers)
                new.append(string)
            codes[i] = code
        if len(numbers) > len(self._rows):
            grown = np.zeros((2 * len(numbers) + 1024, len(tests)), bool)
            if len(self._rows):
                grown[: len(self._rows)] = self._rows
            self._rows = grown
        first = len(numbers) - len(new)
        for code, string in enumerate(new, first):
            self._rows[code] = [test(string) for test in tests]
        return self._rows[codes]


_STRINGS: dict[str, Callable[[TokenTexts], list[str]]] = {
    "token": lambda texts: texts.tokens,
    "word": lambda texts: texts.words,
    "previous": lambda texts: texts.previous(),
    "previous2": lambda texts: texts.previous(2),
    "first_word": lambda texts: texts.first_words,
    "type": lambda texts: texts.types,
}
"""kinds of strings that recur"""
_LINES: dict[str, Callable[[TokenTexts], list[str]]] = {
    "line": lambda texts: texts.lines(),
    "before": lambda texts: texts.before_word(),
}


class _Tables:
    """What evaluations of a library share."""

    def __init__(self, library: Library):
        self.judged = {kind: _Judged() for kind in _STRINGS}
        self.tests: dict[str, list[tuple[str, int]]] = {}
        """by predicate: kinds of strings and the conditions on them"""
        for predicate in library.predicates:
            self.tests[predicate.name] = [
                (kind, self._number(kind, test)) for kind, test in _string_tests(predicate)
            ]

    def _number(self, kind: str, test: Test) -> int:
        self.judged[kind].tests.append(test)
        return len(self.judged[kind].tests) - 1


def _string_tests(predicate: Predicate) -> list[tuple[str, Test]]:
    """Return the conditions of a predicate on strings that recur, with their kinds."""
    found: list[tuple[str, Test]] = []
    for kind in ("token", "word", "previous", "previous2", "first_word"):
        if pattern := getattr(predicate, kind):
            found.append((kind, _fullmatch(pattern)))
    for kind, words in (("word", predicate.words), ("previous", predicate.previous_words)):
        if words:
            found.append((kind, _in(words)))
    if predicate.types:
        found.append(("type", _below(predicate.types)))
    if predicate.other_types:
        below = _below(predicate.other_types)
        found.append(("type", lambda of: not below(of)))
    return found


def _fullmatch(pattern: str) -> Test:
    match = re.compile(pattern).fullmatch
    return lambda string: match(string) is not None


def _in(words: Sequence[str]) -> Test:
    wanted = frozenset(w.lower() for w in words)
    return lambda string: string.lower() in wanted


def _below(types: Sequence[str]) -> Test:
    """Return a test of a lexical type: one of `types` or below one."""
    heads = tuple(f"{t}." for t in types)
    return lambda of: f"{of}.".startswith(heads)


class ConceptFeatures:
    """Which predicates hold at the tokens of several texts. Each predicate is evaluated when it is first used."""

    def __init__(self, texts: TokenTexts, library: Library):
        self.texts, self.library = texts, library
        self._columns: dict[str, Bools] = {}
        self._strings: dict[str, Bools] = {}
        self._lines: dict[str, list[str]] = {}
        tables = library._tables.get(0)
        if tables is None:
            tables = library._tables[0] = _Tables(library)
        self._tables: _Tables = tables

    @classmethod
    def of(
        cls, token_lists: Sequence[NDArray], library: Library, token_strings: Sequence[str]
    ) -> "ConceptFeatures":
        """Return the features of the tokens of all lists, in their order.

        Each list is a run of tokens of one document, and a predicate at a token depends on the tokens of its list up
        to it alone. `token_strings` [V] is the text of each token id.
        """
        return cls(TokenTexts(token_lists, token_strings), library)

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str) -> Bools:
        """Return at which tokens a predicate holds, [n]. Raises `InputError` for a name not in the library."""
        if name not in self._columns:
            self._columns[name] = self._evaluated(self.library[name])
        return self._columns[name]

    @cached_property
    def matrix(self) -> Bools:
        """Return at which tokens each predicate of the library holds, [n, P]."""
        found = np.empty((len(self), len(self.library)), bool)
        for number, predicate in enumerate(self.library.predicates):
            found[:, number] = self.column(predicate.name)
        return found

    def _evaluated(self, predicate: Predicate) -> Bools:
        holds = np.ones(len(self), bool)
        for kind, number in self._tables.tests[predicate.name]:
            if kind not in self._strings:
                judged = self._tables.judged[kind].columns(_STRINGS[kind](self.texts))
                self._strings[kind] = np.asfortranarray(judged)
            holds &= self._strings[kind][:, number]
        for kind, lines_of in _LINES.items():
            if pattern := getattr(predicate, kind):
                if kind not in self._lines:
                    self._lines[kind] = lines_of(self.texts)
                search, lines = re.compile(pattern).search, self._lines[kind]
                for i in np.flatnonzero(holds).tolist():
                    holds[i] = search(lines[i]) is not None
        if predicate.function:
            holds &= _called(predicate, self.texts)
        return holds


@dataclass(frozen=True)
class ConceptReader:
    """A library with the texts of the tokens that it is used on."""

    library: Library
    strings: Sequence[str]
    """[V] text of each token id"""

    def features(self, token_lists: Sequence[NDArray]) -> ConceptFeatures:
        """Return where the predicates hold at the tokens of all lists, see `ConceptFeatures.of`."""
        return ConceptFeatures.of(token_lists, self.library, self.strings)


def _called(predicate: Predicate, texts: TokenTexts) -> Bools:
    """Return what the function of a predicate returns; raise `InputError` if it is not bool [n]."""
    try:
        holds = function_of(predicate.function)(texts)
    except InputError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"the function {predicate.function!r} of the predicate {predicate.name} failed: {what}"
        ) from error
    if not isinstance(holds, np.ndarray) or holds.shape != (len(texts),) or holds.dtype != bool:
        shape = getattr(holds, "shape", type(holds).__name__)
        raise InputError(
            f"the function {predicate.function!r} of the predicate {predicate.name} returned {shape}, expected a NumPy"
            f" array of {len(texts)} bool"
        )
    return holds
