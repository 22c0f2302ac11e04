"""Decoding with a cache, token by token: CRATE, which caches one tensor per layer, compared with its GPT-2 twin.

    python benchmarks/decoding.py                                # two layers of d 128, then of d 768
    python benchmarks/decoding.py --sizes 12l --device cuda --dtype bfloat16

Each model continues a prompt of one token greedily by `generate` of transformers, up to 1,024 positions. The models
take turns; ratios are taken within a turn. Weights are random: the cost does not depend on them.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from common import figures, timed
from transformers import Cache
from transformers.generation import GenerationMixin

from cratelm.models import build

SIZES = {
    "2l": {"name": "2l"},
    "768": {"name": "6l", "num_hidden_layers": 2},
    "12l": {"name": "12l"},
}


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all cached tensors, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cache.layers
        for t in (layer.keys, layer.values)
        if t is not None
    }
    return sum(storages.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["2l", "768"])
    parser.add_argument("--positions", type=int, default=1024, help="tokens, with the prompt")
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    prompt = torch.ones(1, 1, dtype=torch.int64, device=device)
    for size in options.sizes:
        fields = dict(SIZES[size])
        name = fields.pop("name")
        models: dict[str, GenerationMixin] = {}
        for family in ("crate", "gpt2"):
            model = build(f"{family}-{name}", vocab_size=options.vocab_size, **fields).eval()
            models[family] = model.to(device, getattr(torch, options.dtype))  # pyright: ignore
        seconds: dict[str, list[float]] = {family: [] for family in models}
        n_bytes: dict[str, int] = {}

        def decode(family: str, models=models, n_bytes=n_bytes) -> None:
            made = models[family].generate(
                prompt,
                max_length=options.positions,
                min_length=options.positions,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
            n_bytes[family] = cache_bytes(made.past_key_values)  # pyright: ignore

        for turn in range(options.turns + 1):
            for family in models:
                spent = timed(lambda f=family: decode(f), device)
                if turn:  # the first is not counted
                    seconds[family].append(spent)
        ratios = [c / g for c, g in zip(seconds["crate"], seconds["gpt2"], strict=True)]
        medians = {family: statistics.median(s) for family, s in seconds.items()}
        print(
            f"{size}: crate {medians['crate']:.2f} s, gpt2 {medians['gpt2']:.2f} s, ratio"
            f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); cache"
            f" {n_bytes['crate']:,} and {n_bytes['gpt2']:,} bytes"
        )
        figures(
            size=size,
            positions=options.positions,
            seconds=seconds,
            ratios=ratios,
            cache_bytes=n_bytes,
            bytes_ratio=n_bytes["crate"] / n_bytes["gpt2"],
        )


if __name__ == "__main__":
    main()
