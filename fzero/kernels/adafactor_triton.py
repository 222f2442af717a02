"""The Triton kernels of `fzero.kernels.adafactor`: one launch each, and sums of what their programs give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, tl

# The most rows and columns that one Triton program sums, and the elements that it divides.
TILE_ROWS, TILE_COLUMNS, BLOCK = 32, 128, 1024


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Return the elements of `x` at `index`, zero where that lies outside."""
    inside = (index >= 0) & (index < x.shape[0])
    shape = (-1,) + (1,) * (x.ndim - 1)
    return torch.where(inside.view(shape), x[index.clamp(0, x.shape[0] - 1)], 0.0)


@jit
def finite_gradient_of(g, factor):
    """`finite_gradient`: the gradient, and whether it is finite and its square too."""
    gradient = g.to(tl.float32) * factor
    ok = ((gradient * gradient).to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    return tl.where(ok, gradient, 0.0), ok


@jit
def matrix_squares_kernel(
    row_out, column_out, g_in, factor_in, offset_in, length, rows, columns, tiles_down,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one tile over its rows and over its columns. Tiles do not reach over two matrices."""
    tile, across = tl.program_id(0), tl.program_id(1)
    offset = tl.load(offset_in)
    first_row = offset // columns
    number = first_row // rows * tiles_down + first_row % rows // TILE_ROWS + tile
    row = number % tiles_down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    line = number // tiles_down * rows + row
    place = line[:, None] * columns + column[None, :] - offset
    inside = (row < rows)[:, None] & (column < columns)[None, :] & (place >= 0) & (place < length)
    gradient, _ = finite_gradient_of(tl.load(g_in + place, inside, 0.0), tl.load(factor_in))
    wide = gradient.to(tl.float64)
    squares = wide * wide
    row_place = (across * tl.num_programs(0) + tile) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    tl.store(row_out + row_place, tl.sum(squares, 1))
    tl.store(column_out + tile.to(tl.int64) * columns + column, tl.sum(squares, 0), column < columns)


@jit
def factored_direction_kernel(
    out, sum_out, g_in, factor_in, offset_in, row_in, column_in, length, rows, columns, lines, floor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`factored_direction_reference` for BLOCK elements a program; each leaves its own sum of squares."""
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    # Divisions of 64 bits are slow: one or two a program, and inside of a block those of 32 bits are enough.
    position = tl.load(offset_in) + program.to(tl.int64) * BLOCK
    first = position // columns
    along = (position % columns).to(tl.int32) + tl.arange(0, BLOCK)
    down = (first % rows).to(tl.int32) + along // columns
    matrix = first // rows + down // rows
    line = first // rows * rows + down
    # What pads the leaf has no row.
    has_row = inside & (line < lines)
    row = tl.load(row_in + line, has_row, 1.0)
    column = tl.load(column_in + matrix * columns + along % columns, has_row, 1.0)
    moment = row * column
    moment = tl.where(moment < floor, floor, moment)
    gradient, ok = finite_gradient_of(tl.load(g_in + place, inside, 0.0), tl.load(factor_in))
    direction = tl.div_rn(gradient, tl.sqrt_rn(moment))
    tl.store(out + place, tl.where(ok, direction, float("nan")), inside)
    wide = direction.to(tl.float64)
    tl.store(sum_out + program, tl.sum(wide * wide, 0))


def launch_matrix_squares(
    g: Tensor, factor: Tensor, offset: Tensor, count: int, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """`matrix_squares` by one launch of the Triton kernel, and sums over its tiles."""
    if g.shape[0] == 0 or count * rows * columns == 0:
        return g.new_zeros(count * rows, dtype=torch.float64), g.new_zeros(count * columns, dtype=torch.float64)
    high = min(TILE_ROWS, _power_of_two(rows))
    wide = min(TILE_COLUMNS, _power_of_two(columns))
    tiles_down, tiles_across = math.ceil(rows / high), math.ceil(columns / wide)
    lines = math.ceil(g.shape[0] / columns) + 1
    # Each matrix that begins in the piece begins a tile of its own.
    tiles = math.ceil(lines / high) + math.ceil(lines / rows) + 1
    row_sums = g.new_empty(tiles_across, tiles * high, dtype=torch.float64)
    column_sums = g.new_empty(tiles, columns, dtype=torch.float64)
    length = min(g.shape[0], count * rows * columns)
    with torch.cuda.device_of(g):
        matrix_squares_kernel[(tiles, tiles_across)](
            row_sums, column_sums, g, factor, offset, length, rows, columns, tiles_down,
            TILE_ROWS=high, TILE_COLUMNS=wide,
        )  # fmt: skip
    first_row = offset // columns
    first = first_row // rows * tiles_down + first_row % rows // high
    line = torch.arange(count * rows, device=g.device)
    tile_of_line = line // rows * tiles_down + line % rows // high - first
    row_total = taken(row_sums.sum(0), tile_of_line * high + line % rows % high)
    if count == 1:
        return row_total, column_sums.sum(0)
    tile = torch.arange(count * tiles_down, device=g.device) - first
    return row_total, taken(column_sums, tile).view(count, tiles_down, columns).sum(1).view(-1)


def launch_factored_direction(
    g: Tensor, factor: Tensor, offset: Tensor, row: Tensor, column: Tensor, count: int, rows: int, columns: int,
    floor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`factored_direction` by one launch of the Triton kernel, and a sum over its programs."""
    length = g.shape[0]
    direction, programs = torch.empty_like(g, dtype=torch.float32), math.ceil(length / BLOCK)
    sums = g.new_empty(programs, dtype=torch.float64)
    if length:
        tensors = (direction, sums, g, factor, offset, row, column)
        with torch.cuda.device_of(g):
            factored_direction_kernel[(programs,)](
                *tensors, length, rows, columns, count * rows, floor, BLOCK=BLOCK, enable_fp_fusion=False
            )
    return direction, sums.sum()


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
