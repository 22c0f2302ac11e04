"""Tokenizers: trained here, GPT-2's, or from a file; all in the `tokenizers` library's format."""

import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from cratelm.errors import InputError
from cratelm.runs import write_json
from cratelm.runs.hub import quiet_hub
from cratelm.runs.pretrained import json_object
from cratelm.text.units import TokenStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
)
"""end-of-document tokens of GPT-2 and GPT-NeoX, LLaMA 3, LLaMA 2, Gemma, DeepSeek and Qwen; the first found is used.
Append only: the order decides the end token of tokenizers that existing runs hold."""
_LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")
"""the trainer's time grows with the square of a word's length: a word of 1 MB takes many minutes"""
_PART = 65_536
"""characters, from which on the next cut ends a part of a text to train on"""
_SPACE_AFTER_TEXT = re.compile(r"(?<=[^\s\u180e])(?=[ \t\r\n])")
_NAMED_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of at most `vocab_size` tokens, of which `<|endoftext|>` is token 0.

    Pairs are merged while any occurs at least twice, so little text yields fewer tokens. Pre-tokenization
    is GPT-2's (Radford et al. 2019, section 2.2). Memory: the table of distinct words, and
    256 pieces of a text.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for part in _parts(text) for piece in _LONG_RUN.split(part))
    tokenizer.train_from_iterator(pieces, trainer)
    return without_limits(tokenizer)


