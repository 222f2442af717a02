"""Blockwise 8-bit storage of a tensor: one code an element, one float32 scale for each 128 elements.

    signed      value = sign(code) · (|code| / 127)² · scale      code -127 … 127, int8
    unsigned    value = (code / 255)⁴ · scale                     code 0 … 255, uint8

The scale is the largest magnitude of its block. Codes lie dense near zero, where most of a moment's values are; the
fourth power spans the squares of what the second power spans. A value falls between two neighbours and goes to one of
them: to the nearest, or by 16 random bits with the probabilities that keep its mean. An unsigned value above zero never
gets code 0: the root of a second moment is divided by.

What decides is a float32 operation that IEEE 754 rounds exactly, so a CPU, compiled code and Triton agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fzero.kernels.rounding import constexpr, jit, tl

# Consecutive elements that share a scale.
BLOCK = 128

SIGNED_TOP, UNSIGNED_TOP = 127.0, 255.0
# The powers of the largest codes, and what makes 1 of them again, as float32 holds these numbers.
SIGNED_RANGE, UNSIGNED_RANGE = 16129.0, 4228250624.0
SIGNED_UNIT, UNSIGNED_UNIT = 1 / 16129, 1 / 255
# The noise that rounds to nearest, and how many values noise has.
HALF, NOISE_VALUES = 32768, 65536.0
LARGEST = torch.finfo(torch.float32).max

_SIGNED_TOP, _UNSIGNED_TOP = constexpr(SIGNED_TOP), constexpr(UNSIGNED_TOP)
_SIGNED_RANGE, _UNSIGNED_RANGE = constexpr(SIGNED_RANGE), constexpr(UNSIGNED_RANGE)
_SIGNED_UNIT, _UNSIGNED_UNIT = constexpr(SIGNED_UNIT), constexpr(UNSIGNED_UNIT)
_HALF, _NOISE_VALUES, _LARGEST = constexpr(float(HALF)), constexpr(NOISE_VALUES), constexpr(LARGEST)
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
        (tensor([127, -63,   0], dtype=torch.int8), tensor([2.]))
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
    code = codes.float()
    if codes.dtype == torch.int8:
        part = code * code.abs() * SIGNED_UNIT
    else:
        root = code * UNSIGNED_UNIT
        part = (root * root) * (root * root)
    return part * scales[:, None]


def encode_rows(x: Tensor, signed: bool, noise16: Tensor | None) -> tuple[Tensor, Tensor]:
    """`encode` where each row is a block."""
    x = torch.where(x == x, x.clamp(-LARGEST, LARGEST), 0.0)
    size = x.abs()
    scales = size.amax(1)
    part = size / torch.where(scales > 0, scales, 1.0)[:, None]
    noise: Tensor | float = float(HALF) if noise16 is None else noise16.float()
    y = part * (SIGNED_RANGE if signed else UNSIGNED_RANGE)
    root = torch.sqrt(y) if signed else torch.sqrt(torch.sqrt(y))
    # The largest code whose power is not above y. Found this way it does not hang on the last bits of the root, which
    # libraries and GPUs do not agree on.
    code = torch.floor(root + 0.5)
    code = code - (_power(code, signed) > y).float()
    low = _power(code, signed)
    up = noise * (_power(code + 1, signed) - low) < (y - low) * NOISE_VALUES
    code = (code + up.float()).clamp(max=SIGNED_TOP if signed else UNSIGNED_TOP)
    if signed:
        return torch.where(x < 0, -code, code).to(torch.int8), scales
    return torch.where((x > 0) & (code < 1), 1.0, code).to(torch.uint8), scales


def _power(code: Tensor, signed: bool) -> Tensor:
    square = code * code
    return square if signed else square * square


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
    code = codes.to(tl.float32)
    if codes.dtype == tl.int8:
        part = code * tl.abs(code) * _SIGNED_UNIT
    else:
        root = code * _UNSIGNED_UNIT
        part = (root * root) * (root * root)
    return part * scales[:, None]


@jit
def encode_block(x, noise16, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`encode_rows`. Elements behind the end of a tensor have to be 0."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST), 0.0)
    size = tl.abs(x)
    scales = tl.max(size, 1)
    part = tl.div_rn(size, tl.broadcast_to(tl.where(scales > 0, scales, 1.0)[:, None], size.shape))
    if SIGNED:
        y = part * _SIGNED_RANGE
        root = tl.sqrt(y)
    else:
        y = part * _UNSIGNED_RANGE
        root = tl.sqrt(tl.sqrt(y))
    code = tl.floor(root + 0.5)
    code = code - (power(code, SIGNED) > y).to(tl.float32)
    low = power(code, SIGNED)
    gap = power(code + 1.0, SIGNED) - low
    if STOCHASTIC:
        up = noise16.to(tl.float32) * gap < (y - low) * _NOISE_VALUES
    else:
        up = gap * _HALF < (y - low) * _NOISE_VALUES
    code = code + up.to(tl.float32)
    if SIGNED:
        code = tl.minimum(code, _SIGNED_TOP)
        codes = tl.where(x < 0, -code, code).to(tl.int8)
    else:
        code = tl.minimum(code, _UNSIGNED_TOP)
        codes = tl.where((x > 0) & (code < 1), 1.0, code).to(tl.int32).to(tl.uint8)
    return codes, scales


@jit
def power(code, SIGNED: tl.constexpr):
    """`_power`."""
    square = code * code
    if not SIGNED:
        square = square * square
    return square


def check_scales(call: str, codes: Tensor, scales: Tensor) -> None:
    """Refuse scales that are not one for each block."""
    blocks = blocks_of(codes.shape[0]) if codes.ndim == 1 else codes.shape[0]
    if scales.shape != (blocks,):
        raise ValueError(
            f"{call}: scales have shape {tuple(scales.shape)}, expected {(blocks,)} for codes of shape "
            f"{tuple(codes.shape)}: one scale for each {BLOCK} elements."
        )
