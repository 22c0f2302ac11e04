"""Tokens of a sequence grouped into units of text: no byte is lost, no character is cut."""

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cratelm.llm.prompts.excerpts import excerpt_text
from cratelm.text.shading import shaded_html
from cratelm.text.units import TokenStrings, aligned_text, decoded, is_whole, text_of, units_of
from cratelm.tokens.tokenizer import display_strings, train_tokenizer

TEXTS = {
    "Japanese": "私は猫が好きです。",
    "Arabic": "القطة على الطاولة",
    "Hebrew": "החתול על השולחן",
    "emoji": "I ❤️ 👍🏽 and 👨‍👩‍👧 today 😀",
    "combining": "cafe\u0301 nai\u0308ve",
    "Devanagari": "नमस्ते दुनिया",
    "Thai": "สวัสดีชาวโลก",
    "accents": "é ü ß",
}


def bytewise(text: str) -> list[bytes]:
    return [bytes([b]) for b in text.encode()]


@given(st.lists(st.binary(max_size=5), max_size=12))
def test_units_cover_any_bytes_and_lose_none(tokens):
    units = units_of(tokens)
    assert [u.start for u in units] == [0, *(u.stop for u in units[:-1])][: len(units)]
    assert (units[-1].stop if units else 0) == len(tokens)
    assert "".join(u.text for u in units) == decoded(b"".join(tokens))


@given(st.text(max_size=12), st.data())
def test_no_character_is_cut_however_a_text_is(text, data):
    """Any cut of the bytes of any text; each unit is the text of its own bytes."""
    whole = text.encode()
    n = len(whole)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    tokens = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    units = units_of(tokens)
    assert "".join(u.text for u in units) == text
    for unit in units:
        assert unit.text.encode() == b"".join(tokens[unit.start : unit.stop])


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=8))
def test_tokens_that_complete_no_character_stay_alone(tokens):
    for unit in units_of(tokens):
        if unit.n_tokens > 1 and not any(
            unicodedata.category(c).startswith("M") or c == "\u200d" for c in unit.text
        ):
            assert "\\x" not in decoded(b"".join(tokens[unit.start : unit.stop])) or any(
                ord(c) > 127 for c in unit.text
            )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_single_bytes_become_the_characters_of_a_text(text):
    units = units_of(bytewise(text))
    assert "".join(u.text for u in units) == text
    assert all("\\x" not in u.text for u in units)
    for unit, following in itertools.pairwise(units):
        assert not unicodedata.category(following.text[0]).startswith("M"), (unit, following)


def test_marks_skin_tones_and_joined_emoji_are_drawn_on_what_precedes_them():
    assert [u.text for u in units_of([b"cafe", "\u0301".encode(), b" x"])] == ["cafe\u0301", " x"]
    assert [u.text for u in units_of(bytewise("👍🏽!"))] == ["👍🏽", "!"]
    assert [u.text for u in units_of(bytewise("👨‍👩‍👧"))] == ["👨‍👩‍👧"]
    # nothing to be drawn on
    assert [u.text for u in units_of([b" ", "\u0301".encode()])] == [" ", "\u0301"]
    assert [u.text for u in units_of(["\u0301".encode()])] == ["\u0301"]


def test_bytes_of_no_character_stay_escapes():
    assert [u.text for u in units_of([b"\xe4", b"a", b"\xb8\xad", b"\xe4", b"\xb8"])] == [
        "\\xe4", "a", "\\xb8\\xad", "\\xe4", "\\xb8",
    ]  # fmt: skip


def test_text_that_looks_like_an_escape_is_no_byte():
    r"""Source code holds `\xe4` as four characters."""
    tokens = [b"\\xe4", b"\\xb8", b"\\xad"]
    strings = TokenStrings(tokens)
    assert [u.text for u in strings.units([0, 1, 2])] == ["\\xe4", "\\xb8", "\\xad"]
    assert is_whole(0, strings)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE that has seen English only: every other character is cut into bytes."""
    return train_tokenizer(["the cat sat on the mat, the cat and the rat"] * 5, 300)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_tokenizer_gives_the_units_of_its_tokens(tokenizer, text):
    strings = display_strings(tokenizer)
    ids = tokenizer.encode(text).ids
    assert text_of(ids, strings) == text
    assert "".join(aligned_text(ids, strings)) == text
    assert len(aligned_text(ids, strings)) == len(ids)
    assert "".join(u.text for u in strings.units(ids)) == text


def test_byte_tokens_of_sentencepiece_are_bytes():
    vocabulary = {"<0xE4>": 0, "<0xB8>": 1, "<0xAD>": 2, "\u2581a": 3, "<0x0A>": 4}
    strings = display_strings(Tokenizer(BPE(vocab=vocabulary, merges=[])))
    assert list(strings) == ["\\xe4", "\\xb8", "\\xad", " a", "\n"]
    assert [u.text for u in strings.units([3, 0, 1, 2, 4])] == [" a", "中", "\n"]


def test_prompts_have_characters_and_mark_them_whole(tokenizer):
    strings = display_strings(tokenizer)
    ids = np.array(tokenizer.encode("the 中 cat").ids)
    marked = np.zeros(len(ids), bool)
    marked[[i for i, t in enumerate(ids) if not is_whole(int(t), strings)][-1]] = True
    assert excerpt_text(ids, strings, marked) in ("the «中» cat", "the« 中» cat")
    assert excerpt_text(ids, strings) == "the 中 cat"


def test_right_to_left_text_is_one_isolated_run():
    tokens = [
        ("see ", 0, 0),
        ("הח", 1.0, 4),
        ("תול", 2.0, 8),
        (" ", 0, 0),
        ("על", 0, 0),
        (" cat", 0, 0),
    ]
    html = str(shaded_html(tokens, peak=2, every_value=False))
    assert html == (
        'see<i>␣</i><wbr><bdi dir="rtl"><span class="l4" title="1">הח</span>'
        '<span class="l8 peak" title="2">תול</span><i>␣</i><wbr>על</bdi><i>␣</i><wbr>cat'
    )


def test_letters_between_right_to_left_words_end_a_run():
    tokens = [("א", 1.0, 1), (" and ", 0, 0), ("ב", 1.0, 1)]
    html = str(shaded_html(tokens, peak=0, every_value=False))
    assert html.count('<bdi dir="rtl">') == html.count("</bdi>") == 2


def test_parts_of_a_unit_are_named_on_hover():
    html = str(shaded_html([("中", 2.0, 9, "3 tokens: e4 0.1, b8 0, ad 2")], peak=0))
    assert 'title="2 · 3 tokens: e4 0.1, b8 0, ad 2"' in html
