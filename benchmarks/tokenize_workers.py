"""Speed and memory of `cratelm tokenize --workers N` on generated text in the Pile's format.

    python benchmarks/tokenize_workers.py [--megabytes 300] [--files 8] [--workers 1 2] [--repeats 1] [--tokenizer PATH]

The corpus is a folder of `.jsonl.zst` files of equal size. Its words are random letters with the frequencies of Zipf's
law, numbers and punctuation; the seed is fixed, so that all runs have the same text. Without `--tokenizer`, one of
`--vocab-size` tokens is trained on 8 MB of it beforehand, so that the verb does not train. Prints for each number of
workers the megabytes (10^6 bytes) of text per second from the corpus on disk to finished shards, and the peak memory of
all processes together: their proportional set sizes, sampled five times a second (Linux). The numbers of workers take
turns; the rate per second of processor time is the one that other load changes least. Then prints the speed of verifying
and merging parts alone, measured on the part of one file.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import zstandard

from cratelm.corpus.sources import FileCorpus, open_corpus
from cratelm.tokens.config import TokenizeConfig
from cratelm.tokens.parts import Work
from cratelm.tokens.shards import StoreWriter
from cratelm.tokens.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

N_WORDS = 100_000
SUBSETS = ("Pile-CC", "PubMed Central", "Github")
MEAN_WORDS = 900
"""words of a document, about 6 kB, the mean of the Pile"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        n_bytes = write_corpus(folder / "corpus", int(options.megabytes * 1e6), options.files)
        stored = sum(p.stat().st_size for p in (folder / "corpus").iterdir())
        print(
            f"{n_bytes / 1e6:,.0f} MB of text in {options.files} files, {stored / 1e6:,.0f} MB on disk,"
            f" written in {time.monotonic() - began:.0f} s"
        )
        tokenizer = folder / "tokenizer.json"
        if options.tokenizer:
            load_tokenizer(options.tokenizer).save(str(tokenizer))
        else:
            train_tokenizer(_sample(8_000_000), options.vocab_size).save(str(tokenizer))
        runs: dict[int, list[Measured]] = {workers: [] for workers in options.workers}
        for _ in range(options.repeats):
            for workers in options.workers:
                runs[workers].append(tokenize(folder, tokenizer, workers))
        for workers, measured in runs.items():
            seconds = statistics.median(m.seconds for m in measured)
            used = statistics.median(m.processor_seconds for m in measured)
            peak = max(m.peak for m in measured)
            print(
                f"--workers {workers}: {n_bytes / 1e6 / seconds:,.1f} MB/s (median {seconds:,.1f} s of"
                f" {len(measured)}), {n_bytes / 1e6 / used:,.2f} MB per second of processor time,"
                f" {measured[0].tokens:,} tokens, peak {peak / 1e6:,.0f} MB in"
                f" {measured[0].processes} processes"
            )
        print(merge_speed(folder, tokenizer))


class Measured:
    """A run of the verb in processes of its own."""

    def __init__(self, command: list[str], run: Path):
        began, used = time.monotonic(), _processor_seconds()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.peak = self.processes = 0
        while process.poll() is None:
            sizes = [size for pid in _tree(process.pid) if (size := _memory(pid))]
            self.peak = max(self.peak, sum(sizes))
            self.processes = max(self.processes, len(sizes))
            time.sleep(0.2)
        self.seconds = time.monotonic() - began
        self.processor_seconds = _processor_seconds() - used
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        record = json.loads((run / "tokens" / "completed.json").read_text(encoding="utf-8"))
        self.tokens = sum(record["results"]["tokens"].values())


def tokenize(folder: Path, tokenizer: Path, workers: int) -> Measured:
    """Run the verb with some workers on the corpus in a folder."""
    run = folder / "run"
    options = ["--run", run, "--corpus", folder / "corpus", "--tokenizer", tokenizer]
    words = ["tokenize", *options, "--workers", workers, "--force", "--quiet"]
    return Measured([sys.executable, "-m", "cratelm", *map(str, words)], run)


def merge_speed(folder: Path, tokenizer: Path) -> str:
    """Return, in words, the speed of verifying a part and copying it into shards."""
    corpus = open_corpus(str(folder / "corpus"))
    assert isinstance(corpus, FileCorpus)
    config = TokenizeConfig(corpus=str(folder / "corpus"), tokenizer=str(tokenizer))
    groups = corpus.groups(1)[:1]
    work = Work.begin(folder / "parts", groups, config, {}, lambda: load_tokenizer(tokenizer))
    work.write(0, lambda _: None)
    eot_id = work.tokenizer.token_to_id(END_OF_TEXT)
    began, used = time.monotonic(), time.process_time()
    part = work.read(0)
    verified = time.process_time() - used
    writer = StoreWriter(folder / "merged", work.tokenizer, eot_id)
    for block in part.blocks():
        writer.append_block(block.rows, block.tokens)
    writer.close()
    used, seconds = time.process_time() - used, time.monotonic() - began
    tokens = writer.n_tokens("train") + writer.n_tokens("fit") + writer.n_tokens("held_out")
    return (
        f"merging {tokens:,} tokens in {writer.n_documents:,} documents: {tokens / seconds / 1e6:,.0f} million"
        f" tokens/s; in millions per second of processor time: verified {tokens / verified / 1e6:,.0f}, copied"
        f" {tokens / (used - verified) / 1e6:,.0f}"
    )


def write_corpus(folder: Path, n_bytes: int, n_files: int) -> int:
    """Write about `n_bytes` of text into files of the Pile's format; return the bytes of text."""
    folder.mkdir()
    written = 0
    texts = generated_texts()
    for number in range(n_files):
        path = folder / f"{number:02d}.jsonl.zst"
        with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
            while written < n_bytes * (number + 1) // n_files:
                text, subset = next(texts)
                row = {"text": text, "meta": {"pile_set_name": subset}}
                stream.write(json.dumps(row).encode() + b"\n")
                written += len(text)
    return written


def generated_texts() -> Iterator[tuple[str, str]]:
    """Yield ASCII texts, with the part of the corpus that each belongs to, without end."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    frequency = 1 / np.arange(2, 28)
    sizes = draw.integers(2, 10, N_WORDS)
    drawn = draw.choice(letters, sizes.sum(), p=frequency / frequency.sum())
    ends = np.cumsum(sizes)
    words = ["".join(w) for w in np.split(drawn, ends[:-1])]
    words[20::50] = [w.capitalize() for w in words[20::50]]
    words[5::100] = [f"{w}." for w in words[5::100]]
    words[3::100] = [f"{w},\n" for w in words[3::100]]
    words[7::200] = [str(n) for n in range(len(words[7::200]))]
    table = np.array(words, dtype=object)
    weights = np.cumsum(1 / (np.arange(N_WORDS) + 2.7))
    for number in itertools.count():
        n = int(draw.exponential(MEAN_WORDS)) + 1
        chosen = np.searchsorted(weights, draw.random(n) * weights[-1])
        yield " ".join(table[chosen]), SUBSETS[number % len(SUBSETS)]


def _sample(n_bytes: int) -> Iterator[str]:
    size = 0
    for text, _ in generated_texts():
        yield text
        size += len(text)
        if size >= n_bytes:
            return


def _processor_seconds() -> float:
    """Return the processor time of all processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tree(root: int) -> list[int]:
    """Return a process and all processes below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def _memory(process: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("Pss:")), 0)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokenizer", help="path of a tokenizer.json; default: one is trained")
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument(
        "--folder", help="where the corpus is written; default: the system's choice"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
