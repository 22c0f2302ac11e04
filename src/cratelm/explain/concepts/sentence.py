"""A formula in words, as a plural noun phrase: `digits in comments`, `commas and dots, but not in docstrings`."""

from collections.abc import Sequence

from cratelm.explain.concepts.library import Library, Predicate

_NOUN = "tokens"


def formula_phrase(library: Library, names: Sequence[str], operators: Sequence[str]) -> str:
    """Return a formula in words; `names` [K] are predicates and `operators` [K - 1] what joins them from left to right.

    A formula without terms is `all tokens`.
    """
    if not names:
        return f"all {_NOUN}"
    terms = [library[name] for name in names]
    phrase, alternatives = terms[0].phrase, 1
    # a kind of tokens makes the better noun: `digits in comments`, not `tokens in comments that are digits`
    if len(terms) > 1 and operators[0] == "and" and not terms[0].kind and terms[1].kind:
        terms[0], terms[1] = terms[1], terms[0]
        phrase = terms[0].phrase
    parts = [phrase]
    for operator, term in zip(operators, terms[1:], strict=True):
        if operator == "or":
            parts.append(term.phrase)
            alternatives += 1
        elif alternatives > 1:
            both = "all of them " if alternatives > 2 else "both "
            parts = [f"{_listed(parts)}, {_restricted(operator, term, both)}"]
            alternatives = 1
        else:
            parts[-1] = f"{parts[-1]} {_restricted(operator, term, '')}"
    return _listed(parts)


def _restricted(operator: str, term: Predicate, emphasis: str) -> str:
    """Return what restricts a noun phrase to a term, or to all but it."""
    if operator == "and":
        if term.kind:
            return f"that are {emphasis and ''}{term.kind}" if not emphasis else f"if they are {term.kind}"
        return f"{emphasis}{term.where}"
    if term.kind:
        return f"other than {term.kind}" if not emphasis else f"but no {term.kind}"
    return f"except those {term.where}" if term.where.startswith("that ") else f"except {term.where}"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]
