"""A decoder-only transformer: RMSNorm, rotary positions, SwiGLU, and a head tied to the embedding.

An ordinary `nn.Module`. Nothing in it knows of ranks, precision or fzero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of a model; a layer has 12 width² parameters."""

    width: int
    depth: int
    heads: int
    vocabulary: int = 256
    dropout: float = 0.0


PRESETS = {
    "tiny": Config(width=64, depth=2, heads=2),
    "small": Config(width=192, depth=4, heads=4),
    "medium": Config(width=512, depth=8, heads=8),
    "base": Config(width=768, depth=12, heads=12),
}


class GPT(nn.Module):
    """From tokens (batch, time) to the logits of the token that follows each (batch, time, vocabulary)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.head_width = config.width // config.heads
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        turn = rotation(tokens.shape[1], self.head_width, tokens.device)
        x = self.drop(self.embed(tokens))
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.norm(x), self.embed.weight)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = SwiGLU(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), turn))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width, branches=2 * config.depth)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        return self.out(rearrange(mixed, "b h t d -> b t (h d)"))


class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = 32 * round(config.width / 12)  # 8/3 of the width: as many parameters as two matrices of 4 × width
        self.up = linear(config.width, 2 * hidden)
        self.down = linear(hidden, config.width, branches=2 * config.depth)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def linear(inputs: int, outputs: int, branches: int = 1) -> nn.Linear:
    """Return a linear map without bias, its weights small enough that a sum of `branches` such maps has unit size."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs * branches))
    return layer


def rotation(length: int, width: int, device: torch.device) -> Tensor:
    """Return the cosines and sines (2, time, width / 2) of rotary positions, Su et al. 2021, arXiv 2104.09864."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + width / 2]) of (batch, head, time, width) by the angle of their position."""
    cos, sin = turn.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
