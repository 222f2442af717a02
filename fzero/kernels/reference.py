"""The torch reference of an update kernel, for one leaf, and how it runs over the leaf's own memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero.kernels.compiled import run_in_place
from fzero.kernels.storage import BLOCK, Stored, blocks_of, draws, grouped, is_quantized, load, store
from fzero.random.bits import noises, signed

LeafState = Sequence[Tensor]
# (values, gradient as it came, scalars, compiled=, **statics) -> new values, and which elements to change.
Formula = Callable[..., tuple[list[Tensor], Tensor]]


def reference(
    formula: Formula,
    state: LeafState,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    stochastic: bool,
    compiled: bool = False,
    **statics: Any,
) -> list[Tensor]:
    """Return the new state of one leaf, in plain torch operations: what a kernel computes.

    Args:
        formula: of the kernel.
        state: its tensors, 1-D; or (rows, 128), with scales of shape (rows,).
        g: gradient: shape of the parameter.
        scalars: float32, from the kernel's function for them.
        keys: int32 of shape (2,).
        offset: int32, 0-d: index of element 0.
        stochastic: how to round.
        compiled: whether Inductor traces it, see `fzero.kernels.compiled.run_in_place`.
        **statics: of the formula.
    """
    stored = grouped(state)
    values = [load(x) for x in stored]
    new, ok = formula(values, g, scalars, compiled=compiled, **statics)
    moves = torch.isfinite(scalars[-1])
    noise = _noise(keys, offset, g) if stochastic and any(map(draws, stored)) else [None] * 3
    results: list[Tensor] = []
    for value, old_value, old, noise16 in zip(new, values, stored, noise, strict=False):
        results += store(torch.where(ok, value, old_value), old, moves, noise16)
    return results


def _noise(keys: Tensor, offset: Tensor, like: Tensor) -> Sequence[Tensor | None]:
    index = torch.arange(like.numel(), dtype=torch.int32, device=keys.device) + offset
    return noises(index.view(like.shape), keys[0], keys[1])


def update_in_place(
    *tensors: Tensor, formula: Formula, stochastic: bool, compiled: bool = False, **statics: Any
) -> None:
    """Overwrite a leaf's state by what `reference` returns. `tensors` are the state, then `g` to `offset` there."""
    *state, g, scalars, keys, offset = tensors
    new = reference(formula, state, g, scalars, keys, offset, stochastic, compiled, **statics)
    for old, x in zip(state, new, strict=True):
        old.copy_(x)


def run_leaf(
    formula: Formula,
    state: LeafState,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    statics: dict[str, Any],
) -> None:
    """Overwrite the state of one leaf."""
    stored = grouped(state)
    # float32 throughout draws nothing: one program for both flags.
    statics = statics | {"formula": formula, "stochastic": statics["stochastic"] and any(map(draws, stored))}
    if g.is_cuda:
        update_in_place(*state, g, scalars, keys, offset, **statics)
        return
    if not any(map(is_quantized, stored)):
        run_in_place(update_in_place, (*state, g), (scalars, keys), offset, **statics)
        return
    rows, tail = divmod(g.shape[0], BLOCK)
    whole = rows * BLOCK
    run_in_place(
        update_in_place,
        [*_by_rows(stored, 0, whole), g[:whole].view(-1, BLOCK)], (scalars, keys), offset, **statics,
    )  # fmt: skip
    if tail:
        parts = [*_by_rows(stored, whole, whole + tail), g[whole:].view(1, tail)]
        update_in_place(*parts, scalars, keys, offset + signed(whole), **statics)


def _by_rows(stored: Sequence[Stored], start: int, stop: int) -> list[Tensor]:
    """Return a range of a leaf's state with a row for each block, its last row cut if the range ends in it."""
    width = min(BLOCK, stop - start) or BLOCK
    parts: list[Tensor] = []
    for value in stored:
        x, *rest = value
        parts.append(x[start:stop].view(-1, width))
        for other in rest:
            scales = other[start // BLOCK : blocks_of(stop)]
            parts.append(scales if is_quantized(value) else other[start:stop].view(-1, width))
    return parts
