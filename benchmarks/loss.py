"""Head and loss of a training step, forward and backward: the chunked forms compared with the plain one.

    python benchmarks/loss.py                                    # all vocabularies, D 128, 2,048 rows
    python benchmarks/loss.py --vocab-size 50304 --width 768 --rows 4096 --chunks 64 256 1024 --json loss.json

`rule` is the number of rows per chunk that training uses, `loop` the same in the form for bf16 and for older versions
of torch, `--chunks` adds fixed numbers of rows. The forms take turns in each repeat; ratios are taken within a repeat,
their median and range are printed. Peak memory is what one pass adds: on CPU from the system's record of the largest
resident set, on CUDA from the allocator.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from common import figures, peak_memory, timed
from torch.nn import functional as F

from cratelm.train.head_loss import chunked_loss, head_loss, rows_per_chunk

MIB = 2**20
VOCABULARIES = [512, 1024, 2048, 4096, 8192, 16384, 50304, 150000]
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Result:
    """Times and memory of one form at one size."""

    form: str
    vocabulary: int
    width: int
    rows: int
    rows_per_chunk: int
    seconds: list[float] = field(default_factory=list)
    """of one forward and backward pass, in each repeat"""
    ratios: list[float] = field(default_factory=list)
    """to the plain form, in each repeat"""
    peak_mib: float = 0.0
    """largest memory of one pass beyond inputs and gradients of an earlier pass"""


def plain_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, mean: bool = True
) -> torch.Tensor:
    """Return the mean cross-entropy of targets [N] from all logits [N, V]."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def fixed(size: int) -> Form:
    """Return the loss in chunks of `size` rows, in torch's form where there is one."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return lambda h, w, t: chunked_loss(h, w, t, size)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size)
    return lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)


def measure(vocabulary: int, options: argparse.Namespace) -> list[Result]:
    """Return the results of all forms for one vocabulary."""
    device = torch.device(options.device)
    rows, width = options.rows, options.width
    size = rows_per_chunk(rows, width, vocabulary, device.type)
    forms: dict[str, tuple[Form, int]] = {
        "plain": (plain_loss, rows),
        "rule": (head_loss, size),
        "loop": (lambda h, w, t: chunked_loss(h, w, t, size), size),
        **{f"{chunk} rows": (fixed(chunk), chunk) for chunk in options.chunks},
    }
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)

    def take(form: Form) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = form(hidden, weight, targets)
        loss.backward()

    results = []
    for name, (form, chunk) in forms.items():
        peak = peak_memory(lambda form=form: take(form), device) / MIB  # it also warms up
        results.append(Result(name, vocabulary, width, rows, chunk, peak_mib=round(peak, 1)))
    for _ in range(options.repeats):
        for result in results:
            result.seconds.append(timed(lambda r=result: take(forms[r.form][0]), device))
    for result in results:
        pairs = zip(result.seconds, results[0].seconds, strict=True)
        result.ratios = [own / plain for own, plain in pairs]
    return results


def line(result: Result) -> str:
    """Return a result as a line of the table."""
    ratios = result.ratios
    return (
        f"{result.vocabulary:>10,}  {result.form:<10}{result.rows_per_chunk:>10,}"
        f"{statistics.median(result.seconds) * 1e3:>10.1f}{statistics.median(ratios):>8.2f}"
        f"  ({min(ratios):.2f} to {max(ratios):.2f}){result.peak_mib:>10,.0f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--width", type=int, default=128, help="D, width of the model")
    parser.add_argument("--rows", type=int, default=2048, help="tokens of one micro-batch")
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="fixed rows per chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args(arguments)
    print(f"D {options.width}, {options.rows:,} rows, {torch.get_num_threads()} threads")
    print("vocabulary  form      rows/chunk        ms   ratio  (range)            peak MiB")
    results = []
    for vocabulary in options.vocab_size:
        for result in measure(vocabulary, options):
            print(line(result), flush=True)
            results.append(asdict(result))
            figures(**asdict(result))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
