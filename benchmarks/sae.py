"""Cost of training autoencoders beside SAELens' bare steps: what the activations take.

    python benchmarks/sae.py                                   # crate-2l (d 128), 4x, all layers
    python benchmarks/sae.py --architectures topk --expansion 16 --size crate-12l --device cuda

Ratios are of times measured in one run, in turns; the median and the range over the turns are
printed. Tokens are random: the cost does not depend on the text.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from cratelm.models import build, site_of
from cratelm.sae.activations import ActivationBuffer
from cratelm.sae.architectures import build_sae
from cratelm.sae.train import _trainer
from cratelm.sae.train_config import ARCHITECTURES, SaeTrainConfig


class RandomSplit:
    """Random tokens without end marks: the part of `TokenSplit` that a stream reads."""

    def __init__(self, n_tokens: int, vocab_size: int):
        self.n_tokens = n_tokens
        self.tokens = np.random.default_rng(0).integers(1, vocab_size, n_tokens)

    def n_sequences(self, length: int) -> int:
        return (self.n_tokens - 1) // length

    def sequence(self, index: int, length: int) -> np.ndarray:
        return self.tokens[index * length : (index + 1) * length + 1]


def timed(work, device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def measure(architecture: str, arguments: argparse.Namespace) -> str:
    device = torch.device(arguments.device)
    size, turns = arguments.batch_size, arguments.repeats
    model = build(arguments.size, vocab_size=4096, max_position_embeddings=256).eval()
    model.to(device)  # type: ignore[arg-type]
    site = site_of(model)
    layers = tuple(range(site.n_layers))
    config = SaeTrainConfig(
        run=Path("unused"),
        architecture=architecture,  # type: ignore[arg-type]
        expansion=arguments.expansion,
        batch_size=size,
        tokens=100 * size,
    )
    trainers = [
        _trainer(config, build_sae(config, site.n_neurons[layer], layer, device))
        for layer in layers
    ]
    stream = ActivationBuffer(
        model,
        site,
        layers,
        RandomSplit(2_000_000, 4096),  # type: ignore[arg-type]
        0,
        sequence_length=256,
        batch_size=size,
        batch_tokens=8192,
        buffer_bytes=arguments.steps * size * 4 * sum(site.n_neurons),
        most_rows=10**9,
        seed=0,
    )

    def fill_and_serve() -> None:
        place = stream.place
        while stream.place.first == place.first:
            stream.batch()

    batch = stream.batch()
    for _ in range(2):
        [trainer.step(x) for trainer, x in zip(trainers, batch, strict=True)]
    reading, stepping = [], []
    for _ in range(turns):
        before = stream.place
        stream.seek(type(before)(before.first))
        reading.append(timed(fill_and_serve, device) / (stream._rows / size))
        stepping.append(
            timed(
                lambda: [trainer.step(x) for trainer, x in zip(trainers, batch, strict=True)],
                device,
            )
        )
    ratios = [(r + s) / s for r, s in zip(reading, stepping, strict=True)]
    speed = size / (statistics.median(reading) + statistics.median(stepping))
    return (
        f"{architecture:10} {arguments.expansion}x: activations and steps over bare steps"
        f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f});"
        f" {speed:,.0f} tokens/s, {len(layers)} layers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--size", default="crate-2l")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16, help="steps of a buffer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for architecture in arguments.architectures:
        print(measure(architecture, arguments), flush=True)


if __name__ == "__main__":
    main()
