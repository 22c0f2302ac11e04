"""Floating-point operations of a model, counted by torch on tensors without data."""

from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cratelm.models.sizes import build


@cache
def forward_flops(
    name: str, vocab_size: int, length: int, overrides: tuple[tuple[str, Any], ...] = ()
) -> float:
    """Return the operations per token of a forward pass over `length` tokens, head included.

    Matrix products and attention count, 2 operations per multiplication, with attention over all pairs of tokens as the
    products compute it. A training step takes three times as many. Raises `InputError` as `build` does.
    """
    # No tensor gets memory, so that the largest size takes a second.
    with FakeTensorMode():
        model: Any = build(
            name, vocab_size=vocab_size, max_position_embeddings=length, **dict(overrides)
        )
        # torch does not count the fused attention of every device
        model.config._attn_implementation = "eager"
        ids = torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
    return counter.get_total_flops() / length
