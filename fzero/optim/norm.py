"""Norms of sharded gradients: squares summed piece by piece, then over the ranks that hold the pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fzero.kernels.squares import add_squares, squares
from fzero.ranks.collectives import all_reduce
from fzero.ranks.mesh import Mesh
from fzero.sharding.leaf import Spec
from fzero.sharding.sharded import Sharded


@dataclass(frozen=True, eq=False)
class Squares:
    """What was measured of a gradient's leaves, their factor aside.

    Attributes:
        pieces: those of the gradient.
        total: over all of them: the sum of squares of finite elements, and how often there are others. float64 of
            shape (2,), the same on every rank.
    """

    pieces: tuple[Tensor | None, ...]
    total: Tensor

    def are_of(self, grads: Sharded) -> bool:
        """Whether `grads` has the same leaves, whatever its factor is. A gradient whose leaves were changed has not."""
        return grads.pieces is self.pieces

    def norm(self, factor: Tensor) -> Tensor:
        """Return the 2-norm of the finite elements times `factor`: fp32 of shape ()."""
        return (self.total[0].sqrt() * factor).to(torch.float32)

    def finite(self, factor: Tensor) -> Tensor:
        """Return whether every element times `factor` is finite: bool of shape ()."""
        return (self.total[1] == 0) & torch.isfinite(factor)


def measure(grads: Sharded) -> Squares:
    """Measure a gradient over all ranks, by one small all-reduce an axis.

    A leaf that every rank holds whole counts once. Squares are taken piece by piece, as they would be if the leaf were
    cut, and added up in float64, so that the norm does not depend on the layout.
    """
    mesh = grads.mesh
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    for piece, spec in zip(grads.pieces, grads.placement.specs, strict=True):
        if piece is not None:
            sums.setdefault(spec.axes, []).append(_of_piece(piece, spec, mesh, grads.layout.axis))
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for axes, parts in sums.items():
        total = total + _over(add_squares(parts), axes, mesh)
    return Squares(grads.pieces, total)


def measure_leaf(grads: Sharded, index: int) -> Squares:
    """Measure one leaf of a gradient, which is there, over the ranks that hold its pieces."""
    piece, spec = grads.pieces[index], grads.placement.specs[index]
    assert piece is not None
    own = _of_piece(piece, spec, grads.mesh, grads.layout.axis)
    return Squares((piece,), _over(add_squares([own]), spec.axes, grads.mesh))


def _of_piece(piece: Tensor, spec: Spec, mesh: Mesh, axes: tuple[str, ...]) -> Tensor:
    # A leaf that is whole here stands for one piece of each rank that could hold one.
    return squares(piece, 1 if spec.cut else mesh.size(axes))


def _over(total: Tensor, axes: tuple[str, ...], mesh: Mesh) -> Tensor:
    for axis in axes:
        total = all_reduce(total, mesh, axis)
    return total
