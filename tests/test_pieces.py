"""Texts in pieces: the ids are those of the whole text, for every kind of tokenizer, wherever it is cut."""

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from cratelm.errors import InputError
from cratelm.tokens import pieces
from cratelm.tokens import tokenizer as tokenizer_module
from cratelm.tokens.pieces import PieceEncoder, UncuttableError, cut_rule
from cratelm.tokens.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, without_limits

SHARED = Path(os.environ.get("CRATELM_SHARED", Path(__file__).parents[2] / "shared"))
DERANDOMIZE = "CRATELM_FUZZ" not in os.environ
FRAGMENTS = [
    *" \n\t\r'aAbZ09.,!_({\\\"éß漢字，。한あя\u0301\u0338\u200d\u180e\u0085\u00a0\u2028\u3000\x1c\x00▁🦀ſ",
    "  ", "   \n ", "\n\n", " \r\n", "'s", "'ll", "'LL", "'re", "'ſ", " '", "don't", "the", " the",
    "word", "aaaa", "12345", "====", "-->", END_OF_TEXT, "<extra>", "<0x0A>", "e\u0301", "ﷺ", "👩\u200d💻",
    "¨", " \u0308", "x\u0338", "=\u0338", "ab" * 9, " " * 9,
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=20).map("".join),
    st.text("ab' \n1.", max_size=60),
)
ENCODABLE = TEXTS.filter(lambda text: not re.search("[\ud800-\udfff]", text))
CORPUS = [
    "the word don't  stop\n\n  we'll see 12345 ==== a-b aaaa bbbb abab ('x') naïve 漢字，。 한 я 🦀"
    + "".join(FRAGMENTS)
] * 3 + ["the lazy dog's   tail\tand\r\n  the   end", "!\n==\n.\n\n,\r\n{\n_\n a.b(c) x=1;"] * 20


def train(tokenizer: Tokenizer, kind: str = "BPE", **fields: Any) -> Tokenizer:
    trainer = {
        "BPE": lambda: trainers.BpeTrainer(**{"vocab_size": 500, **fields}),
        "WordPiece": lambda: trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"]),
        "Unigram": lambda: trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>"),
    }[kind]()
    tokenizer.train_from_iterator(CORPUS, trainer)
    return without_limits(tokenizer)


def byte_level(*before: Any, prefix: bool = False, regex: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT])


def split_by(expression: str) -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(expression), "isolated"), regex=False)


def normalized(tokenizer: Tokenizer, *steps: Any) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


def neox() -> Tokenizer:
    tokenizer = normalized(byte_level(), normalizers.NFC())
    tokenizer.add_tokens([" " * n for n in range(2, 6)])
    return without_limits(tokenizer)


