"""Neurons per second of `cratelm explain` and `cratelm score`, on generated records.

    python benchmarks/explain_score.py [--neurons 256]

Makes a harvest of the size that `cratelm harvest` leaves by default (50 top, 50 random, 20 per bin
of both binnings, 64 and 8 tokens) of neurons that respond to random sets of tokens, writes it, and
runs both verbs on it, one process, reading and writing included. The `_cpu` figures count the time of
this process alone: on a busy machine they tell more.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import timed
from tokenizers import Tokenizer, models

from cratelm.activations.store import write_records
from cratelm.corpus.documents import Document
from cratelm.explain.config import ExplainConfig
from cratelm.explain.explain import explain
from cratelm.records import Excerpt, ExcerptKind, NeuronId, NeuronRecord, NeuronSummary, Split
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
"""bins, excerpts a bin, tokens an excerpt"""
DOCUMENT = 1000
"""tokens of a document, its end included"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10**6, help="of each split")
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
    """A run with `n_tokens` in both splits and a harvest of `n_neurons` in one layer.

    Its excerpts are not the text at their positions: the near-duplicate audit alone reads that.
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
    """A neuron that fires on a tenth of the tokens, by an amount of its own for each, with noise."""
    own = np.random.default_rng([5, index])  # the same in both splits
    response = own.exponential(1, VOCABULARY) * (own.random(VOCABULARY) < 0.1)
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
    summary = NeuronSummary(
        neuron=NeuronId("m", "ista", 0, index),
        n_tokens=n_tokens,
        mean=0.1,
        variance=1.0,
        skew=1.0,
        kurtosis=3.0,
        firing_rate=0.1,
        maximum=5.0,
        histogram=np.zeros(64, np.int64),
        histogram_low=0.0,
        histogram_high=5.0,
        openai_edges=np.zeros(6, np.float32),
        anthropic_edges=np.zeros(13, np.float32),
    )
    return NeuronRecord(summary, tuple(excerpts))


if __name__ == "__main__":
    main()
