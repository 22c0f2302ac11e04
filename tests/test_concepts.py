"""Predicates against text: what each holds at, that none sees later text, and faulty files of a user's own."""

import json
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratelm.errors import InputError
from cratelm.explain.concepts import library as library_module
from cratelm.explain.concepts.features import ConceptFeatures
from cratelm.explain.concepts.files import check_example, example_tokens, load_library
from cratelm.explain.concepts.fit import fit_features
from cratelm.explain.concepts.lexing import CausalLexer
from cratelm.explain.concepts.library import Library, builtin_library, parse_predicates
from cratelm.explain.concepts.stored import read_library, write_library
from cratelm.explain.concepts.texts import TokenTexts
from cratelm.explain.config import ExplainConfig
from cratelm.tokens.beginning import Beginning
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.shards import TokenStore
from cratelm.tokens.tokenize import tokenize

LIBRARY = builtin_library()


def ids_of(tokens):
    strings = list(dict.fromkeys(tokens))
    return np.array([strings.index(t) for t in tokens], np.int64), strings


def texts(*tokens):
    ids, strings = ids_of(tokens)
    return TokenTexts([ids], strings)


def holding(name, *tokens):
    """The tokens at which a predicate holds."""
    ids, strings = ids_of(tokens)
    column = ConceptFeatures.of([ids], LIBRARY, strings).column(name)
    return [t for t, holds in zip(tokens, column, strict=True) if holds]


def test_the_library_is_large_and_every_predicate_has_an_example():
    assert len(LIBRARY) >= 150
    assert all(p.example for p in LIBRARY.predicates)


@pytest.mark.parametrize("predicate", LIBRARY.predicates, ids=lambda p: p.name)
def test_a_predicate_holds_at_the_marked_tokens_of_its_example(predicate):
    check_example(predicate, "built in")
    marked = example_tokens(predicate.example)[1]
    assert marked.any()
    assert not marked.all() or predicate.name in ("near-start",)


def test_an_example_that_is_wrong_is_noticed():
    text = '[[predicate]]\nname = "x"\nkind = "xs"\ntoken = "a"\nexample = "a «b»"'
    with pytest.raises(InputError, match=r"F, predicate x: holds at \['a'\] of its example"):
        check_example(parse_predicates(text, "F")[0], "F")


# ---- how a token is judged ------------------------------------------------------------------------


def test_a_token_that_straddles_words_is_judged_by_its_last_character():
    found = texts("self", ".get", "(x", "):", "\n    ", "return x")
    assert found.words == ["self", "get", "x", ":", "", "x"]
    assert found.previous() == ["", ".", "(", ")", ":", "return"]
    assert found.first_words == ["self", "self", "self", "self", "self", "return"]
    assert holding("attribute", "self", ".get", "(x") == [".get"]


def test_a_word_is_known_up_to_the_end_of_its_token():
    found = texts(" pre", "fix", "_", "ed", " x")
    assert found.words == ["pre", "prefix", "prefix_", "prefix_ed", "x"]


def test_texts_do_not_see_each_other():
    ids, strings = ids_of(["def", " get", "(", "x"])
    apart = ConceptFeatures.of([ids[:1], ids[1:]], LIBRARY, strings)
    assert not apart.column("after-def").any()
    assert apart.column("first-in-text").tolist() == [True, True, False, False]
    alone = [ConceptFeatures.of([part], LIBRARY, strings).matrix for part in (ids[:1], ids[1:])]
    np.testing.assert_array_equal(apart.matrix, np.concatenate(alone))


def test_brackets_are_closed_by_their_own_kind_and_by_an_empty_line():
    tops, depth, _ = texts(
        "f", "(", "a", "[", "0", "]", ")", "}", " b", "(", "\n", "\n", "c"
    ).brackets
    assert tops == ["", "", "(", "(", "[", "[", "(", "", "", "", "(", "", ""]
    assert depth.tolist() == [0, 0, 1, 1, 2, 2, 1, 0, 0, 0, 1, 0, 0]


