"""The end of an update whose direction was made elsewhere, rounding included. See `fzero.kernels.update`.

For optimizers whose direction is no function of an element alone: Muon, Adafactor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, tl
from fzero.kernels.reference import LeafState
from fzero.kernels.rounding import is_finite
from fzero.kernels.update import Update, define


def write_back(
    states: Sequence[LeafState],
    directions: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    stochastic: bool,
) -> list[tuple[Tensor, ...]]:
    """Return parameters after a step along their directions, `p * decay - step_size * direction`.

    An element whose direction is not finite stays as it is, bit for bit.

    Args:
        states: for each leaf (p[, remainder]), see `fzero.kernels.adamw.adamw`, as for all that follows.
        directions: for each leaf its direction, in the place of a gradient.
        scalars: float32 of shape (2,), from `write_back_scalars`.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).
        stochastic: how to round.

    Example:
        >>> p, direction = torch.ones(2), torch.tensor([2.0, torch.nan])
        >>> zeros, lr = torch.zeros(1, 2, dtype=torch.int32), torch.tensor(0.1)
        >>> scalars = write_back_scalars(lr, lr, weight_decay=0.5)
        >>> write_back([(p,)], [direction], scalars, zeros, zeros[:, 0], stochastic=False)[0][0]
        tensor([0.7500, 1.0000])
    """
    return WRITE_BACK(states, directions, scalars, keys, offsets, stochastic=stochastic)


def write_back_scalars(step_size: Tensor, lr: Tensor, weight_decay: float) -> Tensor:
    """Return what a write-back needs beside its tensors: (decay, step size).

    Computed in float64, returned as float32 of shape (2,).

    Args:
        step_size: 0-d: what the direction is multiplied by.
        lr: learning rate, 0-d.
        weight_decay: decoupled, multiplied by the learning rate.
    """
    rate = lr.to(torch.float64)
    return torch.stack([1 - rate * weight_decay, step_size.to(torch.float64)]).to(torch.float32)


def write_back_formula(
    values: Sequence[Tensor], direction: Tensor, scalars: Tensor, *, compiled: bool
) -> tuple[list[Tensor], Tensor]:
    """The write-back in plain torch operations, see `fzero.kernels.reference.Formula`."""
    decay, step_size = scalars.unbind()
    along = direction.float()
    return [values[0] * decay - step_size * along], torch.isfinite(along)


@jit
def write_back_kernel(values, direction, scalars, numbers):
    """`write_back_formula` for a block of elements."""
    return (values[0] * tl.load(scalars) - tl.load(scalars + 1) * direction,), is_finite(direction)


def write_back_numbers() -> tuple[float, ...]:
    """Return the numbers that `write_back_kernel` takes: none."""
    return ()


WRITE_BACK = Update("write_back", write_back_formula, ("p",), 2, (), write_back_kernel, write_back_numbers)
define(WRITE_BACK)
