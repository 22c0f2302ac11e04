"""Cost of `cratelm seeds` for a pair of models, in multiples of the forward passes of both over the same tokens.

    python benchmarks/seeds.py                                  # crate-2l and gpt2-2l
    python benchmarks/seeds.py --sizes crate-12l --tokens 4096 --vocabulary 50304 --neurons 32 --turns 1

Weights, tokens and explanations (look-up tables) are random. Forward passes, sums with matching, and transfer alternate
in one process. The command makes two passes for the sums, one of them with the initial weights, and one for the transfer.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import figures, random_split, timed_result

from cratelm.activations.batches import SearchPlan
from cratelm.analysis.matching import cross_sums, read_activations
from cratelm.analysis.transfer import measure_transfer
from cratelm.explain.store import ListedExplanations
from cratelm.models import build, site_of
from cratelm.models.sites import Site
from cratelm.records import Explanation, NeuronId
from cratelm.stats.seeds import Matching, match


def matched(models: tuple[Any, Any], site: Site, plan: SearchPlan, batch: int) -> list[Matching]:
    """Return the pairs of neurons of each layer."""
    sums = cross_sums(models, site, plan, batch, lambda n: None)
    return [match(of_layer.correlation()[0]) for of_layer in sums]


def tables(site: Site, neurons: int, entries: int, vocabulary: int) -> ListedExplanations:
    """Return random look-up tables of `neurons` neurons per layer, with `entries` tokens each."""
    rng = np.random.default_rng(0)
    found = []
    for layer in site.layer_numbers:
        for index in range(neurons):
            tokens = rng.choice(vocabulary, min(entries, vocabulary), replace=False).tolist()
            payload = {"default": 0.0, "tokens": tokens, "values": rng.random(len(tokens)).tolist()}
            neuron = NeuronId("model", site.name, layer, index)
            found.append(Explanation(neuron, "lookup", "", payload, ()))
    return ListedExplanations(found)


def measure(size: str, options: argparse.Namespace) -> None:
    """Print the cost of each part for two models of a size."""
    shape = {"vocab_size": options.vocabulary, "max_position_embeddings": options.length}
    models = (build(size, seed=0, **shape).eval(), build(size, seed=1, **shape).eval())
    site = site_of(models[0])
    split = random_split(options.tokens + 1, options.vocabulary)
    plan = SearchPlan.of(split, "held_out", 0, options.length, options.tokens, 0)
    explained = tables(site, options.neurons, options.entries, options.vocabulary)
    ratios: dict[str, list[float]] = {"matching": [], "transfer": []}
    for _ in range(options.turns):

        def forward() -> int:
            read = read_activations(models, site, plan, options.batch, lambda n: None)
            return sum(1 for _ in read)

        def transfer(pairs: list[Matching]) -> int:
            scored = measure_transfer(
                models, site, plan, (explained, explained), pairs,
                vocabulary=options.vocabulary, seed=(0, 0), batch_tokens=options.batch, progress=lambda n: None,
            )  # fmt: skip
            return sum(1 for _ in scored)

        base, _ = timed_result(forward)
        seconds, pairs = timed_result(lambda: matched(models, site, plan, options.batch))
        ratios["matching"].append(seconds / base)
        seconds, _ = timed_result(lambda pairs=pairs: transfer(pairs))
        ratios["transfer"].append(seconds / base)
    for part, values in ratios.items():
        middle = statistics.median(values)
        print(f"{size}: {part} {middle:.2f} times the forward passes ({min(values):.2f} to {max(values):.2f})")  # fmt: skip
        figures(size=size, part=part, ratio=round(middle, 3))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["crate-2l", "gpt2-2l"])
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=256, help="explained neurons per layer")
    parser.add_argument("--entries", type=int, default=64, help="tokens of an explanation")
    parser.add_argument("--batch", type=int, default=8192, help="tokens per forward pass")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    for size in options.sizes:
        measure(size, options)


if __name__ == "__main__":
    main()
