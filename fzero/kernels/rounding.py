"""Rounding, in torch and inside Triton kernels, and random bits inside those: equal bit for bit.

In torch, rounding to nearest is a cast, and random bits are those of `fzero.random.bits`. In Triton both roundings to
bfloat16 are written as operations on bits: Triton's interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fzero.kernels.nvidia import constexpr, jit, tl
from fzero.random.bits import GOLDEN as _GOLDEN
from fzero.random.bits import MULTIPLIERS
from fzero.random.bits import STEP as _STEP

# The quiet NaN that stochastic rounding writes, as the bits of a float32, and the smallest normal float16.
_QUIET_NAN, _SMALLEST_HALF = 0x7FC00000, 2.0**-14

FIRST = constexpr(MULTIPLIERS[0])
SECOND = constexpr(MULTIPLIERS[1])
THIRD = constexpr(MULTIPLIERS[2])
GOLDEN, STEP = constexpr(_GOLDEN), constexpr(_STEP)
QUIET_NAN = constexpr(_QUIET_NAN)
SMALLEST_HALF = constexpr(_SMALLEST_HALF)


@jit
def shift_right(x, n: tl.constexpr):
    """`fzero.random.bits.shift_right`."""
    return (x >> n) & ((1 << (32 - n)) - 1)


@jit
def noises(index, k0, k1):
    """`fzero.random.bits.noises`: three int32 of 16 random bits for each int32 index."""
    x = (index + k0) * GOLDEN
    x = (x ^ shift_right(x, 16) ^ k1) * STEP + k0
    x = x ^ shift_right(x, 15)
    return shift_right(x * FIRST, 16), shift_right(x * SECOND, 16), shift_right(x * THIRD, 16)


@jit
def round_to(x, noise16, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round float32 `x` to `dtype`: by `noise16` if STOCHASTIC, else to nearest, ties to even.

    `dtype` is float32, bfloat16 or float16.
    """
    if dtype == tl.float32:
        rounded = x
    elif dtype == tl.float16:
        rounded = (round_float16(x, noise16) if STOCHASTIC else x).to(tl.float16)
    else:
        # NaN becomes the quiet one, which no carry makes a number: what is computed here is a NaN of positive sign.
        bits = tl.minimum(x.to(tl.int32, bitcast=True), QUIET_NAN)
        if STOCHASTIC:
            carried = bits + noise16
        else:
            carried = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = (carried >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded


@jit
def round_float16(x, noise16):
    """What `round_stochastic` does for float16, as a float32 that float16 holds."""
    size = tl.abs(x)
    moved = tl.where(size < SMALLEST_HALF, SMALLEST_HALF, 0.0)
    carried = ((size + moved).to(tl.int32, bitcast=True) + (noise16 >> 3)) & ~0x1FFF
    rounded = tl.where(x != x, QUIET_NAN, carried).to(tl.float32, bitcast=True) - moved
    sign = (x.to(tl.int32, bitcast=True) >> 31) << 31
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


def round_stochastic(x: Tensor, noise16: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Round float32 `x` to one of its two neighbours in `dtype`, each with the probability that keeps the mean.

    A value that `dtype` holds exactly never moves; infinities and signed zeros stay; any NaN becomes the quiet NaN.
    Derivatives pass through as if nothing had been rounded.

    Args:
        x: float32.
        noise16: int32 of the shape of `x`, uniform in [0, 2^16). float16 has use for its upper 13 bits.
        dtype: bfloat16 or float16. Above the largest float16 the next neighbour is infinity.

    Raises:
        ValueError: `x` is not float32, or `dtype` is neither.

    Example:
        >>> round_stochastic(torch.tensor([1.001]), torch.tensor([65535], dtype=torch.int32))
        tensor([1.0078], dtype=torch.bfloat16)
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"round_stochastic: cannot round to {dtype}; pass dtype=torch.bfloat16 or torch.float16.")
    if x.dtype != torch.float32:
        raise ValueError(f"round_stochastic: x has dtype {x.dtype}, expected torch.float32. Cast it first.")
    rounded: Tensor = _RoundStochastic.apply(x, noise16, dtype)
    return rounded


def _round_bfloat16(x: Tensor, noise16: Tensor) -> Tensor:
    # The noise carries into bit 16 with the probability that the bits below it make up of one unit there. NaN is
    # set apart (by `x != x`, which Inductor vectorizes, unlike `isnan`): its carry can run into the sign bit, and
    # without the low half of its payload it can become an infinity.
    carried = (x.view(torch.int32) + noise16) & ~0xFFFF
    return torch.where(x != x, _QUIET_NAN, carried).view(torch.float32).to(torch.bfloat16)


def _round_float16(x: Tensor, noise16: Tensor) -> Tensor:
    # As above, from bit 13 on. Below the smallest normal float16 its neighbours lie as far apart as just above, so
    # the value is rounded there and moved back.
    size = x.abs()
    moved = torch.where(size < _SMALLEST_HALF, _SMALLEST_HALF, 0.0)
    carried = ((size + moved).view(torch.int32) + (noise16 >> 3)) & ~0x1FFF
    rounded = torch.where(x != x, _QUIET_NAN, carried).view(torch.float32) - moved
    return torch.copysign(rounded, x).to(torch.float16)


def batched(function: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Return what a function of elements does under vmap: the same, on a batch whose dimension stands in front.

    It is the `vmap` of an autograd function that looks at bits: torch 2.11 has no batching rule for a view by dtype.
    """
    tensors = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, in_dims, strict=True)]
    like = torch.broadcast_shapes(*(x.shape for x in tensors if isinstance(x, Tensor)))
    result = function.apply(*(x.expand(like) if isinstance(x, Tensor) else x for x in tensors))
    return result, (0,) * len(result) if isinstance(result, tuple) else 0


class _RoundStochastic(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, noise16: Tensor, dtype: torch.dtype) -> Tensor:
        return (_round_bfloat16 if dtype == torch.bfloat16 else _round_float16)(x, noise16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[2]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return cotangent.to(torch.float32), None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, noise16_tangent: None, dtype_tangent: None) -> Tensor:
        return x_tangent.to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return batched(_RoundStochastic, info, in_dims, *arguments)
