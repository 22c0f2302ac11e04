"""Tokenizers: trained here, GPT-2's, or from a file; all in the `tokenizers` library's format."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from cratelm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-text token"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, `<|endoftext|>` being token 0.

    Pairs are merged while one occurs at least twice, so that little text gives fewer tokens than
    asked for. Pre-tokenization is GPT-2's (Radford et al. 2019, section 2.2).
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
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` file. Raises `InputError` where it cannot be read."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: name a tokenizer.json with --tokenizer")
    try:
        return _plain(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{path} cannot be read as a tokenizer ({_first_line(error)}):"
            " name a tokenizer.json of the `tokenizers` library with --tokenizer"
        ) from None


def fetch_gpt2() -> Tokenizer:
    """GPT-2's tokenizer from the Hub, else through tiktoken. Raises `InputError` out of reach of both."""
    raise InputError("TODO")


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Token that ends a document. Raises `InputError` where the tokenizer has none."""
    found = tokenizer.token_to_id(END_OF_TEXT)
    if found is None:
        raise InputError(
            f"the tokenizer has no token {END_OF_TEXT}, which is written between documents:"
            " name one that has it with --tokenizer, or train one with --tokenizer train"
        )
    return found


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id, so that any id can index an embedding of this size."""
    return max(tokenizer.get_vocab().values()) + 1


def display_strings(tokenizer: Tokenizer) -> list[str]:
    r"""A string for each token id, [vocab_size]: bytes that are part of a character show as \xNN."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    shown = [""] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if token not in added:
            token = bytes(byte_of[c] for c in token).decode("utf-8", "backslashreplace")
        shown[index] = token
    return shown


def hf_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """The same tokenizer for `transformers`, with its end-of-text token set; for model folders."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Encodes whole texts, and a text that says `<|endoftext|>` as the characters that it is."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
