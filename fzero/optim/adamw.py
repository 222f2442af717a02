"""AdamW and Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.calls.arguments import named, number, rate_of
from fzero.kernels import ops
from fzero.kernels.update import Update
from fzero.optim.elementwise import Elementwise
from fzero.optim.masks import Mask, mask_of
from fzero.optim.moments import Moment
from fzero.optim.step import Rate

# The range of what is added to a root, far beyond any use: the reciprocals of such numbers are exact.
EPS_RANGE = 2.0**-100, 2.0**100


class AdamState(NamedTuple):
    """Running means of the gradient and of its square."""

    m: Moment
    v: Moment


def formula(values: ops.Value, gradient: ops.Value, scalars: ops.Value, numbers: ops.Value) -> tuple[Any, Any]:
    """What one element becomes, in torch and in Triton: see `fzero.kernels.ops`."""
    p, first, second = values
    decay, step_size, eps, factor = scalars
    one_minus_b1, b2, one_minus_b2 = numbers
    gradient = gradient * factor
    square = gradient * gradient
    first = first + (gradient - first) * one_minus_b1
    second = second * b2 + square * one_minus_b2
    p = p * decay - step_size * (first * ops.reciprocal(ops.root(second) + eps))
    return (p, first, second), ops.is_finite(square)


ADAMW = Update("adamw", formula, ("p", "m", "v"), scalars=4)


@dataclass(frozen=True, repr=False)
class AdamW(Elementwise):
    """See `adamw`."""

    lr: Rate
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    mask: Mask | None = None

    state_type = AdamState
    signed = (True, False)
    kernel = ADAMW

    @property
    def numbers(self) -> tuple[float, ...]:
        return 1 - self.b1, self.b2, 1 - self.b2

    def scalars(self, t: Tensor, lr: Tensor, weight_decay: float) -> tuple[Tensor, ...]:
        # The root of 1 - b2^t corrects the second moment. As a factor of these two, no element is multiplied by it.
        correction = torch.sqrt(1 - self.b2**t)
        step_size = lr * correction / (1 - self.b1**t)
        return 1 - lr * weight_decay, step_size, (self.eps * correction).clamp(*EPS_RANGE)


@named("fz.adamw")
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

    Raises:
        TypeError, ValueError: a number is none, or out of its range; `fz.init` raises where a mask fits no leaf.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.

    Example:
        >>> import torch
        >>> opt, w, zero = adamw(0.1), torch.ones(3), torch.tensor(0, dtype=torch.int32)
        >>> new, opt_state = opt.update(torch.ones(3), opt.init(w), w, step=zero, seed=zero)
        >>> new
        tensor([0.8990, 0.8990, 0.8990])
    """
    return _checked("fz.adamw", AdamW(lr, b1, b2, eps, weight_decay, mask_of("fz.adamw", mask)))


@named("fz.adam")
def adam(lr: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> AdamW:
    """Return Adam: `adamw` without weight decay.

    Args:
        lr: learning rate: a number, or a function of the step tensor.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.

    Raises:
        TypeError, ValueError: a number is none, or out of its range.

    Source: Kingma and Ba 2015, arXiv 1412.6980.

    Example:
        >>> adam(1e-3).weight_decay
        0.0
    """
    return _checked("fz.adam", AdamW(lr, b1, b2, eps, weight_decay=0.0))


def _checked(call: str, optimizer: AdamW) -> AdamW:
    rate_of(call, optimizer.lr)
    number(call, "b1", optimizer.b1, least=0, below=1)
    number(call, "b2", optimizer.b2, least=0, below=1)
    number(call, "eps", optimizer.eps, above=0, hint="An element without a gradient would be divided by it.")
    number(call, "weight_decay", optimizer.weight_decay, least=0)
    return optimizer
