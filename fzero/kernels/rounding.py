"""Random bits and rounding inside Triton kernels, equal bit for bit to `fzero.random` and to torch's casts.

Both roundings are written as operations on bits: Triton's interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

from typing import Any

from fzero import random

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux alone; elsewhere kernels run as their torch references
    triton = tl = None

jit: Any = triton.jit if triton else lambda function: function
constexpr: Any = tl.constexpr if triton else lambda value: value

__all__ = ["jit", "mix", "remix", "round_to", "tl"]

FIRST = constexpr(random.MULTIPLIERS[0])
SECOND = constexpr(random.MULTIPLIERS[1])
THIRD = constexpr(random.MULTIPLIERS[2])
GOLDEN = constexpr(random.GOLDEN)


@jit
def shift_right(x, n: tl.constexpr):
    """`fzero.random.shift_right`."""
    return (x >> n) & ((1 << (32 - n)) - 1)


@jit
def mix(index, k0, k1):
    """`fzero.random.mix`: int32 random bits for each int32 index."""
    x = index + k0
    x = (x ^ shift_right(x, 17)) * FIRST
    x = x ^ k1
    x = (x ^ shift_right(x, 11)) * SECOND
    x = (x ^ shift_right(x, 15)) + k0
    x = x * THIRD
    return x ^ shift_right(x, 14)


@jit
def remix(word):
    """`fzero.random.remix`: a second word of random bits from the first."""
    x = word * GOLDEN
    return x ^ shift_right(x, 16)


@jit
def round_to(x, noise16, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round float32 `x` to `dtype` (float32 or bfloat16): by `noise16` if STOCHASTIC, else to nearest, ties to even."""
    if dtype == tl.float32:
        rounded = x
    else:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            carried = bits + noise16
        else:
            carried = bits + 0x7FFF + ((bits >> 16) & 1)
        high = tl.where(x != x, 0x7FC0, carried >> 16)
        rounded = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded
