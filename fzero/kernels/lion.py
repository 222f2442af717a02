"""Lion on leaves of any storage, rounding included: one pass over memory. See `fzero.kernels.update`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, signed_as, tl
from fzero.kernels.reference import LeafState
from fzero.kernels.rounding import is_finite
from fzero.kernels.update import Update, define


def lion(
    states: Sequence[LeafState],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    b1: float,
    b2: float,
    stochastic: bool,
) -> list[tuple[Tensor, ...]]:
    """Return the states of leaves after one Lion step; nothing is overwritten.

    Args:
        states: for each leaf (p[, remainder], m[, scales]), see `fzero.kernels.adamw.adamw`, as for all that follows.
        grads: a gradient for each leaf.
        scalars: float32 of shape (3,), from `lion_scalars`.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).
        b1: share of the momentum in the direction of the step.
        b2: decay of the momentum.
        stochastic: how to round.

    Source: Chen et al. 2023, arXiv 2302.06675.

    Example:
        >>> p, m, g = torch.ones(2), torch.zeros(2), torch.tensor([3.0, -7.0])
        >>> zeros = torch.zeros(1, 2, dtype=torch.int32)
        >>> scalars = lion_scalars(zeros[0, 0], lr=0.5, weight_decay=0.0)
        >>> lion([(p, m)], [g], scalars, zeros, zeros[:, 0], b1=0.9, b2=0.99, stochastic=False)[0][0]
        tensor([0.5000, 1.5000])
    """
    return LION(states, grads, scalars, keys, offsets, b1=b1, b2=b2, stochastic=stochastic)


def lion_scalars(step: Tensor, lr: float | Tensor, weight_decay: float, factor: float | Tensor = 1.0) -> Tensor:
    """Return what a Lion step needs beside its tensors: (decay, learning rate, factor).

    Computed in float64, returned as float32 of shape (3,), on the device of `step`.

    Args:
        step: 0-d; what it counts does not matter here.
        lr: learning rate.
        weight_decay: decoupled, multiplied by the learning rate.
        factor: what the gradient has to be multiplied by to be true; NaN skips the step.
    """
    zero = torch.zeros_like(step, dtype=torch.float64)
    rate = zero + lr
    return torch.stack([1 - rate * weight_decay, rate, zero + factor]).to(torch.float32)


def lion_formula(
    values: Sequence[Tensor], g: Tensor, scalars: Tensor, *, compiled: bool, b1: float, b2: float
) -> tuple[list[Tensor], Tensor]:
    """Lion in plain torch operations, see `fzero.kernels.reference.Formula`."""
    p, m = values
    decay, lr, factor = scalars.unbind()
    gradient = g.float() * factor
    mean = m * (b1 / (1 - b1)) + gradient
    step = torch.where(mean > 0, lr, torch.where(mean < 0, -lr, 0.0))
    return [p * decay - step, m * b2 + gradient * (1 - b2)], torch.isfinite(gradient)


@jit
def lion_kernel(values, g, scalars, numbers):
    """`lion_formula` for a block of elements; `numbers` are those of `lion_numbers`."""
    p, m = values
    share, b2, one_minus_b2 = numbers
    decay, lr, factor = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    gradient = g * factor
    return (p * decay - signed_as(lr, m * share + gradient), m * b2 + gradient * one_minus_b2), is_finite(gradient)


def lion_numbers(b1: float, b2: float) -> tuple[float, ...]:
    """Return the numbers that `lion_kernel` takes."""
    return b1 / (1 - b1), b2, 1 - b2


LION = Update("lion", lion_formula, ("p", "m"), 3, ("b1", "b2"), lion_kernel, lion_numbers)
define(LION)
