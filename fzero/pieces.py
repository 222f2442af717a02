"""One leaf: whole on every rank, and as the pieces that ranks hold.

    leaf ──block_of──▶ block, flattened ──own_piece──▶ piece
    leaf ◀───────────────────join──────────────────── pieces of all ranks
    full gradients of all ranks ─────reduce_leaf─────▶ piece of their sum

All are differentiable, and the same code on every rank: where the rank matters it is a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fzero.collectives import all_gather, all_reduce, pad, reduce_scatter
from fzero.mesh import Mesh

# Leaves smaller than this many elements a rank are not worth a collective's latency.
_WHOLE_BELOW = 16


class P(tuple[str | None, ...]):
    """The mesh axis that each dimension of a leaf is split over; `None` for a dimension kept whole.

    Example:
        >>> P("model", None)
        P('model', None)
    """

    def __new__(cls, *axes: str | None) -> P:
        return super().__new__(cls, axes)

    def __getnewargs__(self) -> tuple[str | None, ...]:  # for pickle and copy, which would pass one tuple
        return tuple(self)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


@dataclass(frozen=True)
class Spec:
    """How one leaf is laid out: its full shape, its dimensions' axes, the axes its flat block is cut over."""

    shape: tuple[int, ...]
    split: P
    cut: tuple[str, ...] = ()

    def block_shape(self, mesh: Mesh) -> tuple[int, ...]:
        parts = [1 if axis is None else mesh.size(axis) for axis in self.split]
        parts += [1] * (len(self.shape) - len(parts))
        return tuple(size // n for size, n in zip(self.shape, parts, strict=True))

    def block_numel(self, mesh: Mesh) -> int:
        return math.prod(self.block_shape(mesh))

    def piece_numel(self, mesh: Mesh) -> int:
        return math.ceil(self.block_numel(mesh) / mesh.size(self.cut))


def join(piece: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Make a leaf whole from the ranks' pieces. Differentiable; may alias `piece` where nothing moves."""
    leaf = join_block(piece, spec, mesh).reshape(spec.block_shape(mesh))
    for dim, axis in enumerate(spec.split):
        if axis is not None:
            leaf = all_gather(leaf.movedim(dim, 0), mesh, axis).movedim(0, dim)
    return leaf


def join_block(piece: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Make a flattened block whole from its pieces: what `own_piece` undoes."""
    flat = piece
    for axis in reversed(spec.cut):  # the last axis varies fastest, so its pieces are neighbours
        flat = all_gather(flat, mesh, axis)
    numel = spec.block_numel(mesh)
    return flat if flat.shape[0] == numel else flat[:numel]


def piece_of(leaf: Tensor, spec: Spec, mesh: Mesh, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return this rank's piece of a leaf that every rank has whole, as `dtype`: a copy, and the only one made."""
    flat, numel = block_of(leaf, spec, mesh), spec.piece_numel(mesh)
    start = min(mesh.index(spec.cut) * numel, flat.shape[0])
    part = flat[start : start + numel].to(dtype or leaf.dtype, copy=True)
    return pad(part, numel)


def block_of(leaf: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Return this rank's block of a whole leaf, flattened. May alias it."""
    for dim, axis in enumerate(spec.split):
        if axis is not None and mesh.size(axis) > 1:
            leaf = leaf.unflatten(dim, (mesh.size(axis), -1)).index_select(dim, mesh.index_tensor(axis)).squeeze(dim)
    return leaf.reshape(-1)


def own_piece(flat: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Return this rank's piece of a flattened block. May alias it where nothing is cut."""
    ranks = mesh.size(spec.cut)
    if ranks == 1:
        return flat
    numel = spec.piece_numel(mesh)
    # A row picked by an index tensor, not a slice: a trace must be the same on every rank.
    return pad(flat, ranks * numel).view(ranks, numel).index_select(0, mesh.index_tensor(spec.cut)).squeeze(0)


def reduce_leaf(leaf: Tensor, spec: Spec, mesh: Mesh, *, axes: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """Sum a full leaf over the ranks of the data axes; return this rank's piece of the sum, as `dtype`.

    Reduce-scatters over the axes that cut the leaf, outermost first so that later wires carry less; then
    all-reduces the piece over the axes that hold copies.
    """
    flat = block_of(leaf, spec, mesh)
    if mesh.size(spec.cut) > 1:
        flat = pad(flat, mesh.size(spec.cut) * spec.piece_numel(mesh))
    for axis in spec.cut:
        flat = reduce_scatter(flat, mesh, axis, dtype=dtype)
    for axis in axes:
        if axis not in spec.cut:
            flat = all_reduce(flat, mesh, axis, dtype=dtype)
    return flat.to(dtype)


def cut_axes(spec: Spec, mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes that a leaf is cut over where the layout says `axes`: none for a small one."""
    return axes if spec.block_numel(mesh) >= _WHOLE_BELOW * mesh.size(axes) else ()


def scaled(leaf: Tensor, factor: Tensor) -> Tensor:
    """Return the value of a gradient leaf, multiplied in at least float32."""
    return (leaf.to(torch.promote_types(leaf.dtype, torch.float32)) * factor).to(leaf.dtype)
