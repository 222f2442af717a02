"""Operations of Triton kernels for which an NVIDIA GPU has fewer instructions than Triton's own, with the same results.

Where Triton interprets, and on other vendors' GPUs, each is what Triton has for it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

# On a CPU kernels run as their torch references, and Triton takes as long to import as all of fzero. Nor is it
# everywhere: it exists for Linux alone.
_WANTED = bool(torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ)
if _WANTED and importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:
    triton = tl = None

__all__ = ["Value", "constexpr", "is_finite", "jit", "narrowed", "reciprocal", "root", "signed_as", "tl", "widened"]

jit: Any = triton.jit if triton else lambda function: function
constexpr: Any = tl.constexpr if triton else lambda value: value

Value: Any = tl.tensor if triton else None

# Whether the instructions of an NVIDIA GPU may be named.
NVIDIA = constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1" and not torch.version.hip)
# The largest number, and the sign bit of 32.
LARGEST = constexpr(torch.finfo(torch.float32).max)
SIGN = constexpr(-(1 << 31))


@jit
def reciprocal(x):
    """1 / `x` for float32 from 2^-126 to 2^126, correctly rounded: what a GPU does once it has checked the range."""
    if NVIDIA:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(near, tl.fma(x * -1.0, near, 1.0), near)
    else:
        return tl.div_rn(1.0, x)


@jit
def root(x):
    """The square root of float32 `x`, not negative, correctly rounded, without a branch: see `fzero.kernels.ops`."""
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if NVIDIA:
        # The error of a root of less than 2^-101 would be too small for float32: such a number is scaled.
        is_small = x < 2.0**-64
        scaled = tl.where(is_small, x * 2.0**64, x)
        near = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [tl.maximum(scaled, 2.0**-100)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        found = scaled * near
        found = tl.fma(tl.fma(found * -1.0, found, scaled), near * 0.5, found)
        return tl.where(is_small, found * 2.0**-32, found)
    else:
        return tl.sqrt_rn(x)


@jit
def widened(x):
    """Numbers as float32, or int8 and uint8 as int32."""
    if NVIDIA and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif NVIDIA and x.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $4, 0, 0x8880; prmt.b32 $1, $4, 0, 0x9991; "
            "prmt.b32 $2, $4, 0, 0xaaa2; prmt.b32 $3, $4, 0, 0xbbb3;",
            "=r,=r,=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    elif x.dtype == tl.int8 or x.dtype == tl.uint8:
        return x.to(tl.int32)
    else:
        return x.to(tl.float32)


@jit
def is_finite(x):
    """Whether float32 `x` is."""
    return tl.abs(x) < float("inf")


@jit
def signed_as(x, y):
    """`x`, above zero, with the sign of `y`, all float32; 0 where `y` is 0 or NaN."""
    sign = y.to(tl.int32, bitcast=True) & SIGN
    made = (x.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(y) > 0, made, 0.0)


@jit
def narrowed(x, SIGNED: tl.constexpr):
    """Whole numbers, int32, as the nearest that int8 or uint8 holds."""
    if NVIDIA:
        if SIGNED:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; cvt.pack.sat.s8.s32.b32 t, $4, $3, 0; cvt.pack.sat.s8.s32.b32 $0, $2, $1, t; }",
                "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; cvt.pack.sat.u8.s32.b32 t, $4, $3, 0; cvt.pack.sat.u8.s32.b32 $0, $2, $1, t; }",
                "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        if SIGNED:
            return tl.minimum(tl.maximum(x, -128), 127).to(tl.int8)
        else:
            return tl.minimum(tl.maximum(x, 0), 255).to(tl.uint8)
