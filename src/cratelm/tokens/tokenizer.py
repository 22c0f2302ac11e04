"""Tokenizers: trained here, GPT-2's, or from a file; all in the `tokenizers` library's format."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from cratelm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""what GPT-2 and GPT-NeoX, LLaMA 3, LLaMA 2 and Gemma end a document with; the first found is used.
Append only: the order decides the end token of tokenizers that runs hold already."""
_LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")
"""the trainer's time grows with the square of a word's length: one of 1 MB takes it many minutes"""
_NAMED_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of at most `vocab_size` tokens, `<|endoftext|>` being token 0.

    Pairs are merged while one occurs at least twice, so little text gives fewer tokens. Pre-tokenization is GPT-2's (Radford et al. 2019, section 2.2).
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
    pieces = (piece for text in texts for piece in _LONG_RUN.split(text))
    tokenizer.train_from_iterator(pieces, trainer)
    return without_limits(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json` file. Raises `InputError` where it cannot be read."""
    path = Path(path)
    if not path.is_file():
        inside = path / "tokenizer.json"
        if inside.is_file():
            raise InputError(f"{path} is a folder: type --tokenizer {inside}")
        raise InputError(f"{path} is not a file: name a tokenizer.json with --tokenizer")
    try:
        return without_limits(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{path} cannot be read as a tokenizer ({_first_line(error)}):"
            " name a tokenizer.json of the `tokenizers` library with --tokenizer"
        ) from None


def fetch_gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer through tiktoken, else from the Hub.

    tiktoken goes first because it fails at once without a network, the Hub after 23 s of retries.
    Both give the same ids (a test checks the conversion). Raises `InputError` where neither can
    be reached.
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
        """Takes the ranks as they are, where the library wants a file of them."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
            return tiktoken_url

    return FromRanks(
        vocab_file=encoding._mergeable_ranks,
        pattern=encoding._pat_str,
        extra_special_tokens=list(encoding._special_tokens),
    ).converted()


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the token that ends a document. Raises `InputError` where the tokenizer has none."""
    for token in END_TOKENS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise InputError(
        f"the tokenizer has none of the tokens {' '.join(END_TOKENS)}, one of which is written"
        " between documents: name another with --tokenizer, or train one with --tokenizer train"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id: any id can index an embedding of this size."""
    return max(tokenizer.get_vocab().values()) + 1


# --- how tokens are spelled: here and nowhere else ---------------------------------------------------
#
# A byte-level BPE (GPT-2's way) names each token by one character per byte, from a table of 256; a
# SentencePiece vocabulary writes a space as U+2581 and a single byte as <0xNN>.


def display_strings(tokenizer: Tokenizer) -> list[str]:
    r"""Return a string for each token id, [vocab_size]; bytes that are part of a character show as \xNN."""
    byte_of = {character: byte for byte, character in _characters_of_bytes().items()}
    added, byte_level = _added_tokens(tokenizer), is_byte_level(tokenizer)
    shown = [""] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if token not in added and byte_level:
            token = bytes(byte_of[c] for c in token).decode("utf-8", "backslashreplace")
        elif token not in added:
            token = _NAMED_BYTE.sub(r"\\x\1", token.replace("\u2581", " "))
        shown[index] = token
    return shown


def token_sizes(tokenizer: Tokenizer, special: int) -> NDArray[np.int64]:
    """Return the UTF-8 bytes that each token id stands for, [vocab_size]; 0 for the `special` one."""
    byte_level = is_byte_level(tokenizer)
    sizes = np.zeros(vocabulary_size(tokenizer), np.int64)
    for token, index in tokenizer.get_vocab().items():
        spelled = _NAMED_BYTE.sub("?", token.replace("\u2581", " "))
        sizes[index] = len(token) if byte_level else len(spelled.encode())
    sizes[special] = 0
    return sizes


def byte_level_name(text: str) -> str:
    """Return `text` as a byte-level BPE names a token: one character per UTF-8 byte."""
    character_of = _characters_of_bytes()
    return "".join(character_of[byte] for byte in text.encode())


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether every token that was not added by hand is spelled in the characters of bytes."""
    characters = set(_characters_of_bytes().values())
    return all(
        characters.issuperset(t) for t in tokenizer.get_vocab().keys() - _added_tokens(tokenizer)
    )


@cache
def _characters_of_bytes() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _added_tokens(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values()}


# -----------------------------------------------------------------------------------------------------


def hf_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """Return the same tokenizer for `transformers`, with its end-of-text token; for model folders."""
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.id_to_token(end_of_text_id(tokenizer))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        clean_up_tokenization_spaces=False,
    )


def _fetch_tiktoken() -> Tokenizer:
    import tiktoken

    return from_tiktoken(tiktoken.get_encoding("gpt2"))


def _fetch_hub() -> Tokenizer:
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # without a network: six lines about retries before our one
    try:
        return Tokenizer.from_pretrained("openai-community/gpt2")
    finally:
        logging.set_verbosity(before)


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Set a tokenizer to encode whole texts, and `<|endoftext|>` in a text as its characters; return it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
