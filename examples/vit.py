"""A vision transformer: patches of a picture, each embedded with its place, all looking at each other.

An ordinary `nn.Module`, from Dosovitskiy et al. 2020, arXiv 2010.11929, but for two things. Patches overlap, so that
few pictures are enough to learn from. And there is no class token: what reads the picture gets every patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from gpt import linear
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of a model, and of the pictures that it sees, in pixels."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    patch: int = 12
    stride: int = 6  # from one patch to the next
    picture: tuple[int, int] = (12, 36)

    @property
    def patches(self) -> int:
        rows, columns = ((pixels - self.patch) // self.stride + 1 for pixels in self.picture)
        return rows * columns


class ViT(nn.Module):
    """From pictures (batch, height, width) to embeddings of their patches (batch, patches, width)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch, self.stride = config.patch, config.stride
        self.embed = linear(config.patch**2, config.width)
        self.place = nn.Parameter(torch.empty(config.patches, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.place, std=0.2)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = pictures.unfold(1, self.patch, self.stride).unfold(2, self.patch, self.stride)
        x = self.embed(rearrange(patches, "b y x p q -> b (y x) (p q)").to(self.place.dtype)) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width, branches=2 * config.depth)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = linear(config.width, 4 * config.width)
        self.down = linear(4 * config.width, config.width, branches=2 * config.depth)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(self.attention_norm(x)), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(*qkv.unbind())
        x = x + self.out(rearrange(mixed, "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))
