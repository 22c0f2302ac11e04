"""Sentences of explanations: the claim first, in words of concepts where several tokens share one."""

import numpy as np
import planted
import pytest
from planted import STRINGS, corpus, harvested

from cratelm.explain.concepts.fit import FitFeatures
from cratelm.explain.concepts.library import Library, builtin_library, parse_predicates
from cratelm.explain.concepts.sentence import formula_phrase
from cratelm.explain.config import ExplainConfig
from cratelm.explain.neuron import explain_neuron
from cratelm.text.claim import claim

LIBRARY = builtin_library()


@pytest.mark.parametrize(
    ("names", "operators", "phrase"),
    [
        ((), (), "all tokens"),
        (("digits",), (), "digits"),
        (("in-comment",), (), "tokens in comments"),
        (("digits", "in-comment"), ("and",), "digits in comments"),
        (("in-comment", "digits"), ("and",), "digits in comments"),
        (("digits", "comma"), ("or",), "digits and commas"),
        (("digits", "in-comment"), ("or",), "digits and tokens in comments"),
        (("digits", "comma", "in-comment"), ("or", "and"), "digits and commas, all of them in comments"),
        (("digits", "comma", "in-comment"), ("or", "and not"), "digits and commas, but not in comments"),
        (("digits", "comma", "symbol"), ("or", "and not"), "digits and commas, but no symbols"),
        (("lower-case", "keyword", "article"), ("and not", "and not"), "lower-case words other than keywords and articles"),
        (("digits", "in-comment", "comma"), ("and not", "or"), "digits except in comments and commas"),
        (("in-comment", "after-dot", "digits"), ("and", "and"), "digits in comments and after a dot"),
        (("capitalised", "lower-case"), ("and",), "capitalised words that are lower-case words"),
        (("capitalised", "begins-sentence"), ("and not",), "capitalised words except those that begin a sentence"),
    ],
)  # fmt: skip
def test_a_formula_in_words(names, operators, phrase):
    assert formula_phrase(LIBRARY, names, operators) == phrase


def test_a_users_predicate_in_words():
    library = Library(
        tuple(parse_predicates("[[predicate]]\nname='x'\nwhere='in x'\ntoken='x'", "F"))
    )
    assert formula_phrase(library, ["x"], []) == "tokens in x"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("digits: `1`; 20% of its activation; e.g. x", "digits: `1`"),
        ("the tokens `;` and `.`; 20%", "the tokens `;` and `.`"),
        ("Fires on dates. It also", "Fires on dates"),
        ("numbers such as 1.5 in text; x", "numbers such as 1.5 in text"),
        ("nothing else", "nothing else"),
        ("", ""),
    ],
)
def test_the_claim_ends_at_the_first_semicolon_or_full_stop(text, first):
    assert claim(text) == first


def sentences(activations, **fields):
    names = ("lookup", "trie", "concepts", "lookup+concepts")
    config = ExplainConfig(explainers=names, **fields)
    return {e.explainer: e for e in explain_neuron(harvested(activations), config, STRINGS)}


def test_tokens_that_share_a_concept_are_named_by_it():
    """Fires on words that begin a line, whichever they are."""
    tokens, _ = corpus("fit")
    after = np.append(False, tokens[:-1] == 1) & (tokens != 1)
    found = sentences(after.astype(float))
    for explainer in ("lookup", "trie", "concepts"):
        assert "at the beginning of a line" in claim(found[explainer].text)
        assert found[explainer].claim_variance > 0.8
    assert "% of its activation, fires on " in found["trie"].text
    assert "; e.g. " in found["trie"].text


def test_tokens_without_a_concept_are_listed():
    tokens, _ = corpus("fit")
    found = sentences(np.isin(tokens, [7, 23]).astype(float))
    assert claim(found["lookup"].text) in (
        "the tokens `␣w7` and `␣w23`",
        "the tokens `␣w23` and `␣w7`",
    )
    assert found["lookup"].claim_variance == pytest.approx(1)


def test_one_token_is_not_called_by_its_kind():
    """`from` alone, though it is a preposition, the only one in the vocabulary."""
    found = sentences(planted.on_token(corpus("fit")[0], 3))
    assert claim(found["trie"].text) == "the token `⇥from`"
    assert claim(found["concepts"].text) == "the token `⇥from`"


def test_a_token_that_is_most_of_a_concept_is_named_first():
    """Strong on one word at the beginning of a line, weak on others."""
    tokens, _ = corpus("fit")
    after = np.append(False, tokens[:-1] == 1)
    few = after & (tokens > 2) & (tokens % 2 == 0)
    record = harvested(4.0 * (after & (tokens == 2)) + 0.3 * few)
    library = Library((LIBRARY["begins-line"],))
    config = ExplainConfig(explainers=("concepts",))
    (found,) = explain_neuron(record, config, STRINGS, FitFeatures(library, STRINGS))
    expected = "the token `␣import` and other tokens at the beginning of a line"
    assert claim(found.text) == expected


def test_a_claim_that_leaves_most_unsaid_says_so():
    tokens, _ = corpus("fit")
    rng = np.random.default_rng(0)
    value = rng.uniform(1, 1.2, planted.VOCABULARY) * (np.arange(planted.VOCABULARY) % 2)
    found = sentences(value[tokens])
    assert claim(found["lookup"].text).endswith(", among others")


def test_stacked_sentences_say_what_the_formula_adds():
    tokens, _ = corpus("fit")
    after = np.append(False, tokens[:-1] == 1)
    found = sentences(2.0 * (tokens == 5) + after)
    text = claim(found["lookup+concepts"].text)
    assert text.startswith(claim(found["lookup"].text) + ", more on ")
