"""Training step of named sizes: tokens/s, MFU, peak memory; compared with the model as one would first write it.

    python benchmarks/train_step.py                                   # CPU: 2 layers, vocabularies 4,096 and 50,304
    python benchmarks/train_step.py --models crate-12l gpt2-12l --vocab-size 50304 --length 1024 \\
        --batch 16 --bf16 --compile --peak-tflops 989                 # H100/H200

Beside each CRATE: `five-product`, the same with the plain recurrence; `plain`, all written out, and `research`, the
same with torch's attention (`plain_crate.py`); `--yardsticks` names those of them that are timed.

Variants take turns in each repeat, so that other load slows down all of them; ratios are taken within a repeat. `loop`
is the training loop of `cratelm train` including its log; it writes no checkpoint in so few steps.
"""

import argparse
import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from common import figures, random_run, timed
from plain_crate import PlainCrate, ResearchCrate
from torch.nn import functional as F

from cratelm.models import build
from cratelm.models.crate import CrateConfig, Ista
from cratelm.train.config import TrainConfig
from cratelm.train.losses import NextTokenLoss
from cratelm.train.optimizers import block_matrices, make_optimizers, set_learning_rate

RATE = 1e-4
YARDSTICKS = {"plain": PlainCrate, "research": ResearchCrate}
GIB = 2**30


class PlainIsta(Ista):
    """ISTA with the recurrence multiplied out, D^T x - D^T (D A): five products at two steps, including D A_2."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sparse code [..., H] of x [..., D], with D^T x in each step, and D^T (D A) from the second on."""
        atoms, eta, shift = self.dictionary, self.step_size, self.step_size * self.threshold
        code = F.relu(eta * F.linear(x, atoms) - shift)
        for _ in range(self.steps - 1):
            back = F.linear(code @ atoms, atoms)  # D^T (D A)
            code = F.relu(code + eta * (F.linear(x, atoms) - back) - shift)
        return code


@dataclass
class Variant:
    """A variant of the training step, with its measured times."""

    name: str
    step: Callable[[int], float]
    """takes the given number of steps and returns the seconds they took"""
    flops: float
    """useful floating-point operations of one step: forward and backward pass of the four-product form"""
    seconds: list[float] = field(default_factory=list)
    """seconds per step in each repeat"""
    vocabulary: int = 0
    memory: float = math.nan
    """peak memory in bytes; measured only on CUDA"""


def useful_flops(name: str, vocab: int, length: int, batch: int) -> float:
    """Return the floating-point operations of one training step.

    Counts 2 operations per weight and token for the forward pass, twice that for the backward pass, and attention
    over `length` tokens.
    """
    model = build(name, vocab_size=vocab, max_position_embeddings=length)
    config = model.config
    weights = sum(p.numel() for p in block_matrices(model)) + vocab * config.hidden_size
    if isinstance(
        config, CrateConfig
    ):  # 2 * steps products with each dictionary, of which one is already counted
        uncounted = 2 * config.ista_steps - 1
        weights += uncounted * config.num_hidden_layers * config.num_neurons * config.hidden_size
    attention = 4 * config.num_hidden_layers * length * config.hidden_size
    return 3 * batch * length * (2 * weights + attention)


def bare_step(name: str, options: argparse.Namespace, *, plain: bool) -> Callable[[int], float]:
    """Return a function that takes bare steps (forward, backward, clipping, update) and returns their seconds."""
    device = torch.device(options.device)
    with mock.patch("cratelm.models.crate.Ista", PlainIsta) if plain else contextlib.nullcontext():
        model = build(name, vocab_size=options.vocab, max_position_embeddings=options.length)
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    optimizers = make_optimizers(model, options.optimizer, 0.1)
    forward = NextTokenLoss(model)
    return stepper(forward, list(model.parameters()), optimizers, options)


def yardstick_step(
    kind: type[PlainCrate], name: str, options: argparse.Namespace
) -> Callable[[int], float]:
    """Return the same for CRATE as one would first write it, with the same optimizer over the same tensors."""
    size = build(name, vocab_size=options.vocab, max_position_embeddings=options.length)
    model = kind(cast("CrateConfig", size.config)).to(torch.device(options.device))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    if options.optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        optimizers = [muon, torch.optim.AdamW(others, lr=0.0, weight_decay=0.1)]
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)]
    return stepper(model, list(model.parameters()), optimizers, options)


