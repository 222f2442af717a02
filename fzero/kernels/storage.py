"""How a value is stored between steps: as it is, as a split float32, or in 8 bits; each loads as float32.

A stored value is a tuple of tensors, told apart by their dtypes:

    (x,)               float32, bfloat16 or float16
    (p, remainder)     bfloat16 and int16: p is an exact float32 master rounded, the remainder is what p lacks
    (codes, scales)    int8 or uint8, and a float32 for each block of 128, see `fzero.kernels.codes`

The bits of the master are (bits of p << 16) + remainder. p is the master rounded to nearest, so what computes with p
sees what it would see of a float32 parameter cast to bfloat16, but that ties go up in bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fzero.kernels.codes import BLOCK, blocks_of, decode, decode_block, encode, encode_block
from fzero.kernels.nvidia import constexpr, jit, tl, widened
from fzero.kernels.rounding import batched, round_stochastic, round_to

__all__ = [
    "BLOCK", "Stored", "blocks_of", "decode", "encode", "grouped", "join_master", "load", "split_master", "store",
]  # fmt: skip

Stored = tuple[Tensor, ...]
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.uint8)
BLOCK_ = constexpr(BLOCK)


def grouped(tensors: Sequence[Tensor]) -> list[Stored]:
    """Return tensors in a row as stored values: `[p, remainder, m, scales]` as `[(p, remainder), (m, scales)]`.

    Raises:
        TypeError: dtypes that no storage has.

    Example:
        >>> p, r, v = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int16), torch.ones(3)
        >>> [len(stored) for stored in grouped([p, r, v])]
        [2, 1]
    """
    found: list[Stored] = []
    rest = list(tensors)
    while rest:
        dtypes = tuple(x.dtype for x in rest[:2])
        pair = dtypes == (torch.bfloat16, torch.int16) or (dtypes[0] in CODES and dtypes[1:] == (torch.float32,))
        if not pair and dtypes[0] not in PLAIN:
            raise TypeError(
                f"grouped: nothing is stored as {dtypes[0]} here; expected float32, bfloat16 or float16, bfloat16 with "
                f"int16, or int8 or uint8 with float32 scales. The dtypes are {[x.dtype for x in tensors]}."
            )
        found.append(tuple(rest[: 1 + pair]))
        del rest[: 1 + pair]
    return found


def is_split(stored: Stored) -> bool:
    """Whether it is a split float32."""
    return len(stored) == 2 and stored[0].dtype == torch.bfloat16


def is_quantized(stored: Stored) -> bool:
    """Whether it is codes and scales."""
    return stored[0].dtype in CODES


def draws(stored: Stored) -> bool:
    """Whether what is stored has to be rounded, and so may draw noise."""
    return not is_split(stored) and stored[0].dtype != torch.float32


def load(stored: Stored) -> Tensor:
    """Return a stored value as float32, in the shape of its first tensor.

    Quantized values are 1-D, or (rows, at most 128) with a scale for each row.
    """
    if is_split(stored):
        return join_master(*stored)
    return decode(*stored) if is_quantized(stored) else stored[0].float()


def store(value: Tensor, old: Stored, moves: Tensor, noise16: Tensor | None) -> Stored:
    """Return a value stored as another one is. What is stored exactly keeps its bits, but for those of a NaN.

    Args:
        value: float32, shape of `old[0]`.
        old: what is stored now.
        moves: boolean, 0-d: whether quantized values are encoded anew. Values that codes stand for find the same codes
            again, unless they are too small for float32, below 2^-145.
        noise16: int32 of the shape of `value`, uniform in [0, 2^16): rounds stochastically. Without it, to nearest.

    Example:
        >>> old = (torch.zeros(2, dtype=torch.bfloat16),)
        >>> store(torch.tensor([1.001, 2.0]), old, torch.tensor(True), None)
        (tensor([1., 2.], dtype=torch.bfloat16),)
    """
    if is_split(old):
        return split_master(value)
    if is_quantized(old):
        codes, scales = encode(value, signed=old[0].dtype == torch.int8, noise16=noise16)
        return torch.where(moves, codes, old[0]), torch.where(moves, scales, old[1])
    return (_round_to(value, noise16, old[0].dtype),)


def _round_to(x: Tensor, noise16: Tensor | None, dtype: torch.dtype) -> Tensor:
    if noise16 is None or dtype == torch.float32:
        return x.to(dtype)
    return round_stochastic(x, noise16, dtype)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 numbers as bfloat16 ones, to nearest, and the int16 remainders. Derivatives go to the first.

    Example:
        >>> p, remainder = split_master(torch.tensor([1.0, 1.001]))
        >>> join_master(p, remainder)
        tensor([1.0000, 1.0010])
    """
    p, remainder = _Split.apply(master)
    return p, remainder


