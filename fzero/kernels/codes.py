"""Blockwise 8-bit storage of a tensor: one code an element, one float32 scale for each 128 elements.

    signed      value = sign(code) · m(|code| - 127) · scale      code -127 … 127, int8
    unsigned    value = m(code - 255) · scale                     code 0 … 255, uint8

The scale is the largest magnitude of its block, but at least 2^-126 and at most 2^126. m(0) is 1, and m counts down
through the numbers of three fraction bits, eight for each power of two: 15/16, 14/16, … 8/16, 15/32, … A code is the
head of a float32 number: three bits of its fraction, and of its exponent the part that its block can have. Code 0 is
zero. So neighbours are 6 to 13 % apart over the whole range. A value falls between two neighbours and goes to one of
them: to the nearest, or by 16 random bits with the probabilities that keep its mean. An unsigned value above zero never
gets less than 2^-27 of the scale: the root of a second moment is divided by.

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

from fzero.kernels.nvidia import constexpr, jit, narrowed, reciprocal, tl, widened

# Consecutive elements that share a scale.
BLOCK = 128

SIGNED_TOP, UNSIGNED_TOP = 127, 255
# A code keeps the head of a float32 and leaves out its tail, of 20 bits. ONE is the head of 1.0: 0x3F800000 >> 20.
TAIL = 20
ONE = 127 << 3
# Noise has 16 bits and a tail 20, so a unit of noise is 16 units of the tail. Noise of HALF rounds to nearest.
TAIL_NOISE, HALF = 1 << (TAIL - 16), 32768
# Values are encoded by 4 to 8 units of a float32's last place too large, half of what a value of noise is worth. So one
# that a code stands for rounds to that code by any noise, though it is multiplied by a reciprocal.
MARGIN = 1 + 2.0**-21
# Below the least signed value, 1.25 · 2^-16 of the scale, a unit of noise is a 2^16-th of that value. An unsigned value
# above zero has code 40 at least, 1.125 · 2^-27 of the scale.
UNIT, FLOOR = 1.25 * 2.0**-32, 40
# The range of scales above zero, and of what is encoded: reciprocals of them are float32 numbers of full precision.
LEAST, LARGEST = 2.0**-126, 2.0**126

# A code is its head less a shift, so that the head of 1.0 becomes the largest code, 127 or 255.
SIGNED_SHIFT, UNSIGNED_SHIFT = ONE - SIGNED_TOP, ONE - UNSIGNED_TOP
_SIGNED_SHIFT, _UNSIGNED_SHIFT = constexpr(SIGNED_SHIFT), constexpr(UNSIGNED_SHIFT)
_TAIL, _TAIL_NOISE, _MARGIN = constexpr(TAIL), constexpr(TAIL_NOISE), constexpr(MARGIN)
_UNIT, _FLOOR, _SIGN = constexpr(UNIT), constexpr(FLOOR), constexpr(-(1 << 31))
_HALF, _LEAST, _LARGEST = constexpr(HALF), constexpr(LEAST), constexpr(LARGEST)
# A Triton program works on that many blocks at a time.
ROWS = 16
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
    """Return the codes and scales of float32 values. What is larger than 2^126 counts as that, NaN as 0.

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
    size = torch.where(x == x, x.abs(), 0.0)
    largest = size.amax(1)
    inside = largest.clamp(LEAST, LARGEST)
    scales = torch.where(largest > 0, inside, 0.0)
    part = size * (1.0 / inside * MARGIN)[:, None]
    noise: Tensor | int = HALF if noise16 is None else noise16
    code = ((part.view(torch.int32) + noise * TAIL_NOISE) >> TAIL) - (SIGNED_SHIFT if signed else UNSIGNED_SHIFT)
    if not signed:
        return torch.where(x > 0, code.clamp(FLOOR, UNSIGNED_TOP), 0).to(torch.uint8), scales
    code = torch.where(part > noise * UNIT, code.clamp(min=1), 0)
    # One instruction of a GPU makes integers int8: minus infinity becomes -128.
    return torch.where(x < 0, -code, code).clamp(-SIGNED_TOP - 1, SIGNED_TOP).to(torch.int8), scales


def _value(code: Tensor, shift: int) -> Tensor:
    """The value of codes that are not negative, under a scale of 1."""
    return torch.where(code > 0, ((code + shift) << TAIL).view(torch.float32), 0.0)


@jit
def places(program, length):
    """Return where the ROWS blocks of a program lie in a tensor, for Triton.

    Returns:
        The index of the first element, int64; how far behind it each element is, (ROWS, BLOCK), and whether there is
        such an element; how far behind its block each block is, (ROWS,), and whether there is such a block.
    """
    first = program.to(tl.int64) * (_ROWS * _BLOCK)
    count = tl.minimum(length - first, _ROWS * _BLOCK).to(tl.int32)
    row = tl.arange(0, _ROWS)
    place = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    return first, place, place < count, row, row * _BLOCK < count


@jit
def decode_block(codes, scales):
    """`decode_rows` for codes as they are loaded."""
    code = widened(codes)
    if codes.dtype == tl.int8:
        bits = ((tl.abs(code) + _SIGNED_SHIFT) << _TAIL) | (code & _SIGN)
    else:
        bits = (code + _UNSIGNED_SHIFT) << _TAIL
    return tl.where(code != 0, bits, 0).to(tl.float32, bitcast=True) * scales[:, None]


@jit
def encode_block(x, noise16, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`encode_rows`. Elements behind the end of a tensor have to be 0."""
    # NaN is no largest number, and at the end not above zero.
    size = tl.abs(x)
    largest = tl.minimum(tl.max(size, 1), _LARGEST)
    inside = tl.maximum(largest, _LEAST)
    scales = tl.where(largest > 0, inside, 0.0)
    part = size * (reciprocal(inside) * _MARGIN)[:, None]
    if STOCHASTIC:
        least = noise16.to(tl.float32) * _UNIT
        added = noise16 * _TAIL_NOISE
    else:
        least = _HALF * _UNIT
        added = _HALF * _TAIL_NOISE
    bits = part.to(tl.int32, bitcast=True) + added
    if SIGNED:
        code = tl.maximum((bits >> _TAIL) - _SIGNED_SHIFT, 1)
        code = tl.where(part > least, code, 0)
        code = tl.where(x < 0, -code, code)
    else:
        code = tl.maximum((bits >> _TAIL) - _UNSIGNED_SHIFT, _FLOOR)
        code = tl.where(x > 0, code, 0)
    return narrowed(code, SIGNED), scales


def check_scales(call: str, codes: Tensor, scales: Tensor) -> None:
    """Refuse scales that are not one for each block."""
    blocks = blocks_of(codes.shape[0]) if codes.ndim == 1 else codes.shape[0]
    if scales.shape != (blocks,):
        raise ValueError(
            f"{call}: scales have shape {tuple(scales.shape)}, expected {(blocks,)} for codes of shape "
            f"{tuple(codes.shape)}: one scale for each {BLOCK} elements."
        )
