"""Blockwise 8-bit storage of a tensor: one code an element, one float32 scale for each 128 elements.

    signed      value = sign(code) · m(|code| - 127) · scale      code -127 … 127, int8
    unsigned    value = m(code - 255) · scale                     code 0 … 255, uint8

The scale is the largest magnitude of its block. m(0) is 1, and m counts down through the numbers of three fraction
bits, eight for each power of two: 15/16, 14/16, … 8/16, 15/32, … A code is the head of a float32 number: three bits of
its fraction, and of its exponent the part that its block can have. Code 0 is zero. So neighbours are 6 to 13 % apart
over the whole range. A value falls between two neighbours and goes to one of them: to the nearest, or by 16 random bits
with the probabilities that keep its mean. An unsigned value above zero never gets less than 2^-27 of the scale: the
root of a second moment is divided by.

Why such codes: an optimizer such as AdamW moves an element by lr · m / sqrt(v), however small its gradients are beside
those of its block. Were codes so far apart that one step doubles a small v, rounding v down would lengthen a step by
more than rounding it up shortens one, since 1 / sqrt is convex, and the element would move many times too far. With
neighbours that are a part d apart, roundings in time give a running mean a variance of about d / 2 of its square: 0.05
here. The mean of 1 / sqrt(v) grows by 3/8 of that, 2 %. Signed codes end at 2^-16. Below, a value is now and then
rounded up to that, and random roundings would outweigh the gradients that they stand for. So the least root of v is
five times as large: there an element moves less far than it should, and never further.

What decides is done on bits and by float32 operations that IEEE 754 rounds exactly, so a CPU, compiled code and Triton
agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fzero.kernels.rounding import constexpr, jit, tl

# Consecutive elements that share a scale.
BLOCK = 128

SIGNED_TOP, UNSIGNED_TOP = 127, 255
# Bits of a float32 that a code leaves out, and a mask of them; and what its other bits are, as an integer, for 1.
TAIL = 20
TAIL_MASK = (1 << TAIL) - 1
ONE = 127 << 3
# How much of a tail a value of noise is worth, which has 16 bits; and the noise that rounds to nearest.
TAIL_NOISE, HALF = 1 << (TAIL - 16), 32768
# What a value of noise is worth below the least signed value, and the least code of an unsigned one above zero.
UNIT, FLOOR = 1.25 * 2.0**-32, 40
LARGEST = torch.finfo(torch.float32).max

# How far codes lie below the heads of their floats.
SIGNED_SHIFT, UNSIGNED_SHIFT = ONE - SIGNED_TOP, ONE - UNSIGNED_TOP
_SIGNED_SHIFT, _UNSIGNED_SHIFT = constexpr(SIGNED_SHIFT), constexpr(UNSIGNED_SHIFT)
_TAIL, _TAIL_MASK, _TAIL_NOISE = constexpr(TAIL), constexpr(TAIL_MASK), constexpr(TAIL_NOISE)
_UNIT, _FLOOR = constexpr(UNIT), constexpr(FLOOR)
_HALF, _LARGEST = constexpr(HALF), constexpr(LARGEST)
# A Triton program works on that many blocks at a time.
ROWS = 8
_ROWS, _BLOCK = constexpr(ROWS), constexpr(BLOCK)


def blocks_of(length: int) -> int:
    """Return how many scales `length` elements have.

    Example:
        >>> blocks_of(128), blocks_of(129)
        (1, 2)
    """
    return -(-length // BLOCK)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values that codes and scales stand for.

    Args:
        codes: int8 (signed) or uint8 (unsigned): 1-D of any length, or (rows, at most 128).
        scales: float32 of shape (blocks_of(length),), or (rows,).

    Raises:
        ValueError: the scales are not one for each block.

    Example:
        >>> decode(torch.tensor([127, -127, 0], dtype=torch.int8), torch.tensor([2.0]))
        tensor([ 2., -2.,  0.])
    """
    check_scales("decode", codes, scales)
    if codes.ndim == 1:
        return from_rows(decode_rows(to_rows(codes), scales), codes.shape[0])
    return decode_rows(codes, scales)


