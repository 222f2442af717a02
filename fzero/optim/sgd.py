"""Stochastic gradient descent, with momentum and Nesterov's look-ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.calls.arguments import flag, named, number, rate_of
from fzero.kernels import ops
from fzero.kernels.update import Update
from fzero.optim.elementwise import Elementwise
from fzero.optim.masks import Mask, mask_of
from fzero.optim.moments import Moment
from fzero.optim.step import Rate


class SGDState(NamedTuple):
    """The velocity."""

    momentum: Moment


class PlainSGDState(NamedTuple):
    """Nothing: without momentum there is no state."""


def formula(values: ops.Value, gradient: ops.Value, scalars: ops.Value, numbers: ops.Value) -> tuple[Any, Any]:
    """What one element becomes, in torch and in Triton: see `fzero.kernels.ops`."""
    lr, weight_decay, factor = scalars
    momentum, along_velocity, along_gradient = numbers
    gradient = gradient * factor
    ok = ops.is_finite(gradient)
    gradient = gradient + weight_decay * values[0]
    if len(values) == 1:
        return (values[0] - lr * gradient,), ok
    else:
        velocity = values[1] * momentum + gradient
        direction = gradient * along_gradient + velocity * along_velocity
        return (values[0] - lr * direction, velocity), ok


SGD_UPDATE = Update("sgd", formula, ("p", "velocity"), scalars=3, optional=1)


@dataclass(frozen=True, repr=False)
class SGD(Elementwise):
    """See `sgd`."""

    lr: Rate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    mask: Mask | None = None

    kernel = SGD_UPDATE

    @property
    def state_type(self) -> Callable[..., Any]:
        return SGDState if self.momentum else PlainSGDState

    @property
    def signed(self) -> tuple[bool, ...]:
        return (True,) if self.momentum else ()

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.momentum, self.momentum if self.nesterov else 1.0, float(self.nesterov)

    def scalars(self, t: Tensor, lr: Tensor, weight_decay: float) -> tuple[Tensor, ...]:
        return lr, torch.zeros_like(lr) + weight_decay


@named("fz.sgd")
def sgd(lr: Rate, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0, mask: Any = None) -> SGD:
    """Return stochastic gradient descent, as `torch.optim.SGD` defines it.

    Args:
        lr: learning rate: a number, or a function of the step tensor.
        momentum: decay of the velocity; 0 keeps no state.
        nesterov: step along the velocity looked ahead.
        weight_decay: added to the gradient, times the parameter.
        mask: which leaves decay, see `adamw`.

    Raises:
        TypeError, ValueError: a number is none, or out of its range, or `nesterov` without momentum.

    Source: momentum as in Sutskever et al. 2013.

    Example:
        >>> import torch
        >>> opt, w, zero = sgd(0.5), torch.ones(2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.ones(2), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([0.5000, 0.5000])
    """
    number("fz.sgd", "momentum", momentum, least=0, most=1)
    if flag("fz.sgd", "nesterov", nesterov) and not momentum:
        raise ValueError("fz.sgd: nesterov=True needs a momentum above 0; it is 0.")
    number("fz.sgd", "weight_decay", weight_decay, least=0)
    return SGD(rate_of("fz.sgd", lr), momentum, nesterov, weight_decay, mask_of("fz.sgd", mask))
