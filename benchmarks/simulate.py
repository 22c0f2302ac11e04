"""Simulating with a local language model, beside the plain way, on one machine and model in one process.

    python benchmarks/simulate.py --run runs/demo --model crate-2l --simulator smollm2 --neurons 3

Plain: for each metric and each of its excerpts one forward pass over the whole prompt, with all logits
computed, as the published scorer asks for it. Ours: `LocalBackend`, which computes what prompts share
once, logits only where they are read, and an excerpt that two metrics share once. Both read the same
levels; the largest difference is printed. `--rounds` times each alternately; ratios are of medians.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import timed_result

from cratelm.activations.store import read_records
from cratelm.llm.backends.transformers import LocalBackend
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import Answer, LogprobQuery, OptionLogprobs
from cratelm.records import SIMULATION_METRICS
from cratelm.score.selection import scored_on
from cratelm.tokens.shards import TokenStore

EXPLANATION = "names of things in program code, and quotes around them"


def requests_of(run: Path, model: str, n_neurons: int) -> list[list[LogprobQuery]]:
    """Per neuron, the requests of all three metrics, shared ones as often as metrics hold them."""
    store = TokenStore(run / "tokens")
    strings = store.decode_tokens(range(store.vocab_size))
    indices = list(range(0, 10 * n_neurons, 10))
    found = []
    for record in read_records(run / "activations" / model, "held_out", [0], indices):
        excerpts = [e for metric in SIMULATION_METRICS for e in scored_on(record, metric)]
        text = f"{EXPLANATION} ({record.neuron.index})"
        found.append([simulate_read(text, e.token_ids, strings, 9) for e in excerpts])
    return found


@torch.inference_mode()
def plain(backend: LocalBackend, requests: list[LogprobQuery]) -> list[np.ndarray]:
    """[n, O] of each request: a whole prompt at a time, all logits."""
    ids = [backend.tokenizer(f"\t{level}\n").input_ids[1] for level in range(10)]
    read = []
    for request in requests:
        encoded = backend.tokenizer(request.text, return_offsets_mapping=True, return_tensors="pt")
        logits = backend.model(encoded.input_ids.to(backend.model.device)).logits[0]
        begins = {a: i for i, (a, b) in enumerate(encoded.offset_mapping[0].tolist()) if b > a}
        rows = [begins[offset] - 1 for offset in request.offsets]
        read.append(logits[rows][:, ids].float().log_softmax(-1).cpu().numpy())
    return read


def ours(backend: LocalBackend, requests: list[LogprobQuery]) -> list[np.ndarray]:
    """[n, O] of each request; equal ones are asked once, as the client does."""
    distinct = list(dict.fromkeys(requests))
    found: dict[LogprobQuery, np.ndarray] = {}
    for group in backend.answer(distinct):
        for index, outcome in group:
            assert isinstance(outcome, Answer)
            assert isinstance(outcome.value, OptionLogprobs)
            found[distinct[index]] = outcome.value.log_probs
    return [found[request] for request in requests]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", default="crate-2l")
    parser.add_argument("--simulator", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--neurons", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="where the time of ours goes")
    given = parser.parse_args(arguments)
    backend = LocalBackend(given.simulator, dtype=given.dtype)
    neurons = requests_of(given.run, given.model, given.neurons)
    every = [request for requests in neurons for request in requests]
    n_tokens = sum(backend.count_tokens(request.text) for request in every)
    n_distinct = len(set(every))
    ours(backend, neurons[0][:2])  # loads the model
    print(
        f"{backend.name} {backend.identity['dtype']}, {torch.get_num_threads()} threads:"
        f" {len(neurons)} neurons, {len(every)} excerpts of the three metrics, {n_distinct} distinct,"
        f" {n_tokens:,} tokens in whole prompts"
    )
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    read: dict[str, list[np.ndarray]] = {}
    for _ in range(given.rounds):
        for name, way in (("plain", plain), ("ours", ours)):
            seconds, read[name] = timed_result(
                lambda way=way: [r for requests in neurons for r in way(backend, requests)]
            )
            times[name].append(seconds)
    gap = max(np.abs(a - b).max() for a, b in zip(read["plain"], read["ours"], strict=True))
    medians = {name: statistics.median(all_) for name, all_ in times.items()}
    for name, seconds in medians.items():
        print(f"{name:6} {seconds / len(neurons):8.2f} s a neuron")
    print(f"ratio  {medians['plain'] / medians['ours']:8.2f}   largest difference {gap:.3g} nats")
    if given.profile:
        with torch.profiler.profile() as profile:
            ours(backend, neurons[0])
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))


if __name__ == "__main__":
    main()
