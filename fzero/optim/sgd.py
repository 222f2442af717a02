"""Stochastic gradient descent, with momentum and Nesterov's look-ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.layout import Sharded
from fzero.optim.base import Elementwise, Leaf, Mask, Rate, mask_of, rate, write_back


class SGDState(NamedTuple):
    """The velocity."""

    momentum: Sharded


class PlainSGDState(NamedTuple):
    """Nothing: without momentum there is no state."""


@dataclass(frozen=True)
class SGD(Elementwise):
    """See `sgd`."""

    lr: Rate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    mask: Mask | None = None

    @property
    def count(self) -> int:
        return 1 if self.momentum else 0

    @property
    def state_type(self) -> Callable[..., Any]:
        return SGDState if self.momentum else PlainSGDState

    def prologue(self, step: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return rate(self.lr, step), factor

    def update_piece(
        self, p: Tensor, moments: tuple[Tensor, ...], g: Tensor, leaf: Leaf, shared: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        lr, factor = shared
        gradient = g.to(torch.float32) * factor
        ok = torch.isfinite(gradient)
        value = p.to(torch.float32)
        if self.weight_decay and (self.mask is None or self.mask(leaf.path)):
            gradient = gradient + self.weight_decay * value
        if not moments:
            return write_back(leaf, ok, (value - lr * gradient, p))
        velocity = self.momentum * moments[0].to(torch.float32) + gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return write_back(leaf, ok, (value - lr * direction, p), (velocity, moments[0]))


def sgd(lr: Rate, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0, mask: Any = None) -> SGD:
    """Return stochastic gradient descent, as `torch.optim.SGD` defines it.

    Args:
        lr: learning rate: a number, or a function of the step tensor.
        momentum: decay of the velocity; 0 keeps no state.
        nesterov: step along the velocity looked ahead.
        weight_decay: added to the gradient, times the parameter.
        mask: which leaves decay, see `adamw`.

    Raises:
        ValueError: `nesterov` without momentum.

    Source: momentum as in Sutskever et al. 2013.

    Example:
        >>> opt, w, zero = sgd(0.5), torch.ones(2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.ones(2), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([0.5000, 0.5000])
    """
    if nesterov and not momentum:
        raise ValueError("fz.sgd: nesterov=True needs a momentum above 0; it is 0.")
    return SGD(lr, momentum, nesterov, weight_decay, mask_of(mask))
