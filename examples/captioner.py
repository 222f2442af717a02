"""A GPT that writes about what it is shown: embeddings of a picture come before its tokens.

It writes a caption behind the picture, and it says where picture and caption lie in one space, each seen by itself,
as CLIP does (Radford et al. 2021, arXiv 2103.00020). Both together are CoCa, Yu et al. 2022, arXiv 2205.01917.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from gpt import GPT, Config, linear, rotation
from torch import Tensor, nn


class Captioner(nn.Module):
    """A GPT that continues a prefix of picture embeddings, and says how close pictures and captions are."""

    def __init__(self, config: Config, embedding_width: int) -> None:
        super().__init__()
        self.gpt = GPT(config)
        self.prefix = linear(embedding_width, config.width)
        self.picture_head = linear(embedding_width, config.width)
        self.caption_head = linear(config.width, config.width)
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, embeddings: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what follows each token, and where pictures and captions lie.

        Args:
            embeddings: (batch, patches, embedding width).
            tokens: (batch, time).

        Returns:
            Logits (batch, time, vocabulary) of the token that follows each, given the picture; and two unit vectors
            for each row, (batch, width): of the picture, and of the caption alone.
        """
        embeddings = embeddings.to(self.prefix.weight.dtype)
        words = self.gpt.embed(tokens)
        seen = self.states(torch.cat([self.prefix(embeddings), words], 1))[:, embeddings.shape[1] :]
        picture = self.picture_head(embeddings.mean(1))
        said = self.caption_head(self.states(words)[:, -1])
        return F.linear(seen, self.gpt.embed.weight), F.normalize(picture, dim=-1), F.normalize(said, dim=-1)

    def states(self, x: Tensor) -> Tensor:
        turn = rotation(x.shape[1], self.gpt.head_width, x.device)
        for block in self.gpt.blocks:
            x = block(x, turn)
        normed: Tensor = self.gpt.norm(x)
        return normed
