"""How much of the bare speed of `Tokenizer.encode_batch` is left once a corpus is read, split and written.

    python benchmarks/tokenize_throughput.py [--corpus PATH] [--tokenizer PATH] [--repeats 5]

Both sides encode the same documents with the same tokenizer in one process, in turns, so that a
busy machine slows both. The bare side has all texts in memory and throws the tokens away; the other
is the verb `tokenize` from the corpus on disk to finished shards. Prints tokens a second of each,
the ratio of the medians (target 0.8) and the peak memory of the verb alone (Linux).
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from cratelm.corpus.documents import Document
from cratelm.corpus.sources import open_corpus
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.tokenize import tokenize
from cratelm.tokens.tokenizer import load_tokenizer, train_tokenizer

BATCH_CHARACTERS = 2_000_000


def main() -> None:
    options = _options()
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
            bare.append(_seconds(lambda: encode_all(tokenizer, texts)))
            verb.append(_seconds(lambda: tokenize(config)))
        _show("bare encode_batch", bare, tokens)
        _show("verb tokenize", verb, tokens)
        ratio = statistics.median(bare) / statistics.median(verb)
        pairs = [b / v for b, v in zip(bare, verb, strict=True)]
        print(f"ratio {ratio:.2f} (pairs {min(pairs):.2f} to {max(pairs):.2f}), target 0.80")
        print(f"peak memory of the verb in a process of its own: {_peak_memory(config):,.0f} MB")


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Batches of about 2 million characters, as the verb has them."""
    first, characters = 0, 0
    for last, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= BATCH_CHARACTERS or last == len(texts):
            tokenizer.encode_batch(texts[first:last], add_special_tokens=False)
            first, characters = last, 0


def _seconds(action) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _show(name: str, seconds: list[float], tokens: int) -> None:
    median = statistics.median(seconds)
    print(f"{name:18} {tokens / median:12,.0f} tokens/s  (median {median:.2f} s of {len(seconds)})")


def _peak_memory(config: TokenizeConfig) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_run_and_measure, (config,))
        pool.close()
        pool.join()
    return peak


def _run_and_measure(config: TokenizeConfig) -> float:
    """Linux's high-water mark of this process; `getrusage` would carry over the parent's."""
    tokenize(config)
    (line,) = (
        x
        for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if "VmHWM" in x
    )
    return int(line.split()[1]) / 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="builtin")
    parser.add_argument("--tokenizer", default="train", help="train, or a tokenizer.json")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