def test_no_tokens():
    empty = ConceptFeatures.of([], LIBRARY, [])
    assert empty.matrix.shape == (0, len(LIBRARY))
    assert ConceptFeatures.of([np.zeros(0, np.int64)], LIBRARY, []).matrix.shape[0] == 0


PIECES = [
    "def", " get", "_", "self", ".", "(", ")", ":", "\n", "\n    ", "\n\n", " ", "  ", "'", '"', '"""', "\\", "n",
    "0", "x1", "F", " 12", "# ", "#", "if", " in", "class", " Foo", "@", "f", "{", "}", "%", "s", "=", "==", ",", "the",
    " The", " is", "import", " os", "return", "é", "\\xe2", "[", "]", "`", "-", "\t", "A", "_x", "!", "?", "'s", "/",
]  # fmt: skip


@given(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_later_tokens_never_change_a_predicate(ids, data):
    cut = data.draw(st.integers(1, len(ids)))
    other = data.draw(st.lists(st.integers(0, len(PIECES) - 1), max_size=6))
    whole = ConceptFeatures.of([np.array(ids)], LIBRARY, PIECES).matrix
    changed = ConceptFeatures.of([np.array(ids[:cut] + other)], LIBRARY, PIECES).matrix
    differs = (whole[:cut] != changed[:cut]).any(0)
    assert [LIBRARY.predicates[i].name for i in np.flatnonzero(differs)] == []


# ---- lexing ---------------------------------------------------------------------------------------


def lexed(*tokens):
    ends = np.cumsum([len(t) for t in tokens]).tolist()
    return CausalLexer().types("".join(tokens), ends)


def test_types_of_code():
    assert lexed("x", " =", " 0", "x1", "F", " #", " note", "\n")[2:7] == [
        "Literal.Number.Integer",
        "Literal.Number.Hex",
        "Literal.Number.Hex",
        "Comment.Single",
        "Comment.Single",
    ]
    assert lexed("def", " get", "_", "x", "(")[1:] == ["Name.Function"] * 3 + ["Punctuation"]
    found = lexed("f", "(", "'", "a", " %", "s", "'", ")")
    assert found[2:] == [*["Literal.String.Single"] * 3, "Literal.String.Interpol", "Literal.String.Single", "Punctuation"]  # fmt: skip


def test_quotes_in_several_tokens_are_one_triple_quote():
    assert (
        lexed("\n", '"', '"', '"', "It", "'", "s", " a", '"""', "\n", "x")[4:8]
        == ["Literal.String.Doc"] * 4
    )
    assert lexed("\n", '"', '"', '"', "It", '"""', "\n", "x")[-1] == "Name"


def test_code_in_what_looks_like_a_docstring_ends_it():
    """A text that begins inside a docstring has its closing quotes first."""
    types = lexed("of it.", "\n", '"""', "\n", "def", " f", "(", "x", ")", ":", "\n    ", "return")
    assert types[-1] == "Keyword"


# ---- a user's own ---------------------------------------------------------------------------------

OWN = '[[predicate]]\nname = "shout"\nkind = "shouts"\ntoken = "[A-Z]+!"\nexample = "oh ¦«NO!»"\n'


def test_a_users_file_adds_to_the_library(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN, encoding="utf-8")
    found = load_library([path])
    assert len(found) == len(LIBRARY) + 1
    assert found["shout"].phrase == "shouts"
    write_library(tmp_path, found)
    assert read_library(tmp_path).predicates == found.predicates
    assert read_library(tmp_path / "none") is LIBRARY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name =", "is not TOML"),
        ("[predicate]\nname = 'x'", r"give predicates, each as a table \[\[predicate\]\]"),
        ("[[predicate]]\nname = 'X'\nkind = 'x'\ntoken = 'x'", "predicate X: name must be lower-case"),
        ("[[predicate]]\nname = 'x'\ntoken = 'x'", "give one of kind, .* and where"),
        ("[[predicate]]\nname = 'x'\nkind = 'x'", "give a condition: token, word"),
        ("[[predicate]]\nname = 'x'\nkind = 'x'\ntoken = '('", "token is not a regular expression"),
        ("[[predicate]]\nname = 'x'\nkind = 'x'\ntoken = 3", "token must be a string"),
        ("[[predicate]]\nname = 'x'\nkind = 'x'\nwords = 'a'", "words must be a list of strings"),
        ("[[predicate]]\nname = 'x'\nkind = 'x'\ntokens = 'a'", "tokens is no key: use before, "),
        ("[[predicate]]\nname = 'x'\nkind = 'x'\nfunction = 'os:system'", "no function 'os:system'"),
        ("[[predicate]]\nname = 'digits'\nkind = 'x'\ntoken = 'x'", "digits exists already"),
        (OWN.replace("oh", "«oh»"), "predicate shout: holds at"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as found:
        load_library([path])
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--concepts .*none\.toml cannot be read"):
        load_library([tmp_path / "none.toml"])
    assert ExplainConfig(concepts=(tmp_path / "none.toml",)).concepts  # read by the verb alone


def starts_with_x(texts):
    return np.array([t.strip().startswith("x") for t in texts.tokens], bool)


def wrong(texts):
    return [True] * len(texts)


def raises(texts):
    raise KeyError("x")


@pytest.fixture
def declared(monkeypatch):
    """Functions as an installed package would declare them."""
    entries = [
        EntryPoint(name, f"test_concepts:{name}", library_module.GROUP)
        for name in ("starts_with_x", "wrong", "raises", "missing")
    ]
    monkeypatch.setattr(library_module, "entry_points", lambda group: entries)
    library_module.function_of.cache_clear()
    yield
    library_module.function_of.cache_clear()


def predicate_with(function):
    text = f"[[predicate]]\nname = 'own'\nkind = 'xs'\nfunction = '{function}'"
    return Library(tuple(parse_predicates(text, "F")))


@pytest.mark.usefixtures("declared")
def test_an_installed_package_declares_functions():
    ids, strings = ids_of(["a", " x1", "x"])
    found = ConceptFeatures.of([ids], predicate_with("starts_with_x"), strings).column("own")
    assert found.tolist() == [False, True, True]
    with pytest.raises(InputError, match="the function 'missing' cannot be imported"):
        predicate_with("missing")


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("function", "message"),
    [("wrong", "returned list, expected a NumPy array of 1 bool"), ("raises", "failed: KeyError")],
)
def test_a_function_that_fails_is_named(function, message):
    features = ConceptFeatures.of([np.array([0])], predicate_with(function), ["a"])
    with pytest.raises(InputError, match=message):
        features.column("own")


def test_a_name_that_the_library_lacks():
    with pytest.raises(InputError, match="no predicate 'nothing' in the library of"):
        ConceptFeatures.of([np.array([0])], LIBRARY, ["a"]).column("nothing")


def test_a_damaged_library_is_named(tmp_path):
    (tmp_path / "concepts.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is not a library of predicates"):
        read_library(tmp_path)


def test_features_of_the_fit_text_are_kept_for_the_same_tokens(tmp_path):
    corpus, run = tmp_path / "texts.jsonl", tmp_path / "run"
    texts = [{"text": f"def name_{i}(self):\n    return {i}\n"} for i in range(60)]
    corpus.write_text("".join(json.dumps(text) + "\n" for text in texts))
    tokenize(TokenizeConfig(run=run, corpus=str(corpus), vocab_size=300, fit=0.5, held_out=0.2, quiet=True))  # fmt: skip
    store, again = TokenStore(run / "tokens"), TokenStore(run / "tokens")
    library = builtin_library()
    first = fit_features(library, store, 32)
    assert fit_features(library, again, 32) is first
    assert fit_features(library, store, 16) is not first  # other segments
    begun = fit_features(library, store, 32, Beginning(0, 2))
    assert begun is not fit_features(library, store, 32)
    shorter = Library(library.predicates[:5])
    assert fit_features(shorter, store, 32).library == shorter
    kept = fit_features(library, store, 32)
    record = run / "tokens" / "completed.json"
    record.write_text(record.read_text() + "\n")  # made again
    assert fit_features(library, store, 32) is not kept
    record.unlink()
    assert fit_features(library, store, 32) is not fit_features(library, store, 32)