def encode(x: Tensor, *, signed: bool, noise16: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of float32 values. Infinities count as the largest float32, NaN as 0.

    Args:
        x: float32: 1-D of any length, or (rows, at most 128). Not negative, unless `signed`.
        signed: int8 codes; otherwise uint8.
        noise16: int32 of the shape of `x`, uniform in [0, 2^16): rounds stochastically. Without it, to nearest.

    Returns:
        `(codes, scales)`, see `decode`.

    Source: blockwise quantization of optimizer states, Dettmers et al. 2022, arXiv 2110.02861; the codes are fzero's.

    Example:
        >>> encode(torch.tensor([2.0, -0.5, 0.0]), signed=True)
        (tensor([ 127, -111,    0], dtype=torch.int8), tensor([2.]))
    """
    if x.ndim > 1:
        return encode_rows(x, signed, noise16)
    length = x.shape[0]
    codes, scales = encode_rows(to_rows(x), signed, None if noise16 is None else to_rows(noise16))
    return from_rows(codes, length), scales


def to_rows(x: Tensor) -> Tensor:
    """Return a 1-D tensor as (blocks, 128), zeros behind its end."""
    missing = -x.shape[0] % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)


def from_rows(rows: Tensor, length: int) -> Tensor:
    """Return the first `length` elements of (blocks, 128) as a 1-D tensor that has its memory to itself."""
    flat = rows.reshape(-1)
    return flat if flat.shape[0] == length else flat[:length].clone()


def decode_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """`decode` where each row is a block."""
    code = codes.to(torch.int32)
    part = _value(code.abs(), SIGNED_SHIFT if codes.dtype == torch.int8 else UNSIGNED_SHIFT)
    return torch.where(code < 0, -part, part) * scales[:, None]


def encode_rows(x: Tensor, signed: bool, noise16: Tensor | None) -> tuple[Tensor, Tensor]:
    """`encode` where each row is a block."""
    x = torch.where(x == x, x.clamp(-LARGEST, LARGEST), 0.0)
    size = x.abs()
    scales = size.amax(1)
    part = size / torch.where(scales > 0, scales, 1.0)[:, None]
    noise: Tensor | int = HALF if noise16 is None else noise16
    bits = part.view(torch.int32)
    code = (bits >> TAIL) - (SIGNED_SHIFT if signed else UNSIGNED_SHIFT)
    up = (bits & TAIL_MASK) > noise * TAIL_NOISE
    raised = code + up.to(torch.int32)
    if not signed:
        return torch.where(x > 0, raised.clamp(min=FLOOR), 0).to(torch.uint8), scales
    is_least = part > noise * UNIT
    code = torch.where(code < 1, is_least.to(torch.int32), raised)
    return torch.where(x < 0, -code, code).to(torch.int8), scales


def _value(code: Tensor, shift: int) -> Tensor:
    """The value of codes that are not negative, under a scale of 1."""
    return torch.where(code > 0, ((code + shift) << TAIL).view(torch.float32), 0.0)


@jit
def places(program, length):
    """Return where the ROWS blocks of a program lie in a tensor, for Triton.

    Returns:
        The index of each element, (ROWS, BLOCK), whether there is such an element, the index of each block, (ROWS,),
        and whether there is such a block.
    """
    row = tl.arange(0, _ROWS).to(tl.int64) + program * _ROWS
    place = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    return place, place < length, row, row * _BLOCK < length


@jit
def decode_block(codes, scales):
    """`decode_rows` for codes as they are loaded."""
    code = codes.to(tl.int32)
    if codes.dtype == tl.int8:
        size = tl.abs(code)
        bits = (size + _SIGNED_SHIFT) << _TAIL
    else:
        size = code
        bits = (size + _UNSIGNED_SHIFT) << _TAIL
    part = tl.where(size > 0, bits.to(tl.float32, bitcast=True), 0.0)
    if codes.dtype == tl.int8:
        part = tl.where(code < 0, -part, part)
    return part * scales[:, None]


@jit
def encode_block(x, noise16, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`encode_rows`. Elements behind the end of a tensor have to be 0."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST), 0.0)
    size = tl.abs(x)
    scales = tl.max(size, 1)
    part = tl.div_rn(size, tl.broadcast_to(tl.where(scales > 0, scales, 1.0)[:, None], size.shape))
    bits = part.to(tl.int32, bitcast=True)
    tail = bits & _TAIL_MASK
    if STOCHASTIC:
        up = tail > noise16 * _TAIL_NOISE
        is_least = part > noise16.to(tl.float32) * _UNIT
    else:
        up = tail > _HALF * _TAIL_NOISE
        is_least = part > _UNIT * _HALF
    if SIGNED:
        code = (bits >> _TAIL) - _SIGNED_SHIFT
        code = tl.where(code < 1, is_least.to(tl.int32), code + up.to(tl.int32))
        codes = tl.where(x < 0, -code, code).to(tl.int8)
    else:
        code = (bits >> _TAIL) - _UNSIGNED_SHIFT + up.to(tl.int32)
        codes = tl.where(x > 0, tl.maximum(code, _FLOOR), 0).to(tl.uint8)
    return codes, scales


def check_scales(call: str, codes: Tensor, scales: Tensor) -> None:
    """Refuse scales that are not one for each block."""
    blocks = blocks_of(codes.shape[0]) if codes.ndim == 1 else codes.shape[0]
    if scales.shape != (blocks,):
        raise ValueError(
            f"{call}: scales have shape {tuple(scales.shape)}, expected {(blocks,)} for codes of shape "
            f"{tuple(codes.shape)}: one scale for each {BLOCK} elements."
        )
