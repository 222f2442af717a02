"""Random bits and rounding inside Triton kernels, equal bit for bit to `fzero.random.bits` and to torch's casts.

Both roundings to bfloat16 are written as operations on bits: Triton's interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from fzero.random import bits as random

# On a CPU kernels run as their torch references, and Triton takes as long to import as all of fzero. Nor is it
# everywhere: it exists for Linux alone.
_WANTED = bool(torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ)
if _WANTED and importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:
    triton = tl = None

jit: Any = triton.jit if triton else lambda function: function
constexpr: Any = tl.constexpr if triton else lambda value: value

__all__ = ["constexpr", "is_finite", "jit", "mix", "remix", "round_to", "tl"]

FIRST = constexpr(random.MULTIPLIERS[0])
SECOND = constexpr(random.MULTIPLIERS[1])
THIRD = constexpr(random.MULTIPLIERS[2])
GOLDEN = constexpr(random.GOLDEN)
QUIET_NAN = constexpr(random.QUIET_NAN)
SMALLEST_HALF = constexpr(random.SMALLEST_HALF)


@jit
def shift_right(x, n: tl.constexpr):
    """`fzero.random.bits.shift_right`."""
    return (x >> n) & ((1 << (32 - n)) - 1)


@jit
def mix(index, k0, k1):
    """`fzero.random.bits.mix`: int32 random bits for each int32 index."""
    x = index + k0
    x = (x ^ shift_right(x, 17)) * FIRST
    x = x ^ k1
    x = (x ^ shift_right(x, 11)) * SECOND
    x = (x ^ shift_right(x, 15)) + k0
    x = x * THIRD
    return x ^ shift_right(x, 14)


@jit
def remix(word):
    """`fzero.random.bits.remix`: a second word of random bits from the first."""
    x = word * GOLDEN
    return x ^ shift_right(x, 16)


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
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            carried = bits + noise16
        else:
            carried = bits + 0x7FFF + ((bits >> 16) & 1)
        high = tl.where(x != x, 0x7FC0, carried >> 16)
        rounded = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded


@jit
def round_float16(x, noise16):
    """What `fzero.random.bits.round_stochastic` does for float16, as a float32 that float16 holds."""
    size = tl.abs(x)
    moved = tl.where(size < SMALLEST_HALF, SMALLEST_HALF, 0.0)
    carried = ((size + moved).to(tl.int32, bitcast=True) + (noise16 >> 3)) & ~0x1FFF
    rounded = tl.where(x != x, QUIET_NAN, carried).to(tl.float32, bitcast=True) - moved
    sign = (x.to(tl.int32, bitcast=True) >> 31) << 31
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@jit
def is_finite(x):
    """Whether float32 `x` is: its exponent bits are not all ones."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
