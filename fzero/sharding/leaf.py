"""One leaf: whole on every rank, and as the pieces that ranks hold.

    leaf ──block_of──▶ block, flattened ──own_piece──▶ piece
    leaf ◀───────────────────join──────────────────── pieces of all ranks
    full gradients of all ranks ─────reduce_leaf─────▶ piece of their sum

All are differentiable, and the same code on every rank: where the rank matters it is a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero._torch import is_functorch_wrapped
from fzero.errors import LayoutError
from fzero.random.bits import signed
from fzero.ranks.collectives import all_gather, all_reduce, pad, reduce_scatter
from fzero.ranks.mesh import Mesh

# A leaf with fewer elements a rank than this stays whole on every rank, as it is not worth a collective's latency: on 8
# ranks one of under 128 elements, such as a small bias.
_WHOLE_BELOW = 16


class P(tuple[str | None, ...]):
    """The mesh axis that each dimension of a leaf is split over; `None` for a dimension kept whole.

    Example:
        >>> P("model", None)
        P('model', None)
    """

    def __new__(cls, *axes: str | None) -> P:
        if not all(axis is None or isinstance(axis, str) for axis in axes):
            raise TypeError(f"fz.P: expected the name of a mesh axis, or None, for each dimension, got {axes!r}.")
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

    @property
    def split_axes(self) -> tuple[str, ...]:
        """The mesh axes that its dimensions are split over."""
        return tuple(axis for axis in self.split if axis is not None)

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes whose ranks hold different parts of it."""
        return self.cut + self.split_axes

    def block_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """The shape of the block that `P` leaves a rank: (8, 6) split by `P("model")` over 4 ranks is (2, 6)."""
        parts = [1 if axis is None else mesh.size(axis) for axis in self.split]
        parts += [1] * (len(self.shape) - len(parts))
        return tuple(size // n for size, n in zip(self.shape, parts, strict=True))

    def block_numel(self, mesh: Mesh) -> int:
        """The elements of a block."""
        return math.prod(self.block_shape(mesh))

    def piece_numel(self, mesh: Mesh) -> int:
        """The elements of a piece, padding included: a block of 10 cut over 4 ranks gives pieces of 3."""
        return math.ceil(self.block_numel(mesh) / mesh.size(self.cut))


def join(piece: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Make a leaf whole from the ranks' pieces. Differentiable; of one rank it may be a view of `piece`."""
    if piece.ndim != 1:
        raise LayoutError(
            f"fz: expected a piece of one dimension of a leaf of shape {spec.shape}, got one of shape "
            f"{tuple(piece.shape)}. Stacked trees are for torch.func.vmap, such as vmap(fz.gather)(stacked)."
        )
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
    if flat.shape[0] == numel:
        return flat
    # Of 7 elements padded to 8, a batch under vmap would keep the strides (8, 1). A state that was stacked has (7, 1),
    # and a step that returned others would be traced again for them. Hence a copy.
    return flat[:numel].clone() if is_functorch_wrapped(flat) else flat[:numel]


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
            leaf = _own_row(leaf.unflatten(dim, (mesh.size(axis), -1)), dim, mesh.index_tensor(axis))
    return leaf.reshape(-1)


def own_piece(flat: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Return this rank's piece of a flattened block. May alias it where nothing is cut."""
    ranks = mesh.size(spec.cut)
    if ranks == 1:
        return flat
    numel = spec.piece_numel(mesh)
    return _own_row(pad(flat, ranks * numel).view(ranks, numel), 0, mesh.index_tensor(spec.cut))


def _own_row(rows: Tensor, dim: int, index: Tensor) -> Tensor:
    # Picked by an index tensor, not a slice: a trace must be the same on every rank. The index has one element, not no
    # dimensions: under vmap torch would return N rows for such an index instead of one.
    return rows.index_select(dim, index.reshape(1)).squeeze(dim)


def placed_as(wanted: Spec, piece: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Return a piece of a leaf that is cut by `spec` as the piece of another placement. One of the two has it whole.

    All ranks have one and the same leaf here, and so one cotangent: in reverse mode it is cut, or joined, back again.
    Through `join_block` each rank would have a cotangent of its own, and they would be summed.
    """
    return piece if spec.cut == wanted.cut else _PlacedAs.apply(piece, spec, wanted, mesh)


class _PlacedAs(torch.autograd.Function):
    @staticmethod
    def forward(piece: Tensor, spec: Spec, wanted: Spec, mesh: Mesh) -> Tensor:
        placed = own_piece(piece, wanted, mesh) if wanted.cut else join_block(piece, spec, mesh)
        return placed.view_as(placed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.spec, ctx.wanted, ctx.mesh = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        return placed_as(ctx.spec, cotangent, ctx.wanted, ctx.mesh), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return placed_as(ctx.wanted, tangent, ctx.spec, ctx.mesh)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None, None], piece: Tensor, spec: Spec, wanted: Spec, mesh: Mesh
    ) -> tuple[Tensor, int]:
        return torch.func.vmap(lambda x: placed_as(wanted, x, spec, mesh), in_dims[0])(piece), 0


def first_elements(specs: Sequence[Spec], mesh: Mesh) -> Tensor:
    """Return the number of the first element of this rank's piece of each leaf: int32 of shape (n,), modulo 2^32.

    By these numbers noise is drawn. A block of columns has no contiguous indices in its leaf. So the elements of block
    0 count from 0, those of block 1 from the length of a block, and so on.
    """
    numbers = torch.zeros(len(specs), dtype=torch.int32, device=mesh.device)
    for axes in dict.fromkeys(spec.cut for spec in specs):
        sizes = [signed(spec.piece_numel(mesh)) if spec.cut == axes else 0 for spec in specs]
        numbers = numbers + mesh.index_tensor(axes) * torch.tensor(sizes, dtype=torch.int32, device=mesh.device)
    for axes in dict.fromkeys(spec.split_axes for spec in specs):
        sizes = [signed(spec.block_numel(mesh)) if spec.split_axes == axes else 0 for spec in specs]
        numbers = numbers + mesh.index_tensor(axes) * torch.tensor(sizes, dtype=torch.int32, device=mesh.device)
    return numbers


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