def _parts(text: str) -> Iterator[str]:
    """Yield the parts of a text, cut before white space, where the pre-tokenizer and `_LONG_RUN` cut, too.

    The words are the same, but the trainer takes 40 times the size of a whole text in memory.
    """
    start = 0
    while cut := _SPACE_AFTER_TEXT.search(text, start + _PART):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json` file. Raises `InputError` if it cannot be read."""
    path = Path(path)
    if not os.path.isfile(path):  # os.path, because Path raises if a name is too long
        inside = path / "tokenizer.json"
        if os.path.isfile(inside):
            raise InputError(f"{path} is a folder: type --tokenizer {inside}")
        raise InputError(
            f"{path} is not a file: name a tokenizer.json, or the folder or Hub id of a model, with --tokenizer"
        )
    try:
        return without_limits(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{path} cannot be read as a tokenizer ({_first_line(error)}):"
            " name a tokenizer.json of the `tokenizers` library with --tokenizer"
        ) from None


def fetch_gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer, fetched through tiktoken, else from the Hub.

    tiktoken comes first because, without a network, it fails at once, and the Hub only after 23 s of
    retries. Both give the same ids (a test checks the conversion). Raises `InputError` if neither can be
    reached.
    """
    reasons = []
    for fetch in (_fetch_tiktoken, _fetch_hub):
        try:
            return without_limits(fetch())
        except Exception as error:  # network libraries share no base exception
            reasons.append(f"{fetch.__name__.removeprefix('_fetch_')}: {type(error).__name__}")
    raise InputError(
        f"GPT-2's tokenizer cannot be fetched ({'; '.join(reasons)}): name a copy of its"
        " tokenizer.json with --tokenizer PATH, or train one with --tokenizer train"
    )


def from_tiktoken(encoding: Any) -> Tokenizer:
    """Return a `tiktoken.Encoding` in the `tokenizers` library's format."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class FromRanks(TikTokenConverter):
        """Converter that takes the ranks themselves, not the name of a file of ranks."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
            return tiktoken_url

    return FromRanks(
        vocab_file=encoding._mergeable_ranks,
        pattern=encoding._pat_str,
        extra_special_tokens=list(encoding._special_tokens),
    ).converted()


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a document. Raises `InputError` if there is none."""
    for token in END_TOKENS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token_id
    raise InputError(
        f"the tokenizer has none of the tokens {' '.join(END_TOKENS)}, one of which is written"
        " between documents: name another with --tokenizer, or train one with --tokenizer train"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id: any id can index an embedding of this size."""
    return max(tokenizer.get_vocab().values()) + 1


# --- spelling of tokens: only here -------------------------------------------------------------------
#
# A byte-level BPE, such as GPT-2's, spells each token with one character per byte, from a table of 256; a
# SentencePiece vocabulary writes a space as U+2581 and a single byte as <0xNN>.


def display_strings(tokenizer: Tokenizer) -> TokenStrings:
    r"""Return a string for each token id, [vocab_size]; incomplete characters appear as bytes, \xNN."""
    byte_of = {character: byte for byte, character in characters_of_bytes().items()}
    added, byte_level = _added_tokens(tokenizer), is_byte_level(tokenizer)
    spelled = [b""] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if token in added:
            spelled[index] = token.encode()
        elif byte_level:
            spelled[index] = bytes(byte_of[c] for c in token)
        else:
            spelled[index] = _bytes_of_pieces(token.replace("\u2581", " "))
    return TokenStrings(spelled)


def _bytes_of_pieces(token: str) -> bytes:
    """Return the bytes of a token in which <0xNN> stands for a single byte."""
    parts = _NAMED_BYTE.split(token)  # every second part is the number of a byte
    return b"".join(
        bytes([int(part, 16)]) if at % 2 else part.encode() for at, part in enumerate(parts)
    )


def token_sizes(tokenizer: Tokenizer, special: int) -> NDArray[np.int64]:
    """Return the number of UTF-8 bytes of each token id, [vocab_size]; 0 for the token `special`."""
    byte_level = is_byte_level(tokenizer)
    sizes = np.zeros(vocabulary_size(tokenizer), np.int64)
    for token, index in tokenizer.get_vocab().items():
        spelled = _NAMED_BYTE.sub("?", token.replace("\u2581", " "))
        sizes[index] = len(token) if byte_level else len(spelled.encode())
    sizes[special] = 0
    return sizes


def byte_level_name(text: str) -> str:
    """Return `text` as a byte-level BPE spells it: one character per UTF-8 byte."""
    character_of = characters_of_bytes()
    return "".join(character_of[byte] for byte in text.encode())


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether all tokens except added ones are spelled in the 256 characters of bytes."""
    characters = set(characters_of_bytes().values())
    return all(
        characters.issuperset(t) for t in tokenizer.get_vocab().keys() - _added_tokens(tokenizer)
    )


@cache
def characters_of_bytes() -> dict[int, str]:
    """Return the character by which a byte-level BPE spells each byte.

    The table of `transformers` would take a second to import.
    """
    # Of the 256 characters, those below 256 spell themselves; the others, in order, spell the other bytes.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    same = {ord(c): c for c in characters if ord(c) < 256}
    others = (byte for byte in range(256) if byte not in same)
    return same | dict(zip(others, characters[len(same) :], strict=True))


def _added_tokens(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values()}


# -----------------------------------------------------------------------------------------------------


def hf_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """Return a tokenizer for `transformers`, with its end-of-text token, to save in a model's folder."""
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.id_to_token(end_of_text_id(tokenizer))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        clean_up_tokenization_spaces=False,
    )


def save_hf_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a tokenizer into a model's folder, so that versions 4 and 5 of transformers read it."""
    tokenizer.save_pretrained(folder)
    name_class_of_version_4(folder)


def name_class_of_version_4(folder: Path) -> None:
    """Change the class in a folder's `tokenizer_config.json`, if there is one, to the name that version 4 has.

    transformers 5 writes `TokenizersBackend`, at which `AutoTokenizer` of version 4 stops;
    `PreTrainedTokenizerFast` is the same class in both, with the same ids.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json_object(path, "the settings of a tokenizer")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def _fetch_tiktoken() -> Tokenizer:
    import tiktoken

    return from_tiktoken(tiktoken.get_encoding("gpt2"))


def _fetch_hub() -> Tokenizer:
    with quiet_hub():
        return Tokenizer.from_pretrained("openai-community/gpt2")


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Set a tokenizer to encode whole texts, and `<|endoftext|>` in a text as plain text; return it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
