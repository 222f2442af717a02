"""Stochastic gradient descent on leaves of any storage, rounding included: one pass over memory.

See `fzero.kernels.update`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, tl
from fzero.kernels.reference import LeafState
from fzero.kernels.rounding import is_finite
from fzero.kernels.update import Update, define


def sgd(
    states: Sequence[LeafState],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    stochastic: bool,
) -> list[tuple[Tensor, ...]]:
    """Return the states of leaves after one step of stochastic gradient descent; nothing is overwritten.

    Args:
        states: for each leaf (p[, remainder][, velocity[, scales]]), see `fzero.kernels.adamw.adamw`, as for all that
            follows. No velocity where `momentum` is 0.
        grads: a gradient for each leaf.
        scalars: float32 of shape (3,), from `sgd_scalars`.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).
        momentum: decay of the velocity.
        nesterov: step along the velocity looked ahead.
        stochastic: how to round.

    Source: momentum as in Sutskever et al. 2013, in the form of `torch.optim.SGD`.

    Example:
        >>> p, g = torch.ones(2), torch.ones(2)
        >>> zeros = torch.zeros(1, 2, dtype=torch.int32)
        >>> scalars = sgd_scalars(zeros[0, 0], lr=0.5, weight_decay=0.0)
        >>> sgd([(p,)], [g], scalars, zeros, zeros[:, 0], momentum=0.0, nesterov=False, stochastic=False)[0][0]
        tensor([0.5000, 0.5000])
    """
    return SGD(
        states, grads, scalars, keys, offsets, momentum=momentum, nesterov=nesterov, stochastic=stochastic
    )  # fmt: skip


def sgd_scalars(step: Tensor, lr: float | Tensor, weight_decay: float, factor: float | Tensor = 1.0) -> Tensor:
    """Return what a step needs beside its tensors: (learning rate, weight decay, factor).

    Computed in float64, returned as float32 of shape (3,), on the device of `step`.

    Args:
        step: 0-d; what it counts does not matter here.
        lr: learning rate.
        weight_decay: added to the gradient, times the parameter.
        factor: what the gradient has to be multiplied by to be true; NaN skips the step.
    """
    zero = torch.zeros_like(step, dtype=torch.float64)
    return torch.stack([zero + lr, zero + weight_decay, zero + factor]).to(torch.float32)


def sgd_formula(
    values: Sequence[Tensor], g: Tensor, scalars: Tensor, *, compiled: bool, momentum: float, nesterov: bool
) -> tuple[list[Tensor], Tensor]:
    """Stochastic gradient descent in plain torch operations, see `fzero.kernels.reference.Formula`."""
    p, *velocities = values
    lr, weight_decay, factor = scalars.unbind()
    gradient = g.float() * factor
    ok = torch.isfinite(gradient)
    gradient = gradient + weight_decay * p
    if not velocities:
        return [p - lr * gradient], ok
    velocity = velocities[0] * momentum + gradient
    direction = gradient + velocity * momentum if nesterov else velocity
    return [p - lr * direction, velocity], ok


@jit
def sgd_kernel(values, g, scalars, numbers):
    """`sgd_formula` for a block of elements; `numbers` are those of `sgd_numbers`."""
    momentum, nesterov = numbers
    lr, weight_decay, factor = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    p = values[0]
    gradient = g * factor
    ok = is_finite(gradient)
    gradient = gradient + weight_decay * p
    if len(values) == 1:
        return (p - lr * gradient,), ok
    else:
        velocity = values[1] * momentum + gradient
        direction = tl.where(nesterov > 0, gradient + velocity * momentum, velocity)
        return (p - lr * direction, velocity), ok


def sgd_numbers(momentum: float, nesterov: bool) -> tuple[float, ...]:
    """Return the numbers that `sgd_kernel` takes."""
    return momentum, float(nesterov)


SGD = Update("sgd", sgd_formula, ("p", "velocity"), 3, ("momentum", "nesterov"), sgd_kernel, sgd_numbers, optional=1)
define(SGD)
