"""Loss without each neuron: a whole forward pass for each, over what `cratelm effects` does.

    python benchmarks/effects.py                        # crate-2l and gpt2-2l
    python benchmarks/effects.py --sizes crate-6l --neurons 4 --tokens 2048 --vocabulary 50304

Both measure the same neurons on the same tokens in one run, in turns; the naive way runs the whole model
with a hook, as many sequences at a time. Weights and tokens are random: what is saved depends on how often
neurons fire, which is printed. Of a trained model: `--run runs/demo --model crate-2l`.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cratelm.activations.open_harvest import open_harvested
from cratelm.models import build, capture, site_of
from cratelm.models.partial_forward import PartialForward
from cratelm.runs import Run
from cratelm.steer import Edit
from cratelm.steer.ablation import HeldOutText, ablate, rows_at_a_time, token_losses
from cratelm.steer.steering import steering


class RandomSplit:
    """Random tokens in documents of 1,000: the part of `TokenSplit` that is read."""

    name = "held_out"

    def __init__(self, n_tokens: int, vocabulary: int):
        self.n_tokens = n_tokens
        self._tokens = np.random.default_rng(0).integers(1, vocabulary, n_tokens)

    def n_sequences(self, length: int) -> int:
        return (self.n_tokens - 1) // length

    def sequence(self, index: int, length: int) -> np.ndarray:
        return self._tokens[index * length : index * length + length + 1]

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        return positions // 1000


@torch.no_grad()
def naive(rest: PartialForward, text: HeldOutText, neurons: list[np.ndarray]) -> list[list[float]]:
    """Mean change of the loss of each neuron, by whole passes."""
    tokens, _ = next(text.batches(text.n_tokens))
    ids = torch.from_numpy(tokens).to(rest.model.device)
    step = rows_at_a_time(rest, text.length)

    def loss() -> float:
        parts = [
            token_losses(rest.model(part[:, :-1], use_cache=False).logits.float(), part[:, 1:])
            for part in ids.split(step)
        ]
        return float(torch.cat(parts).double().mean())

    plain = loss()
    found = []
    for layer, some in enumerate(neurons):
        found.append([])
        for neuron in some:
            with steering(rest.model, Edit(layer, int(neuron), zero=True), site=rest.site):
                found[-1].append(loss() - plain)
    return found


def compare(rest: PartialForward, text: HeldOutText, neurons: list[np.ndarray], turns: int) -> str:
    """Ratio of the times, and the largest difference of what is found."""
    ratios, worst = [], 0.0
    for _ in range(turns):
        start = time.perf_counter()
        plain_way = naive(rest, text, neurons)
        middle = time.perf_counter()
        ours = ablate(rest, text, neurons, None, 4096, tqdm(disable=True))
        ratios.append((middle - start) / (time.perf_counter() - middle))
        for a, b in zip(plain_way, ours.neurons, strict=True):
            worst = max(worst, *(abs(x - y.change.value) for x, y in zip(a, b, strict=True)))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{statistics.median(ratios):.2f} times as long ({spread}), largest difference {worst:.1e} nats"


def firing(rest: PartialForward, text: HeldOutText) -> float:
    """Part of tokens at which a neuron is not 0."""
    tokens, _ = next(text.batches(4096))
    found = capture(rest.model, rest.site, torch.from_numpy(tokens[:, :-1]).to(rest.model.device))
    return float(np.mean([(a != 0).float().mean().item() for a in found]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss without each neuron: naive over ours")
    parser.add_argument("--sizes", nargs="+", default=["crate-2l", "gpt2-2l"])
    parser.add_argument("--run", type=Path, help="a run, in place of random weights")
    parser.add_argument("--model", nargs="+", default=["crate-2l"], help="of the run")
    parser.add_argument("--neurons", type=int, default=16, help="a layer")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    for name in given.model if given.run else given.sizes:
        if given.run:
            harvested = open_harvested(Run(given.run), name)
            model, site, split = (
                harvested.subject.model, harvested.site, harvested.store.split("held_out"),
            )  # fmt: skip
        else:
            model = build(name, vocab_size=given.vocabulary, max_position_embeddings=given.length)
            model.eval()
            site = site_of(model)
            split = RandomSplit(given.tokens + given.length + 1, given.vocabulary)
        rest = PartialForward(model, site)
        text = HeldOutText.of(split, given.length, given.tokens, 0)  # type: ignore[arg-type]
        neurons = [np.arange(given.neurons)] * site.n_layers
        told = compare(rest, text, neurons, given.turns)
        print(
            f"{name}: the naive way takes {told}; neurons fire at {firing(rest, text):.0%} of tokens"
        )


if __name__ == "__main__":
    main()
