"""Groups of neurons: by concept, else by the class of the strongest token."""

import pytest

from cratelm.results.neuron_groups import (
    NO_GROUP,
    TOKEN_CLASSES,
    NeuronGroup,
    neuron_groups,
    token_class,
)


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("\n        ", "line breaks and spaces"),
        ("  ", "line breaks and spaces"),
        (" 12", "numbers"),
        ("0x1f", "numbers"),
        (" 3.5,", "numbers"),
        ("(", "brackets"),
        ("):\n", "brackets"),
        ("('", "brackets"),
        (' """', "quotes"),
        ("'", "quotes"),
        (" ==", "operators and punctuation"),
        (".", "operators and punctuation"),
        (" self", "beginnings of words"),
        ("ing", "words and parts of words"),
        (".append", "words and parts of words"),
        ("é", "words and parts of words"),
        (" Foo", "capitalised words"),
        ("_MAX", "capitalised words"),
        (" import", "Python keywords"),
        ("None", "Python keywords"),
        ("%s", "words and parts of words"),
        ("a b", "other tokens"),
    ],
)
def test_classes_of_tokens(token: str, name: str) -> None:
    assert token_class(token) == name
    assert name in (*TOKEN_CLASSES, "other tokens")


def test_a_neuron_without_a_concept_belongs_to_the_class_of_its_token() -> None:
    tokens = [" self", "self", "  ", "\n ", ""]
    assert neuron_groups([""] * 5, tokens) == [
        NeuronGroup("beginnings of words", "self"),
        NeuronGroup("words and parts of words", "self"),  # the same label with and without a space
        NeuronGroup("line breaks and spaces", "␣␣"),
        NeuronGroup("line breaks and spaces", "⏎"),
        NO_GROUP,
    ]
    assert neuron_groups([], []) == []


@pytest.mark.parametrize(
    ("sentence", "shares"),
    [
        ("names of attributes after a dot: `get`, `set`; 71% of its", "names of attributes after a dot"),
        ("digits and dots, but not in comments; 50% of", "digits"),
        ("commas, conjunctions and equals signs, among others: `,`", "commas"),
        ("tokens after a dot and in comments. 20%", "tokens after a dot"),
        ("`self` or `cls`, auxiliary verbs and dots; 3%", "`self` or `cls`"),
        ("`if`, `elif` or `else` that are pieces of two letters; 3%", "`if`, `elif` or `else`"),
        ("x" * 60, "x" * 31 + "…"),
    ],
)  # fmt: skip
def test_a_label_is_the_first_concept(sentence: str, shares: str) -> None:
    assert neuron_groups([sentence], [" self"])[0].shares == shares


def test_concepts_of_one_noun_are_a_family() -> None:
    sentences = [
        "opening square brackets, single capitals and dots; 1%",
        "closing brackets; 1%",
        "brackets of calls; 1%",
        "single line breaks with an indentation; 1%",
        "line breaks; 1%",
        "parts of names up to an underscore and digits; 1%",
        "names of built-in functions; 1%",
        "tokens inside string literals other than dots; 1%",
        "letters outside ASCII; 1%",
        "`self` or `cls`; 1%",
        "",
        "; 1%",
    ]
    groups = neuron_groups(sentences, ["1"] * len(sentences))
    assert [g.family for g in groups] == [
        *["brackets"] * 3,
        *["line breaks"] * 2,
        "parts of names up to an underscore",
        "names",
        "tokens inside string literals",
        "letters",
        "`self` or `cls`",
        "",  # without a sentence: no family, since the others are those of concepts
        "",
    ]
    assert groups[-2].shares == "1"
