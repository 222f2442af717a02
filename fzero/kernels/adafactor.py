"""What Adafactor needs of a matrix that is cut anywhere: sums of squares over rows and columns, and its direction.

A piece is a range of the flattened leaf, which is one matrix or several on top of one another; it may begin and end
in the middle of a row. Two ops, opaque to a trace:

    fzero::matrix_squares       g ──▶ sums of squares over each row and each column: what the piece adds to them
    fzero::factored_direction   g, row and column factors ──▶ g / root of their product, and its sum of squares

Sums are float64 and are made without atomics, so a run repeats bit for bit; rounded to float32 they do not depend on
how a leaf is cut. CUDA runs Triton kernels that read the piece once; a CPU walks over whole rows in chunks. Sums over
the partial results of programs, a few numbers for each tile, are torch's. `sum_of_squares` is torch throughout, and so
is what vectors need, which are small: see `fzero.optim.adafactor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fzero.kernels.adafactor_triton import launch_factored_direction, launch_matrix_squares, taken
from fzero.kernels.in_place import transformed
from fzero.kernels.storage import Stored, load

# Elements that a CPU converts at a time.
CHUNK = 1 << 20

Matrices = tuple[int, int, int]  # how many matrices, rows of each, columns of each


def matrix_squares(g: Tensor, factor: Tensor, offset: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor]:
    """Return the sums of squares of `g * factor` over rows and over columns, of the elements that a piece has.

    An element that is not finite, or whose square is not, counts as zero.

    Args:
        g: gradient: 1-D, floating point.
        factor: float32, 0-d: what makes the gradient true.
        offset: int64, 0-d: index of the first element of `g` in its leaf.
        matrices: `(count, rows, columns)` of the leaf. `g` may be longer than what the leaf has left, by zeros.

    Returns:
        float64 of shape (count · rows,) and of shape (count · columns,): a piece's share of sums over the whole leaf.

    Example:
        >>> matrix_squares(torch.arange(1.0, 5.0), torch.ones(()), torch.tensor(1), (1, 2, 3))
        (tensor([ 5., 25.], dtype=torch.float64), tensor([ 9., 17.,  4.], dtype=torch.float64))
    """
    if transformed(g, factor):
        return matrix_squares_reference(g, factor, offset, *matrices)
    sums: tuple[Tensor, Tensor] = torch.ops.fzero.matrix_squares(g, factor, offset, *matrices)
    return sums


def factored_direction(
    g: Tensor, factor: Tensor, offset: Tensor, row: Tensor, column: Tensor, matrices: Matrices, floor: float
) -> tuple[Tensor, Tensor]:
    """Return `g * factor / sqrt(max(row · column, floor))` and its sum of squares.

    Args:
        g: as for `matrix_squares`; so are `factor`, `offset` and `matrices`.
        row: float32 of shape (count · rows,): one factor of the second moment.
        column: float32 of shape (count · columns,): the other.
        floor: the least second moment.

    Returns:
        The direction, float32 in the shape of `g`, NaN where the gradient is not finite or its square is not; and the
        sum of squares of the others, float64 of shape ().

    Source: Shazeer and Stern 2018, arXiv 1804.04235.

    Example:
        >>> row, column, one = torch.tensor([4.0]), torch.tensor([1.0, 4.0]), torch.ones(())
        >>> factored_direction(torch.tensor([2.0, 2.0]), one, torch.tensor(0), row, column, (1, 1, 2), 1e-6)
        (tensor([1.0000, 0.5000]), tensor(1.2500, dtype=torch.float64))
    """
    if transformed(g, factor, row, column):
        return factored_direction_reference(g, factor, offset, row, column, *matrices, floor)
    found: tuple[Tensor, Tensor] = torch.ops.fzero.factored_direction(g, factor, offset, row, column, *matrices, floor)
    return found


def finite_gradient(g: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return `g * factor` in float32, zero where it is not finite or its square is not, and where that is not so."""
    gradient = g.to(torch.float32) * factor
    ok = torch.isfinite(gradient * gradient)
    return torch.where(ok, gradient, 0.0), ok


def sum_of_squares(x: Stored) -> Tensor:
    """Return the sum of squares of a stored value, summed in float64: float64 of shape ().

    Example:
        >>> sum_of_squares((torch.tensor([3.0, 4.0]),))
        tensor(25., dtype=torch.float64)
    """
    if transformed(*x):
        return load(x).to(torch.float64).square().sum()
    total: Tensor = torch.ops.fzero.sum_of_squares(list(x))
    return total


