"""Cost of `cratelm analyze` for a deep model, in multiples of its forward passes over the same tokens.

    OMP_NUM_THREADS=1 python benchmarks/analyze.py                 # a random LLaMA of 30 layers

Weights, tokens and explanations (look-up tables) are random. Forward passes, the sums over text, the groups of neurons and
the consistency of explained neurons alternate in one process. The number of forward passes that consistency takes is
printed with each figure: one if the memory suffices, however many layers the model has.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence

import torch
from common import figures, random_split, timed, timed_result
from seeds import tables
from transformers import LlamaConfig, LlamaForCausalLM

from cratelm.activations.batches import SearchPlan
from cratelm.analysis.consistency import HeldOutPass, measure_neurons
from cratelm.analysis.groups import group_neurons
from cratelm.analysis.layer_sums import sum_over_text
from cratelm.models import site_of


def deep_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """Return a LLaMA of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=options.length,
    )
    return LlamaForCausalLM(config).eval()


def measure(options: argparse.Namespace) -> None:
    """Print the cost of each part."""
    model = deep_model(options)
    site = site_of(model)
    split = random_split(options.tokens + 1, options.vocabulary)
    plan = SearchPlan.of(split, "held_out", 0, options.length, options.tokens, 0)
    random_tables = tables(site, options.neurons, options.entries, options.vocabulary)
    explained = [
        stored.read() for layer in site.layer_numbers for _, stored in random_tables.of_layer(layer)
    ]
    maximum = defaultdict(lambda: 1.0)
    passes = 0
    model.base_model.register_forward_hook(lambda *_: _count())

    def _count() -> None:
        nonlocal passes
        passes += 1

    def forward() -> None:
        with torch.no_grad():
            for batch in plan.batches(options.batch, model.device):
                model.base_model(input_ids=batch.input_ids, use_cache=False)

    def consistency() -> int:
        held_out = HeldOutPass(model, site, plan, options.batch)
        measured = measure_neurons(held_out, explained, maximum, memory_bytes=options.memory_mib * 2**20, seed=0, progress=lambda n: None)  # fmt: skip
        return sum(1 for _ in measured)

    of_consistency = 0
    ratios: dict[str, list[float]] = {"sums": [], "groups": [], "consistency": [], "all": []}
    for _ in range(options.turns):
        base = timed(forward)
        seconds, sums = timed_result(
            lambda: sum_over_text(
                model, site, plan, batch_tokens=options.batch, ista_steps=1, progress=lambda n: None
            )
        )
        found = {"sums": seconds}
        found["groups"] = timed(
            lambda sums=sums: [
                group_neurons(of_layer.correlation.correlation())
                for of_layer in sums.layers.values()
                if of_layer.correlation is not None
            ]
        )
        before = passes
        found["consistency"] = timed(consistency)
        of_consistency = passes - before
        found["all"] = sum(found.values())
        for part, seconds in found.items():
            ratios[part].append(seconds / base)
    batches = sum(1 for _ in plan.batches(options.batch, model.device))
    print(f"consistency reads the text {of_consistency / batches:g} times")
    for part, values in ratios.items():
        middle = statistics.median(values)
        print(f"{part} {middle:.2f} times the forward passes ({min(values):.2f} to {max(values):.2f})")  # fmt: skip
        figures(part=part, ratio=round(middle, 3), layers=options.layers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576, help="as SmolLM2-135M")
    parser.add_argument("--inner", type=int, default=1536, help="neurons per layer")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=64, help="explained neurons per layer")
    parser.add_argument("--entries", type=int, default=64, help="tokens of an explanation")
    parser.add_argument("--batch", type=int, default=8192, help="tokens per forward pass")
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    measure(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
