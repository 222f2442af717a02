"""Adafactor: the second moment of a matrix as the product of a row and a column, and no first moment.

A leaf of two or more dimensions is a matrix of its last two, or several on top of one another. Each rank sums squares
over the rows and columns that its piece has a part of; added over the ranks they are those of the whole matrix:

    ḡ ──squares──▶ row, column sums ──all-reduce──▶ means R, C ──▶ direction ḡ / √(R·C / mean R) ──write-back──▶ p

Row and column means are float32 under every policy, and whole on every rank: they are a few numbers of thousands. Sums
are float64 and round to float32 at their end, so a step does not depend on the number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.calls.arguments import named, number, rate_of
from fzero.kernels.adafactor import Matrices, factored_direction, finite_gradient, matrix_squares, sum_of_squares
from fzero.kernels.storage import grouped
from fzero.kernels.write_back import WRITE_BACK, write_back_scalars
from fzero.marks import mark
from fzero.optim.base import Optimizer
from fzero.optim.leaves import Leaves
from fzero.optim.masks import Mask, mask_of
from fzero.optim.moments import moment_placement, with_remainder
from fzero.optim.step import Rate, Step, rate
from fzero.ranks.collectives import all_reduce
from fzero.ranks.mesh import Mesh
from fzero.sharding.leaf import P, Spec
from fzero.sharding.placement import Placement
from fzero.sharding.sharded import Sharded

Axes = tuple[str, ...]


class AdafactorState(NamedTuple):
    """Running means of the gradient's square: over rows and over columns of matrices, whole; of vectors, cut."""

    rows: Sharded
    columns: Sharded
    squares: Sharded


