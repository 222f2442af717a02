"""Blockwise quantize and dequantize as ops that are opaque to a trace.

CUDA runs a Triton kernel, one pass over memory; a CPU the torch operations of `fzero.kernels.codes`. Both give the same
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fzero.kernels.codes import (
    BLOCK,
    ROWS,
    blocks_of,
    check_scales,
    decode,
    decode_block,
    encode,
    encode_block,
    places,
)  # fmt: skip
from fzero.kernels.rounding import jit, tl

__all__ = ["decode", "dequantize", "encode", "quantize"]


def quantize(x: Tensor, *, signed: bool, noise16: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the 8-bit codes of float32 values, and a scale for each block of 128: what `codes.encode` does.

    Args:
        x: float32, 1-D, contiguous. Not negative, unless `signed`.
        signed: int8 codes; otherwise uint8.
        noise16: int32 of the shape of `x`, uniform in [0, 2^16): rounds stochastically. Without it, to nearest.

    Returns:
        `(codes, scales)`.

    Raises:
        ValueError: `x` or `noise16` is not of that form.

    Source: blockwise quantization of optimizer states, Dettmers et al. 2022, arXiv 2110.02861; the codes are fzero's.

    Example:
        >>> codes, scales = quantize(torch.tensor([4.0, 1.0]), signed=False)
        >>> dequantize(codes, scales)
        tensor([4., 1.])
    """
    for name, tensor, dtype in (("x", x, torch.float32), ("noise16", noise16, torch.int32)):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != (x.numel(),) or not tensor.is_contiguous()):
            raise ValueError(
                f"quantize: {name} has dtype {tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                f"expected {dtype}, {(x.numel(),)}, (1,). Cast it, flatten it, make it contiguous."
            )
    codes, scales = torch.ops.fzero.quantize(x, signed, noise16)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of codes: what `codes.decode` does.

    Args:
        codes: int8 or uint8, 1-D, contiguous.
        scales: float32, one for each block.

    Raises:
        ValueError: the scales are not one for each block.
    """
    check_scales("dequantize", codes, scales)
    values: Tensor = torch.ops.fzero.dequantize(codes, scales)
    return values


@jit
def quantize_kernel(codes, scales, x, noise16, length, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`quantize` for some blocks. `noise16` is read if STOCHASTIC."""
    place, inside, row, row_inside = places(tl.program_id(0), length)
    noise = tl.load(noise16 + place, inside, 0) if STOCHASTIC else place
    new, scale = encode_block(tl.load(x + place, inside, 0.0), noise, SIGNED, STOCHASTIC)
    tl.store(codes + place, new, inside)
    tl.store(scales + row, scale, row_inside)


@jit
def dequantize_kernel(values, codes, scales, length):
    """`dequantize` for some blocks."""
    place, inside, row, row_inside = places(tl.program_id(0), length)
    decoded = decode_block(tl.load(codes + place, inside, 0), tl.load(scales + row, row_inside, 0.0))
    tl.store(values + place, decoded, inside)


def launch_quantize(x: Tensor, signed: bool, noise16: Tensor | None) -> tuple[Tensor, Tensor]:
    """`quantize` by the Triton kernel."""
    codes, scales = _like_quantized(x, signed, noise16)
    if x.numel():
        with torch.cuda.device_of(x):
            quantize_kernel[_grid(x)](
                codes, scales, x, x if noise16 is None else noise16, x.numel(),
                SIGNED=signed, STOCHASTIC=noise16 is not None, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, scales


def launch_dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """`dequantize` by the Triton kernel."""
    values = _like_dequantized(codes, scales)
    if codes.numel():
        with torch.cuda.device_of(codes):
            dequantize_kernel[_grid(codes)](values, codes, scales, codes.numel(), enable_fp_fusion=False)
    return values


def _grid(x: Tensor) -> tuple[int]:
    return (-(-x.numel() // (ROWS * BLOCK)),)


def _quantize_cpu(x: Tensor, signed: bool, noise16: Tensor | None) -> tuple[Tensor, Tensor]:
    return encode(x, signed=signed, noise16=noise16)


def _like_quantized(x: Tensor, signed: bool, noise16: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8), x.new_empty(blocks_of(x.shape[0]))


def _like_dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


for _name, _schema, _cpu, _cuda, _fake in (
    ("quantize", "(Tensor x, bool signed, Tensor? noise16) -> (Tensor, Tensor)",
     _quantize_cpu, launch_quantize, _like_quantized),
    ("dequantize", "(Tensor codes, Tensor scales) -> Tensor", decode, launch_dequantize, _like_dequantized),
):  # fmt: skip
    torch.library.define(f"fzero::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"fzero::{_name}", "cpu", _cpu)
    torch.library.impl(f"fzero::{_name}", "cuda", _cuda)
    torch.library.register_fake(f"fzero::{_name}", _fake)
