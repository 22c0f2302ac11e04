"""CRATE as one would first write it: the yardsticks of `train_step.py`. Same parameters, same loss.

Both use five products per block, and all logits at once. `PlainCrate` writes attention out, with all weights
[B, K, T, T]. `ResearchCrate` uses torch's attention, as research code in the manner of nanoGPT does; it stands for
such code as far as its operations go, not for its data loading or its logging.

Shape legend: B batch, T positions, D width, K heads, P = D/K, H neurons, V vocabulary.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from cratelm.models.crate import CrateConfig


class _Block(nn.Module):
    def __init__(self, config: CrateConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.norm_attention, self.norm_code = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projection = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)
        bound = math.sqrt(6 / width)
        self.dictionary = nn.Parameter(
            torch.empty(width, config.num_neurons).uniform_(-bound, bound)
        )

    def attention(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the heads [B, K, T, P], from their codes."""
        length = codes.shape[-2]
        scores = codes @ codes.transpose(-1, -2) / math.sqrt(codes.shape[-1])  # [B, K, T, T]
        later = torch.ones(length, length, dtype=torch.bool, device=codes.device).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(-1) @ codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the residual stream [B, T, D] after the block."""
        heads = self.config.num_attention_heads
        codes = self.projection(self.norm_attention(x)).unflatten(-1, (heads, -1)).transpose(1, 2)
        x = x + self.output(self.attention(codes).transpose(1, 2).flatten(2))
        signal, d = self.norm_code(x), self.dictionary
        eta, weight = self.config.step_size, self.config.threshold
        code = F.relu(eta * (signal @ d) - eta * weight)  # [B, T, H]
        for _ in range(self.config.ista_steps - 1):
            gradient = (code @ d.T) @ d - signal @ d
            code = F.relu(code - eta * gradient - eta * weight)
        return code @ d.T


class PlainCrate(nn.Module):
    """The language model, with attention written out."""

    block = _Block

    def __init__(self, config: CrateConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=config.initializer_range)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats of targets [B, T] after ids [B, T]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _ResearchBlock(_Block):
    def attention(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the heads [B, K, T, P], from their codes."""
        return F.scaled_dot_product_attention(codes, codes, codes, is_causal=True)


class ResearchCrate(PlainCrate):
    """The same with torch's attention."""

    block = _ResearchBlock
