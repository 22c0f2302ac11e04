"""Speed of simulation with a local language model, compared with the plain method.

    python benchmarks/simulate.py --run runs/demo --model crate-2l --simulator smollm2 --neurons 3

Plain: one forward pass over the whole prompt for each metric and each of its excerpts, computing all logits, as in the
published scorer. Ours: `LocalBackend`, which computes the common part of prompts only once, logits only where they are
read, and an excerpt that two metrics share only once. Both run in one process with the same model and read the same
levels; the largest difference is printed. They are timed alternately, `--rounds` times each; ratios are of medians.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import figures, timed_result

from cratelm.activations.store import read_records
from cratelm.llm.backends.transformers import LocalBackend
from cratelm.llm.prompts.neurons import simulate_read
from cratelm.llm.requests import Answer, LogprobQuery, OptionLogprobs
from cratelm.records import SIMULATION_METRICS
from cratelm.score.selection import scored_on
from cratelm.tokens.shards import TokenStore

EXPLANATION = "names of things in program code, and quotes around them"


def requests_of(run: Path, model: str, n_neurons: int) -> list[list[LogprobQuery]]:
    """Return the requests of all three metrics for each neuron; a shared request occurs once per metric."""
    store = TokenStore(run / "tokens")
    strings = store.decode_tokens(range(store.vocab_size))
    indices = list(range(0, 10 * n_neurons, 10))
    requests = []
    for record in read_records(run / "activations" / model, "held_out", [0], indices):
        excerpts = [e for metric in SIMULATION_METRICS for e in scored_on(record, metric)]
        text = f"{EXPLANATION} ({record.neuron.index})"
        requests.append([simulate_read(text, e.token_ids, strings, 9) for e in excerpts])
    return requests


@torch.inference_mode()
def plain(backend: LocalBackend, requests: list[LogprobQuery]) -> list[np.ndarray]:
    """Return the log-probabilities [n, O] of each request, from one whole prompt at a time, with all logits."""
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
    """Return the log-probabilities [n, O] of each request; equal requests are sent once, as the client does."""
    distinct = list(dict.fromkeys(requests))
    answers: dict[LogprobQuery, np.ndarray] = {}
    for group in backend.answer(distinct):
        for index, outcome in group:
            assert isinstance(outcome, Answer)
            assert isinstance(outcome.value, OptionLogprobs)
            answers[distinct[index]] = outcome.value.log_probs
    return [answers[request] for request in requests]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", default="crate-2l")
    parser.add_argument("--simulator", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--neurons", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print a profile of `LocalBackend`")
    options = parser.parse_args(arguments)
    backend = LocalBackend(options.simulator, dtype=options.dtype)
    neurons = requests_of(options.run, options.model, options.neurons)
    all_requests = [request for requests in neurons for request in requests]
    n_tokens = sum(backend.count_tokens(request.text) for request in all_requests)
    n_distinct = len(set(all_requests))
    ours(backend, neurons[0][:2])  # loads the model
    print(
        f"{backend.name} {backend.identity['dtype']}, {torch.get_num_threads()} threads:"
        f" {len(neurons)} neurons, {len(all_requests)} excerpts of the three metrics, {n_distinct} distinct,"
        f" {n_tokens:,} tokens in whole prompts"
    )
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    read: dict[str, list[np.ndarray]] = {}
    for _ in range(options.rounds):
        for name, method in (("plain", plain), ("ours", ours)):
            seconds, read[name] = timed_result(
                lambda method=method: [r for requests in neurons for r in method(backend, requests)]
            )
            times[name].append(seconds)
    gap = max(np.abs(a - b).max() for a, b in zip(read["plain"], read["ours"], strict=True))
    medians = {name: statistics.median(all_) for name, all_ in times.items()}
    for name, seconds in medians.items():
        print(f"{name:6} {seconds / len(neurons):8.2f} s per neuron")
    print(f"ratio  {medians['plain'] / medians['ours']:8.2f}   largest difference {gap:.3g} nats")
    figures(
        threads=torch.get_num_threads(),
        neurons=len(neurons),
        seconds=times,
        ratios=[p / o for p, o in zip(times["plain"], times["ours"], strict=True)],
        largest_difference=float(gap),
    )
    if options.profile:
        with torch.profiler.profile() as profile:
            ours(backend, neurons[0])
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))


if __name__ == "__main__":
    main()