def join_master(p: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 numbers that `split_master` was given, exactly. Derivatives come from `p`."""
    joined: Tensor = _Join.apply(p, remainder)
    return joined


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(master: Tensor) -> tuple[Tensor, Tensor]:
        bits = master.view(torch.int32)
        high = (bits + 0x8000) >> 16
        # Not a view of 16 bits: Inductor vectorizes views of 32.
        return (high << 16).view(torch.float32).to(torch.bfloat16), (bits - (high << 16)).to(torch.int16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> Tensor:
        return cotangent.to(torch.float32)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        return tangent.to(torch.bfloat16), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return batched(_Split, info, in_dims, *arguments)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(p: Tensor, remainder: Tensor) -> Tensor:
        return (p.float().view(torch.int32) + remainder.to(torch.int32)).view(torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent.to(torch.bfloat16), None

    @staticmethod
    def jvp(ctx: Any, p_tangent: Tensor, remainder_tangent: None) -> Tensor:
        return p_tangent.to(torch.float32)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return batched(_Join, info, in_dims, *arguments)


@jit
def load_block(stored, at):
    """`load` for a block of rows of 128 elements.

    Args:
        stored: a tuple of pointers, as `Stored` is one of tensors.
        at: from `fzero.kernels.codes.places`.

    Returns:
        The float32 values, and a tuple of what was read.
    """
    first, place, inside, row, row_inside = at
    x = tl.load(stored[0] + first + place, inside, 0)
    if len(stored) == 1:
        return widened(x), (x,)
    elif x.dtype == tl.bfloat16:
        remainder = tl.load(stored[1] + first + place, inside, 0)
        bits = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) + remainder.to(tl.int32)
        return bits.to(tl.float32, bitcast=True), (x, remainder)
    else:
        scales = tl.load(stored[1] + first // BLOCK_ + row, row_inside, 0.0)
        return decode_block(x, scales), (x, scales)


@jit
def store_block(stored, value, old, factor, noise16, at, STOCHASTIC: tl.constexpr):
    """`store` for a block of rows, into `stored`. `old` is from `load_block`."""
    first, place, inside, row, row_inside = at
    values = stored[0] + first + place
    if len(stored) == 1:
        tl.store(values, round_to(value, noise16, old[0].dtype, STOCHASTIC), inside)
    elif old[0].dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        p = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
        remainder = (bits - (high << 16)).to(tl.int16)
        tl.store(values, p, inside)
        tl.store(stored[1] + first + place, remainder, inside)
    else:
        # Triton's interpreter spreads numbers, not truths.
        moves = tl.abs(tl.broadcast_to(factor, place.shape)) < float("inf")
        row_moves = tl.abs(tl.broadcast_to(factor, row.shape)) < float("inf")
        kept = stored[1] + first // BLOCK_ + row
        codes, scales = encode_block(value, noise16, old[0].dtype == tl.int8, STOCHASTIC)
        tl.store(values, codes, inside & moves)
        tl.store(kept, scales, row_inside & row_moves)
        # Into other memory than the old one. A choice of what to store would be one for each element.
        tl.store(values, old[0], inside & ~moves)
        tl.store(kept, old[1], row_inside & ~row_moves)
