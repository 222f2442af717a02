"""The torch reference of an update kernel, for one leaf, and the parts of a leaf that it runs over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero.kernels.ops import COMPILED, over
from fzero.kernels.storage import BLOCK, Stored, blocks_of, draws, grouped, is_quantized, load, store
from fzero.random.bits import noises

LeafState = Sequence[Tensor]
# (values, gradient, scalars, numbers) -> (new values, which elements to change), written over `fzero.kernels.ops`.
Formula = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
Numbers = tuple[float, ...]


def reference(
    formula: Formula,
    state: LeafState,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    *,
    numbers: Numbers,
    stochastic: bool,
) -> list[Tensor]:
    """Return the new state of one leaf, in plain torch operations: what a kernel computes.

    Args:
        formula: of the kernel.
        state: its tensors, 1-D; or (rows, 128), with scales of shape (rows,).
        g: gradient: shape of the parameter.
        scalars: float32, what changes from step to step; the last of them is not finite where the step is skipped.
        keys: int32 of shape (2,).
        offset: int32, 0-d: index of element 0.
        numbers: what does not change, for the formula.
        stochastic: how to round.
    """
    old = grouped(state)
    values = tuple(load(x) for x in old)
    new, ok = formula(values, g.float(), scalars.unbind(), numbers)
    drawn: Sequence[Tensor | None] = [None] * 3
    if stochastic and any(map(draws, old)):
        index = torch.arange(g.numel(), dtype=torch.int32, device=keys.device) + offset
        drawn = noises(index.view(g.shape), keys[0], keys[1])
    moves = torch.isfinite(scalars[-1])
    results: list[Tensor] = []
    for value, old_value, stored, noise16 in zip(new, values, old, drawn, strict=False):
        results += store(torch.where(ok, value, old_value), stored, moves, noise16)
    return results


def update_in_place(*tensors: Tensor, formula: Formula, numbers: Numbers, stochastic: bool, compiled: bool) -> None:
    """Overwrite a leaf's state by what `reference` returns. `tensors` are the state, then `g` to `offset` there."""
    *state, g, scalars, keys, offset = tensors
    formula = over(formula, COMPILED) if compiled else formula
    new = reference(formula, state, g, scalars, keys, offset, numbers=numbers, stochastic=stochastic)
    for old, x in zip(state, new, strict=True):
        old.copy_(x)


def parts_of(state: LeafState, g: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield what an update of a leaf acts on: `[*state, g]`, in rows of whole blocks where values are quantized.

    The last block may be short; it is a part of its own. With each part comes the index of its first element.
    """
    old = grouped(state)
    if not any(map(is_quantized, old)):
        yield 0, [*state, g]
        return
    length = g.shape[0]
    whole = length - length % BLOCK
    for start, stop in ((0, whole), (whole, length)):
        if stop > start:
            yield start, [*_by_rows(old, start, stop), g[start:stop].view(-1, min(BLOCK, stop - start))]


def _by_rows(stored: Sequence[Stored], start: int, stop: int) -> list[Tensor]:
    """Return a range of a leaf's state with a row for each block, its last row cut if the range ends in it."""
    width = min(BLOCK, stop - start)
    parts: list[Tensor] = []
    for value in stored:
        x, *rest = value
        parts.append(x[start:stop].view(-1, width))
        for other in rest:
            scales = other[start // BLOCK : blocks_of(stop)]
            parts.append(scales if is_quantized(value) else other[start:stop].view(-1, width))
    return parts
