"""Speed of `cratelm explain` and `cratelm score` in neurons per second, on generated records.

    python benchmarks/explain_score.py [--neurons 256]

Generates a harvest of the default size of `cratelm harvest` (50 top, 50 random, 20 per bin of both binnings, 64 and 8
tokens) of neurons that respond to random sets of tokens. Then runs both verbs on it in one process; reading and writing
are included. The `_cpu` results count only the CPU time of this process, which is more reliable on a busy machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import neuron_summary, timed
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10**6, help="tokens of each split")
    options = parser.parse_args(arguments)
    n = options.neurons
    with tempfile.TemporaryDirectory() as folder:
        run = generated_run(Path(folder) / "run", n, options.tokens)
        seconds = {}
        for name, verb, config in (
            ("explain", explain, ExplainConfig(run=run.path, model="m", quiet=True)),
            ("score", score, ScoreConfig(run=run.path, model="m", quiet=True)),
        ):
            start_cpu = time.process_time()
            seconds[name] = timed(lambda verb=verb, config=config: verb(config))
            seconds[f"{name}_cpu"] = time.process_time() - start_cpu
    rates = {f"{name}_neurons_per_second": round(n / s, 1) for name, s in seconds.items()}
    print(json.dumps({"neurons": n, **rates}))


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
    return run


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
