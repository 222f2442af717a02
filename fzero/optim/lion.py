"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.layout import Sharded
from fzero.optim.base import Elementwise, Leaf, Mask, Rate, mask_of, rate, write_back


class LionState(NamedTuple):
    """The running mean of gradients."""

    m: Sharded


@dataclass(frozen=True)
class Lion(Elementwise):
    """See `lion`."""

    lr: Rate
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    mask: Mask | None = None

    count = 1
    state_type = LionState

    def prologue(self, step: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return rate(self.lr, step), factor

    def update_piece(
        self, p: Tensor, moments: tuple[Tensor, ...], g: Tensor, leaf: Leaf, shared: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        lr, factor = shared
        gradient = g.to(torch.float32) * factor
        ok = torch.isfinite(gradient)
        m = moments[0].to(torch.float32)
        decays = self.mask is None or self.mask(leaf.path)
        value = p.to(torch.float32) * (1 - lr * (self.weight_decay if decays else 0.0))
        value = value - lr * torch.sign(self.b1 * m + (1 - self.b1) * gradient)
        return write_back(leaf, ok, (value, p), (self.b2 * m + (1 - self.b2) * gradient, moments[0]))


def lion(lr: Rate, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0, mask: Any = None) -> Lion:
    """Return Lion.

    Args:
        lr: learning rate: a number, or a function of the step tensor. About a tenth of AdamW's.
        b1: share of the momentum in the direction of a step.
        b2: decay of the momentum.
        weight_decay: decoupled, about ten times AdamW's.
        mask: which leaves decay, see `adamw`.

    Source: Chen et al. 2023, arXiv 2302.06675.

    Example:
        >>> opt, w, zero = lion(0.5), torch.ones(2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.tensor([3.0, -7.0]), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([0.5000, 1.5000])
    """
    return Lion(lr, b1, b2, weight_decay, mask_of(mask))
