"""Loss without each neuron: time of a whole forward pass per neuron, compared with `cratelm effects`.

    python benchmarks/effects.py                        # crate-2l and gpt2-2l
    python benchmarks/effects.py --sizes crate-6l --neurons 4 --tokens 2048 --vocabulary 50304

Both methods measure the same neurons on the same tokens, alternately in one process. The naive method runs the whole
model with a hook, on the same number of sequences at a time. Weights and tokens are random. The time saved depends on
how often neurons fire, which is printed. For a trained model, use `--run runs/demo --model crate-2l`.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import random_split, timed_result
from tqdm import tqdm

from cratelm.activations.open_harvest import open_harvested
from cratelm.models import build, capture, site_of
from cratelm.models.partial_forward import PartialForward
from cratelm.runs import Run
from cratelm.steer import Edit
from cratelm.steer.ablation import HeldOutText, ablate, rows_at_a_time, token_losses
from cratelm.steer.steering import steering


@torch.no_grad()
def naive(
    partial: PartialForward, text: HeldOutText, neurons: list[np.ndarray]
) -> list[list[float]]:
    """Return the mean change of the loss without each neuron, by layer, measured with whole forward passes."""
    tokens, *_ = next(text.batches(text.n_tokens))
    ids = torch.from_numpy(tokens).to(partial.model.device)
    step = rows_at_a_time(partial, text.length)

    def loss() -> float:
        parts = [
            token_losses(partial.model(part[:, :-1], use_cache=False).logits.float(), part[:, 1:])
            for part in ids.split(step)
        ]
        return float(torch.cat(parts).double().mean())

    plain = loss()
    changes = []
    for layer, indices in enumerate(neurons):
        changes.append([])
        for neuron in indices:
            with steering(partial.model, Edit(layer, int(neuron), zero=True), site=partial.site):
                changes[-1].append(loss() - plain)
    return changes


def compare(
    partial: PartialForward, text: HeldOutText, neurons: list[np.ndarray], turns: int
) -> str:
    """Return in words the ratio of the times, and the largest difference between the measured changes."""
    ratios, worst = [], 0.0
    for _ in range(turns):
        naive_seconds, changes = timed_result(lambda: naive(partial, text, neurons))
        seconds, ours = timed_result(
            lambda: ablate(partial, text, neurons, None, 4096, tqdm(disable=True))
        )
        ratios.append(naive_seconds / seconds)
        for a, b in zip(changes, ours.neurons, strict=True):
            measured = [b[place].change.value for place in range(len(b))]
            worst = max(worst, *(abs(x - y) for x, y in zip(a, measured, strict=True)))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{statistics.median(ratios):.2f} times as long ({spread}), largest difference {worst:.1e} nats"


def firing(partial: PartialForward, text: HeldOutText) -> float:
    """Return the fraction of tokens at which a neuron is not 0, mean over neurons and layers."""
    tokens, *_ = next(text.batches(4096))
    activations = capture(
        partial.model, partial.site, torch.from_numpy(tokens[:, :-1]).to(partial.model.device)
    )
    return float(np.mean([(a != 0).float().mean().item() for a in activations]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["crate-2l", "gpt2-2l"])
    parser.add_argument("--run", type=Path, help="run directory to use instead of random weights")
    parser.add_argument("--model", nargs="+", default=["crate-2l"], help="models of the run")
    parser.add_argument("--neurons", type=int, default=16, help="neurons per layer")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    for name in options.model if options.run else options.sizes:
        if options.run:
            harvested = open_harvested(Run(options.run), name)
            model, site, split = (
                harvested.subject.model, harvested.site, harvested.store.split("held_out"),
            )  # fmt: skip
        else:
            model = build(
                name, vocab_size=options.vocabulary, max_position_embeddings=options.length
            )
            model.eval()
            site = site_of(model)
            split = random_split(options.tokens + options.length + 1, options.vocabulary)
        partial = PartialForward(model, site)
        text = HeldOutText.of(split, options.length, options.tokens, 0)
        neurons = [np.arange(options.neurons)] * site.n_layers
        comparison = compare(partial, text, neurons, options.turns)
        print(
            f"{name}: the naive method takes {comparison}; neurons fire at"
            f" {firing(partial, text):.0%} of tokens"
        )


if __name__ == "__main__":
    main()
