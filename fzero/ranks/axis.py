"""An axis as a value: `mesh["data"]`, with its collectives as methods.

They are the collectives of `fzero.ranks.collectives`, along any dimension, and each is the transpose of another, so a
function that is differentiated may use them:

    gather   ↔  scatter          sum  =  its own transpose

The gradient that comes out of `fz.vjp` is that of the mean, over all ranks, of what each rank's function returns.
Along an axis of one rank, as where there is no launcher, each is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fzero.errors import ShapeError
from fzero.ranks.collectives import Ranks, all_gather, all_reduce, reduce_scatter
from fzero.ranks.peers import collective


def _kind(axis: Axis, x: Tensor, dim: int | None = None) -> list[str]:
    return [] if axis.size == 1 else [f"{x.dtype}{tuple(x.shape)} over {axis.name}, dimension {dim}"]


@dataclass(frozen=True)
class Axis:
    """One named axis of a mesh; made by `mesh["name"]`.

    Attributes:
        ranks: the mesh.
        name: the axis.

    Example:
        >>> import torch
        >>> from fzero.ranks.mesh import make_mesh
        >>> axis = make_mesh("cpu")["data"]
        >>> axis, axis.sum(torch.ones(2))
        (Axis('data', size=1), tensor([1., 1.]))
    """

    ranks: Ranks
    name: str

    @property
    def size(self) -> int:
        """The number of ranks along the axis."""
        return self.ranks.size(self.name)

    @property
    def index(self) -> Tensor:
        """This rank's coordinate, int32 of shape (): data, so that all ranks trace the same program."""
        return self.ranks.index_tensor(self.name)

    @collective("fz.Axis.sum", _kind, within=True)
    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the axis, the same bits on every rank.

        Args:
            x: of any shape, the same on every rank.
        """
        return all_reduce(x, self.ranks, self.name)

    @collective("fz.Axis.gather", _kind, within=True)
    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the ranks' tensors joined along `dim`, in rank order: of size `n` there, `size · n`.

        Args:
            x: with at least one dimension; the same shape on every rank.
            dim: where they are joined.

        Raises:
            ShapeError: `x` has no such dimension.

        Example:
            >>> import torch
            >>> from fzero.ranks.mesh import make_mesh
            >>> make_mesh("cpu")["data"].gather(torch.arange(3))
            tensor([0, 1, 2])
        """
        self._check(x, dim, "gather")
        return all_gather(x.movedim(dim, 0), self.ranks, self.name).movedim(0, dim)

    @collective("fz.Axis.scatter", _kind, within=True)
    def scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this rank's part of the sum over the axis: of size `size · n` along `dim`, `n`.

        Args:
            x: the same shape on every rank.
            dim: where the sum is cut; its size is a multiple of the axis'.

        Raises:
            ShapeError: `x` has no such dimension, or it does not divide evenly.
        """
        self._check(x, dim, "scatter")
        if x.shape[dim] % self.size:
            raise ShapeError(
                f"fz.Axis.scatter: dimension {dim} of a tensor of shape {tuple(x.shape)} does not divide into the "
                f"{self.size} ranks of axis {self.name!r}. Pad it to a multiple of {self.size}."
            )
        return reduce_scatter(x.movedim(dim, 0), self.ranks, self.name).movedim(0, dim)

    def _check(self, x: Tensor, dim: int, method: str) -> None:
        if not -x.ndim <= dim < x.ndim:
            raise ShapeError(
                f"fz.Axis.{method}: there is no dimension {dim} in a tensor of shape {tuple(x.shape)}. "
                f"Give one of {list(range(x.ndim))}{', or x[None] for a number' if x.ndim == 0 else ''}."
            )

    def __repr__(self) -> str:
        return f"Axis({self.name!r}, size={self.size})"
