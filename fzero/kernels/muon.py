"""Muon's momentum on leaves of any storage, rounding included; and a matrix made orthogonal.

The momentum is an update kernel, see `fzero.kernels.update`: one pass over memory that stores the running mean and
gives out the direction. Orthogonalization is products of matrices, which torch does best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fzero.kernels import ops
from fzero.kernels.reference import LeafState
from fzero.kernels.update import Update
from fzero.random.bits import fold

# Coefficients of the quintic iteration, and the least norm that a matrix is divided by.
A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7


def formula(values: ops.Value, gradient: ops.Value, scalars: ops.Value, numbers: ops.Value) -> tuple[Any, Any]:
    """What a mean becomes, and the direction that it gives, in torch and in Triton: see `fzero.kernels.ops`."""
    one_minus_decay, ahead = numbers
    gradient = gradient * scalars[0]
    mean = values[1] + (gradient - values[1]) * one_minus_decay
    return (mean + (gradient - mean) * ahead, mean), ops.is_finite(gradient)


MOMENTUM = Update("momentum", formula, ("direction", "m"), scalars=1)


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
        states: for each leaf (m[, scales]), see `fzero.kernels.update.Update`, as for all that follows.
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
    numbers = 1 - decay, (1 - decay) * nesterov
    return MOMENTUM(states, grads, scalars, own, offsets, numbers=numbers, stochastic=stochastic)


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
