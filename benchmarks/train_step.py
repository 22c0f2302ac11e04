"""Training step of named sizes: tokens/s, MFU, peak memory; the four-product ISTA against the plain five.

    python benchmarks/train_step.py                                   # CPU: 2 layers, vocabulary 4,096
    python benchmarks/train_step.py --models crate-12l gpt2-12l --vocab 50304 --length 1024 \\
        --batch 16 --bf16 --compile --peak-tflops 989                 # H100/H200

Variants take turns in each repeat, so that a machine that slows down slows all of them; a ratio is
taken within a repeat. `loop` is `cratelm train`'s own loop with its log, without checkpoints.
"""

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from cratelm.models import build
from cratelm.models.crate import CrateConfig, Ista
from cratelm.runs import Draft
from cratelm.train.config import TrainConfig
from cratelm.train.data import BatchSampler
from cratelm.train.log import read_metrics
from cratelm.train.loop import TrainingSetup, open_accelerator, take_steps
from cratelm.train.losses import NextTokenLoss, Validation
from cratelm.train.optimizers import block_matrices, make_optimizers, set_learning_rate

RATE = 1e-4
GIB = 2**30


class PlainIsta(Ista):
    """The recurrence multiplied out: D^T x - D^T (D A), five products at two steps, D A_2 among them."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Sparse code [..., H] of x [..., D]: D^T x in each step, and from the second on D^T (D A)."""
        atoms, eta, shift = self.dictionary, self.step_size, self.step_size * self.threshold
        code = F.relu(eta * F.linear(x, atoms) - shift)
        for _ in range(self.steps - 1):
            back = F.linear(code @ atoms, atoms)  # D^T (D A)
            code = F.relu(code + eta * (F.linear(x, atoms) - back) - shift)
        return code


@dataclass
class Variant:
    """One thing that is timed, and its seconds a step in each repeat."""

    name: str
    step: Callable[[int], float]
    """takes so many steps; seconds they took"""
    flops: float
    """of one step, useful ones: forward and backward of the four-product form"""
    seconds: list[float] = field(default_factory=list)
    memory: float = math.nan
    """peak, in bytes; known on CUDA"""


class RandomSplit:
    """As much of a `TokenSplit` as training reads, of random tokens."""

    def __init__(self, vocab: int, length: int):
        self.tokens = np.random.default_rng(0).integers(0, vocab, 1024 * length + 1)
        self.n_tokens = len(self.tokens)

    def n_sequences(self, length: int) -> int:
        return (self.n_tokens - 1) // length

    def sequence(self, index: int, length: int) -> np.ndarray:
        return self.tokens[index * length : (index + 1) * length + 1]


def useful_flops(name: str, vocab: int, length: int, batch: int) -> float:
    """Of one training step: 2 a weight and token forward, twice that backward, attention over T."""
    model = build(name, vocab_size=vocab, max_position_embeddings=length)
    config = model.config
    weights = sum(p.numel() for p in block_matrices(model)) + vocab * config.hidden_size
    if isinstance(config, CrateConfig):  # 2 * steps products with each dictionary, one is counted
        again = 2 * config.ista_steps - 1
        weights += again * config.num_hidden_layers * config.num_neurons * config.hidden_size
    attention = 4 * config.num_hidden_layers * length * config.hidden_size
    return 3 * batch * length * (2 * weights + attention)


def bare_step(name: str, options: argparse.Namespace, *, plain: bool) -> Callable[[int], float]:
    """Forward, backward, clip and update, and nothing else."""
    device = torch.device(options.device)
    with mock.patch("cratelm.models.crate.Ista", PlainIsta) if plain else contextlib.nullcontext():
        model = build(name, vocab_size=options.vocab, max_position_embeddings=options.length)
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    optimizers = make_optimizers(model, options.optimizer, 0.1)
    set_learning_rate(optimizers, RATE)
    forward = NextTokenLoss(model)
    if options.compile:
        forward.compile()
    shape = (options.batch, options.length + 1)
    tokens = torch.randint(options.vocab, shape, device=device)

    def step(count: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss = forward(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        _wait(device)
        return time.perf_counter() - start

    return step


def loop_step(name: str, options: argparse.Namespace) -> Callable[[int], float]:
    """The loop of `cratelm train` on random tokens; its seconds as its own timing file has them."""

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
            quiet=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            draft = Draft(Path(folder), fresh=True)
            setup = _setup(name, config, options)
            take_steps(setup, config, draft, name)
            lines = read_metrics(draft.path, "timing.jsonl")
        tokens = config.resolved().tokens_per_step * config.resolved().log_every
        return sum(tokens / line["tokens_per_s"] for line in lines)

    return step


def _setup(name: str, config: TrainConfig, options: argparse.Namespace) -> TrainingSetup:
    split, numbers = RandomSplit(options.vocab, options.length), config.resolved()
    accelerator = open_accelerator(config)
    sampler = BatchSampler(
        split,  # pyright: ignore[reportArgumentType]
        batch_size=options.batch,
        micro_batch_size=options.batch,
        sequence_length=options.length,
        seed=0,
    )
    validation = Validation(split, numbers, accelerator)  # pyright: ignore[reportArgumentType]
    bare = build(name, vocab_size=options.vocab, max_position_embeddings=options.length)
    optimizers = make_optimizers(bare, options.optimizer, 0.1)
    wrapped = NextTokenLoss(bare)
    if options.compile:
        wrapped.compile()
    model, *optimizers = accelerator.prepare(wrapped, *optimizers)
    return TrainingSetup(accelerator, model, optimizers, sampler, validation, 0)


def measure(variants: list[Variant], options: argparse.Namespace) -> None:
    """Warms each up, then lets them take turns."""
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
    """What is compared: plain and loop with the model itself, CRATE with its twin."""
    found = [(name, name.split()[0]) for name in names if " " in name]
    crates = [n for n in names if n.startswith("crate") and " " not in n]
    return found + [
        (n, n.replace("crate", "gpt2")) for n in crates if n.replace("crate", "gpt2") in names
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    size = "12l" if cuda else "2l"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[f"crate-{size}", f"gpt2-{size}"])
    parser.add_argument("--vocab", type=int, default=50304 if cuda else 4096)
    parser.add_argument("--length", type=int, default=1024 if cuda else 256, help="T, tokens")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of the device, at this precision")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if cuda else 5, help="steps a repeat")
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1, help="steps")
    return parser.parse_args()


def main() -> None:
    options = _options()
    variants = []
    for name in options.models:
        flops = useful_flops(name, options.vocab, options.length, options.batch)
        variants.append(Variant(name, bare_step(name, options, plain=False), flops))
        if name.startswith("crate"):
            plain = bare_step(name, options, plain=True)
            variants.append(Variant(f"{name} five-product", plain, flops))
        variants.append(Variant(f"{name} loop", loop_step(name, options), flops))
    measure(variants, options)
    show(variants, options)


if __name__ == "__main__":
    main()
