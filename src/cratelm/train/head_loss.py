"""Cross-entropy of a linear head, forward and backward, with the logits of a few rows at a time.

A plain head with loss needs the logits of all rows, their log-softmax and its gradient: three times 4 N V
bytes, 2.4 GB for 4,096 rows and V = 50,304. A chunked form computes loss and gradient of some rows, adds
their gradients, and drops their logits.

How many rows: each chunk reads the weights twice and adds to their gradient, 16 V D bytes, and computes
6 r V D operations. With few rows the first decides the time, whatever V is, unless weights and gradient
stay in cache; with many rows the logits no longer do. `rows_per_chunk` has the rule.

Shape legend: N rows (tokens), r rows of one chunk, D width of the model, V vocabulary.
"""

from typing import Any

import torch
from torch.nn import functional as F

try:
    from torch.nn import LinearCrossEntropyOptions
except ImportError:  # torch before 2.13
    LinearCrossEntropyOptions = None

IN_CACHE = 4 * 2**20
"""bytes of weights and their gradient, 8 V D, up to which chunks of few rows cost nothing"""
FEWEST_ROWS = {True: 64, False: 256}
"""fewest rows of a chunk on CPU, by whether weights and gradient stay in cache: `benchmarks/loss.py`"""
FEWEST_ROWS_GPU = 2048
"""fewest rows on other devices, from operations per byte (16 / 6 x 200 = 530 keep an H100 busy in bf16, and
four times as many make the traffic a fifth of the time); not measured"""

_SAFE = 60.0
"""largest logit up to which exponentials of a million logits neither overflow in float32 nor vanish"""


def rows_per_chunk(
    rows: int, width: int, vocabulary: int, device: str = "cpu", in_cache: int = IN_CACHE
) -> int:
    """Return how many of N rows a chunk of the head's loss has: r, at most N.

    The logits of a chunk are about half as large as the hidden states [N, D] of all rows (the rule
    `aspect_ratio:2` of `torch.nn.LinearCrossEntropyOptions`), but a chunk never has fewer than 256 rows on CPU
    (64 while weights and gradient fit into `in_cache` bytes) and 2,048 on a GPU, because it would then be slower
    than the plain form. One chunk's logits therefore take at most 4 max(N D, fewest V) bytes: on CPU 49 MiB
    at V = 50,304 and 147 MiB at V = 150,000; on a GPU 393 MiB and 1,172 MiB.
    """
    share = -(-rows // -(-vocabulary // width))
    balanced = (1 << (share - 1).bit_length()) // 2
    fewest = FEWEST_ROWS[8 * vocabulary * width <= in_cache] if device == "cpu" else FEWEST_ROWS_GPU
    return min(rows, max(balanced, fewest))


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, mean: bool = True
) -> torch.Tensor:
    """Return the cross-entropy in nats of targets [N] under logits `hidden` [N, D] @ `weight` [V, D]^T.

    Returns the mean, or each row's [N]. Under autocast the products are in its precision, and the loss is
    in float32. Inside `torch.compile`, and under autocast for one chunk, this is the plain form: the compiler
    fuses it itself.
    """
    reduction = "mean" if mean else "none"
    if torch.compiler.is_compiling():
        return F.cross_entropy(F.linear(hidden, weight), targets, reduction=reduction)
    (rows, width), device = hidden.shape, hidden.device.type
    narrow = torch.is_autocast_enabled(device)
    size = rows_per_chunk(rows, width, len(weight), device, 0 if narrow else IN_CACHE)
    if narrow and size == rows:
        return F.cross_entropy(F.linear(hidden, weight), targets, reduction=reduction)
    # torch's own form returns its loss in the precision of its input, which is three digits in bf16.
    if narrow or LinearCrossEntropyOptions is None:
        return chunked_loss(hidden, weight, targets, size, mean=mean)
    options = LinearCrossEntropyOptions(batch_chunk_size=size)
    return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    size: int,
    *,
    mean: bool = True,
) -> torch.Tensor:
    """Return what `head_loss` does, in chunks of `size` rows, on any torch and under autocast.

    Only the mean avoids the logits of all rows in a backward pass, too.
    """
    if mean:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        loss: Any = _ChunkedMean.apply(hidden, weight, targets, size, dtype)
        return loss
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([F.cross_entropy(F.linear(h, weight), t, reduction="none") for h, t in parts])


@torch.no_grad()
def row_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_of: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross-entropy in nats of each target [N], from hidden states [rows, D]; no gradient.

    `row_of` [N] is the row of each target (default: its own). Only the logits of `rows_per_chunk` rows are in memory.
    """
    partition = _log_partition(hidden, weight)
    if row_of is not None:
        hidden, partition = hidden[row_of], partition[row_of]
    return partition - (hidden * weight[targets]).sum(-1)


def _log_partition(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials [rows] of the logits `hidden` [rows, D] @ `weight` [V, D]^T.

    Logits of a few rows at a time overwrite those before them: with new memory for each, the pages that the system must
    provide take longer than the product (2.2 times as long in all at d 128 and V 4,096). A logit is at most the product
    of two norms. Where that cannot overflow the exponential, nothing is subtracted before it.
    """
    step = rows_per_chunk(len(hidden), *reversed(weight.shape), device=hidden.device.type)
    buffer = hidden.new_empty(step, len(weight))
    partition = hidden.new_empty(len(hidden))
    bound = weight.norm(dim=-1).max() * hidden.norm(dim=-1).max() if len(hidden) else 0.0
    is_safe = bool(bound < _SAFE)  # also of NaN: the plain way has to return NaN
    for first in range(0, len(hidden), max(1, step)):
        rows = hidden[first : first + step]
        logits = torch.mm(rows, weight.T, out=buffer[: len(rows)])
        if is_safe:
            partition[first : first + step] = logits.exp_().sum(-1).log_()
            continue
        highest = logits.amax(-1, keepdim=True)
        sums = logits.sub_(highest).exp_().sum(-1)
        partition[first : first + step] = sums.log_() + highest[:, 0]
    return partition


class _ChunkedMean(torch.autograd.Function):
    """Mean cross-entropy whose gradients are computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # `dtype` is its precision already
            needs_hidden, needs_weight = ctx.needs_input_grad[:2]
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # [N, D]
            grad_weight = torch.zeros_like(weight) if needs_weight else None  # [V, D]
            total, matrix = hidden.new_zeros((), dtype=torch.float32), weight.to(dtype)
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                x, target = hidden[rows].to(dtype), targets[rows, None]  # [r, D], [r, 1]
                logits = (x @ matrix.T).float()  # [r, V]
                normaliser = logits.logsumexp(-1, keepdim=True)  # [r, 1]
                total += (normaliser - logits.gather(1, target)).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                # The gradient of the mean, (softmax - one-hot) / N, in the place of the logits.
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, target, -torch.ones_like(target, dtype=slope.dtype))
                slope = slope.div_(len(hidden)).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = slope @ matrix
                if grad_weight is not None and dtype == weight.dtype:
                    grad_weight.addmm_(slope.T, x)
                elif grad_weight is not None:
                    grad_weight += slope.T @ x
        ctx.gradients = (grad_hidden, grad_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they serve once
        if gradients is None:
            raise RuntimeError("the chunked loss has no second backward pass")
        scaled = [None if g is None else g.mul_(grad_outputs[0]) for g in gradients]
        return (*scaled, None, None, None)
