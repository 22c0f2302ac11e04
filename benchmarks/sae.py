"""Cost of training autoencoders, including their activations, compared with the bare steps of SAELens.

    python benchmarks/sae.py                                   # crate-2l (d 128), 4x, all layers
    python benchmarks/sae.py --architectures topk --expansion 16 --size crate-12l --device cuda

Ratios are of times measured alternately in one process; the median and the range over the turns are printed. Tokens are
random: the cost does not depend on the text.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from common import random_split, timed

from cratelm.models import build, site_of
from cratelm.sae.activations import ActivationBuffer, StreamPosition
from cratelm.sae.architectures import build_sae
from cratelm.sae.train import make_trainer
from cratelm.sae.train_config import ARCHITECTURES, SaeTrainConfig


def measure(architecture: str, arguments: argparse.Namespace) -> str:
    """Return the result for one architecture, as a line of text."""
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
        make_trainer(config, build_sae(config, site.n_neurons[layer], layer, device))
        for layer in layers
    ]
    stream = ActivationBuffer(
        model,
        site,
        layers,
        random_split(arguments.tokens, 4096),
        0,
        sequence_length=256,
        batch_size=size,
        batch_tokens=8192,
        buffer_bytes=arguments.steps * size * 4 * sum(site.n_neurons),
        most_rows=10**9,
        seed=0,
    )

    def fill_and_serve() -> None:
        first = stream.position.first
        while stream.position.first == first:
            stream.batch()

    batch = stream.batch()
    for _ in range(2):
        [trainer.step(x) for trainer, x in zip(trainers, batch, strict=True)]
    reading, stepping = [], []
    for _ in range(turns):
        stream.seek(StreamPosition(stream.position.first))
        reading.append(timed(fill_and_serve, device) / (stream.rows / size))
        stepping.append(
            timed(
                lambda: [trainer.step(x) for trainer, x in zip(trainers, batch, strict=True)],
                device,
            )
        )
    ratios = [(r + s) / s for r, s in zip(reading, stepping, strict=True)]
    speed = size / (statistics.median(reading) + statistics.median(stepping))
    return (
        f"{architecture:10} {arguments.expansion}x: activations and steps / bare steps"
        f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f});"
        f" {speed:,.0f} tokens/s, {len(layers)} layers"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--size", default="crate-2l")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16, help="training steps per buffer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of the random split")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    for architecture in options.architectures:
        print(measure(architecture, options), flush=True)


if __name__ == "__main__":
    main()
