"""The lexical type of each token of a text, such as keyword or comment, as far as the text up to it shows.

The rules are pygments' for Python, which cope with fragments. A lexer of whole texts looks ahead: `def` is a keyword
only because a space follows. Here the text is cut after each token, and the type is that of the lexeme that covers the
token's last character other than white space in the cut text. What follows never changes it.

To lex each prefix from its start would take time quadratic in the length. So lexing goes on from the last lexeme that
the previous token ended in: this lexeme alone can grow by the next token. What happens from there depends on the state
of the rules, one character of text before, and the text since, and these three recur: results are cached by them.

A text may begin inside a docstring, whose closing quotes then look as if they opened one. A line inside a triple-quoted
string that can only be code ends it.
"""

import re
from collections.abc import Iterable, Sequence

from pygments.lexers.python import PythonLexer
from pygments.token import _TokenType

DOCSTRING = "Literal.String.Doc"
_ROOT = ("root",)
_CACHED = 500_000
"""results that are kept, of about 200 bytes each"""
_LONGEST = 120
"""characters of a lexeme that are lexed again for the next token"""
_CODE_LINE = re.compile(
    r"\s*(?:def \w+\(|class \w+[(:]|@\w+|import \w+$|from [\w.]+ import\b|self\.\w+|return\b|raise \w+|elif \w|"
    r"else:|try:|except\b.*:|if \w.*:$|for \w+ in .*:$|while \w.*:$|with \w.*:$|\w+ = )"
)
_LAST_WORD = re.compile(r"\w+\Z")
_States = tuple[str, ...]
_Step = tuple[int, _States, str]


class CausalLexer:
    """Types of tokens as dotted names of pygments, such as `Name.Function` or `Literal.String.Doc`."""

    def __init__(self):
        # The rules by state, which pygments compiles into this attribute: its own loop takes a whole text only.
        lexer = PythonLexer()
        self._lexer, self._rules = lexer, lexer._tokens  # type: ignore[attr-defined]
        self._triple = {state for state in self._rules if self._closed_by(state, ('"""', "'''"))}
        self._strings = self._triple | {s for s in self._rules if self._closed_by(s, ('"', "'"))}
        self._cache: dict[tuple[_States, bool, str, str], _Step] = {}

    def _closed_by(self, state: str, quotes: Iterable[str]) -> bool:
        """Return whether a rule of a state leaves it at one of these quotes."""
        return any(
            (m := match(q, 0)) is not None and m.group() == q and new == -1
            for match, _, new in self._rules[state]
            for q in quotes
        )

    def types(self, text: str, ends: Sequence[int]) -> list[str]:
        """Return the type of each token of `text`; `ends` is where each token ends, ascending."""
        types, position, stack = [], 0, _ROOT
        in_docstring, resumed, start = False, -1, 0
        for end in ends:
            was_triple = not self._triple.isdisjoint(stack)
            if was_triple:
                line = text.rfind("\n", 0, end) + 1
                if resumed != line and _CODE_LINE.match(text, line, end):
                    position, stack, resumed, was_triple = line, _ROOT, line, False
            blank = text[start:end].isspace()
            key = stack, blank, text[max(0, position - 1) : position], text[position:end]
            step = self._cache.get(key)
            if step is None:
                step = self._step(text, position, end, stack, blank)
                if len(self._cache) >= _CACHED:
                    self._cache.clear()
                self._cache[key] = step
            advanced, stack, kind = step
            is_triple = not self._triple.isdisjoint(stack)
            if is_triple and not was_triple:
                in_docstring = _begins_line(text, end)
            if in_docstring and (is_triple or was_triple) and kind.startswith("Literal.String"):
                kind = DOCSTRING
            position, start = position + advanced, end
            types.append(kind)
        return types

    def _step(self, text: str, position: int, end: int, stack: _States, blank: bool) -> _Step:
        """Lex text[position:end]; return how far it need not be lexed again, the state there, and the type at the end."""
        states, matches = list(stack), []
        wanted = end - 1
        while not blank and wanted > position and text[wanted].isspace():
            wanted -= 1
        kind, at = "Text", position
        while at < end:
            matches.append((at, tuple(states)))
            for match, action, new in self._rules[states[-1]]:
                m = match(text, at, end)
                if m is None:
                    continue
                if action is not None:
                    whole = type(action) is _TokenType
                    lexemes = [(at, action, m.group())] if whole else action(self._lexer, m)
                    for first, of, value in lexemes or ():
                        if first <= wanted < first + len(value):
                            kind = str(of).removeprefix("Token.")
                _change(states, new)
                if m.end() > at or new is not None:
                    at = m.end()
                    break
            else:  # as pygments does: a line break ends what no rule continues
                if text[at] == "\n":
                    states = ["root"]
                if at == wanted:
                    kind = "Text.Whitespace" if text[at].isspace() else "Error"
                at += 1
        kept, before = self._checkpoint(text, end, matches, tuple(states))
        return kept - position, before, kind

    def _checkpoint(
        self, text: str, end: int, matches: list[tuple[int, _States]], states: _States
    ) -> tuple[int, _States]:
        """Return where lexing goes on for the next token, and the state there.

        That is where the last rule matched, or the first within a run of quotes or of word characters, which rules
        divide differently once it is longer: one to three quotes, `0` and `0x1f`. A piece of a string, whose state
        says all that matters, and a long lexeme are not lexed again.
        """
        start, before = matches[-1]
        in_string = before[-1] in self._strings
        plain = in_string and states == before and text[end - 1].isalnum()
        if (plain and "\\" not in text[start:end]) or end - start > _LONGEST:
            return end, states
        run = start
        if text[end - 1] in "\"'":
            run = end - 1
            while run > matches[0][0] and text[run - 1] == text[end - 1] and end - run < 3:
                run -= 1
        elif not in_string and (word := _LAST_WORD.search(text, matches[0][0], end)):
            run = word.start()
        return next(((at, of) for at, of in matches if at >= run), (start, before))


def _change(states: list[str], new: object) -> None:
    """Apply the transition of a rule to the stack of states, as pygments does."""
    if new is None:
        return
    for change in new if isinstance(new, tuple) else (new,):
        if change == "#pop":
            change = -1
        if isinstance(change, int):  # the number of states to leave, negative
            del states[max(1, len(states) + change) :]
        else:
            states.append(states[-1] if change == "#push" else str(change))


def _begins_line(text: str, end: int) -> bool:
    """Return whether the triple quotes before `end` are the first on their line, as those of a docstring are."""
    opened = max(text.rfind('"""', 0, end), text.rfind("'''", 0, end), 0)
    line = text.rfind("\n", 0, opened) + 1
    return not text[line:opened].strip(" \trRuUbB")
