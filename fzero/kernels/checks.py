"""What an update kernel refuses, before its op is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fzero.kernels.storage import blocks_of, grouped, is_quantized

if TYPE_CHECKING:
    from fzero.kernels.update import LeafState, Update

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    update: Update,
    states: Sequence[LeafState],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
) -> None:
    """Refuse what the kernel does not take.

    Args:
        update: the kernel.
        states: for each leaf its state.
        grads: for each leaf its gradient.
        scalars: what all leaves share.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).

    Raises:
        ValueError: a shape, a device or a layout in memory.
        TypeError: a dtype.
    """
    call, count = update.name, len(states)
    if len(grads) != count:
        raise ValueError(f"{call}: {count} states and {len(grads)} gradients. Pass one gradient for each leaf.")
    for name, tensor, dtype, shape in (
        ("scalars", scalars, torch.float32, (update.scalars,)),
        ("keys", keys, torch.int32, (count, 2)),
        ("offsets", offsets, torch.int32, (count,)),
    ):
        _check_tensor(f"{call}: {name}", tensor, (dtype,), shape, scalars.device)
    for i, (leaf, g) in enumerate(zip(states, grads, strict=True)):
        if [x.dtype for x in (*leaf, g)] != [x.dtype for x in (*states[0], grads[0])]:
            raise TypeError(
                f"{call}: leaf {i} has dtypes {[x.dtype for x in (*leaf, g)]} and leaf 0 "
                f"{[x.dtype for x in (*states[0], grads[0])]}. Update leaves of other dtypes by another call."
            )
        _check_leaf(update, i, leaf, g, scalars.device)


def _check_leaf(update: Update, index: int, leaf: LeafState, g: Tensor, device: torch.device) -> None:
    call, of = update.name, f"of leaf {index}"
    stored = grouped(leaf)
    if not len(update.values) - update.optional <= len(stored) <= len(update.values) or is_quantized(stored[0]):
        raise TypeError(
            f"{call}: the state {of} has dtypes {[x.dtype for x in leaf]}, expected those of "
            f"{', '.join(update.values)}, each float32, bfloat16 or float16, bfloat16 and an int16 remainder, or, but "
            f"for p, int8 or uint8 and float32 scales."
        )
    p = leaf[0]
    if p.ndim != 1:
        raise ValueError(f"{call}: p {of} has shape {tuple(p.shape)}, expected one dimension. Pass p.flatten().")
    length = p.shape[0]
    for name, value in zip(update.values, stored, strict=False):
        _check_tensor(f"{call}: {name} {of}", value[0], (value[0].dtype,), (length,), device)
        if len(value) == 2:
            what, size = ("scales", blocks_of(length)) if is_quantized(value) else ("remainder", length)
            _check_tensor(f"{call}: the {what} of {name} {of}", value[1], (value[1].dtype,), (size,), device)
    _check_tensor(f"{call}: the gradient {of}", g, GRADIENT_DTYPES, (length,), device)


def _check_tensor(
    what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{what} has dtype {tensor.dtype}, expected {expected}. Cast it first.")
    if tensor.shape != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {shape}.")
    if tensor.device != device:
        raise ValueError(f"{what} is on {tensor.device}, the scalars on {device}. Move it there.")
    if not tensor.is_contiguous():
        raise ValueError(f"{what} is not contiguous. Pass it through .contiguous().")
