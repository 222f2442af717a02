"""AdamW on leaves of any storage, rounding included: one pass over memory. See `fzero.kernels.update`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fzero.kernels.nvidia import constexpr, jit, reciprocal, root, tl
from fzero.kernels.reference import LeafState
from fzero.kernels.rounding import is_finite
from fzero.kernels.update import Update, define

# The range of what is added to a root, far beyond any use: of what lies in it reciprocals are exact.
EPS_RANGE = 2.0**-100, 2.0**100
LARGEST = torch.finfo(torch.float32).max
_LARGEST = constexpr(LARGEST)


def adamw(
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
    """Return the states of leaves after one AdamW step; nothing is overwritten.

    An element whose gradient times the factor is not finite, or has no finite square, keeps its parameter and moments;
    a NaN factor skips the whole step.

    Args:
        states: for each leaf its tensors in a row: the parameter, the first and the second moment, each as it is
            stored (see `fzero.kernels.storage`): (p[, remainder], m[, scales], v[, scales]). 1-D, contiguous, the same
            dtypes for all leaves.
        grads: for each leaf its gradient: shape of the parameter; float32, bfloat16 or float16.
        scalars: float32 of shape (4,), from `adamw_scalars`.
        keys: int32 of shape (leaves, 2), from `fzero.random.bits.leaf_keys`.
        offsets: int32 of shape (leaves,): global index of element 0 in its leaf, modulo 2^32.
        b1: decay of the first moment.
        b2: decay of the second moment.
        stochastic: round what does not hold float32 stochastically, by bits drawn for a leaf's keys and an element's
            index; otherwise to nearest.

    Returns:
        The new states, in the form of the old ones. Under `torch.func` transforms differentiable, the rounding as the
        identity.

    Raises:
        ValueError: a shape or a layout in memory that the kernel does not take; 8-bit moments under a transform.
        TypeError: a dtype that it does not take.

    Source: decoupled weight decay, Loshchilov and Hutter 2019, arXiv 1711.05101.

    Example:
        >>> p, m, v, g = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)
        >>> zeros = torch.zeros(1, 2, dtype=torch.int32)
        >>> scalars = adamw_scalars(zeros[0, 0], lr=0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
        >>> adamw([(p, m, v)], [g], scalars, zeros, zeros[:, 0], b1=0.9, b2=0.999, stochastic=False)[0][0]
        tensor([0.9000, 0.9000, 0.9000])
    """
    return ADAMW(states, grads, scalars, keys, offsets, b1=b1, b2=b2, stochastic=stochastic)


def adamw_scalars(
    step: Tensor,
    lr: float | Tensor,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """Return what an AdamW step needs beside its tensors: (decay, step size, eps, factor).

    Computed in float64, returned as float32 of shape (4,), on the device of `step`. The root of 1 - b2^t, which
    corrects the second moment, is a factor of the step size and of `eps`: so no element is multiplied by it.

    Args:
        step: 0-based count of the steps taken: int32, 0-d. t is `step + 1`.
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the corrected root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        factor: what the gradient has to be multiplied by to be true; NaN skips the step.
    """
    t = step.to(torch.float64) + 1
    rate = torch.zeros_like(t) + lr
    decay = 1 - rate * weight_decay
    correction = torch.sqrt(1 - b2**t)
    step_size = rate * correction / (1 - b1**t)
    added = (eps * correction).clamp(*EPS_RANGE)
    return torch.stack([decay, step_size, added, torch.zeros_like(t) + factor]).to(torch.float32)


def adamw_formula(
    values: Sequence[Tensor], g: Tensor, scalars: Tensor, *, compiled: bool, b1: float, b2: float
) -> tuple[list[Tensor], Tensor]:
    """AdamW in plain torch operations, see `fzero.kernels.reference.Formula`."""
    p, first, second = values
    decay, step_size, eps, factor = scalars.unbind()
    gradient = g.float() * factor
    square = gradient * gradient
    first = first + (gradient - first) * (1 - b1)
    second = second * b2 + square * (1 - b2)
    root = _sqrt(second.clamp(max=LARGEST), compiled)
    p = p * decay - step_size * (first * (1.0 / (root + eps)))
    return [p, first, second], torch.isfinite(square)


def _sqrt(x: Tensor, compiled: bool) -> Tensor:
    """The root of float32 `x`, correctly rounded, as kernels compute it.

    Compiled code has an instruction for that; torch's own operation calls a library that may be one bit off, and the
    root of a float64 rounded to float32 is correct.
    """
    return torch.sqrt(x) if compiled else torch.sqrt(x.double()).float()


@jit
def adamw_kernel(values, g, scalars, numbers):
    """`adamw_formula` for a block of elements; `numbers` are those of `adamw_numbers`."""
    p, first, second = values
    one_minus_b1, b2, one_minus_b2 = numbers
    decay, step_size = tl.load(scalars), tl.load(scalars + 1)
    eps, factor = tl.load(scalars + 2), tl.load(scalars + 3)
    gradient = g * factor
    square = gradient * gradient
    first = first + (gradient - first) * one_minus_b1
    second = second * b2 + square * one_minus_b2
    finite = tl.minimum(second, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    p = p * decay - step_size * (first * reciprocal(root(finite) + eps))
    return (p, first, second), is_finite(square)


def adamw_numbers(b1: float, b2: float) -> tuple[float, ...]:
    """Return the numbers that `adamw_kernel` takes."""
    return 1 - b1, b2, 1 - b2


ADAMW = Update("adamw", adamw_formula, ("p", "m", "v"), 4, ("b1", "b2"), adamw_kernel, adamw_numbers)
define(ADAMW)