@dataclass(frozen=True, repr=False)
class Adafactor(Optimizer):
    """See `adafactor`."""

    lr: Rate = 1e-2
    decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    clip: float = 1.0
    weight_decay: float = 0.0
    mask: Mask | None = None

    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> Any:
        placements = _row_placement(params), _column_placement(params), moment_placement(params)
        state = AdafactorState(*(_zeros(params, placement, k == 2) for k, placement in enumerate(placements)))
        return with_remainder(state, params, remainder)

    def update_sharded(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        leaves, now = Leaves(grads, opt_state, params, at), self._now(at.count)
        for i in leaves.indices:
            path = params.paths[i]
            with mark(role="update", leaf=path):
                (state,), (gradient,), rounding = leaves.take([i])
                parameter, *old = grouped(state)
                leaf = _Leaf.of(grads.placement.specs[i], params.mesh)
                means, direction, square = self._direction(
                    tuple(x for (x,) in old), gradient, grads.multiplier, leaf, now.share
                )
                sums = leaf.sum(torch.stack([sum_of_squares(parameter), square]))
                scalars = self._scalars(now, sums / leaf.numel, self.mask is None or bool(self.mask(path)))
                (new,) = WRITE_BACK(
                    [parameter], [direction], scalars, *rounding.source, numbers=(), stochastic=rounding.stochastic
                )
                leaves.put([i], [(*new, *means)])
        return leaves.done()

    def learning_rate(self, step: Tensor) -> Tensor:
        return rate(self.lr, step)

    def _direction(
        self, old: tuple[Tensor, ...], gradient: Tensor, factor: Tensor, leaf: _Leaf, share: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the new means, the direction of this piece, and the sum of squares of that."""
        floor = (torch.finfo(torch.float32).eps if self.eps[0] is None else self.eps[0]) ** 2
        if leaf.matrices is None:
            (mean,) = old
            value, ok = finite_gradient(gradient, factor)
            new = torch.where(ok, mean + (value * value - mean) * share.to(torch.float32), mean)
            direction = value / torch.sqrt(new.clamp(min=floor).to(torch.float64)).to(torch.float32)
            return (new,), torch.where(ok, direction, torch.nan), sum_of_squares((direction,))
        count, rows, _ = leaf.matrices
        of_rows, of_columns = leaf.sum_matrix(*matrix_squares(gradient, factor, leaf.offset, leaf.matrices))
        row = _moved(old[0], of_rows / leaf.whole[1], share, factor)
        column = _moved(old[1], of_columns / leaf.whole[0], share, factor)
        mean_row = leaf.sum_rows(row.to(torch.float64).view(count, rows).sum(1)) / leaf.whole[0]
        relative = row.view(count, rows) / mean_row.clamp(min=math.sqrt(floor))[:, None]
        direction, square = factored_direction(
            gradient, factor, leaf.offset, relative.to(torch.float32).view(-1), column, leaf.matrices, floor
        )
        return (row, column), direction, square

    def _scalars(self, now: _Now, squares: Tensor, decays: bool) -> Tensor:
        """Return what the write-back takes, of the mean squares of the parameter and of its direction."""
        size, length = squares.sqrt().unbind()
        size = torch.where(size > self.eps[1], size, self.eps[1])
        step_size = size * now.relative / (length / self.clip).clamp(min=1.0)
        return write_back_scalars(step_size, now.lr, self.weight_decay if decays else 0.0)

    def _now(self, step: Tensor) -> _Now:
        lr, t = rate(self.lr, step).to(torch.float64), step.to(torch.float64) + 1
        return _Now(lr, torch.minimum(lr, t**-0.5), t**self.decay)


class _Now(NamedTuple):
    """What all leaves share in a step: the learning rate, the relative step, the share of this gradient. float64."""

    lr: Tensor
    relative: Tensor
    share: Tensor


@dataclass(frozen=True)
class _Leaf:
    """Where a rank's piece of a leaf lies, and over whom its sums are taken.

    Attributes:
        mesh: the ranks.
        spec: of the gradient.
        matrices: of this rank's block, see `fzero.kernels.adafactor`; `None` for a vector.
        whole: rows and columns of the leaf, not of the block.
        offset: int64, 0-d: of the piece in the block.
        numel: of the leaf.
    """

    mesh: Mesh
    spec: Spec
    matrices: Matrices | None
    whole: tuple[int, int]
    offset: Tensor
    numel: int

    @staticmethod
    def of(spec: Spec, mesh: Mesh) -> _Leaf:
        block, is_matrix = spec.block_shape(mesh), len(spec.shape) >= 2
        offset = mesh.index_tensor(spec.cut).to(torch.int64) * spec.piece_numel(mesh)
        matrices = (math.prod(block[:-2]), block[-2], block[-1]) if is_matrix else None
        whole = (max(spec.shape[-2], 1), max(spec.shape[-1], 1)) if is_matrix else (1, 1)
        return _Leaf(mesh, spec, matrices, whole, offset, max(math.prod(spec.shape), 1))

    def sum(self, x: Tensor) -> Tensor:
        """Add numbers up over all pieces."""
        return _summed(x, self.spec.axes, self.mesh)

    def sum_matrix(self, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
        """Add sums over rows and over columns up over the pieces that have a part in them."""
        both = _summed(torch.cat([of_rows, of_columns]), self.spec.cut, self.mesh)
        of_rows, of_columns = both.split([of_rows.shape[0], of_columns.shape[0]])
        return _summed(of_rows, self._split(-1), self.mesh), self.sum_rows(of_columns)

    def sum_rows(self, x: Tensor) -> Tensor:
        """Add up over the ranks that rows are split over."""
        return _summed(x, self._split(-2), self.mesh)

    def _split(self, dim: int) -> Axes:
        axis = dict(enumerate(self.spec.split)).get(len(self.spec.shape) + dim)
        return () if axis is None else (axis,)


def _summed(x: Tensor, axes: Axes, mesh: Mesh) -> Tensor:
    for axis in axes:
        x = all_reduce(x, mesh, axis)
    return x


def _moved(old: Tensor, mean: Tensor, share: Tensor, factor: Tensor) -> Tensor:
    """Return a running mean after a step, or as it was where the step is skipped."""
    wide = old.to(torch.float64)
    return torch.where(torch.isfinite(factor), (wide + (mean - wide) * share).to(torch.float32), old)


def _zeros(params: Sharded, placement: Placement, of_vectors: bool) -> Sharded:
    pieces: list[Tensor | None] = []
    for piece, shape, spec in zip(params.pieces, params.shapes, placement.specs, strict=True):
        if piece is None or not piece.is_floating_point() or (len(shape) < 2) != of_vectors:
            pieces.append(None)
        else:
            pieces.append(torch.zeros(spec.piece_numel(params.mesh), device=piece.device))
    return Sharded(tuple(pieces), placement)


def _row_placement(params: Sharded) -> Placement:
    return _whole(params, lambda spec: Spec(spec.shape[:-1], P(*spec.split[: len(spec.shape) - 1])))


def _column_placement(params: Sharded) -> Placement:
    def without_rows(spec: Spec) -> Spec:
        split = (*spec.split, *[None] * (len(spec.shape) - len(spec.split)))
        return Spec((*spec.shape[:-2], spec.shape[-1]), P(*split[:-2], split[-1]))

    return _whole(params, without_rows)


def _whole(params: Sharded, of_matrix: Any) -> Placement:
    """Return the placement of a tree that has something for each matrix, which the data axes do not cut."""
    specs = [of_matrix(spec) if len(spec.shape) >= 2 else spec for spec in params.placement.specs]
    return dataclasses.replace(params.placement, specs=tuple(specs))


@named("fz.adafactor")
def adafactor(
    lr: Rate = 1e-2,
    decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    clip: float = 1.0,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> Adafactor:
    """Return Adafactor, as `torch.optim.Adafactor` defines it.

    A step is relative to the size of its leaf: `min(lr, 1 / sqrt(t)) · max(eps[1], root mean square of the leaf)`.

    Args:
        lr: the largest relative step: a number, or a function of the step tensor.
        decay: step t has a share of `t ** decay` in the running means.
        eps: the least root of a second moment (`None`: the spacing of float32 at 1), and the least size of a leaf.
        clip: a direction whose root mean square is larger is scaled down to it.
        weight_decay: decoupled: `lr * weight_decay` of each parameter goes at each step.
        mask: which leaves decay, see `adamw`.

    Raises:
        TypeError, ValueError: a number is none, or out of its range.

    Source: Shazeer and Stern 2018, arXiv 1804.04235.

    Example:
        >>> opt, w, zero = adafactor(0.1), torch.ones(2, 2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.ones(2, 2), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([[0.9000, 0.9000],
                [0.9000, 0.9000]])
    """
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise TypeError(
            f"fz.adafactor: eps: expected two numbers, (root of a second moment or None, size of a leaf), got {eps!r}."
        )
    for name, value in (("clip", clip), ("eps[0]", 1.0 if eps[0] is None else eps[0]), ("eps[1]", eps[1])):
        number("fz.adafactor", name, value, above=0, finite=name != "clip")
    number("fz.adafactor", "decay", decay, most=0, hint="A step t has a share of t ** decay.")
    number("fz.adafactor", "weight_decay", weight_decay, least=0)
    mask = mask_of("fz.adafactor", mask)
    return Adafactor(rate_of("fz.adafactor", lr), decay, (eps[0], eps[1]), clip, weight_decay, mask)
