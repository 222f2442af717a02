"""The sum of squares of one 1-D piece and whether it is finite: what a norm over all leaves is made of.

Two ops, opaque to a trace: `fzero::squares` measures a piece, which it reads once and holds no converted copy of, and
`fzero::add_squares` adds up what it gave for all pieces.

On a CPU the first walks over the piece in chunks that stay in the cache; only a chunk with an element that is not
finite is read again. On CUDA a Triton program sums a block of fixed size in float64, and the blocks of all leaves are
added at once. Nothing is atomic, and no order depends on how many programs run at a time: the same piece always gives
the same bits. The reference, which transforms see, takes norms in float32: its last bits differ, and it overflows where
a square is larger than any float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fzero.kernels.in_place import transformed
from fzero.kernels.nvidia import jit, tl

# Elements whose squares are added in float32; further up the sum is one of float64. One thread adds them, so the bits
# of the sum do not depend on the number of threads.
ROW = 1 << 12
# Elements converted at a time.
CHUNK = 1 << 20
# Elements that one Triton program sums, and how many of them at a time.
BLOCK = 1 << 12
LANES = 1 << 10


def squares(piece: Tensor, ranks: int = 1) -> Tensor:
    """Return sums of squares of the finite elements, and for each how many others there are: float64 of shape (n, 2).

    Args:
        piece: 1-D, floating point.
        ranks: how many pieces this one stands for. They are summed one by one, so that a leaf gives the same bits whole
            and cut.

    Returns:
        One row on a CPU, one for each block on CUDA; `add_squares` adds up those of several pieces. Under `torch.func`
        transforms differentiable; there its last bits may differ.

    Example:
        >>> squares(torch.tensor([3.0, torch.nan, 4.0]))
        tensor([[25.,  1.]], dtype=torch.float64)
    """
    if transformed(piece):
        return squares_reference(piece, ranks)
    summed: Tensor = torch.ops.fzero.squares(piece, ranks)
    return summed


def squares_reference(piece: Tensor, ranks: int) -> Tensor:
    """`squares` in plain torch operations, whatever the values are."""
    length = piece.shape[0]
    if length == 0:
        return torch.zeros(1, 2, dtype=torch.float64, device=piece.device)
    rows = math.ceil(length / ranks)
    finite = torch.nan_to_num(piece, nan=0.0, posinf=0.0, neginf=0.0)
    cut = torch.nn.functional.pad(finite, (0, ranks * rows - length)).view(ranks, rows) if ranks > 1 else finite[None]
    total = torch.linalg.vector_norm(cut, dim=-1, dtype=torch.float32).to(torch.float64).square().sum()
    # The extremes are NaN where an element is; one pass, without the mask that isfinite makes.
    low, high = torch.aminmax(piece.detach())
    bad = ~(torch.isfinite(low) & torch.isfinite(high))
    return torch.stack([total, bad.to(torch.float64)])[None]


def _squares_cpu(piece: Tensor, ranks: int) -> Tensor:
    total, bad = 0.0, False
    # One buffer for all chunks: fresh memory costs more than what is done with it.
    converted = None if piece.dtype == torch.float32 else torch.empty(min(CHUNK, piece.shape[0]))
    for row in piece.split(max(1, math.ceil(piece.shape[0] / ranks))):
        of_row = 0.0
        for chunk in row.split(CHUNK):
            values = chunk if converted is None else converted[: chunk.shape[0]].copy_(chunk)
            square = _sum_of_squares(values)
            if not math.isfinite(square):  # or a square is larger than any float32, as it is again below
                bad = bad or not values.isfinite().all()
                square = _sum_of_squares(torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0))
            of_row += square
        total += of_row
    return torch.tensor([[total, bad]], dtype=torch.float64)


def _sum_of_squares(values: Tensor) -> float:
    whole = values.shape[0] // ROW * ROW
    norms = [torch.linalg.vector_norm(values[whole:]).item()]
    if whole:
        norms += torch.linalg.vector_norm(values[:whole].view(-1, ROW), dim=-1).tolist()
    return sum(norm * norm for norm in norms)


@jit
def block_kernel(piece, partial, length, rows, blocks, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Sum the squares of one block of one row, in float64: its finite elements, and 1 if there are others."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    start = row * rows + block * BLOCK
    count = tl.minimum(tl.minimum(row * rows + rows, length) - start, BLOCK).to(tl.int32)
    total = sum_of_block(piece + start, count, False, LANES)
    # No square of a float32 is too large for float64, so another element shows. Few blocks have one.
    is_bad = (total < float("inf")) == 0
    if is_bad:
        total = sum_of_block(piece + start, count, True, LANES)
    tl.store(partial + 2 * program, total)
    tl.store(partial + 2 * program + 1, is_bad.to(tl.float64))


@jit
def sum_of_block(block, count, ONLY_FINITE: tl.constexpr, LANES: tl.constexpr):
    """The sum of squares of `count` elements, of those that are finite or of all."""
    sums = tl.zeros((LANES,), tl.float64)
    for first in range(0, count, 4 * LANES):
        for k in tl.static_range(4):  # so many loads are on their way at a time
            place = first + k * LANES + tl.arange(0, LANES)
            x = tl.load(block + place, place < count, other=0.0).to(tl.float64)
            if ONLY_FINITE:
                x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
            sums += x * x
    return tl.sum(sums, 0)


def launch(piece: Tensor, ranks: int) -> Tensor:
    """`squares` by one launch of a Triton kernel."""
    rows, blocks = _cut(piece.shape[0], ranks)
    piece = piece.contiguous()
    partial = torch.empty(blocks * math.ceil(piece.shape[0] / rows), 2, dtype=torch.float64, device=piece.device)
    if partial.numel():
        with torch.cuda.device_of(piece):
            block_kernel[(len(partial),)](piece, partial, piece.shape[0], rows, blocks, BLOCK=BLOCK, LANES=LANES)
    return partial


def _cut(length: int, ranks: int) -> tuple[int, int]:
    """Return the elements of each of the pieces that one stands for, at least one, and the blocks of each."""
    rows = max(1, math.ceil(length / ranks))
    return rows, math.ceil(rows / BLOCK)


torch.library.define("fzero::squares", "(Tensor piece, int ranks) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("fzero::squares", "cpu", _squares_cpu)
torch.library.impl("fzero::squares", "cuda", launch)


@torch.library.register_fake("fzero::squares")
def _(piece: Tensor, ranks: int) -> Tensor:
    rows, blocks = _cut(piece.shape[0], ranks)
    count = blocks * math.ceil(piece.shape[0] / rows) if piece.device.type == "cuda" else 1
    return piece.new_empty(count, 2, dtype=torch.float64)


def add_squares(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of what `squares` gave for several pieces: float64 of shape (2,).

    One op, opaque to a trace: Inductor would copy each part into its rows of a whole by a kernel of its own.

    Args:
        parts: each of shape (n, 2), whatever its n is; at least one.
    """
    if transformed(*parts):
        return torch.cat(list(parts)).sum(0)
    summed: Tensor = torch.ops.fzero.add_squares(list(parts))
    return summed


torch.library.define("fzero::add_squares", "(Tensor[] parts) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("fzero::add_squares", ("cpu", "cuda"), lambda parts: torch.cat(parts).sum(0))
torch.library.register_fake("fzero::add_squares", lambda parts: parts[0].new_empty(2))
