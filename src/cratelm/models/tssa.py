"""Token statistics self-attention (TSSA): attention of linear time, with three running sums as its cache.

Source: Wu et al., "Token Statistics Transformer: Linear-Time Attention via Variational Rate Reduction"
(ICLR 2025, arXiv 2412.17810), in the causal form of the authors' language model. No token is compared with
another. Each head keeps statistics of all tokens up to now, and scales each channel of the present token
by them. For head k, channel p and position t, with w = W x:

    n[k,t,p] = w^2 / max(sum_{s<=t} w[k,s,p]^2, 1e-12) + b[k,t]
    Pi[k,t]  = softmax over heads k of  tau_k sum_p n[k,t,p]
    g[k,t,p] = sum_{s<=t} Pi[k,s] w[k,s,p]^2 / (sum_{s<=t} Pi[k,s] + 1e-8)
    y[k,t,p] = - Pi[k,t] w[k,t,p] / (1 + g[k,t,p])
    out      = W_o concat_k y                          added to the residual stream by the block

It imports only torch and transformers, so that it can be saved with a model.

Shape legend: B batch, T new positions, D width, K heads, P = D/K width of a head, N longest sequence.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin


class RunningSums(CacheLayerMixin):
    """Cache of one layer of TSSA, of the same size whatever the length of the text.

    `keys` [B, K, P] is the sum of w^2 over the positions so far; `values` [B, K, P + 1] are the sums of
    Pi w^2 and, in the last column, of Pi. Both are float32. A position cannot be removed again, so methods of
    generation that take tokens back are rejected by transformers.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: each sum starts at 0 with its first terms."""

    def update(  # type: ignore[override]
        self,
        key_states: torch.Tensor | None,
        value_states: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Add the terms of T positions [B, K, T, .] of one of the sums, the other being None.

        Return the sum up to each of these positions, [B, K, T, .], in the same place. The sum of w^2 comes first.
        """
        if key_states is not None:
            sums = running(key_states, self.keys)
            self.keys = sums[:, :, -1]
            self.dtype, self.device = sums.dtype, sums.device
            self.cumulative_length += key_states.shape[2]
            return sums, None
        assert value_states is not None
        sums = running(value_states, self.values)
        self.values = sums[:, :, -1]
        self.is_initialized = True
        return None, sums

    def get_seq_length(self) -> int:
        """Return the number of positions that the sums are over, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length that a mask of keys would have, and its offset 0."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the sums have no maximal length."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the given rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]


def running(terms: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Return the sum up to each position [B, K, T, .] of `terms`, added to the sum `before` them [B, K, .]."""
    sums = terms.cumsum(2)
    return sums if before is None else before[:, :, None] + sums


class Tssa(nn.Module):
    """Causal token statistics self-attention of `num_heads` heads on sequences of up to `max_positions` tokens."""

    def __init__(self, hidden_size: int, num_heads: int, max_positions: int):
        super().__init__()
        self.num_heads = num_heads
        self.projection = nn.Linear(hidden_size, hidden_size, bias=False)
        self.subspace = nn.Identity()
        """site: the projection w [B, T, D], head after head"""
        self.heads = nn.Identity()
        """site: outputs of the heads y [B, T, D], before the output map"""
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1))
        """tau [K, 1]"""
        self.denominator_bias = nn.Parameter(torch.zeros(num_heads, max_positions, 1))
        """b [K, N, 1]"""

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
    ) -> torch.Tensor:
        """Return the output [B, T, D] for x [B, T, D], before it is added to the residual stream.

        `mask` [B, T] is 1 at tokens and 0 at padding, which then adds nothing to the statistics.
        `position_ids` [B, T] or [1, T] selects b; without it, positions count from 0. With a cache, whose layer
        `layer_idx` must be `RunningSums`, T are the positions after those already summed.
        """
        batch, length, width = x.shape
        # Sums over a sequence are taken in float32: in bf16 a term below 1/256 of the sum adds nothing.
        w = self.subspace(self.projection(x))  # [B, T, D]
        split = w.float().view(batch, length, self.num_heads, -1).transpose(1, 2)  # [B, K, T, P]
        squares = split.square()
        if mask is not None:
            squares = squares * mask[:, None, :, None]
        totals = self._sums(squares, None, past_key_values, layer_idx)
        bias = self._bias(position_ids, length)  # [K, T, 1] or [B, K, T, 1]
        normed = squares / totals.clamp_min(1e-12) + bias.float()  # n
        member = (self.temperature.float() * normed.sum(-1)).softmax(1)  # Pi [B, K, T]
        if mask is not None:
            member = member * mask[:, None]
        member = member[..., None]  # [B, K, T, 1]
        terms = torch.cat([member * squares, member], -1)  # [B, K, T, P + 1]
        weighted = self._sums(None, terms, past_key_values, layer_idx)
        moment = weighted[..., :-1] / (weighted[..., -1:] + 1e-8)  # g
        y = -member * split / (1 + moment)
        heads = self.heads(y.transpose(1, 2).reshape(batch, length, width).to(w.dtype))
        return self.output(heads)

    def _sums(
        self,
        squares: torch.Tensor | None,
        terms: torch.Tensor | None,
        past_key_values: Cache | None,
        layer_idx: int,
    ) -> torch.Tensor:
        """Return the running sum of whichever of the two is given, continued from the cache if there is one."""
        if past_key_values is None:
            first = squares if squares is not None else terms
            assert first is not None
            return running(first, None)
        sums: Any = past_key_values.update(squares, terms, layer_idx)  # type: ignore[arg-type]
        return sums[0] if squares is not None else sums[1]

    def _bias(self, position_ids: torch.Tensor | None, length: int) -> torch.Tensor:
        if position_ids is None:
            return self.denominator_bias[:, :length]
        return self.denominator_bias[:, position_ids].transpose(0, 1)  # [B, K, T, 1]
