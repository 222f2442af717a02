"""AdamW and Adam: the update of `fzero.kernels.adamw`, leaf by leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fzero.kernels.adamw import adamw as kernel
from fzero.kernels.adamw import adamw_scalars
from fzero.layout import Sharded
from fzero.optim.base import Elementwise, Leaf, Mask, Rate, mask_of, rate


class AdamState(NamedTuple):
    """Running means of the gradient and of its square."""

    m: Sharded
    v: Sharded


@dataclass(frozen=True)
class AdamW(Elementwise):
    """See `adamw`."""

    lr: Rate
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    mask: Mask | None = None

    count = 2
    state_type = AdamState

    def prologue(self, step: Tensor, factor: Tensor) -> dict[bool, Tensor]:
        """Return the kernel's scalars for leaves that decay, and for leaves that do not."""
        lr = rate(self.lr, step)
        return {
            decays: adamw_scalars(step, lr, self.b1, self.b2, self.weight_decay if decays else 0.0, factor)
            for decays in ((True, False) if self.mask else (True,))
        }

    def update_piece(
        self, p: Tensor, moments: tuple[Tensor, ...], g: Tensor, leaf: Leaf, shared: dict[bool, Tensor]
    ) -> tuple[Tensor, ...]:
        scalars = shared[self.mask is None or self.mask(leaf.path)]
        m, v = moments
        return kernel(
            p, m, v, g, scalars, leaf.keys, leaf.offset,
            b1=self.b1, b2=self.b2, eps=self.eps, stochastic=leaf.stochastic,
        )  # fmt: skip


def adamw(
    lr: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any = None,
) -> AdamW:
    """Return AdamW.

    Args:
        lr: learning rate: a number, or a function of the step tensor such as those of `fz.schedules`.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the second moment.
        weight_decay: decoupled: `lr * weight_decay` of each parameter goes at each step.
        mask: which leaves decay: a function of the dotted path, or a tree of booleans like the parameters.
            Default: all.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.

    Example:
        >>> import torch
        >>> opt, w, zero = adamw(0.1), torch.ones(3), torch.tensor(0, dtype=torch.int32)
        >>> new, opt_state = opt.update(torch.ones(3), opt.init(w), w, step=zero, seed=zero)
        >>> new
        tensor([0.8990, 0.8990, 0.8990])
    """
    return AdamW(lr, b1, b2, eps, weight_decay, mask_of(mask))


def adam(lr: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> AdamW:
    """Return Adam: `adamw` without weight decay, whose arguments these are.

    Source: Kingma and Ba 2015, arXiv 1412.6980.

    Example:
        >>> adam(1e-3).weight_decay
        0.0
    """
    return AdamW(lr, b1, b2, eps, weight_decay=0.0)
