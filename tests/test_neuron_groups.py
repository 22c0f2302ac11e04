"""Groups of neurons: by concept, else by the class of the strongest token."""

import pytest

from cratelm.results.neuron_groups import (
    NO_GROUP,
    TOKEN_CLASSES,
    NeuronGroup,
    neuron_group,
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


def test_a_neuron_without_a_concept_belongs_to_the_class_of_its_first_token() -> None:
    assert neuron_group("", [" self", "\n"]) == NeuronGroup("beginnings of words", "self")
    assert neuron_group("", ["self"]).shares == "self"  # with and without a space: the same label
    assert neuron_group("", ["  "]) == NeuronGroup("line breaks and spaces", "␣␣")
    assert neuron_group("", ["\n "]).shares == "⏎"
    assert neuron_group("", []) == NO_GROUP


@pytest.mark.parametrize(
    ("sentence", "family", "shares"),
    [
        (
            "names of attributes after a dot: `get`, `set`; fires on 2% of tokens",
            "names of attributes after a dot",
            "names of attributes after a dot",
        ),
        ("digits and not in comments. Fires on ...", "digits", "digits and not in comments"),
        ("the token `a;b.c:` after `(`; fires", "the token `a;b.c:` after `(`", "the token `a;b.c:` after `(`"),
        ("x" * 60, "x" * 60, "x" * 39 + "…"),
    ],
)  # fmt: skip
def test_a_concept_comes_before_tokens(sentence: str, family: str, shares: str) -> None:
    assert neuron_group(sentence, [" self"]) == NeuronGroup(family, shares)


def test_a_sentence_without_a_claim_counts_as_none() -> None:
    assert neuron_group("; fires on 2% of tokens", ["1"]).family == "numbers"
