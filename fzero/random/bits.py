"""Counter-based random bits: a draw is a function of a key and an element's index, and of nothing else.

Element `i` of a leaf always gets the same bits for one (seed, step, path), however the leaf is cut, on whatever
device, eager, traced or recomputed:

    (seed, step, path) ──fold──▶ keys (k0, k1) ──mix(index, k0, k1)──▶ 32 bits an element

All of it is int32 arithmetic that wraps, about 15 operations an element: Philox in int64 costs 25 times an optimizer
update on a CPU. `fzero.kernels.rounding` holds the same functions for Triton kernels, equal bit for bit. The bits are
statistical, not cryptographic.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from fzero._torch import is_functorch_wrapped


def signed(value: int) -> int:
    """Return the low 32 bits of `value` as the signed number that an int32 tensor holds for them.

    Example:
        >>> signed(0xFFFFFFFF), signed(7)
        (-1, 7)
    """
    return (value + 2**31) % 2**32 - 2**31


# Odd multipliers of `mix`: those of triple32. Source: Wellons, "Hash function prospector", 2018.
MULTIPLIERS = (signed(0xED5AD4BB), signed(0xAC4C1B51), signed(0x31848BAB))
# Multiplier of `noises`: that of MurmurHash3's last step. Source: Appleby 2011.
STEP = signed(0x85EBCA6B)
# 2^32 over the golden ratio, odd: the second key word of `fold`, and a step between the indices of `noises`.
GOLDEN = signed(0x9E3779B1)


def shift_right(x: Tensor, n: int) -> Tensor:
    """Return int32 `x` shifted right by `n` bits with zeros coming in (`>>` copies the sign bit)."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def mix(index: Tensor, k0: Tensor, k1: Tensor | int) -> Tensor:
    """Return 32 random bits for each `index` under the key words `k0` and `k1`. All int32, broadcast together.

    For fixed keys this is a permutation of the 2^32 indices. `k0` enters twice, so streams whose keys differ are
    not shifted copies of one another, even where only one word differs.
    """
    first, second, third = MULTIPLIERS
    x = index + k0
    x = (x ^ shift_right(x, 17)) * first
    x = x ^ k1
    x = (x ^ shift_right(x, 11)) * second
    x = (x ^ shift_right(x, 15)) + k0
    x = x * third
    return x ^ shift_right(x, 14)


def noises(index: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three times 16 random bits for each `index` under the key words `k0` and `k1`, for roundings.

    Cheaper than `mix`, since an optimizer draws for every element: fewer steps, and three products of what they give,
    of which the high halves count. Each product is a permutation of the 2^32 indices, so each draw is uniform. The
    three together hold no more than 32 random bits.

    Source: the steps are those of SplitMix, Steele, Lea and Flood 2014, in 32 bits.
    """
    x = (index + k0) * GOLDEN
    x = (x ^ shift_right(x, 16) ^ k1) * STEP + k0
    x = x ^ shift_right(x, 15)
    first, second, third = MULTIPLIERS
    return shift_right(x * first, 16), shift_right(x * second, 16), shift_right(x * third, 16)


def fold(key: Tensor, data: int | Tensor) -> Tensor:
    """Return the int32 key that `key` and `data` make together. A chain of folds names a stream.

    Args:
        key: int32, any shape; each element is a key word of its own.
        data: an integer, taken modulo 2^32, or an int32 tensor that broadcasts with `key`.

    For one key, different data give different results; for one datum, different keys do so but for chance (2^-32).

    Example:
        >>> key = fold(torch.tensor(0, dtype=torch.int32), 1)
        >>> key.dtype, key.shape
        (torch.int32, torch.Size([]))
    """
    if isinstance(data, int):
        data = torch.full((), signed(data), dtype=torch.int32, device=key.device)
    if is_functorch_wrapped(key) or is_functorch_wrapped(data):  # vmap has no rule for an operator of ours
        return _fold(key, data)
    folded: Tensor = torch.ops.fzero.fold(key, data)
    return folded


def _fold(key: Tensor, data: Tensor) -> Tensor:
    return mix(data, key, GOLDEN)


# One operator, since keys are a word or two: a program shows it as one thing, and is traced the sooner.
torch.library.define("fzero::fold", "(Tensor key, Tensor data) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("fzero::fold", ("cpu", "cuda"), _fold)
torch.library.register_fake("fzero::fold", lambda key, data: torch.empty_like(key + data))


def step_keys(seed: Tensor, step: Tensor) -> Tensor:
    """Return the two key words of a step, int32 of shape (2,). `leaf_keys` folds a leaf's path into them."""
    return fold(fold(seed, torch.arange(2, dtype=torch.int32, device=seed.device)), step)


def leaf_keys(seed: Tensor, step: Tensor, path: str) -> Tensor:
    """Return the two key words of the leaf at `path` in one step, int32 of shape (2,).

    Args:
        seed: int32, 0-d.
        step: int32, 0-d.
        path: the leaf's dotted path; its CRC-32 enters the keys.

    Example:
        >>> zero = torch.tensor(0, dtype=torch.int32)
        >>> leaf_keys(zero, zero, "blocks.0.weight").shape
        torch.Size([2])
    """
    return fold(step_keys(seed, step), zlib.crc32(path.encode()))


def bits(keys: Tensor, offset: Tensor | int, n: int) -> Tensor:
    """Return `n` int32 words of random bits: word `i` is `mix` of index `offset + i` (modulo 2^32) under `keys`.

    Args:
        keys: int32 of shape (2,), from `leaf_keys` or a chain of `fold`.
        offset: global index of the first element: int32, 0-d, or an integer.
        n: how many; below 2^31.
    """
    if isinstance(offset, int):
        offset = signed(offset)
    index = torch.arange(n, dtype=torch.int32, device=keys.device) + offset
    return mix(index, keys[0], keys[1])


def _unit(word: Tensor) -> Tensor:
    """Return the top 24 bits of `word` as float32 in [0, 1), a multiple of 2^-24."""
    return shift_right(word, 8).to(torch.float32) * 2.0**-24


def uniform(keys: Tensor, offset: Tensor | int, n: int) -> Tensor:
    """Return `n` float32 draws, uniform in [0, 1): the top 24 bits of `bits(keys, offset, n)`."""
    return _unit(bits(keys, offset, n))


def normal(keys: Tensor, offset: Tensor | int, n: int) -> Tensor:
    """Return `n` float32 draws from the standard normal distribution, by Box and Muller, at most 5.77 in size.

    The bits behind them are the same on every device; the logarithm and the cosine may differ in their last bit.
    """
    word = bits(keys, offset, n)
    radius = torch.sqrt(-2.0 * torch.log(1.0 - _unit(word)))
    return radius * torch.cos(2.0 * math.pi * _unit(mix(word, keys[1], keys[0])))
