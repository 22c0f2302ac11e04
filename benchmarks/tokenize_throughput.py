"""Speed of `cratelm tokenize` as a fraction of the bare speed of `Tokenizer.encode_batch`.

    python benchmarks/tokenize_throughput.py [--corpus PATH] [--tokenizer PATH] [--repeats 5]

Both sides encode the same documents with the same tokenizer, alternately in one process, so that other load slows down
both. The bare side has all texts in memory and discards the tokens; the other side is the verb `tokenize`, from the
corpus on disk to finished shards. Prints the tokens per second of each, the ratio of the medians (target 0.8) and the
peak memory of the verb alone (Linux).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import timed
from tokenizers import Tokenizer

from cratelm.corpus.documents import Document
from cratelm.corpus.sources import open_corpus
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.tokens.tokenizer import load_tokenizer, train_tokenizer

BATCH_CHARACTERS = 2_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    options = _options(arguments)
    texts = [d.text for d in open_corpus(options.corpus) if isinstance(d, Document) and d.text]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        if options.tokenizer == "train":
            train_tokenizer(texts, 4096).save(str(path))
        else:
            path = Path(options.tokenizer)
        config = TokenizeConfig(
            run=Path(folder) / "run",
            corpus=options.corpus,
            tokenizer=str(path),
            force=True,
            quiet=True,
        )
        tokens = sum(tokenize(config).tokens.values())
        tokenizer = load_tokenizer(path)
        bare, verb = [], []
        for _ in range(options.repeats):
            bare.append(timed(lambda: encode_all(tokenizer, texts)))
            verb.append(timed(lambda: tokenize(config)))
        _show("bare encode_batch", bare, tokens)
        _show("verb tokenize", verb, tokens)
        ratio = statistics.median(bare) / statistics.median(verb)
        pairs = [b / v for b, v in zip(bare, verb, strict=True)]
        print(f"ratio {ratio:.2f} (pairs {min(pairs):.2f} to {max(pairs):.2f}), target 0.80")
        print(f"peak memory of the verb in a separate process: {_peak_memory(config):,.0f} MB")


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Encode all texts in batches of about 2 million characters, as the verb does."""
    first, characters = 0, 0
    for last, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= BATCH_CHARACTERS or last == len(texts):
            tokenizer.encode_batch(texts[first:last], add_special_tokens=False)
            first, characters = last, 0


def _show(name: str, seconds: list[float], tokens: int) -> None:
    median = statistics.median(seconds)
    print(f"{name:18} {tokens / median:12,.0f} tokens/s  (median {median:.2f} s of {len(seconds)})")


def _peak_memory(config: TokenizeConfig) -> float:
    """Return the peak memory of `cratelm tokenize` in MB, measured as Linux's high-water mark of a separate process.

    `getrusage` would include the peak of the process that starts it.
    """
    command = [sys.executable, "-c", _TOKENIZE, str(config.run), config.corpus, config.tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


_TOKENIZE = """
import sys
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
run, corpus, tokenizer = sys.argv[1:]
tokenize(TokenizeConfig(run=run, corpus=corpus, tokenizer=tokenizer, force=True, quiet=True))
status = open("/proc/self/status", encoding="utf-8").read().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument(
        "--tokenizer", default="train", help="`train`, or the path of a tokenizer.json"
    )
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
