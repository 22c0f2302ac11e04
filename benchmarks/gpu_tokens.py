"""Write tokens of a run to one small file, which `gpu.sh` trains on; or generate tokens that resemble text.

    python benchmarks/gpu_tokens.py runs/mine benchmarks/gpu_tokens.safetensors

The file has the arrays `train` and `held_out`, uint16, and the vocabulary and the tokenizer's hash as metadata. If the
run has more tokens than the file may hold, blocks of 65,536 tokens are taken evenly over each split.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cratelm.errors import InputError
from cratelm.runs.atomic import atomic_path

if TYPE_CHECKING:
    from cratelm.tokens.shards import TokenSplit

MEGABYTES = 60
BLOCK = 2**16
HELD_OUT_SHARE = 16
"""at most this part of the file is held-out tokens: one 16th"""
LARGEST_VOCABULARY = 2**16
SPLITS = ("train", "held_out")


class ArraySplit:
    """Tokens in memory, read like a `TokenSplit` by the samplers of training."""

    def __init__(self, name: str, tokens: NDArray[np.integer]):
        self.name, self.tokens, self.n_tokens = name, tokens, len(tokens)

    def n_sequences(self, length: int) -> int:
        """Return the number of sequences of `length` tokens that have a next token for every position."""
        return max(0, (self.n_tokens - 1) // length)

    def sequence(self, index: int, length: int) -> NDArray[np.int64]:
        """Return sequence `index` and the token after it, int64 [T + 1]."""
        return self.tokens[index * length : index * length + length + 1].astype(np.int64)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens to train and to validate on."""

    train: "TokenSplit"
    held_out: "TokenSplit"
    rows: int
    """rows of the embedding: the vocabulary, rounded up to a multiple of 64"""
    origin: dict[str, Any]
    """what a reader of the results must know about them"""

    @classmethod
    def of(
        cls, arrays: Mapping[str, NDArray[np.integer]], rows: int, origin: dict[str, Any]
    ) -> "Tokens":
        """Return the tokens in two arrays."""
        train, held_out = (cast("TokenSplit", ArraySplit(name, arrays[name])) for name in SPLITS)
        counts = {f"{name}_tokens": len(arrays[name]) for name in SPLITS}
        return cls(train, held_out, rows, {**origin, **counts})


def write(run: Path, out: Path, megabytes: float = MEGABYTES) -> dict[str, str]:
    """Write the tokens of a run, at most so many megabytes, and return the metadata of the file.

    Raises `InputError` for a run without tokens, and for a vocabulary of more than 65,536.
    """
    from cratelm.runs import Run
    from cratelm.tokens.shards import TokenStore

    stage = Run(run).stage("tokens")
    done = stage.require("tokenize")
    store = TokenStore(stage.path)
    if store.padded_vocab_size > LARGEST_VOCABULARY:
        raise InputError(
            f"the tokens of {run} have a vocabulary of {store.vocab_size:,}: the file holds 16 bits per token,"
            f" so name a run of at most {LARGEST_VOCABULARY:,}"
        )
    room = int(megabytes * 1e6 - 4096) // 2  # tokens; the rest is for the header
    held_out = evenly(store.split("held_out"), room // HELD_OUT_SHARE)
    arrays = {"train": evenly(store.split("train"), room - len(held_out)), "held_out": held_out}
    metadata = {
        "vocab_size": str(store.vocab_size),
        "rows": str(store.padded_vocab_size),
        "eot_id": str(store.eot_id),
        "tokenizer_sha256": done.outputs["tokenizer.json"],
        "tokens_identity": done.identity,
        "train_tokens_of_the_run": str(store.split("train").n_tokens),
    }
    with atomic_path(out) as temporary:
        save_file(arrays, temporary, metadata)
    return metadata


def evenly(split: "TokenSplit", room: int) -> NDArray[np.uint16]:
    """Return all tokens of a split, or whole blocks of it, evenly spread, that have at most `room` tokens."""
    if split.n_tokens <= room:
        return split.read(0, split.n_tokens).astype(np.uint16)
    block = min(BLOCK, room)
    starts = np.linspace(0, split.n_tokens - block, room // block).astype(np.int64)
    return np.concatenate([split.read(int(s), int(s) + block).astype(np.uint16) for s in starts])


def read(path: Path) -> Tokens:
    """Return the tokens of a file that `write` wrote. Raises `InputError` for another or a damaged file."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in SPLITS}
        rows = int(metadata["rows"])
        largest = max(int(tokens.max()) for tokens in arrays.values())
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is not a file of tokens ({error}): make one with `python benchmarks/gpu_tokens.py RUN {path}`"
        ) from None
    if largest >= rows:
        raise InputError(f"{path} is damaged: it has token {largest}, but a vocabulary of {rows}")
    return Tokens.of(arrays, rows, {"kind": "carried", "file": path.name, **metadata})


def generate(n_tokens: int, rows: int, seed: int = 0) -> Tokens:
    """Return made-up tokens below `rows` that resemble text, a 32nd of them as held-out split.

    A token is drawn by Zipf's law, or, every second time, is one of the four successors of the token before it. So a
    model first learns the frequencies, then the pairs, as it does on text. Token 0 ends a document of about 1,000.
    """
    generator = np.random.default_rng(seed)
    streams = min(
        4096, max(1, n_tokens // 64)
    )  # drawn side by side: a chain cannot be drawn at once
    steps = -(-n_tokens // streams)
    cumulative = np.cumsum(1 / np.arange(1, rows))
    cumulative /= cumulative[-1]

    def zipf(*shape: int) -> NDArray[np.int64]:
        return 1 + np.searchsorted(cumulative, generator.random(shape)).clip(max=rows - 2)

    successors = zipf(rows, 4)
    chain = np.empty((streams, steps), np.uint16)
    before = zipf(streams)
    for step in range(steps):
        follows = generator.random(streams) < 0.5
        before = np.where(
            follows, successors[before, generator.integers(4, size=streams)], zipf(streams)
        )
        before[generator.random(streams) < 0.001] = 0
        chain[:, step] = before
    tokens = chain.reshape(-1)[:n_tokens]
    first = n_tokens - n_tokens // 32
    arrays = {"train": tokens[:first], "held_out": tokens[first:]}
    return Tokens.of(arrays, rows, {"kind": "generated", "seed": str(seed), "rows": str(rows)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="run directory with tokens")
    parser.add_argument("out", type=Path, help="the file, .safetensors")
    parser.add_argument(
        "--megabytes", type=float, default=MEGABYTES, help="largest size of the file"
    )
    options = parser.parse_args(arguments)
    try:
        metadata = write(options.run, options.out, options.megabytes)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    tokens = read(options.out)
    print(
        f"{options.out}: {tokens.train.n_tokens:,} of {int(metadata['train_tokens_of_the_run']):,} training"
        f" tokens, {tokens.held_out.n_tokens:,} held-out tokens, vocabulary {int(metadata['vocab_size']):,},"
        f" {options.out.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