def matrix_squares_reference(
    g: Tensor, factor: Tensor, offset: Tensor, count: int, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """`matrix_squares` in plain torch operations that know neither the values nor where the piece begins."""
    # The piece is moved into a buffer of whole rows; of several matrices, into one of whole matrices.
    height = 1 if count == 1 else rows
    unit = height * columns
    units = math.ceil(g.shape[0] / unit) + 1
    first = offset // unit
    squares = finite_gradient(g, factor)[0].to(torch.float64).square()
    whole = taken(squares, torch.arange(units * unit, device=g.device) - offset % unit).view(units, height, columns)
    row_of = torch.arange(count * rows, device=g.device) - first * height
    row_sums = taken(whole.sum(2).reshape(-1), row_of)
    if count == 1:
        return row_sums, whole.sum((0, 1))
    matrix_of = torch.arange(count, device=g.device) - first
    return row_sums, taken(whole.sum(1), matrix_of).reshape(-1)


def factored_direction_reference(
    g: Tensor, factor: Tensor, offset: Tensor, row: Tensor, column: Tensor, count: int, rows: int, columns: int,
    floor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`factored_direction` in plain torch operations."""
    place = torch.arange(g.shape[0], device=g.device) + offset
    line = (place // columns).clamp(max=count * rows - 1)  # what pads the leaf has no row of its own
    moment = row[line] * column[line // rows * columns + place % columns]
    return _divided(g, factor, moment, floor)


def _divided(g: Tensor, factor: Tensor, moment: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    gradient, ok = finite_gradient(g, factor)
    # The root of a float64 rounded to float32 is correct; torch's own of a float32 may be one bit off.
    direction = gradient / torch.sqrt(moment.clamp(min=floor).to(torch.float64)).to(torch.float32)
    return torch.where(ok, direction, torch.nan), direction.to(torch.float64).square().sum()


def _spans(length: int, offset: int, unit: int, most: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut a piece at multiples of `unit`; yield for each part its first unit, how many, the zeros before, its ends."""
    first, last = offset // unit, math.ceil((offset + length) / unit)
    for here in range(first, last, most):
        units = min(most, last - here)
        start, stop = max(here * unit - offset, 0), min((here + units) * unit - offset, length)
        yield here, units, start + offset - here * unit, start, stop


def _aligned(part: Tensor, before: int, total: int) -> Tensor:
    return torch.nn.functional.pad(part, (before, total - before - part.shape[0]))


def _matrix_squares_cpu(
    g: Tensor, factor: Tensor, offset: Tensor, count: int, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    row_sums = g.new_zeros(count, rows, dtype=torch.float64)
    column_sums = g.new_zeros(count, columns, dtype=torch.float64)
    start_of_piece, size = int(offset), rows * columns
    length = min(g.shape[0], count * size - start_of_piece)
    # Small matrices go several at a time, a large one goes some rows at a time.
    if 0 < size <= CHUNK:
        for first, matrices, before, start, stop in _spans(length, start_of_piece, size, CHUNK // size):
            squares = _aligned(_squares(g[start:stop], factor), before, matrices * size).view(matrices, rows, columns)
            row_sums[first : first + matrices] += squares.sum(2)
            column_sums[first : first + matrices] += squares.sum(1)
    elif size:
        for matrix, _, _, start, stop in _spans(length, start_of_piece, size, 1):
            here = start_of_piece + start - matrix * size
            for first, lines, before, low, high in _spans(stop - start, here, columns, max(1, CHUNK // columns)):
                part = _squares(g[start + low : start + high], factor)
                squares = _aligned(part, before, lines * columns).view(lines, columns)
                row_sums[matrix, first : first + lines] += squares.sum(1)
                column_sums[matrix] += squares.sum(0)
    return row_sums.view(-1), column_sums.view(-1)


def _squares(g: Tensor, factor: Tensor) -> Tensor:
    return finite_gradient(g, factor)[0].to(torch.float64).square()


def _factored_direction_cpu(
    g: Tensor, factor: Tensor, offset: Tensor, row: Tensor, column: Tensor, count: int, rows: int, columns: int,
    floor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    directions, total = torch.zeros_like(g, dtype=torch.float32), torch.zeros((), dtype=torch.float64)
    start_of_piece = int(offset)
    length = min(g.shape[0], count * rows * columns - start_of_piece)
    most = max(1, CHUNK // max(columns, 1))
    for first, lines, before, start, stop in _spans(length, start_of_piece, columns, most) if columns else ():
        matrix = torch.arange(first, first + lines) // rows
        moments = (row[first : first + lines, None] * column.view(count, columns)[matrix]).view(-1)
        part = moments[before : before + stop - start]
        directions[start:stop], square = _divided(g[start:stop], factor, part, floor)
        total += square
    return directions, total


def _sum_of_squares(x: Sequence[Tensor]) -> Tensor:
    # In chunks, which no converted copy of the whole stands beside. On CUDA each costs a few launches.
    parts = zip(*(part.split(CHUNK << 4 if part.is_cuda else CHUNK) for part in x), strict=True)
    return torch.stack([load(part).to(torch.float64).square().sum() for part in parts]).sum()


MATRICES = "int count, int rows, int columns"
torch.library.define(
    "fzero::matrix_squares",
    f"(Tensor g, Tensor factor, Tensor offset, {MATRICES}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fzero::factored_direction",
    f"(Tensor g, Tensor factor, Tensor offset, Tensor row, Tensor column, {MATRICES}, float floor) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define("fzero::sum_of_squares", "(Tensor[] x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("fzero::sum_of_squares", ("cpu", "cuda"), _sum_of_squares)
torch.library.impl("fzero::matrix_squares", "cpu", _matrix_squares_cpu)
torch.library.impl("fzero::matrix_squares", "cuda", launch_matrix_squares)
torch.library.impl("fzero::factored_direction", "cpu", _factored_direction_cpu)
torch.library.impl("fzero::factored_direction", "cuda", launch_factored_direction)


@torch.library.register_fake("fzero::matrix_squares")
def _(g: Tensor, factor: Tensor, offset: Tensor, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return g.new_empty(count * rows, dtype=torch.float64), g.new_empty(count * columns, dtype=torch.float64)


@torch.library.register_fake("fzero::factored_direction")
def _(g: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(g, dtype=torch.float32), g.new_empty((), dtype=torch.float64)


@torch.library.register_fake("fzero::sum_of_squares")
def _(x: Sequence[Tensor]) -> Tensor:
    return x[0].new_empty((), dtype=torch.float64)
