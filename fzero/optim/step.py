"""Which step an update is, and what the write-back of each leaf draws from in it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fzero import tree
from fzero.errors import ShapeError
from fzero.optim.norm import Squares
from fzero.random.bits import fold, signed, step_keys
from fzero.sharding.leaf import first_elements
from fzero.sharding.sharded import Sharded

Rate = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One step, as every part of an optimizer sees it.

    Attributes:
        count: how many were taken before: int32 of shape ().
        seed: with the count, a leaf's path and an element's index it decides how stochastic rounding falls: int32 of
            shape ().
        squares: what may have been measured of the gradient already.
    """

    count: Tensor
    seed: Tensor
    squares: Squares | None = None


def rate(lr: Rate, step: Tensor) -> Tensor:
    """Return a learning rate at a step, as fp32 of shape ()."""
    value = lr(step) if callable(lr) else lr
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=step.device)
    if value.numel() != 1:
        raise ShapeError(
            f"fz.apply_gradients: the learning rate of a step must be one number, got {tree.describe(value)} from "
            f"{getattr(lr, '__name__', lr)}. Return a tensor of shape ()."
        )
    return value.reshape(()).to(torch.float32)


@dataclass(frozen=True)
class Rounding:
    """What the write-back of some leaves draws from.

    Attributes:
        keys: int32 of shape (n, 2): for each leaf.
        offsets: int32 of shape (n,): global index of the first element of each piece.
        stochastic: whether low-precision results are rounded stochastically.
    """

    keys: Tensor
    offsets: Tensor
    stochastic: bool

    @property
    def source(self) -> tuple[Tensor, Tensor]:
        """Keys and offsets, as kernels take them."""
        return self.keys, self.offsets

    @staticmethod
    def joined(parts: Sequence[Rounding]) -> Rounding:
        """Return that of several leaves, which round alike."""
        if len(parts) == 1:
            return parts[0]
        keys, offsets = torch.cat([part.keys for part in parts]), torch.cat([part.offsets for part in parts])
        return Rounding(keys, offsets, parts[0].stochastic)


def roundings(grads: Sharded, params: Sharded, at: Step) -> list[Rounding]:
    """Return what each leaf rounds by: keys and offsets of all leaves at once, a few operations in all."""
    mesh, specs = params.mesh, grads.placement.specs
    policies = [params.placement.policy_of(path) for path in params.paths]
    stochastic = [policy is not None and policy.rounding == "stochastic" for policy in policies]
    if not any(stochastic):
        keys = torch.zeros((1, 2), dtype=torch.int32, device=mesh.device)
        return [Rounding(keys, keys[0, :1], stochastic=False)] * len(specs)
    hashes = torch.tensor([signed(zlib.crc32(p.encode())) for p in params.paths], dtype=torch.int32, device=mesh.device)
    keys = fold(step_keys(at.seed, at.count), hashes[:, None])
    offsets = first_elements(specs, mesh)
    return [Rounding(*row) for row in zip(keys.split(1), offsets.split(1), stochastic, strict=True)]
