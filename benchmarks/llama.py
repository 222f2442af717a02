"""The shape of Llama 3.1: grouped-query attention, SwiGLU, RMSNorm, rotary positions, an untied head.

    python -c 'from llama import SHAPES, Llama; ...'        # used by programs.py

Shapes are those of the published models, Grattafiori et al. 2024, arXiv 2407.21783, table 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from gpt import rotate, rotation
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    width: int
    depth: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 128256


SHAPES = {
    "8B": Shape(width=4096, depth=32, heads=32, kv_heads=8, hidden=14336),
    "405B": Shape(width=16384, depth=126, heads=128, kv_heads=8, hidden=53248),
}


class Llama(nn.Module):
    """From tokens (batch, time) to the logits of the token that follows each (batch, time, vocabulary)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head_width = shape.width // shape.heads

    def forward(self, tokens: Tensor) -> Tensor:
        turn = rotation(tokens.shape[1], self.head_width, tokens.device)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, turn)
        return self.head(self.norm(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.groups = shape.heads, shape.heads // shape.kv_heads
        narrow = shape.width // shape.heads * shape.kv_heads
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, narrow, bias=False)
        self.v = nn.Linear(shape.width, narrow, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads)
        k, v = (rearrange(f(x), "b t (h d) -> b h t d", h=self.heads // self.groups) for f in (self.k, self.v))
        k, v = rotate(k, turn), v
        mixed = F.scaled_dot_product_attention(rotate(q, turn), k, v, is_causal=True, enable_gqa=True)
        return self.out(rearrange(mixed, "b h t d -> b t (h d)"))
