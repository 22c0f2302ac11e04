"""A formula in words, as a plural noun phrase: `digits in comments`, `commas and dots, but not in docstrings`."""

from collections.abc import Sequence

from cratelm.explain.concepts.library import Library, Predicate

Restriction = tuple[str, Predicate]
"""`and` or `and not`, and the predicate"""


def formula_phrase(library: Library, names: Sequence[str], operators: Sequence[str]) -> str:
    """Return a formula in words; `names` [K] are predicates and `operators` [K - 1] what joins them from left to right.

    A formula without terms is `all tokens`. Raises `InputError` for a name that is not in the library.
    """
    if not names:
        return "all tokens"
    terms = [library[name] for name in names]
    alternatives: list[list[Restriction]] = [[("and", terms[0])]]
    phrase = ""
    for operator, term in zip(operators, terms[1:], strict=True):
        if operator == "or":
            alternatives.append([("and", term)])
        elif len(alternatives) == 1:
            alternatives[0].append((operator, term))
        else:
            phrase += f", {_restricts_all(operator, term)}"
    return listed([_noun_phrase(of) for of in alternatives]) + phrase


def _noun_phrase(restrictions: Sequence[Restriction]) -> str:
    """Return tokens of which all restrictions hold: kinds first, then places, then what is excepted."""
    positive = [term for operator, term in restrictions if operator == "and"]
    kinds = [term.kind for term in positive if term.kind]
    places = [term.where for term in positive if term.where]
    excepted = [term for operator, term in restrictions if operator != "and"]
    words = [kinds[0] if kinds else "tokens"]
    words += [f"that are {kind}" for kind in kinds[1:]]
    words += [f"{'and ' if i else ''}{place}" for i, place in enumerate(places)]
    if other := [term.kind for term in excepted if term.kind]:
        words.append(f"other than {listed(other)}")
    for term in excepted:
        if term.where:
            words.append(f"except {'those ' if term.where.startswith('that ') else ''}{term.where}")
    return " ".join(words)


def _restricts_all(operator: str, term: Predicate) -> str:
    """Return what restricts several alternatives."""
    if operator == "and":
        return f"all of them {term.where}" if term.where else f"if they are {term.kind}"
    return f"but not {term.where}" if term.where else f"but no {term.kind}"


def listed(names: Sequence[str]) -> str:
    """Return names as `a`, `a and b` or `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]
