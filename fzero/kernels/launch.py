"""The Triton kernel around every update formula, and its launch: for one leaf, or for many at once.

    one leaf      tensors are passed as they are
    many leaves   one launch; a program finds its leaf in a table of addresses, which is copied from pinned memory

A program works on blocks of 16 × 128 elements, so that it has whole blocks of 8-bit storage.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fzero.kernels.codes import BLOCK as QUANTIZED
from fzero.kernels.codes import ROWS, places
from fzero.kernels.nvidia import constexpr, jit, tl, widened
from fzero.kernels.rounding import noises
from fzero.kernels.storage import Stored, grouped, load_block, store_block

# Elements that a program updates at a time.
BLOCK = ROWS * QUANTIZED
_BLOCK = constexpr(BLOCK)
# Blocks that one program of a launch for many leaves goes through: so much shorter is the table.
BLOCKS = 8


@jit
def update_block(
    out, state, g_in, scalars, keys, offset_in, length, block, numbers,
    FORMULA: tl.constexpr, SCALARS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update one block: load, the formula, store. Launched without fused multiply-add."""
    at = places(block, length)
    first, place, inside, _, _ = at
    values: tl.tuple = ()
    old: tl.tuple = ()
    for k in tl.static_range(len(state)):
        value, raw = load_block(state[k], at)
        values = values + (value,)  # noqa: RUF005
        old = old + (raw,)  # noqa: RUF005
    gradient = widened(tl.load(g_in + first + place, inside, 0.0))
    shared: tl.tuple = ()
    for k in tl.static_range(SCALARS):
        shared = shared + (tl.load(scalars + k),)  # noqa: RUF005
    new, ok = FORMULA(values, gradient, shared, numbers)
    factor = shared[SCALARS - 1]

    index = place + (first.to(tl.int32) + tl.load(offset_in))
    noise = noises(index, tl.load(keys), tl.load(keys + 1))
    for k in tl.static_range(len(state)):
        store_block(
            out[k], tl.where(ok, new[k], values[k]), old[k], factor, noise[k], at, STOCHASTIC
        )  # fmt: skip


@jit
def update_one(
    out, state, g, scalars, keys, offset, length, numbers,
    FORMULA: tl.constexpr, SCALARS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update one leaf, a block a program."""
    update_block(
        out, state, g, scalars, keys, offset, length, tl.program_id(0), numbers, FORMULA, SCALARS, STOCHASTIC
    )  # fmt: skip


@jit
def update_many(
    table, programs, like, g_like, scalars, keys, offsets, numbers,
    FORMULA: tl.constexpr, SCALARS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update many leaves. `like` and `g_like` are the state and the gradient of one, for their dtypes alone."""
    entry = tl.load(programs + tl.program_id(0))
    leaf = entry >> 32
    first = entry & 0xFFFFFFFF
    address = table + leaf * COLUMNS
    state: tl.tuple = ()
    out: tl.tuple = ()
    for k in tl.static_range(len(like)):
        stored: tl.tuple = ()
        stored_out: tl.tuple = ()
        for i in tl.static_range(len(like[k])):
            stored = stored + (pointer(address, like[k][i], ALIGNED),)  # noqa: RUF005
            stored_out = stored_out + (pointer(address + 1, like[k][i], ALIGNED),)  # noqa: RUF005
            address += 2
        state = state + (stored,)  # noqa: RUF005
        out = out + (stored_out,)  # noqa: RUF005
    g = pointer(address, g_like, ALIGNED)
    length = tl.load(address + 1)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    for i in range(BLOCKS):
        if (first + i) * _BLOCK < length:
            update_block(
                out, state, g, scalars, keys + 2 * leaf, offsets + leaf, length, first + i, numbers,
                FORMULA, SCALARS, STOCHASTIC,
            )  # fmt: skip


@jit
def pointer(address, like, ALIGNED: tl.constexpr):
    """Read an address and return it as a pointer of the type of `like`."""
    found = tl.load(address).to(like.dtype)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


def launch(
    out: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *,
    formula: Any,
    numbers: tuple[float, ...],
    stochastic: bool,
) -> None:
    """Write the new states of leaves into `out`, which may be the old ones.

    Args:
        out: for each leaf its tensors.
        states: likewise. All leaves have the same dtypes.
        grads: for each leaf its gradient.
        scalars: what the formula reads.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).
        formula: a Triton function `(values, gradient, scalars, numbers) -> (new values, ok)`.
        numbers: floats that it takes.
        stochastic: how to round.
    """
    leaves = [i for i, g in enumerate(grads) if g.numel()]
    if not leaves:
        return
    how = {"FORMULA": formula, "SCALARS": scalars.shape[0], "STOCHASTIC": stochastic, "enable_fp_fusion": False}
    with torch.cuda.device_of(grads[0]):
        # A graph that is being captured would copy from pinned memory again at each replay; launches cost it little.
        if len(leaves) > 1 and not (grads[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            _launch_many(
                [out[i] for i in leaves], [states[i] for i in leaves], [grads[i] for i in leaves],
                scalars, *_rows(leaves, keys, offsets), numbers, how,
            )  # fmt: skip
            return
        for i in leaves:
            update_one[(-(-grads[i].numel() // BLOCK),)](
                _nested(out[i]), _nested(states[i]), grads[i], scalars, keys[i], offsets[i],
                grads[i].numel(), numbers, **how,
            )  # fmt: skip


def _rows(leaves: list[int], keys: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and offsets of some leaves."""
    if len(leaves) == keys.shape[0]:
        return keys, offsets
    return torch.stack([keys[i] for i in leaves]), torch.stack([offsets[i] for i in leaves])


def _launch_many(
    out: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    numbers: tuple[float, ...],
    how: dict[str, Any],
) -> None:
    rows = []
    for new, old, g in zip(out, states, grads, strict=True):
        row = [x.data_ptr() for pair in zip(old, new, strict=True) for x in pair]
        rows.append([*row, g.data_ptr(), g.numel()])
    columns = len(rows[0])
    # Addresses and lengths: then sixteen bytes are read and written at a time.
    is_aligned = not any(number % 16 for row in rows for number in row)
    programs = programs_of(tuple(g.numel() for g in grads))
    host = torch.from_numpy(np.concatenate([np.array(rows, dtype=np.int64).reshape(-1), programs]))
    device = grads[0].device
    if device.type == "cuda":
        # The allocator of pinned memory waits for the copy before it gives this memory to somebody else.
        host = host.pin_memory()
    table = host.to(device, non_blocking=True)
    update_many[(len(programs),)](
        table, table[len(rows) * columns :], _nested(states[0]), grads[0], scalars, keys, offsets, numbers,
        **how, ALIGNED=is_aligned, COLUMNS=columns, BLOCKS=BLOCKS,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def programs_of(lengths: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return what each program of a launch works on: (leaf << 32) + its first block.

    Example:
        >>> [(x >> 32, x & 0xFFFFFFFF) for x in programs_of((10, 40_000)).tolist()]
        [(0, 0), (1, 0), (1, 8), (1, 16)]
    """
    counts = np.array([-(-length // (BLOCK * BLOCKS)) for length in lengths])
    leaf = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)) * BLOCKS
    return (leaf << 32) + first


def _nested(state: Sequence[Tensor]) -> tuple[Stored, ...]:
    return tuple(grouped(state))
