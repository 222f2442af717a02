"""Two tasks on handwritten digits that one network learns, and the gradient of each loss from one forward.

    image (64) ──trunk──▶ features ──┬─▶ which digit it is     cross-entropy
                                     └─▶ how much ink it has   mean square, in per mille of a black picture

The second loss starts ten thousand times as large as the first and more. `gradient_norms.py` and `pcgrad.py` do
something about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from digits import Digits
from torch import Tensor, nn

import fzero as fz

Losses = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]


class TwoTasks(nn.Module):
    """From images (batch, 64) to the logits of ten digits (batch, 10) and a share of ink (batch,)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.digit = nn.Linear(width, 10)
        self.ink = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return self.digit(features), self.ink(features).squeeze(-1)


def losses_of(apply: Callable[..., tuple[Tensor, Tensor]]) -> Losses:
    """Return `losses(params, images, labels)`: a dict of two scalars."""

    def losses(params: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits, ink = apply(params, images)
        off = 1000 * (ink.float() - images.mean(-1))
        return {"digit": F.cross_entropy(logits.float(), labels), "ink": off.square().mean()}

    return losses


def gradients_of(
    losses: Losses, state: fz.State, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, fz.Sharded]]:
    """Return each loss, and the gradient of each: one forward, and the pullback called once for each loss."""
    values, pullback = fz.vjp(lambda params: losses(params, images, labels), state)
    nothing = fz.tree.map(torch.zeros_like, values)
    return values, {task: pullback({**nothing, task: torch.ones_like(x)})[0] for task, x in values.items()}


def load(mesh: fz.Mesh) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images (count, 64) between 0 and 1 with their labels: those to train on, and those held out."""
    train, held_out = (
        (torch.from_numpy(x.images).flatten(1).to(mesh.device), torch.from_numpy(x.labels).to(mesh.device))
        for x in Digits.load()
    )
    return train, held_out


def batch(data: tuple[Tensor, Tensor], rows: int, *, step: int, mesh: fz.Mesh) -> tuple[Tensor, Tensor]:
    """Return `rows` random images with their labels: a function of the step and the rank."""
    generator = torch.Generator().manual_seed(step * mesh.size("data") + mesh.index("data"))
    chosen = torch.randint(len(data[0]), (rows,), generator=generator).to(mesh.device)
    return data[0][chosen], data[1][chosen]


def measured(
    apply: Callable[..., tuple[Tensor, Tensor]], state: fz.State, held_out: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Return the share of held-out digits that are read right, and how far off the ink is, in per mille."""
    images, labels = held_out
    logits, ink = fz.call(apply, state.params, images)
    return {
        "read right": (logits.argmax(-1) == labels).float().mean().item(),
        "ink off by": 1000 * (ink - images.mean(-1)).abs().mean().item(),
    }