def metaspace(scheme: str, *, split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    train(tokenizer, special_tokens=["<unk>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


def llama2() -> Tokenizer:
    description = json.loads(metaspace("always", split=True).to_str())
    vocabulary = description["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in " 漢я":  # bytes instead
        assert character == " " or vocabulary.pop(character) > 0
    merges = [m for m in description["model"]["merges"] if not set("漢я") & set("".join(m))]
    model = {**description["model"], "byte_fallback": True, "merges": merges}
    model["vocab"] = {
        t: i for t, i in vocabulary.items() if len(t) == 1 or t[0] == "<" or not set("漢я") & set(t)
    }
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    whole = {
        **description,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
    }
    return without_limits(Tokenizer.from_str(json.dumps({**whole, "model": model})))


def gemma() -> Tokenizer:
    description = json.loads(llama2().to_str())
    description["normalizer"] = description["normalizer"]["normalizers"][1]
    description["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    }  # fmt: skip
    return without_limits(Tokenizer.from_str(json.dumps(description)))


def bert(pre_tokenizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizer
    return train(tokenizer, "WordPiece")


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return train(normalized(tokenizer, normalizers.NFKC()), "Unigram")


EXPRESSIONS = list(pieces._EXPRESSIONS)
TOKENIZERS = {
    "built in": lambda: train_tokenizer(CORPUS, 600),
    **{f"expression {i}": lambda e=e: split_by(e) for i, e in enumerate(EXPRESSIONS)},
    "prefix space": lambda: byte_level(prefix=True),
    "normal form, GPT-2": lambda: normalized(byte_level(), normalizers.NFKC(), normalizers.Lowercase()),
    "normal form, GPT-4": lambda: normalized(split_by(EXPRESSIONS[3]), normalizers.NFC()),
    "added spaces": neox,
    "Metaspace always": lambda: metaspace("always", split=True),
    "Metaspace first": lambda: metaspace("first", split=True),
    "Metaspace never": lambda: metaspace("never", split=True),
    "Metaspace without words": lambda: metaspace("first", split=False),
    "LLaMA 2": llama2,
    "Gemma": gemma,
    "Unigram": unigram,
    "BERT": lambda: bert(pre_tokenizers.BertPreTokenizer()),
    "WordPiece, Whitespace": lambda: bert(pre_tokenizers.Whitespace()),
    "WordPiece, WhitespaceSplit": lambda: bert(pre_tokenizers.WhitespaceSplit()),
}  # fmt: skip


@cache
def encoder_of(name: str) -> PieceEncoder:
    return PieceEncoder(TOKENIZERS[name]())


@contextmanager
def limits(piece: int, window: int = 8, kept: int = 4) -> Iterator[None]:
    """Pieces and windows that are short enough for the texts of a test."""
    names = {"_PIECE": piece, "_TAIL": 3, "_GROUP": 3, "_WINDOW": window, "_KEPT": kept}
    before = {name: getattr(pieces, name) for name in names}
    for name, value in names.items():
        setattr(pieces, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pieces, name, value)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.fault("a long text is encoded in pieces", "the ids are those of the whole text")
def test_pieces_have_the_ids_of_the_whole_text(name: str) -> None:
    encoder = encoder_of(name)
    assert encoder._plan.rule is not None
    n_cuts = 0

    @settings(
        max_examples=int(os.environ.get("CRATELM_FUZZ", 100)),
        deadline=None,
        database=None,
        derandomize=DERANDOMIZE,
    )
    @given(text=ENCODABLE, piece=st.integers(1, 12))
    def holds(text: str, piece: int) -> None:
        nonlocal n_cuts
        with limits(piece):
            parts = list(encoder.pieces(text))
            assert "".join(parts) == text
            n_cuts += max(0, len(parts) - 1)
            whole = encoder.tokenizer.encode(text, add_special_tokens=False).ids
            assert encoder.encode(text).tolist() == whole

    holds()
    assert n_cuts > 20


BYTE_LEVEL = ["built in", "prefix space", *(f"expression {i}" for i in range(len(EXPRESSIONS)))]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_words_are_those_of_the_whole_text_for_every_pair_of_characters(name: str) -> None:
    """Words and not ids: those are the same by chance where no token happens to contain both characters."""
    encoder = encoder_of(name)

    def words(tokenizer: Tokenizer, text: str) -> list[str]:
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    n_cuts = 0
    for x, y in itertools.product(" \n\t\r'sldabZ09.,!_(-漢，🦀\u0301\u00a0\u180e\x1cſ", repeat=2):
        for text in (f"a{x}{y}b", f"{x}{x}{y}{y}", f"1{x} {y}l", f".{x}'{y}s"):
            with limits(1):
                first, *later = encoder.pieces(text)
            n_cuts += len(later)
            parts = [words(encoder._plan.later, piece) for piece in later]
            assert words(encoder.tokenizer, first) + list(itertools.chain(*parts)) == words(
                encoder.tokenizer, text
            )
    assert n_cuts > 1000


@pytest.mark.parametrize("name", ["built in", "expression 3", "prefix space"])
def test_words_of_any_length_have_the_ids_of_the_whole(name: str) -> None:
    encoder = encoder_of(name)
    letters = st.lists(
        st.sampled_from(["a", "b", "ab", "the", "word", "aaaa", "ï", "漢"]), min_size=4
    )
    signs = st.lists(st.sampled_from(["=", "-", "==", "(", "<|", "🦀", "→", "，"]), min_size=4)
    spaces = st.lists(st.sampled_from([" ", "\n", "  "]), min_size=4)

    @settings(
        max_examples=int(os.environ.get("CRATELM_FUZZ", 100)),
        deadline=None,
        database=None,
        derandomize=DERANDOMIZE,
    )
    @given(
        word=st.one_of(letters, signs, spaces).map("".join),
        piece=st.integers(1, 9),
        window=st.integers(3, 20),
        kept=st.integers(1, 4),
    )
    def holds(word: str, piece: int, window: int, kept: int) -> None:
        with limits(piece, window, kept):
            whole = encoder.tokenizer.encode(word, add_special_tokens=False).ids
            assert encoder.encode(word).tolist() == whole
            assert encoder.encode(f"see {word} there").tolist() == (
                encoder.tokenizer.encode(f"see {word} there", add_special_tokens=False).ids
            )

    holds()


@pytest.mark.parametrize("name", ["built in", "LLaMA 2", "BERT"])
def test_long_texts_with_the_real_sizes_of_pieces(name: str) -> None:
    encoder = encoder_of(name)
    draw = np.random.default_rng(0)
    text = "".join(draw.choice(FRAGMENTS[:20] + FRAGMENTS[40:70], 60_000))
    text += "x" * 100_000 * (name == "built in") + " end"
    parts = list(encoder.pieces(text))
    assert len(parts) > 2
    assert (
        encoder.encode(text).tolist()
        == encoder.tokenizer.encode(text, add_special_tokens=False).ids
    )


def test_the_shared_tokenizers_give_the_ids_of_the_whole() -> None:
    for name in ("gpt2.json", "bpe4k.json"):
        path = SHARED / "tokenizers" / name
        if not path.exists():
            pytest.skip(f"{path} is not there: set CRATELM_SHARED to the folder of shared material")
        encoder = PieceEncoder(load_tokenizer(path))
        assert encoder._plan.words is not None  # their merges are proper
        text = Path(pieces.__file__).read_text() * 8 + "x" * 70_000 + " " * 70_000 + "né" * 40_000
        whole = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder.encode(text).tolist() == whole


def test_the_classes_of_characters_are_what_they_are_called() -> None:
    def members(characters: str) -> list[str]:
        pattern = re.compile(f"[{characters}]")
        return [c for c in map(chr, range(0x20000)) if pattern.match(c)]

    assert all(unicodedata.category(c)[0] == "L" for c in members(pieces._LETTERS))
    assert all(unicodedata.category(c)[0] in "PS" for c in members(pieces._SIGNS))
    assert "'" not in members(pieces._SIGNS)
    spaces = set(map(chr, [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)]))
    spaces |= set(map(chr, [0x2028, 0x2029, 0x202F, 0x205F, 0x3000]))  # White_Space in Unicode 15
    assert spaces.isdisjoint(members(pieces._SOLID))


def test_a_tokenizer_that_is_not_known_is_encoded_whole_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = PieceEncoder(split_by(r"\p{L}+|\s+"))
    assert encoder._plan.rule is None
    monkeypatch.setattr(pieces, "_PIECE", 5)
    text = "some words of text"
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text).ids
    monkeypatch.setattr(pieces, "LONGEST_STRETCH", 10)
    with pytest.raises(InputError, match=r"^18 bytes of text without .*: split the document$"):
        encoder.encode(text)


def test_a_stretch_without_a_cut_is_refused_above_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = encoder_of("BERT")
    monkeypatch.setattr(pieces, "_PIECE", 5)
    monkeypatch.setattr(pieces, "LONGEST_STRETCH", 20)
    assert len(encoder.encode("word " * 20)) == 20
    with pytest.raises(UncuttableError, match=r"21 bytes of text without an end of a word"):
        encoder.encode("word " + "x" * 20)


def changed(tokenizer: Tokenizer, **parts: Any) -> dict[str, Any]:
    return {**json.loads(tokenizer.to_str()), **parts}


def test_what_could_cross_a_cut_forbids_it() -> None:
    """Each of these would give other ids if it were cut as usual."""
    added = {"id": 9, "content": "a b", "special": False, "lstrip": False, "rstrip": False,
             "single_word": False, "normalized": False}  # fmt: skip
    plain = byte_level()
    assert cut_rule(changed(plain))
    assert cut_rule(changed(plain, added_tokens=[added])) is None
    assert cut_rule(changed(plain, added_tokens=[{**added, "special": True}]))
    assert cut_rule(changed(plain, added_tokens=[{**added, "special": True}]), False) is None
    assert cut_rule(changed(plain, added_tokens=[{**added, "content": "ab"}]))
    assert (
        cut_rule(changed(plain, added_tokens=[{**added, "content": "ab", "rstrip": True}])) is None
    )
    assert cut_rule(changed(plain, normalizer={"type": "Strip"})) is None
    sentence_piece = changed(llama2())
    assert cut_rule(sentence_piece)
    crossing = {**sentence_piece["model"]}
    crossing["merges"] = [*crossing["merges"], ["e", "▁"]]
    assert cut_rule({**sentence_piece, "model": crossing}) is None
    assert cut_rule({**sentence_piece, "added_tokens": [{**added, "content": "zz"}]}) is None


def test_words_are_not_encoded_in_parts_if_merges_are_out_of_order() -> None:
    model = json.loads(encoder_of("built in").tokenizer.to_str())["model"]
    assert pieces._is_proper(model)
    assert not pieces._is_proper({**model, "merges": model["merges"][::-1]})
    assert not pieces._is_proper({**model, "ignore_merges": True})
    assert not pieces._is_proper({**model, "vocab": {"a": 0}})


def test_the_trainer_sees_the_same_words_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*CORPUS, "é" * 3000 + " x" * 3000 + "\n" * 2500 + "य ह " * 500, ""]
    whole = train_tokenizer(texts, 700).to_str()
    for size in (1, 10, 500):
        monkeypatch.setattr(tokenizer_module, "_PART", size)
        assert train_tokenizer(texts, 700).to_str() == whole
    parts = list(tokenizer_module._parts("one two\nthree" * 500))
    assert len(parts) > 2
    assert "".join(parts) == "one two\nthree" * 500
