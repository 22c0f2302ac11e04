"""Speed of `cratelm explain` and `cratelm score` in neurons per second, on generated records.

    python benchmarks/explain_score.py [--neurons 256] [--against ../cratelm-0.1.0]

Generates a harvest of the default size of `cratelm harvest` (50 top, 50 random, 20 per bin of both binnings, 64 and 8
tokens) of neurons that respond to random sets of tokens. Then runs both verbs on it in one process; reading and writing
are included. The `_cpu` results count only the CPU time of this process, which is more reliable on a busy machine.

With `--against`, a folder with the code of another version, such as a git worktree of a tag, both versions are measured
in turns, each in processes of its own and on a run that it wrote itself. The ratios are those of the medians: above 1,
this version is faster.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import figures, neuron_summary, timed
from tokenizers import Tokenizer, models

from cratelm.activations.store import write_records
from cratelm.corpus.documents import Document
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.records import Excerpt, ExcerptKind, NeuronId, NeuronRecord, Split
from cratelm.runs import Run
from cratelm.score.config import ScoreConfig
from cratelm.score.score import score
from cratelm.tokens.shards import StoreWriter

VOCABULARY = 4096
KINDS: dict[ExcerptKind, tuple[int, int, int]] = {
    "top": (1, 50, 64),
    "random": (1, 50, 64),
    "openai_bin": (5, 20, 64),
    "anthropic_bin": (12, 20, 8),
    "out_of_context": (1, 10, 3),
}
"""number of bins, excerpts per bin, tokens per excerpt"""
DOCUMENT = 1000
"""number of tokens of a document, including the end-of-text token"""


NEURONS_PER_GROUP = 16
"""neurons in a row group of excerpts, as in a harvest"""
ROOT = Path(__file__).absolute().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10**6, help="tokens of each split")
    parser.add_argument("--against", type=Path, help="folder with the code of another version")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each version")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = [options.neurons, options.tokens]
    with tempfile.TemporaryDirectory() as folder:
        path = options.run or Path(folder) / "run"
        result = (
            rates(path, *sizes)
            if options.against is None
            else compared(options.against, Path(folder), options.turns, *sizes)
        )
    if options.against is not None:
        figures(neurons=options.neurons, **result)
    print(json.dumps({"neurons": options.neurons, **result}))


def rates(path: Path, n_neurons: int, n_tokens: int) -> dict[str, float]:
    """Return neurons per second of both verbs; the run is generated if it does not exist."""
    run = Run(path) if path.exists() else generated_run(path, n_neurons, n_tokens)
    seconds = {}
    for name, verb, config in (
        (
            "explain",
            explain,
            ExplainConfig(
                run=run.path, model="m", explainers=("lookup", "trie"), force=True, quiet=True
            ),
        ),
        ("score", score, ScoreConfig(run=run.path, model="m", force=True, quiet=True)),
    ):
        start_cpu = time.process_time()
        seconds[name] = timed(lambda verb=verb, config=config: verb(config))
        seconds[f"{name}_cpu"] = time.process_time() - start_cpu
    return {f"{name}_neurons_per_second": round(n_neurons / s, 1) for name, s in seconds.items()}


def compared(
    other: Path, folder: Path, turns: int, n_neurons: int, n_tokens: int
) -> dict[str, Any]:
    """Return the median rates of this version and of the code in `other`, and their ratios."""
    versions = {"this": ROOT, "other": other.absolute()}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    sizes = [f"--neurons={n_neurons}", f"--tokens={n_tokens}"]
    for _ in range(turns):
        for name, root in versions.items():
            done = subprocess.run(
                [sys.executable, __file__, *sizes, f"--run={folder / name}"],
                env={**os.environ, "PYTHONPATH": str(root / "src")},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    names = [name for name in measured["this"][0] if name != "neurons"]
    medians = {
        v: {n: round(median(m[n] for m in ms), 1) for n in names} for v, ms in measured.items()
    }
    ratios = {
        n: [a[n] / b[n] for a, b in zip(measured["this"], measured["other"], strict=True)]
        for n in names
    }
    return {
        **medians,
        "ratios": {n: round(median(r), 2) for n, r in ratios.items()},
        "explain_ratios": ratios["explain_neurons_per_second"],
        "score_ratios": ratios["score_neurons_per_second"],
    }


def generated_run(path: Path, n_neurons: int, n_tokens: int) -> Run:
    """Write a run with `n_tokens` in each of two splits, and a harvest of `n_neurons` in one layer.

    Its excerpts differ from the text at their positions, which only the near-duplicate audit reads.
    """
    run = Run(path)
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    with run.stage("tokens").write({}, {}) as draft:
        writer = StoreWriter(draft.path, Tokenizer(models.WordLevel(vocabulary, "t0")), eot_id=0)
        writer.append("train", [1, 2, 3], Document("t1 t2 t3", "generated", "", 0, ""))
        rng = np.random.default_rng(0)
        for _ in range(
            n_tokens // DOCUMENT
        ):  # ordinals from 1: odd in one split, even in the other
            for split in ("held_out", "fit"):
                ids = rng.integers(1, VOCABULARY, DOCUMENT - 1).tolist()
                writer.append(split, ids, Document("", "generated", "", 0, ""))
        writer.close()
    with run.stage("activations", "m").write({}, {}) as draft:
        for split in ("fit", "held_out"):
            rng = np.random.default_rng(split == "fit")
            records = [generated_record(rng, split, index, n_tokens) for index in range(n_neurons)]
            write_records(draft.path, split, records)
            _write_in_groups(draft.path / f"excerpts-{split}.parquet")
    return run


def _write_in_groups(path: Path) -> None:
    """Write the excerpts again in row groups as small as those of a harvest."""
    table = pq.read_table(path)
    groups = table["index"].to_numpy() // NEURONS_PER_GROUP
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for group in np.unique(groups).tolist():
            writer.write_table(table.filter(pa.array(groups == group)))


def generated_record(
    rng: np.random.Generator, split: Split, index: int, n_tokens: int
) -> NeuronRecord:
    """Return a neuron that fires on a tenth of the tokens, with a random strength for each token, and noise."""
    neuron_rng = np.random.default_rng([5, index])  # the same in both splits
    response = neuron_rng.exponential(1, VOCABULARY) * (neuron_rng.random(VOCABULARY) < 0.1)
    excerpts = []
    for kind, (bins, count, length) in KINDS.items():
        if kind == "out_of_context" and split == "fit":
            continue
        for number in range(bins * count):
            ids = (VOCABULARY * rng.random(length) ** 3).astype(np.int32)  # few tokens are common
            noise = rng.uniform(0.8, 1.2, length)
            at = int(rng.integers(n_tokens))
            excerpts.append(
                Excerpt(
                    kind=kind,
                    rank=number % count,
                    bin=number // count if bins > 1 else -1,
                    token_ids=ids,
                    activations=(response[ids] * noise).astype(np.float32),
                    peak=length // 2,
                    document=1 + 2 * (at // DOCUMENT) + (split == "fit"),
                    position=at,
                )
            )
    summary = neuron_summary(NeuronId("m", "ista", 0, index), n_tokens, 5.0)
    return NeuronRecord(summary, tuple(excerpts))


if __name__ == "__main__":
    main()
