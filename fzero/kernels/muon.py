"""Muon's momentum on leaves of any storage, rounding included; and a matrix made orthogonal.

The momentum is an update kernel, see `fzero.kernels.update`: one pass over memory that stores the running mean and
gives out the direction. Orthogonalization is products of matrices, which torch does best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, tl
from fzero.kernels.reference import LeafState
from fzero.kernels.rounding import is_finite
from fzero.kernels.update import Update, define
from fzero.random.bits import fold

# Coefficients of the quintic iteration, and the least norm that a matrix is divided by.
A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7


def momentum(
    states: Sequence[LeafState],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    decay: float,
    nesterov: bool,
    stochastic: bool,
) -> list[tuple[Tensor, ...]]:
    """Return running means of gradients after a step, each behind the direction that it gives; nothing is overwritten.

    An element whose gradient times the factor is not finite keeps its mean, and has NaN for a direction.

    Args:
        states: for each leaf (m[, scales]), see `fzero.kernels.adamw.adamw`, as for all that follows.
        grads: a gradient for each leaf.
        scalars: float32 of shape (1,): what the gradients have to be multiplied by to be true.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).
        decay: of the mean.
        nesterov: whether the direction is the mean looked ahead, or the mean itself.
        stochastic: how to round; the direction too.

    Returns:
        For each leaf (direction, m[, scales]), the direction in bfloat16.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

    Example:
        >>> m, g, zeros = torch.zeros(2), torch.tensor([1.0, torch.nan]), torch.zeros(1, 2, dtype=torch.int32)
        >>> momentum([(m,)], [g], torch.ones(1), zeros, zeros[:, 0], decay=0.5, nesterov=False, stochastic=False)
        [(tensor([0.5000,    nan], dtype=torch.bfloat16), tensor([0.5000, 0.0000]))]
    """
    # An update leaves as it is what it does not change. So directions start as NaN.
    directions = [torch.full_like(g, torch.nan, dtype=torch.bfloat16) for g in grads]
    states = [(direction, *state) for direction, state in zip(directions, states, strict=True)]
    # The write-back of the parameter draws from the keys as they are.
    own = fold(keys, 1)
    return MOMENTUM(states, grads, scalars, own, offsets, decay=decay, nesterov=nesterov, stochastic=stochastic)


def momentum_formula(
    values: Sequence[Tensor], g: Tensor, scalars: Tensor, *, compiled: bool, decay: float, nesterov: bool
) -> tuple[list[Tensor], Tensor]:
    """Momentum in plain torch operations, see `fzero.kernels.reference.Formula`."""
    (factor,) = scalars.unbind()
    gradient = g.float() * factor
    mean = values[1] + (gradient - values[1]) * (1 - decay)
    direction = mean + (gradient - mean) * (1 - decay) if nesterov else mean
    return [direction, mean], torch.isfinite(gradient)


@jit
def momentum_kernel(values, g, scalars, numbers):
    """`momentum_formula` for a block of elements; `numbers` are those of `momentum_numbers`."""
    one_minus_decay, nesterov = numbers
    gradient = g * tl.load(scalars)
    mean = values[1] + (gradient - values[1]) * one_minus_decay
    direction = tl.where(nesterov > 0, mean + (gradient - mean) * one_minus_decay, mean)
    return (direction, mean), is_finite(gradient)


def momentum_numbers(decay: float, nesterov: bool) -> tuple[float, ...]:
    """Return the numbers that `momentum_kernel` takes."""
    return 1 - decay, float(nesterov)


MOMENTUM = Update(
    "momentum", momentum_formula, ("direction", "m"), 1, ("decay", "nesterov"), momentum_kernel, momentum_numbers
)
define(MOMENTUM)


def orthogonalize(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Return about the orthogonal matrix nearest to one: its singular values become numbers around 1.

    Plain torch operations, so differentiable.

    Args:
        matrix: (rows, columns), bfloat16.
        steps: of the Newton-Schulz iteration. 5 bring a singular value of 1/500 of the norm or more to between 0.68 and
            1.21, but for the roundings of bfloat16.

    Returns:
        bfloat16, in the shape of `matrix`.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

    Example:
        >>> orthogonalize(torch.tensor([[0.0, 5.0], [-3.0, 0.0]], dtype=torch.bfloat16)).round()
        tensor([[ 0.,  1.],
                [-1.,  0.]], dtype=torch.bfloat16)
    """
    # The Gram matrix of the short side is the smaller one.
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if is_tall else x
