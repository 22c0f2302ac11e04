"""Part of `gpu.sh`: training steps of crate-12l and gpt2-12l in bf16, compiled and eager, four products and five.

The step and its FLOPs are those of `train_step.py`. Nothing else runs on the card, so variants are timed one after
another; each figure is the median of five blocks of steps. MFU is against the rate of a large matrix product, which
is measured first on the same card.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import timed
from gpu_part import (
    Figures,
    PartOptions,
    count_memory,
    free_memory,
    is_out_of_memory,
    peak_memory,
)
from train_step import bare_step, useful_flops

BATCHES = (32, 16, 8, 4, 2, 1)
"""sequences per step, tried in this order until one fits into memory; 64 x 1,024 x 50,304 logits would need indices
of 64 bits"""
BLOCKS = 5
BLOCK_SECONDS = 0.8


def measure(options: PartOptions, figures: Figures) -> None:
    """Record the matrix rate, and a record for each variant; a variant that fails leaves its error."""
    size, vocab, length = ("1l", 300, 16) if options.tiny else ("12l", 50304, 1024)
    rate = matrix_rate(options.device, 256 if options.tiny else 8192)
    figures.record("matrix_tflops", rate / 1e12)
    figures.record("vocab", vocab)
    figures.record("length", length)
    crate, gpt2 = f"crate-{size}", f"gpt2-{size}"
    flops = {name: useful_flops(name, vocab, length, 1) for name in (crate, gpt2)}
    batches: dict[str, int] = {}
    # The eager ones first: they find the batch size in seconds, while each compilation takes up to a minute.
    variants = [
        (crate, False, False),
        (gpt2, False, False),
        (crate, True, False),
        (gpt2, True, False),
        (crate, True, True),
        (crate, False, True),
    ]
    for name, compiled, plain in variants[:3] if options.tiny else variants:
        label = f"{name}{', five products' if plain else ''}, {'compiled' if compiled else 'eager'}"
        setting = argparse.Namespace(
            device=options.device,
            vocab=vocab,
            length=length,
            optimizer="adamw",
            bf16=True,
            compile=compiled,
            backend=options.backend,
        )
        first = batches.get(name, 2 if options.tiny else BATCHES[0])
        try:
            record = variant(name, setting, plain, first, options)
        except Exception as error:
            figures.record(label, {"error": f"{type(error).__name__}: {error}"[:500]})
        else:
            batches.setdefault(name, record["batch"])
            record["mfu"] = flops[name] * record["batch"] / record["seconds_per_step"] / rate
            record["tokens_per_s"] = record["batch"] * length / record["seconds_per_step"]
            figures.record(label, record)
    for how in ("compiled", "eager"):
        five, four = (figures.values.get(f"{crate}{x}, {how}", {}) for x in (", five products", ""))
        if "tokens_per_s" in five and "tokens_per_s" in four:
            figures.record(f"four products, {how}", ratio_of(five, four))


def ratio_of(five: dict[str, Any], four: dict[str, Any]) -> dict[str, Any]:
    """Return how many times the tokens/s and the peak memory of five products those of four are."""
    memory = (four["peak_bytes"], five["peak_bytes"])
    comparable = None not in memory and four["batch"] == five["batch"]
    return {
        "times_as_fast_as_five": four["tokens_per_s"] / five["tokens_per_s"],
        "memory_of_five_to_four": memory[1] / memory[0] if comparable else None,
    }


def matrix_rate(device: str, size: int) -> float:
    """Return the floating-point operations per second of products of two square bf16 matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    multiply(3)
    seconds = [timed(lambda: multiply(10), torch.device(device)) / 10 for _ in range(BLOCKS)]
    return 2 * size**3 / statistics.median(seconds)


def variant(
    name: str, setting: argparse.Namespace, plain: bool, first: int, options: PartOptions
) -> dict[str, Any]:
    """Return batch, seconds per step and peak memory of one variant, at the first batch size that fits."""
    batch = first
    while True:
        free_memory(options.device)
        setting.batch = batch
        try:
            return timed_variant(lambda: bare_step(name, setting, plain=plain), batch, options)
        except Exception as error:
            if not is_out_of_memory(error) or batch == BATCHES[-1]:
                raise
        batch = next(b for b in BATCHES if b < batch)


def timed_variant(
    make: Callable[[], Callable[[int], float]], batch: int, options: PartOptions
) -> dict[str, Any]:
    """Return the record of a variant whose step `make` returns."""
    step = make()
    start = step(1)  # compiles
    estimate = step(2) / 2
    count_memory(options.device)
    count = 1 if options.tiny else max(1, round(BLOCK_SECONDS / estimate))
    seconds = [step(count) / count for _ in range(2 if options.tiny else BLOCKS)]
    return {
        "batch": batch,
        "seconds_per_step": statistics.median(seconds),
        "seconds_per_step_of_blocks": seconds,
        "seconds_of_first_step": start,
        "peak_bytes": peak_memory(options.device),
    }