def stepper(
    forward: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    options: argparse.Namespace,
) -> Callable[[int], float]:
    """Return a function that takes bare steps with a module from inputs and targets to the loss."""
    device = torch.device(options.device)
    set_learning_rate(optimizers, RATE)
    if options.compile:
        forward.compile(backend=options.backend)
    shape = (options.batch, options.length + 1)
    tokens = torch.randint(options.vocab, shape, device=device)

    def take(count: int) -> None:
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss = forward(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return lambda count: timed(lambda: take(count), device)


def loop_step(name: str, options: argparse.Namespace) -> Callable[[int], float]:
    """Return a function that runs `cratelm train` on random tokens and returns the seconds of its loop.

    The seconds are taken from its timing file.
    """
    from cratelm.train.log import read_metrics  # these import pyarrow, which gpu.sh does without
    from cratelm.train.loop import train

    def step(count: int) -> float:
        config = TrainConfig(
            model=name,
            recipe="laptop",
            steps=count,
            batch_size=options.batch,
            micro_batch_size=options.batch,
            sequence_length=options.length,
            optimizer=options.optimizer,
            precision="bf16" if options.bf16 else "fp32",
            compile=options.compile,
            log_every=count if options.device == "cuda" else 1,
            validation_sequences=1,
            device="auto" if options.device == "cuda" else "cpu",
            tensorboard=False,
            quiet=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            run = random_run(Path(folder) / "run", options.vocab, 1024 * options.length)
            result = train(replace(config, run=run.path))
            lines = read_metrics(result.path, "timing.jsonl")
        tokens = options.batch * options.length * (count if options.device == "cuda" else 1)
        return sum(tokens / line["tokens_per_s"] for line in lines)

    return step


def measure(variants: list[Variant], options: argparse.Namespace) -> None:
    """Warm up each variant, then time them alternately and record their seconds per step."""
    for variant in variants:
        variant.step(options.warmup)
    for _ in range(options.repeats):
        for variant in variants:
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            variant.seconds.append(variant.step(options.steps) / options.steps)
            if options.device == "cuda":
                variant.memory = torch.cuda.max_memory_allocated()


def show(variants: list[Variant], options: argparse.Namespace) -> None:
    """Print a table of the variants and the ratios of their times."""
    tokens = options.batch * options.length
    print(f"{'variant':<24}{'tokens/s':>12}{'ms/step':>10}{'MFU':>8}{'peak GiB':>10}")
    for variant in variants:
        seconds = statistics.median(variant.seconds)
        mfu = "-"
        if options.peak_tflops:
            mfu = f"{variant.flops / seconds / options.peak_tflops / 1e12:.1%}"
        memory = "-" if math.isnan(variant.memory) else f"{variant.memory / GIB:.2f}"
        print(
            f"{variant.name:<24}{tokens / seconds:>12,.0f}{seconds * 1e3:>10.1f}{mfu:>8}{memory:>10}"
        )
    by_name = {v.name: v.seconds for v in variants}
    for slow, fast in _pairs(list(by_name)):
        ratios = [a / b for a, b in zip(by_name[slow], by_name[fast], strict=True)]
        print(
            f"time of {slow} / {fast}: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}"
        )


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs to compare: `five-product` and `loop` with the bare step, and CRATE with its twin."""
    pairs = [(name, name.split()[0]) for name in names if " " in name]
    crates = [n for n in names if n.startswith("crate") and " " not in n]
    return pairs + [
        (n, n.replace("crate", "gpt2")) for n in crates if n.replace("crate", "gpt2") in names
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    size = "12l" if cuda else "2l"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[f"crate-{size}", f"gpt2-{size}"])
    vocabularies = [50304] if cuda else [4096, 50304]
    parser.add_argument("--vocab-size", type=int, nargs="+", default=vocabularies)
    parser.add_argument(
        "--length", type=int, default=1024 if cuda else 256, help="tokens per sequence"
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--yardsticks", nargs="*", choices=YARDSTICKS, default=list(YARDSTICKS))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, for --compile")
    parser.add_argument(
        "--peak-tflops", type=float, help="peak TFLOP/s of the device at this precision, for MFU"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if cuda else 5, help="steps per repeat")
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1, help="warm-up steps")
    parser.add_argument("--json", type=Path, help="file for all times")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    options = _options(arguments)
    done = []
    for vocabulary in options.vocab_size:
        print(f"vocabulary {vocabulary:,}")
        options.vocab = vocabulary
        variants = _variants(options)
        measure(variants, options)
        show(variants, options)
        done += variants
        for slow, fast in _pairs([v.name for v in variants]):
            of = {v.name: v.seconds for v in variants}
            ratios = [a / b for a, b in zip(of[slow], of[fast], strict=True)]
            figures(
                vocabulary=vocabulary,
                optimizer=options.optimizer,
                slow=slow,
                fast=fast,
                ratios=ratios,
            )
    if options.json:
        options.json.write_text(json.dumps([_figures(v) for v in done], indent=1) + "\n")


def _variants(options: argparse.Namespace) -> list[Variant]:
    """Return the variants of all models for one vocabulary."""
    variants = []
    for name in options.models:
        flops = useful_flops(name, options.vocab, options.length, options.batch)
        variants.append(Variant(name, bare_step(name, options, plain=False), flops))
        if name.startswith("crate"):
            five = bare_step(name, options, plain=True)
            variants.append(Variant(f"{name} five-product", five, flops))
            for yardstick in options.yardsticks:
                step = yardstick_step(YARDSTICKS[yardstick], name, options)
                variants.append(Variant(f"{name} {yardstick}", step, flops))
        variants.append(Variant(f"{name} loop", loop_step(name, options), flops))
    for variant in variants:
        variant.vocabulary = options.vocab
    return variants


def _figures(variant: Variant) -> dict[str, Any]:
    """Return the figures of a variant for the JSON file; memory is None where it was not measured."""
    memory = None if math.isnan(variant.memory) else variant.memory
    figures = {"variant": variant.name, "vocabulary": variant.vocabulary, "flops": variant.flops}
    return {**figures, "seconds_per_step": variant.seconds, "peak_bytes": memory}


if __name__ == "__main__":
    main()
